// 3x3 convolutions with stride 1 and padding 1 by Winograd's F(4x4, 3x3) (Lavin and Gray, arXiv 1509.09308).
//
// A tile of 4x4 outputs depends on 6x6 inputs d. For every filter g and channel,
//
//     out = A^T [ (G g G^T) * (B^T d B) ] A        * elementwise
//
// and the sum over channels moves inside the brackets, where it makes 36 matrix products (tiles x channels) by
// (channels x filters): 36 multiplications for 16 outputs and a pair of channels, where the definition has 144.
// The interpolation points are 0, 1, -1, 2, -2 and infinity.
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

// out[i] = (B^T d)[i], i = 0..5.
inline __attribute__((always_inline)) void input_transform(const VecF (&d)[kIn], VecF (&out)[kIn]) {
  const VecF even = d[4] - 4.0f * d[2], odd = d[3] - 4.0f * d[1];
  const VecF even2 = d[4] - d[2], odd2 = 2.0f * (d[3] - d[1]);
  out[0] = 4.0f * d[0] - 5.0f * d[2] + d[4];
  out[1] = even + odd;
  out[2] = even - odd;
  out[3] = even2 + odd2;
  out[4] = even2 - odd2;
  out[5] = 4.0f * d[1] - 5.0f * d[3] + d[5];
}

// out[i] = (A^T m)[i], i = 0..3.
inline __attribute__((always_inline)) void output_transform(const VecF (&m)[kIn], VecF (&out)[kOut]) {
  const VecF sum1 = m[1] + m[2], difference1 = m[1] - m[2];
  const VecF sum2 = m[3] + m[4], difference2 = m[3] - m[4];
  out[0] = m[0] + sum1 + sum2;
  out[1] = difference1 + 2.0f * difference2;
  out[2] = sum1 + 4.0f * sum2;
  out[3] = difference1 + 8.0f * difference2 + m[5];
}

// out[i] = (G g)[i], i = 0..5.
inline __attribute__((always_inline)) void filter_transform(const VecF (&g)[kTaps], VecF (&out)[kIn]) {
  const VecF outer = (g[0] + g[2]) * (1.0f / 6), middle = g[1] * (1.0f / 6);
  const VecF outer2 = (g[0] + 4.0f * g[2]) * (1.0f / 24), middle2 = g[1] * (1.0f / 12);
  out[0] = g[0] * 0.25f;
  out[1] = VecF{} - outer - middle;
  out[2] = middle - outer;
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

// Where tile `index` of a member lies: the sample among those of all members, and the pixel of its first output.
struct Place {
  int64_t sample, y, x;

  Place(const ConvolutionProblem& p, int64_t member, int64_t index) {
    const int64_t across = p.tiles_across(), in_sample = p.tiles_down() * across;
    sample = member * p.samples + index / in_sample;
    y = index % in_sample / across * kOut;
    x = index % across * kOut;
  }
};

// The tile's inputs at all points: out[point * point_stride + channel]. `zeros` are the channels of a padded pixel.
inline void gather_tile(const ConvolutionProblem& p, const Place& place, const float* zeros, int64_t point_stride,
                        float* out) {
  const float* image = p.x + place.sample * p.height * p.width * p.channels;
  const auto pixel = [&](int64_t y, int64_t x) { return image + (y * p.width + x) * p.channels; };
  const float* from[kIn][kIn];
  for (int i = 0; i < kIn; ++i) {
    for (int j = 0; j < kIn; ++j) {
      const int64_t y = place.y - 1 + i, x = place.x - 1 + j;
      const bool inside = y >= 0 && y < p.height && x >= 0 && x < p.width;
      from[i][j] = inside ? pixel(y, x) : zeros;
    }
  }
  // The tile to the right comes next; a stream this short is nothing that the hardware foresees.
  for (int64_t y = place.y; y < std::min(place.y + kOut, p.height); ++y) {
    for (int64_t x = place.x + kIn - 1; x < std::min(place.x + kIn - 1 + kOut, p.width); ++x) {
      for (int64_t c = 0; c < p.channels; c += kChannelBlock) __builtin_prefetch(pixel(y, x) + c);
    }
  }
  for (int64_t c = 0; c < p.channels; c += kLanesF) {
    VecF half[kIn][kIn];  // half[j][i] = (B^T d)[i, j]
    for (int j = 0; j < kIn; ++j) {
      VecF d[kIn];
      for (int i = 0; i < kIn; ++i) d[i] = load<VecF>(from[i][j] + c);
      input_transform(d, half[j]);
    }
    for (int i = 0; i < kIn; ++i) {
      const VecF row[kIn] = {half[0][i], half[1][i], half[2][i], half[3][i], half[4][i], half[5][i]};
      VecF at[kIn];
      input_transform(row, at);
      for (int j = 0; j < kIn; ++j) store(out + (i * kIn + j) * point_stride + c, at[j]);
    }
  }
}

// out (kRows, 16) = in (kRows, channels) times filters (channels, 16).
inline __attribute__((always_inline)) void multiply(const float* in, const float* filters, int64_t channels,
                                                    float* out) {
  VecF sum[kRows][kVectors] = {};
  for (int64_t c = 0; c < channels; ++c) {
    VecF filter[kVectors];
    for (int v = 0; v < kVectors; ++v) filter[v] = load<VecF>(filters + c * kChannelBlock + v * kLanesF);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const VecF value = VecF{} + in[r * channels + c];
      for (int v = 0; v < kVectors; ++v) sum[r][v] += value * filter[v];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) store(out + r * kChannelBlock + v * kLanesF, sum[r][v]);
  }
}

// Sixteen filters of the tile, from their products at all points: in[point * point_stride + filter].
inline void scatter_tile(const ConvolutionProblem& p, const Place& place, int64_t filter, const float* bias,
                         const float* in, int64_t point_stride) {
  const int64_t corner = ((place.sample * p.height + place.y) * p.width + place.x) * p.filters + filter;
  const int64_t height = std::min<int64_t>(kOut, p.height - place.y),
                width = std::min<int64_t>(kOut, p.width - place.x);
  for (int lane = 0; lane < kChannelBlock; lane += kLanesF) {
    VecF half[kIn][kOut];  // half[j][i] = (A^T m)[i, j]
    for (int j = 0; j < kIn; ++j) {
      VecF m[kIn];
      for (int i = 0; i < kIn; ++i) m[i] = load<VecF>(in + (i * kIn + j) * point_stride + lane);
      output_transform(m, half[j]);
    }
    const VecF offset = bias != nullptr ? load<VecF>(bias + filter + lane) : VecF{};
    for (int64_t i = 0; i < height; ++i) {
      const VecF row[kIn] = {half[0][i], half[1][i], half[2][i], half[3][i], half[4][i], half[5][i]};
      VecF at[kOut];
      output_transform(row, at);
      for (int64_t j = 0; j < width; ++j) {
        const int64_t place_out = corner + (i * p.width + j) * p.filters + lane;
        store(p.out + place_out, finish(p.epilogue, at[j] + offset, place_out));
      }
    }
  }
}

void convolve_tiles(const ConvolutionProblem& p, int64_t begin, int64_t end) {
  const int64_t in_stride = kTileBlock * p.channels, out_stride = kTileBlock * kChannelBlock;
  const auto floats = [](int64_t count) { return ceat_cpu::Scratch::round_up(count * sizeof(float)); };
  ceat_cpu::Scratch scratch(floats(kTilePoints * in_stride) + floats(kTilePoints * out_stride) + floats(p.channels));
  float* inputs = scratch.take<float>(kTilePoints * in_stride);
  float* outputs = scratch.take<float>(kTilePoints * out_stride);
  float* zeros = scratch.take<float>(p.channels);
  std::fill(zeros, zeros + p.channels, 0.0f);
  // Rows past the last tile are multiplied along and never stored.
  std::fill(inputs, inputs + kTilePoints * in_stride, 0.0f);

  for (int64_t block = begin; block < end; ++block) {
    const int64_t member = block / p.blocks(), first = block % p.blocks() * kTileBlock;
    const int64_t count = std::min(kTileBlock, p.tiles() - first);
    const float* all_filters = p.filters_at_points + member * kTilePoints * p.filters * p.channels;
    const float* bias = p.epilogue.bias != nullptr ? p.epilogue.bias + member * p.filters : nullptr;
    for (int64_t t = 0; t < count; ++t) {
      gather_tile(p, Place(p, member, first + t), zeros, in_stride, inputs + t * p.channels);
    }
    for (int64_t filter = 0; filter < p.filters; filter += kChannelBlock) {
      for (int64_t point = 0; point < kTilePoints; ++point) {
        const float* filters = all_filters + (filter * kTilePoints + point * kChannelBlock) * p.channels;
        for (int64_t t = 0; t < count; t += kRows) {
          multiply(inputs + point * in_stride + t * p.channels, filters, p.channels,
                   outputs + point * out_stride + t * kChannelBlock);
        }
      }
      for (int64_t t = 0; t < count; ++t) {
        scatter_tile(p, Place(p, member, first + t), filter, bias, outputs + t * kChannelBlock, out_stride);
      }
    }
  }
}

}  // namespace CEAT_ISA
}  // namespace ceat
