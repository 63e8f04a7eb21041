// Convolutions by their definition: those that are no 3x3 convolution of stride 1, such as strided and 1x1 ones, and
// their gradients for the input.
//
// Twelve vectors of sums stay in registers while the taps and channels of a few pixels go by, read where they lie.
// Compiled once per instruction set, with CEAT_ISA naming it. SIMD lanes hold filters.
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
  const E* from[kMaxTaps];  // the channels under each tap
  int64_t to;               // in the output
};

// Walks over the pixels of a member's grid. `zeros` are the channels of what lies outside.
template <class E>
class Walk {
 public:
  Walk(const DirectProblem& p, int64_t member, int64_t index, const E* zeros) : p_(p), zeros_(zeros) {
    const PixelGrid& grid = p.grid;
    const int64_t in_sample = grid.count[0] * grid.count[1];
    sample_ = member * p.samples + index / in_sample;
    i_ = index % in_sample / grid.count[1];
    j_ = index % grid.count[1];
    for (int t = 0; t < grid.taps; ++t) {
      delta_[t] = (grid.offset[t][0] * p.in_width + grid.offset[t][1]) * p.channels;
      for (int axis = 0; axis < 2; ++axis) {
        least_[axis] = std::min<int64_t>(least_[axis], grid.offset[t][axis]);
        most_[axis] = std::max<int64_t>(most_[axis], grid.offset[t][axis]);
      }
    }
  }

  Pixel<E> next() {
    const PixelGrid& grid = p_.grid;
    const int64_t y = grid.in_step * i_, x = grid.in_step * j_;
    const E* middle = static_cast<const E*>(p_.x) + ((sample_ * p_.in_height + y) * p_.in_width + x) * p_.channels;
    Pixel<E> pixel;
    if (y + least_[0] >= 0 && y + most_[0] < p_.in_height && x + least_[1] >= 0 && x + most_[1] < p_.in_width) {
      for (int t = 0; t < grid.taps; ++t) pixel.from[t] = middle + delta_[t];
    } else {
      for (int t = 0; t < grid.taps; ++t) {
        const int64_t v = y + grid.offset[t][0], u = x + grid.offset[t][1];
        const bool inside = v >= 0 && v < p_.in_height && u >= 0 && u < p_.in_width;
        pixel.from[t] = inside ? middle + delta_[t] : zeros_;
      }
    }
    const int64_t out_y = grid.first[0] + grid.step * i_, out_x = grid.first[1] + grid.step * j_;
    pixel.to = ((sample_ * p_.out_height + out_y) * p_.out_width + out_x) * p_.filters;
    advance();
    return pixel;
  }

 private:
  void advance() {
    if (++j_ < p_.grid.count[1]) return;
    j_ = 0;
    if (++i_ < p_.grid.count[0]) return;
    i_ = 0;
    ++sample_;
  }

  const DirectProblem& p_;
  const E* zeros_;
  int64_t sample_, i_, j_;
  int64_t delta_[kMaxTaps], least_[2] = {0, 0}, most_[2] = {0, 0};
};

// Sixteen filters at kRows pixels, of which the first `count` are stored; weights: (taps, words, 16, ...).
template <class E>
inline void convolve_rows(const DirectProblem& p, const Pixel<E>* pixels, int count, const E* weights, int64_t filter,
                          const VecF (&offset)[kVectors]) {
  Sums<E> sums;
  for (int t = 0; t < p.grid.taps; ++t) {
    const E* from[kRows];
    for (int r = 0; r < kRows; ++r) from[r] = pixels[r].from[t];
    const E* tap = weights + p.grid.tap[t] * p.channels * kChannelBlock;
    for (int64_t c = 0; c < p.channels; c += kChannelsPerWord<E>) {
      sums.add([&](auto row) { return from[row] + c; }, tap + c * kChannelBlock);
    }
  }
  unrolled<kRows>([&](auto r) {
    if (r >= count) return;
    unrolled<kVectors>([&](auto v) {
      const int64_t place = pixels[r].to + filter + v * kLanes<float>;
      finish(p.epilogue, sums.at[r * kVectors + v], offset[v], place, static_cast<E*>(p.out));
    });
  });
}

template <class E>
void convolve_pixels(const DirectProblem& p, int64_t begin, int64_t end) {
  ceat_cpu::Scratch scratch(p.channels * sizeof(E));
  E* zeros = scratch.take<E>(p.channels);
  std::fill(zeros, zeros + p.channels, E{});
  Pixel<E> pixels[kPixelBlock];

  for (int64_t block = begin; block < end; ++block) {
    const int64_t member = block / p.blocks(), first = block % p.blocks() * kPixelBlock;
    const int64_t count = std::min(kPixelBlock, p.pixels() - first);
    Walk<E> walk(p, member, first, zeros);
    for (int64_t i = 0; i < count; ++i) pixels[i] = walk.next();
    // Rows past the last pixel are multiplied along and never stored.
    for (int64_t i = count; i % kRows != 0; ++i) pixels[i] = pixels[count - 1];
    for (int64_t filter = 0; filter < p.filters; filter += kChannelBlock) {
      const E* weights = static_cast<const E*>(p.weights) + (member * p.filters + filter) * p.taps * p.channels;
      VecF offset[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        offset[v] = offset_of<E>(p.epilogue, member * p.filters + filter + v * kLanes<float>);
      }
      for (int64_t i = 0; i < count; i += kRows) {
        convolve_rows(p, pixels + i, static_cast<int>(std::min<int64_t>(kRows, count - i)), weights, filter, offset);
      }
    }
  }
}

void convolve_pixels(const DirectProblem& p, int64_t begin, int64_t end) {
  p.dtype == ceat_cpu::DType::kBFloat16 ? convolve_pixels<BFloat16>(p, begin, end)
                                        : convolve_pixels<float>(p, begin, end);
}

}  // namespace CEAT_ISA
}  // namespace ceat
