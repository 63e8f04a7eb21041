// Convolutions by their definition: those that are no 3x3 convolution of stride 1, such as strided and 1x1 ones, and
// their gradients for the input.
//
// What lies under the taps of a few pixels is copied together, so that inner products find it at constant distances,
// and is multiplied with all filters. Compiled once per instruction set, with CEAT_ISA naming it. SIMD lanes hold
// filters.
#include <algorithm>

#include "convolutions.h"
#include "epilogue.h"
#include "scratch.h"

namespace ceat {
inline namespace CEAT_ISA {

using ceat_cpu::DirectProblem;
using ceat_cpu::kChannelBlock;
using ceat_cpu::kMaxTaps;
using ceat_cpu::kPixelBlock;
using ceat_cpu::PixelGrid;

// Where the inputs and the outputs of a pixel lie.
template <class E>
struct Pixel {
  const E* middle;   // the channels under a tap of offset 0
  int64_t to;        // in the output
  uint32_t outside;  // a bit for each tap that lies in the padding
};

// The pixels of a grid among those `count` of the first grid that begin at number `first` of a member.
template <class E>
int64_t find_pixels(const DirectProblem& p, const PixelGrid& grid, int64_t member, int64_t first, int64_t count,
                    Pixel<E>* pixels) {
  const int64_t* size = p.grid[0].count;
  int64_t sample = member * p.samples + first / (size[0] * size[1]);
  int64_t i = first % (size[0] * size[1]) / size[1], j = first % size[1], found = 0;
  for (int64_t left = count; left > 0; j = 0) {
    const int64_t in_row = std::min(left, size[1] - j), y = grid.in_step * i;
    const E* row = static_cast<const E*>(p.x) + (sample * p.in_height + y) * p.in_width * p.channels;
    const int64_t out_row = (sample * p.out_height + grid.first[0] + grid.step * i) * p.out_width + grid.first[1];
    for (int64_t end = i < grid.count[0] ? std::min(j + in_row, grid.count[1]) : 0; j < end; ++j) {
      const int64_t x = grid.in_step * j;
      Pixel<E>& pixel = pixels[found++];
      pixel = {row + x * p.channels, (out_row + grid.step * j) * p.filters, 0};
      if (y > 0 && y + 1 < p.in_height && x > 0 && x + 1 < p.in_width) continue;
      for (int t = 0; t < grid.taps; ++t) {
        const int64_t v = y + grid.offset[t][0], u = x + grid.offset[t][1];
        pixel.outside |= uint32_t(v < 0 || v >= p.in_height || u < 0 || u >= p.in_width) << t;
      }
    }
    left -= in_row;
    if (++i < size[0]) continue;
    i = 0;
    ++sample;
  }
  return found;
}

// Rows of inputs under all taps. Taps beside each other, in the image and in the weights, make a run, whose channels
// lie together: (blocks of sixteen channels of all runs, kRows, 16), where the last block of a run may be filled in
// part.
template <class E>
class Rows {
 public:
  Rows(const DirectProblem& p, const PixelGrid& grid, E* memory) : p_(p), grid_(grid), memory_(memory) {
    for (int t = 0; t < grid.taps; ++t) {
      const bool goes_on = t > 0 && grid.tap[t] == grid.tap[t - 1] + 1 && grid.offset[t][0] == grid.offset[t - 1][0] &&
                           grid.offset[t][1] == grid.offset[t - 1][1] + 1;
      if (!goes_on) first_[runs_++] = t;
      first_[runs_] = t + 1;
    }
  }
  static size_t most(const DirectProblem& p) {
    return p.taps * ((p.channels + kChannelBlock - 1) / kChannelBlock) * kRows * kChannelBlock;
  }

  void gather(const Pixel<E>* pixels) {
    E* to = memory_;
    for (int run = 0; run < runs_; ++run) {
      const int first = first_[run];
      const uint32_t all = (1u << first_[run + 1]) - (1u << first);
      const int64_t delta = (grid_.offset[first][0] * p_.in_width + grid_.offset[first][1]) * p_.channels;
      const int64_t whole = length(run) / kChannelBlock * kChannelBlock;
      for (int r = 0; r < kRows; ++r, to += kChannelBlock) {
        if (pixels[r].outside & all) {
          for (int t = first; t < first_[run + 1]; ++t) {
            const int64_t at = (t - first) * p_.channels;
            copy(pixels[r].outside >> t & 1 ? nullptr : pixels[r].middle + delta + at, at, at + p_.channels, to);
          }
          continue;
        }
        const E* from = pixels[r].middle + delta;
        for (int64_t c = 0; c < whole; c += kChannelBlock) {
          std::memcpy(to + c * kRows, from + c, kChannelBlock * sizeof(E));
        }
        if (whole < length(run)) copy_part(from + whole, length(run) - whole, to + whole * kRows);
      }
      to += (blocks(run) - 1) * kRows * kChannelBlock;
    }
  }

  // Products with sixteen filters: out (kRows, 16); weights (taps, words, 16, channels per word).
  void multiply(const E* weights, float* out) const {
    Sums<E> sums;
    const E* from = memory_;
    for (int run = 0; run < runs_; ++run) {
      const E* weight = weights + grid_.tap[first_[run]] * p_.channels * kChannelBlock;
      for (int64_t c = 0; c < length(run); c += kChannelBlock, from += kRows * kChannelBlock) {
        const int64_t count = std::min(kChannelBlock, length(run) - c);
        for (int64_t k = 0; k < count; k += kChannelsPerWord<E>, weight += Sums<E>::kWeights) {
          sums.add([&](auto row) { return from + row * kChannelBlock + k; }, weight);
        }
      }
    }
    sums.write(out);
  }

 private:
  int64_t length(int run) const { return (first_[run + 1] - first_[run]) * p_.channels; }
  int64_t blocks(int run) const { return (length(run) + kChannelBlock - 1) / kChannelBlock; }

  // Channels [begin, end) of a row of a run; zeros if `from`, that of channel `begin`, is null.
  static void copy(const E* from, int64_t begin, int64_t end, E* to) {
    for (int64_t c = begin; c < end;) {
      const int64_t count = std::min(kChannelBlock - c % kChannelBlock, end - c);
      E* place = to + c / kChannelBlock * kRows * kChannelBlock + c % kChannelBlock;
      if (from == nullptr) {
        std::fill(place, place + count, E{});
      } else {
        copy_part(from + c - begin, count, place);
      }
      c += count;
    }
  }

  // A word at least, a block at most: two moves of a fixed size, which may overlap.
  static void copy_part(const E* from, int64_t count, E* to) {
    const auto both_ends = [&](auto size) {
      constexpr int64_t channels = size / sizeof(E);
      std::memcpy(to, from, size);
      std::memcpy(to + count - channels, from + count - channels, size);
    };
    const size_t bytes = count * sizeof(E);
    if (bytes >= 32) return both_ends(std::integral_constant<size_t, 32>());
    if (bytes >= 16) return both_ends(std::integral_constant<size_t, 16>());
    if (bytes >= 8) return both_ends(std::integral_constant<size_t, 8>());
    both_ends(std::integral_constant<size_t, 4>());
  }

  const DirectProblem& p_;
  const PixelGrid& grid_;
  E* memory_;
  int runs_ = 0, first_[kMaxTaps + 1] = {};  // the first tap of each run, and the end of the last
};

// Asks for what the epilogue of a pixel reads and writes. Inlined always: GCC 12 drops calls of functions that do
// nothing else.
template <class E>
inline __attribute__((always_inline)) void prefetch_outputs(const DirectProblem& p, const Pixel<E>& pixel) {
  constexpr int64_t kLine = 64 / sizeof(E);
  for (int64_t f = 0; f < p.filters; f += kLine) {
    __builtin_prefetch(static_cast<E*>(p.out) + pixel.to + f, 1);
    if (p.epilogue.residual) __builtin_prefetch(static_cast<const E*>(p.epilogue.residual) + pixel.to + f);
    if (p.epilogue.gate) __builtin_prefetch(static_cast<const E*>(p.epilogue.gate) + pixel.to + f);
  }
}

// Computes these pixels of a member; `pixels` has space for whole rows.
template <class E>
void convolve_pixels(const DirectProblem& p, int64_t member, Rows<E>& rows, Pixel<E>* pixels, int64_t count) {
  float sums[kRows * kChannelBlock];
  // Rows past the last pixel are multiplied along and never stored.
  for (int64_t i = count; i % kRows != 0; ++i) pixels[i] = pixels[count - 1];
  for (int64_t i = 0; i < count; i += kRows) {
    const int64_t stored = std::min<int64_t>(kRows, count - i);
    for (int64_t r = 0; r < stored; ++r) prefetch_outputs(p, pixels[i + r]);
    rows.gather(pixels + i);
    for (int64_t filter = 0; filter < p.filters; filter += kChannelBlock) {
      rows.multiply(static_cast<const E*>(p.weights) + (member * p.filters + filter) * p.taps * p.channels, sums);
      for (int lane = 0; lane < kChannelBlock; lane += kLanes<float>) {
        const VecF offset = offset_of<E>(p.epilogue, member * p.filters + filter + lane);
        for (int64_t r = 0; r < stored; ++r) {
          const VecF sum = load<VecF>(sums + r * kChannelBlock + lane);
          finish(p.epilogue, sum, offset, pixels[i + r].to + filter + lane, static_cast<E*>(p.out));
        }
      }
    }
  }
}

template <class E>
void convolve_pixels(const DirectProblem& p, int64_t begin, int64_t end) {
  ceat_cpu::Scratch scratch(Rows<E>::most(p) * sizeof(E));
  E* memory = scratch.take<E>(Rows<E>::most(p));
  Pixel<E> pixels[kPixelBlock];

  for (int64_t block = begin; block < end; ++block) {
    const int64_t member = block / p.blocks(), first = block % p.blocks() * kPixelBlock;
    const int64_t count = std::min(kPixelBlock, p.pixels() - first);
    // Grids one after the other within a block, since neighbours of different grids share lines of memory.
    for (int g = 0; g < p.grids; ++g) {
      Rows<E> rows(p, p.grid[g], memory);
      convolve_pixels(p, member, rows, pixels, find_pixels(p, p.grid[g], member, first, count, pixels));
    }
  }
}

void convolve_pixels(const DirectProblem& p, int64_t begin, int64_t end) {
  p.dtype == ceat_cpu::DType::kBFloat16 ? convolve_pixels<BFloat16>(p, begin, end)
                                        : convolve_pixels<float>(p, begin, end);
}

}  // namespace CEAT_ISA
}  // namespace ceat
