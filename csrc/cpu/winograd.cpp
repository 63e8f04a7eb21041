// 3x3 convolutions with stride 1 and padding 1 by Winograd's F(4x4, 3x3) (Lavin and Gray, arXiv 1509.09308).
//
// A tile of 4x4 outputs depends on 6x6 inputs d. For every filter g and channel,
//
//     out = A^T [ (G g G^T) * (B^T d B) ] A        * elementwise
//
// and the sum over channels moves inside the brackets, where it makes 36 matrix products (tiles x channels) by
// (channels x filters): 36 multiplications for 16 outputs and a pair of channels, where the definition has 144.
// The interpolation points are 0, a, -a, b, -b and infinity with a = 5/8 and b = 3/2. 1 and 2 would save nothing, and
// their rounding errors are larger: the powers of a and b lie closer together. Transforms compute in fp32; for bf16,
// their results are rounded before they are multiplied.
//
// Compiled once per instruction set, with CEAT_ISA naming it. SIMD lanes hold channels or filters.
#include "convolutions.h"

#include <algorithm>

#include "epilogue.h"
#include "scratch.h"

namespace ceat {
inline namespace CEAT_ISA {

using ceat_cpu::ConvolutionProblem;
using ceat_cpu::FilterProblem;
using ceat_cpu::kChannelBlock;
using ceat_cpu::kTileBlock;
using ceat_cpu::kTilePoints;

constexpr int kLanesF = kLanes<float>;
constexpr int kIn = 6, kOut = 4, kTaps = 3;
constexpr float kA = 0.625f, kB = 1.5f, kA2 = kA * kA, kB2 = kB * kB;

// out[i] = (B^T d)[i], i = 0..5.
inline __attribute__((always_inline)) void input_transform(const VecF (&d)[kIn], VecF (&out)[kIn]) {
  const VecF even = d[4] - kB2 * d[2], odd = d[3] - kB2 * d[1];
  const VecF even2 = d[4] - kA2 * d[2], odd2 = d[3] - kA2 * d[1];
  out[0] = kA2 * kB2 * d[0] + (d[4] - (kA2 + kB2) * d[2]);
  out[1] = even + kA * odd;
  out[2] = even - kA * odd;
  out[3] = even2 + kB * odd2;
  out[4] = even2 - kB * odd2;
  out[5] = kA2 * kB2 * d[1] + (d[5] - (kA2 + kB2) * d[3]);
}

// out[i] = (A^T m)[i], i = 0..3.
inline __attribute__((always_inline)) void output_transform(const VecF (&m)[kIn], VecF (&out)[kOut]) {
  const VecF sum = m[1] + m[2], difference = m[1] - m[2];
  const VecF sum2 = m[3] + m[4], difference2 = m[3] - m[4];
  out[0] = m[0] + sum + sum2;
  out[1] = kA * difference + kB * difference2;
  out[2] = kA2 * sum + kB2 * sum2;
  out[3] = kA2 * kA * difference + (kB2 * kB * difference2 + m[5]);
}

// out[i] = (G g)[i], i = 0..5.
inline __attribute__((always_inline)) void filter_transform(const VecF (&g)[kTaps], VecF (&out)[kIn]) {
  constexpr float scale = 1 / (2 * kA2 * (kA2 - kB2)), scale2 = 1 / (2 * kB2 * (kB2 - kA2));
  const VecF outer = scale * (g[0] + kA2 * g[2]), middle = scale * kA * g[1];
  const VecF outer2 = scale2 * (g[0] + kB2 * g[2]), middle2 = scale2 * kB * g[1];
  out[0] = g[0] * (1 / (kA2 * kB2));
  out[1] = outer + middle;
  out[2] = outer - middle;
  out[3] = outer2 + middle2;
  out[4] = outer2 - middle2;
  out[5] = g[2];
}

// Blocks [begin, end) of filters.
void transform_filters(const FilterProblem& p, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    for (int64_t c = 0; c < p.channels; ++c) {
      for (int lane = 0; lane < kChannelBlock; lane += kLanesF) {
        VecF half[kTaps][kIn];  // half[x][i] = (G g)[i, x]
        for (int x = 0; x < kTaps; ++x) {
          VecF g[kTaps];
          for (int y = 0; y < kTaps; ++y) {
            float lanes[kLanesF];
            const float* from = p.weight + (block * kChannelBlock + lane) * p.strides[0] + c * p.strides[1] +
                                y * p.strides[2] + x * p.strides[3];
            for (int w = 0; w < kLanesF; ++w) lanes[w] = from[w * p.strides[0]];
            g[y] = load<VecF>(lanes);
          }
          filter_transform(g, half[x]);
        }
        for (int i = 0; i < kIn; ++i) {
          const VecF row[kTaps] = {half[0][i], half[1][i], half[2][i]};
          VecF at[kIn];
          filter_transform(row, at);
          for (int j = 0; j < kIn; ++j) {
            const int64_t point = block * kTilePoints + i * kIn + j;
            store(p.out + (point * p.channels + c) * kChannelBlock + lane, at[j]);
          }
        }
      }
    }
  }
}

// Where a tile lies: the sample among those of all members, and the pixel of its first output.
struct Place {
  int64_t sample = -1, y = 0, x = 0;
};

// The tiles of a block, one after the other in their rows.
struct Block {
  int64_t member, count;
  Place tiles[kTileBlock];

  Block(const ConvolutionProblem& p, int64_t index) : member(index / p.blocks()) {
    const int64_t first = index % p.blocks() * kTileBlock, in_sample = p.tiles_down() * p.tiles_across();
    count = std::min(kTileBlock, p.tiles() - first);
    Place place;
    place.sample = member * p.samples + first / in_sample;
    place.y = first % in_sample / p.tiles_across() * kOut;
    place.x = first % p.tiles_across() * kOut;
    for (int64_t t = 0; t < count; ++t) {
      tiles[t] = place;
      if ((place.x += kOut) < p.width) continue;
      place.x = 0;
      if ((place.y += kOut) < p.height) continue;
      place.y = 0;
      ++place.sample;
    }
  }
};

// Walks over the tiles of a block; the inputs of neighbours in a row share two columns, which are transformed once.
// `zeros` are the channels of a padded pixel.
template <class E>
class Inputs {
 public:
  Inputs(const ConvolutionProblem& p, int64_t channel, const E* zeros) : p_(p), channel_(channel), zeros_(zeros) {}

  // kLanes channels of the tile at all points: out[point * point_stride].
  void gather(const Place& place, int64_t point_stride, E* out) {
    if (place.sample == last_.sample && place.y == last_.y && place.x == last_.x + kOut) {
      unrolled<(kIn - kOut) * kIn>([&](auto k) { column_[k / kIn][k % kIn] = column_[k / kIn + kOut][k % kIn]; });
    } else {
      find_rows(place);
      for (int j = 0; j < kIn - kOut; ++j) transform_column(place.x - 1 + j, column_[j]);
    }
    last_ = place;
    for (int j = kIn - kOut; j < kIn; ++j) transform_column(place.x - 1 + j, column_[j]);
    for (int i = 0; i < kIn; ++i) {
      VecF row[kIn], at[kIn];
      unrolled<kIn>([&](auto j) { row[j] = column_[j][i]; });
      input_transform(row, at);
      unrolled<kIn>([&](auto j) { store_rounded(out + (i * kIn + j) * point_stride, at[j]); });
    }
  }

 private:
  void find_rows(const Place& place) {
    const E* image = static_cast<const E*>(p_.x) + place.sample * p_.height * p_.width * p_.channels;
    for (int i = 0; i < kIn; ++i) {
      const int64_t y = place.y - 1 + i;
      const bool inside = y >= 0 && y < p_.height;
      row_[i] = (inside ? image + y * p_.width * p_.channels : zeros_) + channel_;
      stride_[i] = inside ? p_.channels : 0;
    }
  }

  void transform_column(int64_t x, VecF (&out)[kIn]) const {
    if (x < 0 || x >= p_.width) return unrolled<kIn>([&](auto i) { out[i] = VecF{}; });
    VecF d[kIn], at[kIn];
    unrolled<kIn>([&](auto i) { d[i] = load_wide(row_[i] + x * stride_[i]); });
    input_transform(d, at);
    unrolled<kIn>([&](auto i) { out[i] = at[i]; });
  }

  const ConvolutionProblem& p_;
  int64_t channel_;
  const E* zeros_;
  Place last_;
  const E* row_[kIn];
  int64_t stride_[kIn];
  VecF column_[kIn][kIn];  // column_[j][i] = (B^T d)[i, j]
};

// out (kRows, 16) = in (channels / 16, kTileBlock, 16), at kRows tiles, times filters (channels, 16).
template <class E>
inline void multiply(const E* in, const E* filters, int64_t channels, float* out) {
  constexpr int kWords = kChannelBlock / kChannelsPerWord<E>;
  Sums<E> sums;
  for (int64_t c = 0; c < channels; c += kChannelBlock) {
    for (int w = 0; w < kWords; ++w) {
      const E* word = in + c * kTileBlock + w * kChannelsPerWord<E>;
      sums.add([&](auto row) { return word + row * kChannelBlock; },
               filters + c * kChannelBlock + w * Sums<E>::kWeights);
    }
  }
  sums.write(out);
}

// kLanes filters of the tile, from their products at all points: in[point * point_stride].
template <class E>
inline void scatter_tile(const ConvolutionProblem& p, const Place& place, int64_t filter, VecF offset, const float* in,
                         int64_t point_stride) {
  const int64_t corner = ((place.sample * p.height + place.y) * p.width + place.x) * p.filters + filter;
  const int64_t height = std::min<int64_t>(kOut, p.height - place.y),
                width = std::min<int64_t>(kOut, p.width - place.x);
  VecF half[kIn][kOut];  // half[j][i] = (A^T m)[i, j]
  unrolled<kIn>([&](auto j) {
    VecF m[kIn];
    unrolled<kIn>([&](auto i) { m[i] = load<VecF>(in + (i * kIn + j) * point_stride); });
    output_transform(m, half[j]);
  });
  unrolled<kOut>([&](auto i) {
    if (i >= height) return;
    VecF row[kIn], at[kOut];
    unrolled<kIn>([&](auto j) { row[j] = half[j][i]; });
    output_transform(row, at);
    unrolled<kOut>([&](auto j) {
      if (j < width) finish(p.epilogue, at[j], offset, corner + (i * p.width + j) * p.filters, static_cast<E*>(p.out));
    });
  });
}

// Asks for the memory of a tile's 4x4 pixels. Inlined always: GCC 12 drops calls of functions that do nothing else.
template <int write>
inline __attribute__((always_inline)) void prefetch(const void* images, const Place& place, const ConvolutionProblem& p,
                                                    int64_t pixel_bytes) {
  constexpr int64_t kLine = 64, kSecondLevel = 2;
  if (images == nullptr) return;
  const int64_t rows = std::min<int64_t>(kOut, p.height - place.y),
                columns = std::min<int64_t>(kOut, p.width - place.x);
  const char* row =
      static_cast<const char*>(images) + ((place.sample * p.height + place.y) * p.width + place.x) * pixel_bytes;
  for (int64_t i = 0; i < rows; ++i, row += p.width * pixel_bytes) {
    for (int64_t byte = 0; byte < columns * pixel_bytes; byte += kLine) {
      __builtin_prefetch(row + byte, write, kSecondLevel);
    }
  }
}

// What a block will read and write after its products, and what the next block reads at first. The streams are too
// short for the hardware to foresee them, and the products need no memory meanwhile.
template <class E>
inline __attribute__((always_inline)) void prefetch(const ConvolutionProblem& p, const Block& block, const Block& next,
                                                    int64_t tile) {
  if (tile < block.count) {
    const int64_t bytes = p.filters * sizeof(E);
    prefetch<1>(p.out, block.tiles[tile], p, bytes);
    prefetch<0>(p.epilogue.residual, block.tiles[tile], p, bytes);
    prefetch<0>(p.epilogue.gate, block.tiles[tile], p, bytes);
  }
  if (tile < next.count) prefetch<0>(p.x, next.tiles[tile], p, p.channels * sizeof(E));
}

static_assert(kTileBlock <= kTilePoints, "one tile is asked for beside the products of each point");

template <class E>
void convolve_tiles(const ConvolutionProblem& p, int64_t begin, int64_t end) {
  if (begin == end) return;
  const int64_t in_stride = kTileBlock * p.channels, out_stride = kTileBlock * kChannelBlock;
  const auto bytes = [](int64_t count, size_t size) { return ceat_cpu::Scratch::round_up(count * size); };
  ceat_cpu::Scratch scratch(bytes(kTilePoints * in_stride, sizeof(E)) + bytes(kTilePoints * out_stride, sizeof(float)) +
                            bytes(p.channels, sizeof(E)));
  E* inputs = scratch.take<E>(kTilePoints * in_stride);
  float* outputs = scratch.take<float>(kTilePoints * out_stride);
  E* zeros = scratch.take<E>(p.channels);
  std::fill(zeros, zeros + p.channels, E{});
  // Rows past the last tile are multiplied along and never stored.
  std::fill(inputs, inputs + kTilePoints * in_stride, E{});

  Block block(p, begin);
  for (int64_t index = begin; index < end; ++index) {
    const Block next(p, std::min(index + 1, end - 1));
    const E* all_filters =
        static_cast<const E*>(p.filters_at_points) + block.member * kTilePoints * p.filters * p.channels;
    for (int64_t c = 0; c < p.channels; c += kLanesF) {
      Inputs<E> walk(p, c, zeros);
      E* to = inputs + c / kChannelBlock * kTileBlock * kChannelBlock + c % kChannelBlock;
      for (int64_t t = 0; t < block.count; ++t) walk.gather(block.tiles[t], in_stride, to + t * kChannelBlock);
    }
    for (int64_t filter = 0; filter < p.filters; filter += kChannelBlock) {
      for (int64_t point = 0; point < kTilePoints; ++point) {
        if (filter == 0) prefetch<E>(p, block, next, point);
        const E* filters = all_filters + (filter * kTilePoints + point * kChannelBlock) * p.channels;
        for (int64_t t = 0; t < block.count; t += kRows) {
          multiply(inputs + point * in_stride + t * kChannelBlock, filters, p.channels,
                   outputs + point * out_stride + t * kChannelBlock);
        }
      }
      for (int lane = 0; lane < kChannelBlock; lane += kLanesF) {
        const VecF offset = offset_of<E>(p.epilogue, block.member * p.filters + filter + lane);
        for (int64_t t = 0; t < block.count; ++t) {
          scatter_tile<E>(p, block.tiles[t], filter + lane, offset, outputs + t * kChannelBlock + lane, out_stride);
        }
      }
    }
    block = next;
  }
}

void convolve_tiles(const ConvolutionProblem& p, int64_t begin, int64_t end) {
  p.dtype == ceat_cpu::DType::kBFloat16 ? convolve_tiles<BFloat16>(p, begin, end)
                                        : convolve_tiles<float>(p, begin, end);
}

}  // namespace CEAT_ISA
}  // namespace ceat
