// 3x3 convolutions of all members in one launch, in bf16 on the matrix units (mma.sync), with what follows them.
//
// An implicit matrix product: rows are output pixels of one member, columns its filters, and the taps and channels are
// summed over. A warp holds kPixelTiles tiles of 16 pixels and up to 32 filters. It reads the pixels' channels straight
// from memory into the operands' registers, nine times from neighbouring places, of which eight hit the L1 cache; the
// weights lie in shared memory in the order of the operands' registers.
//
// Which channel stands in which place of an operand is free as long as both operands agree, and which filter in which
// column likewise. Here lane t of a quad has neighbouring channels and filters, so that it moves 8 or 16 bytes at once:
//
//   channel of k-step s, quad lane t, place j      C = 16: 4t + j       else: 32 (s / 2) + 8t + 4 (s % 2) + j
//   filter of column tile n, column c              F = 16: 4 (c / 2) + 2n + c % 2
//                                                  else: 32 (n / 4) + 8 (c / 2) + 2 (n % 4) + c % 2
#pragma once

#ifdef CEAT_SIMT
#include CEAT_SIMT  // emulation on the host, for tests
#else
#include "matrix.cuh"
#endif

#include "convolution.h"

namespace ceat::cuda {

using Half = uint16_t;  // the bits of a bf16

constexpr int kWarps = 4;
constexpr int kConvolutionThreads = kWarps * kWarpSize;
constexpr int kTaps = 9;

// Filters of one thread block, and tiles of 16 pixels of one warp: more of these share a weight's way to the registers,
// fewer leave more warps to hide latencies.
constexpr int kMostFilters = 32;
template <int kFilters>
constexpr int kFilterBlock = kFilters < kMostFilters ? kFilters : kMostFilters;
template <int kFilters, Direction kDirection>
constexpr int kPixelTilesOf = kFilters == 16 && kDirection != Direction::kTransposed2 ? 4 : 2;

inline int pixel_tiles(const ConvolutionArgs& args) {
  return args.filters == 16 && args.direction != Direction::kTransposed2 ? 4 : 2;
}

// Of a launch: blocks of pixels, members, and blocks of filters for each kind of pixels.
struct Blocks {
  unsigned x, y, z;
};

inline Blocks blocks_of(const ConvolutionArgs& args) {
  const int per_block = kWarps * 16 * pixel_tiles(args);
  const int64_t pixels = args.samples * args.by_height.value * args.by_width.value;
  const int filters = args.filters < kMostFilters ? args.filters : kMostFilters;
  const int kinds = args.direction == Direction::kTransposed2 ? 4 : 1;
  return {unsigned((pixels + per_block - 1) / per_block), unsigned(args.members),
          unsigned(kinds * args.filters / filters)};
}

inline int taps_of(const ConvolutionArgs& args) { return args.point ? 1 : kTaps; }

inline size_t shared_bytes(const ConvolutionArgs& args) {
  const int filters = args.filters < kMostFilters ? args.filters : kMostFilters;
  return size_t(taps_of(args)) * args.channels * filters * sizeof(Half);
}

// Words of two bf16 that one lane has of a pixel: 2 for 16 channels, else 4 for each 32 of them.
template <int kChannels>
constexpr int kWordsOf = kChannels / 8;

template <int kWords>
__device__ inline void load_words(uint32_t (&to)[kWords], const Half* from) {
  if constexpr (kWords == 2) {
    const uint2 pair = read_only(reinterpret_cast<const uint2*>(from));
    to[0] = pair.x;
    to[1] = pair.y;
  } else {
#pragma unroll
    for (int group = 0; group < kWords / 4; ++group) {
      const uint4 quad = read_only(reinterpret_cast<const uint4*>(from + 32 * group));
      to[4 * group] = quad.x;
      to[4 * group + 1] = quad.y;
      to[4 * group + 2] = quad.z;
      to[4 * group + 3] = quad.w;
    }
  }
}

template <int kWords>
__device__ inline void store_words(Half* to, const uint32_t (&from)[kWords]) {
  if constexpr (kWords == 2) {
    *reinterpret_cast<uint2*>(to) = make_uint2(from[0], from[1]);
  } else {
#pragma unroll
    for (int group = 0; group < kWords / 4; ++group) {
      *reinterpret_cast<uint4*>(to + 32 * group) =
          make_uint4(from[4 * group], from[4 * group + 1], from[4 * group + 2], from[4 * group + 3]);
    }
  }
}

// Where the taps of an output pixel lie in the input. Tap (u, v) of the pixel is `steps(u)` rows and `steps(v)` columns
// away from the base; bit 3 u + v of `inside` says whether it is part of the image.
struct Source {
  const Half* base;
  uint32_t inside;
  int pixel;  // number of the output pixel, or -1
};

template <Direction kDirection>
__device__ inline int steps(int tap) {
  return kDirection == Direction::kTransposed2 ? int(tap == 0) : tap - 1;
}

// Whether output pixels with odd or even coordinates have such a tap.
template <Direction kDirection>
__device__ inline bool has_tap(int tap, int odd) {
  return kDirection != Direction::kTransposed2 || (tap + odd) % 2 == 1;
}

// The taps of one coordinate of a grid that lie in [0, size), as bits.
template <Direction kDirection>
__device__ inline uint32_t taps_inside(int coordinate, int size) {
  uint32_t inside = 0;
#pragma unroll
  for (int tap = 0; tap < 3; ++tap) {
    const int place = (kDirection == Direction::kStride2 ? 2 * coordinate : coordinate) + steps<kDirection>(tap);
    inside |= uint32_t(place >= 0 && place < size) << tap;
  }
  return inside;
}

template <int kChannels, Direction kDirection>
__device__ inline Source source_of(const ConvolutionArgs& args, const Half* member, uint32_t place, uint32_t places,
                                   int odd_row, int odd_column) {
  constexpr int kStride = kDirection == Direction::kStride2 ? 2 : 1,
                kPart = kDirection == Direction::kTransposed2 ? 2 : 1;
  if (place >= places) return {member, 0, -1};
  const uint32_t line = divide(place, args.by_width), sample = divide(line, args.by_height);
  const int column = int(place - line * args.by_width.value), row = int(line - sample * args.by_height.value);
  const uint32_t rows = taps_inside<kDirection>(row, args.height),
                 columns = taps_inside<kDirection>(column, args.width);
  uint32_t inside = 0;
#pragma unroll
  for (int u = 0; u < 3; ++u) inside |= (rows >> u & 1) * columns << 3 * u;
  const int out_row = kPart * row + odd_row, out_column = kPart * column + odd_column;
  if (out_row >= args.out_height || out_column >= args.out_width) return {member, 0, -1};
  const int64_t base = (int64_t(sample) * args.height + kStride * row) * args.width + kStride * column;
  return {member + base * kChannels, inside, (int(sample) * args.out_height + out_row) * args.out_width + out_column};
}

// The lane's words of a tensor like out.
template <int kPixelTiles, int kWords>
struct Elements {
  uint32_t words[2 * kPixelTiles][kWords];

  __device__ void load(const Half* tensor, const Source (&sources)[2 * kPixelTiles], int filters) {
#pragma unroll
    for (int i = 0; i < 2 * kPixelTiles; ++i) {
      if (sources[i].pixel >= 0) load_words(words[i], tensor + int64_t(sources[i].pixel) * filters);
    }
  }

  // Calls body(sum, element) for all sums of the lane.
  template <class Body>
  __device__ void with(float (&sums)[kPixelTiles][kWords][4], const Body& body) const {
#pragma unroll
    for (int i = 0; i < 2 * kPixelTiles; ++i) {
#pragma unroll
      for (int n = 0; n < kWords; ++n) {
        const float2 values = unpack(words[i][n]);
        body(sums[i / 2][n][2 * (i % 2)], values.x);
        body(sums[i / 2][n][2 * (i % 2) + 1], values.y);
      }
    }
  }
};

template <int kChannels, int kFilters, Direction kDirection>
__device__ inline void run_convolution(const ConvolutionArgs& args) {
  constexpr int kBlock = kFilterBlock<kFilters>, kTiles = kBlock / 8, kFilterBlocks = kFilters / kBlock;
  constexpr int kPixelTiles = kPixelTilesOf<kFilters, kDirection>;
  constexpr int kWords = kWordsOf<kChannels>, kSteps = kChannels / 16, kAllTiles = kFilters / 8;
  CEAT_DYNAMIC_SHARED(shared);
  const int taps = args.point ? 1 : kTaps;
  const int64_t member = blockIdx.y;
  const int filter_block = int(blockIdx.z) % kFilterBlocks, kind = int(blockIdx.z) / kFilterBlocks;
  const int odd_row = kind / 2, odd_column = kind % 2;
  // A fragment is what the lanes of a warp have of one k-step and column tile: 16 pieces of 16 bytes. Those of this
  // block's filters stand together for every k-step.
  {
    constexpr int kPieces = 16 * kTiles;
    const uint4* from =
        static_cast<const uint4*>(args.weights) + (member * taps * kSteps * kAllTiles + filter_block * kTiles) * 16;
    for (int i = int(threadIdx.x); i < taps * kSteps * kPieces; i += kConvolutionThreads) {
      start_copy(shared + i, from + i / kPieces * (16 * kAllTiles) + i % kPieces);
    }
  }

  const int lane = int(threadIdx.x) % kWarpSize, quad = lane / 4, t = lane % 4;
  const uint32_t places = uint32_t(args.samples) * args.by_height.value * args.by_width.value;
  const uint32_t first = (blockIdx.x * kWarps + threadIdx.x / kWarpSize) * (16 * kPixelTiles) + quad;
  const Half* input = static_cast<const Half*>(args.x) + member * args.samples * args.height * args.width * kChannels +
                      t * (kChannels == 16 ? 4 : 8);
  Source sources[2 * kPixelTiles];
#pragma unroll
  for (int i = 0; i < 2 * kPixelTiles; ++i) {
    sources[i] = source_of<kChannels, kDirection>(args, input, first + 8 * i, places, odd_row, odd_column);
  }
  // The lane's filters are neighbours, two of each column tile. Where there are registers for it, what is needed behind
  // the sums is on its way meanwhile.
  constexpr bool kEarly = kPixelTiles == 2;
  const int place = filter_block * kBlock + t * (kBlock == 16 ? 4 : 8);
  const int64_t offset = member * args.samples * args.out_height * args.out_width * kFilters + place;
  Elements<kPixelTiles, kTiles> residual, gate;
  const auto load_residual = [&] {
    if (args.residual != nullptr) residual.load(static_cast<const Half*>(args.residual) + offset, sources, kFilters);
  };
  const auto load_gate = [&] {
    if (args.gate != nullptr) gate.load(static_cast<const Half*>(args.gate) + offset, sources, kFilters);
  };
  if (kEarly) load_residual();
  if (kEarly) load_gate();
  float sums[kPixelTiles][kTiles][4] = {};
  finish_copies();

  const uint2* weights = reinterpret_cast<const uint2*>(shared) + lane;
  for (int u = args.point ? 1 : 0; u < (args.point ? 2 : 3); ++u) {
    if (!has_tap<kDirection>(u, odd_row)) continue;
#pragma unroll
    for (int v = 0; v < 3; ++v) {
      if ((args.point && v != 1) || !has_tap<kDirection>(v, odd_column)) continue;
      const int step_to = (steps<kDirection>(u) * args.width + steps<kDirection>(v)) * kChannels;
      uint32_t words[2 * kPixelTiles][kWords];
#pragma unroll
      for (int i = 0; i < 2 * kPixelTiles; ++i) {
        if (sources[i].inside >> (3 * u + v) & 1) {
          load_words(words[i], sources[i].base + step_to);
        } else {
#pragma unroll
          for (int w = 0; w < kWords; ++w) words[i][w] = 0;
        }
      }
      const int tap = args.point ? 0 : args.flipped ? kTaps - 1 - (3 * u + v) : 3 * u + v;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          const uint2 b = weights[((tap * kSteps + step) * kTiles + n) * kWarpSize];
#pragma unroll
          for (int tile = 0; tile < kPixelTiles; ++tile) {
            const uint32_t (&low)[kWords] = words[2 * tile], (&high)[kWords] = words[2 * tile + 1];
            multiply_add(sums[tile][n], low[2 * step], high[2 * step], low[2 * step + 1], high[2 * step + 1], b);
          }
        }
      }
    }
  }

  if (args.bias != nullptr) {
    uint32_t bias[kTiles];
    load_words(bias, static_cast<const Half*>(args.bias) + member * kFilters + place);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const float2 values = unpack(bias[n]);
#pragma unroll
      for (int tile = 0; tile < kPixelTiles; ++tile) {
        sums[tile][n][0] += values.x;
        sums[tile][n][1] += values.y;
        sums[tile][n][2] += values.x;
        sums[tile][n][3] += values.y;
      }
    }
  }
  if (!kEarly) load_residual();
  if (args.residual != nullptr) residual.with(sums, [](float& sum, float other) { sum += other; });
  if (args.relu) {
#pragma unroll
    for (int i = 0; i < kPixelTiles * kTiles * 4; ++i) {
      float& sum = sums[i / (kTiles * 4)][i / 4 % kTiles][i % 4];
      sum = sum < 0 ? 0 : sum;  // NaN stays NaN
    }
  }
  if (!kEarly) load_gate();
  if (args.gate != nullptr) gate.with(sums, [](float& sum, float other) { sum = other <= 0 ? 0 : sum; });
#pragma unroll
  for (int i = 0; i < 2 * kPixelTiles; ++i) {
    uint32_t out[kTiles];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) out[n] = pack(sums[i / 2][n][2 * (i % 2)], sums[i / 2][n][2 * (i % 2) + 1]);
    if (sources[i].pixel >= 0) {
      store_words(static_cast<Half*>(args.out) + offset + int64_t(sources[i].pixel) * kFilters, out);
    }
  }
}

}  // namespace ceat::cuda
