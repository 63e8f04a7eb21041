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
#include "elements.cuh"
#include "matrix.cuh"

namespace ceat::cuda {

namespace {

using Half = __nv_bfloat16;

constexpr int kWarps = 4;
constexpr int kConvolutionThreads = kWarps * kWarpSize;
constexpr int kTaps = 9;

// Filters of one thread block, and tiles of 16 pixels of one warp: more of these share a weight's way to the registers,
// fewer leave more warps to hide latencies.
template <int kFilters>
constexpr int kFilterBlock = kFilters < 32 ? kFilters : 32;
template <int kFilters>
constexpr int kPixelTilesOf = kFilters == 16 ? 4 : 2;

// Words of two bf16 that one lane has of a pixel: 2 for 16 channels, else 4 for each 32 of them.
template <int kChannels>
constexpr int kWordsOf = kChannels / 8;

template <int kWords>
__device__ inline void load_words(uint32_t (&to)[kWords], const Half* from) {
  if constexpr (kWords == 2) {
    const uint2 pair = __ldg(reinterpret_cast<const uint2*>(from));
    to[0] = pair.x;
    to[1] = pair.y;
  } else {
#pragma unroll
    for (int group = 0; group < kWords / 4; ++group) {
      const uint4 quad = __ldg(reinterpret_cast<const uint4*>(from + 32 * group));
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
};

template <Direction kDirection>
__device__ inline int steps(int tap) {
  return kDirection == Direction::kTransposed2 ? int(tap == 0) : tap - 1;
}

// The taps of one coordinate that lie in [0, size), as bits, for the base that `at` gives.
template <Direction kDirection>
__device__ inline uint32_t taps_inside(int coordinate, int size, int* at) {
  uint32_t inside = 0;
  *at = kDirection == Direction::kStride2       ? 2 * coordinate
        : kDirection == Direction::kTransposed2 ? coordinate / 2
                                                : coordinate;
#pragma unroll
  for (int tap = 0; tap < 3; ++tap) {
    const int place = *at + steps<kDirection>(tap);
    const bool met = kDirection != Direction::kTransposed2 || (coordinate + 1 - tap) % 2 == 0;
    inside |= uint32_t(met && place >= 0 && place < size) << tap;
  }
  return inside;
}

template <int kChannels, Direction kDirection>
__device__ inline Source source_of(const ConvolutionArgs& args, const Half* member, uint32_t pixel, uint32_t pixels) {
  if (pixel >= pixels) return {member, 0};
  const uint32_t line = divide(pixel, args.by_width), sample = divide(line, args.by_height);
  const int column = int(pixel - line * args.by_width.value), row = int(line - sample * args.by_height.value);
  int r, q;
  const uint32_t rows = taps_inside<kDirection>(row, args.height, &r);
  const uint32_t columns = taps_inside<kDirection>(column, args.width, &q);
  uint32_t inside = 0;
#pragma unroll
  for (int u = 0; u < 3; ++u) inside |= (rows >> u & 1) * columns << 3 * u;
  return {member + ((int64_t(sample) * args.height + r) * args.width + q) * kChannels, inside};
}

// Calls body(sum, other) for all sums of the lane and the elements of a tensor like out, all of which are read first.
template <int kPixelTiles, int kWords, class Body>
__device__ inline void with_elements(const void* tensor, const int64_t (&offsets)[kPixelTiles][2],
                                     float (&sums)[kPixelTiles][kWords][4], const Body& body) {
  uint32_t words[kPixelTiles][2][kWords];
#pragma unroll
  for (int i = 0; i < 2 * kPixelTiles; ++i) {
    const int64_t offset = offsets[i / 2][i % 2];
    if (offset >= 0) load_words(words[i / 2][i % 2], static_cast<const Half*>(tensor) + offset);
  }
#pragma unroll
  for (int i = 0; i < 2 * kPixelTiles; ++i) {
#pragma unroll
    for (int n = 0; n < kWords; ++n) {
      const float2 values = unpack(words[i / 2][i % 2][n]);
      body(sums[i / 2][n][2 * (i % 2)], values.x);
      body(sums[i / 2][n][2 * (i % 2) + 1], values.y);
    }
  }
}

template <int kChannels, int kFilters, Direction kDirection>
__global__ void __launch_bounds__(kConvolutionThreads, kFilters == 16 ? 3 : 5)
    convolution_kernel(const ConvolutionArgs args) {
  constexpr int kBlock = kFilterBlock<kFilters>, kTiles = kBlock / 8, kPixelTiles = kPixelTilesOf<kFilters>;
  constexpr int kWords = kWordsOf<kChannels>, kSteps = kChannels / 16, kAllTiles = kFilters / 8;
  extern __shared__ uint4 shared[];
  const int taps = args.point ? 1 : kTaps;
  const int64_t member = blockIdx.y;
  // A fragment is what the lanes of a warp have of one k-step and column tile: 16 pieces of 16 bytes. Those of this
  // block's filters stand together for every k-step.
  {
    constexpr int kPieces = 16 * kTiles;
    const uint4* from = static_cast<const uint4*>(args.weights) +
                        (member * taps * kSteps * kAllTiles + int64_t(blockIdx.z) * kTiles) * 16;
    for (int i = int(threadIdx.x); i < taps * kSteps * kPieces; i += kConvolutionThreads) {
      start_copy(shared + i, from + i / kPieces * (16 * kAllTiles) + i % kPieces);
    }
  }

  const int lane = int(threadIdx.x) % kWarpSize, quad = lane / 4, t = lane % 4;
  const uint32_t pixels = uint32_t(args.samples) * uint32_t(args.out_height) * uint32_t(args.out_width);
  const uint32_t first = (blockIdx.x * kWarps + threadIdx.x / kWarpSize) * (16 * kPixelTiles) + quad;
  const Half* input = static_cast<const Half*>(args.x) + member * args.samples * args.height * args.width * kChannels +
                      t * (kChannels == 16 ? 4 : 8);
  Source sources[kPixelTiles][2];
#pragma unroll
  for (int i = 0; i < 2 * kPixelTiles; ++i) {
    sources[i / 2][i % 2] = source_of<kChannels, kDirection>(args, input, first + 8 * i, pixels);
  }
  float sums[kPixelTiles][kTiles][4] = {};
  finish_copies();

  const uint2* weights = reinterpret_cast<const uint2*>(shared) + lane;
  for (int u = args.point ? 1 : 0; u < (args.point ? 2 : 3); ++u) {
#pragma unroll
    for (int v = 0; v < 3; ++v) {
      if (args.point && v != 1) continue;
      const int offset = (steps<kDirection>(u) * args.width + steps<kDirection>(v)) * kChannels;
      uint32_t words[kPixelTiles][2][kWords];
#pragma unroll
      for (int i = 0; i < 2 * kPixelTiles; ++i) {
        const Source& source = sources[i / 2][i % 2];
        if (source.inside >> (3 * u + v) & 1) {
          load_words(words[i / 2][i % 2], source.base + offset);
        } else {
#pragma unroll
          for (int w = 0; w < kWords; ++w) words[i / 2][i % 2][w] = 0;
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
            const auto& a = words[tile];
            multiply_add(sums[tile][n], a[0][2 * step], a[1][2 * step], a[0][2 * step + 1], a[1][2 * step + 1], b);
          }
        }
      }
    }
  }

  // The lane's filters are neighbours, two of each column tile.
  const int place = int(blockIdx.z) * kBlock + t * (kBlock == 16 ? 4 : 8);
  int64_t offsets[kPixelTiles][2];
#pragma unroll
  for (int i = 0; i < 2 * kPixelTiles; ++i) {
    const uint32_t pixel = first + 8 * i;
    offsets[i / 2][i % 2] = pixel < pixels ? (member * pixels + pixel) * kFilters + place : -1;
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
  if (args.residual != nullptr) {
    with_elements(args.residual, offsets, sums, [](float& sum, float other) { sum += other; });
  }
  if (args.relu) {
#pragma unroll
    for (int i = 0; i < kPixelTiles * kTiles * 4; ++i) {
      float& sum = sums[i / (kTiles * 4)][i / 4 % kTiles][i % 4];
      sum = sum < 0 ? 0 : sum;  // NaN stays NaN
    }
  }
  if (args.gate != nullptr) {
    with_elements(args.gate, offsets, sums, [](float& sum, float other) { sum = other <= 0 ? 0 : sum; });
  }
#pragma unroll
  for (int i = 0; i < 2 * kPixelTiles; ++i) {
    uint32_t out[kTiles];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) out[n] = pack(sums[i / 2][n][2 * (i % 2)], sums[i / 2][n][2 * (i % 2) + 1]);
    const int64_t offset = offsets[i / 2][i % 2];
    if (offset >= 0) store_words(static_cast<Half*>(args.out) + offset, out);
  }
}

template <int kChannels, int kFilters, Direction kDirection>
const char* launch_directed(const ConvolutionArgs& args, void* stream) {
  constexpr int kPixels = kWarps * 16 * kPixelTilesOf<kFilters>;
  const auto kernel = convolution_kernel<kChannels, kFilters, kDirection>;
  constexpr int kBlock = kFilterBlock<kFilters>;
  const size_t bytes = size_t(args.point ? 1 : kTaps) * kChannels * kBlock * sizeof(Half);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const int64_t pixels = args.samples * args.out_height * args.out_width;
  const dim3 blocks(unsigned((pixels + kPixels - 1) / kPixels), unsigned(args.members), kFilters / kBlock);
  kernel<<<blocks, kConvolutionThreads, bytes, static_cast<cudaStream_t>(stream)>>>(args);
  const cudaError_t launched = cudaGetLastError();
  return launched == cudaSuccess ? nullptr : cudaGetErrorString(launched);
}

template <int kChannels, int kFilters>
const char* launch_sized(const ConvolutionArgs& args, void* stream) {
  switch (args.direction) {
    case Direction::kStride1: return launch_directed<kChannels, kFilters, Direction::kStride1>(args, stream);
    case Direction::kStride2: return launch_directed<kChannels, kFilters, Direction::kStride2>(args, stream);
    case Direction::kTransposed2: return launch_directed<kChannels, kFilters, Direction::kTransposed2>(args, stream);
  }
  return "unknown direction";
}

template <int kChannels>
const char* launch_filters(const ConvolutionArgs& args, void* stream) {
  switch (args.filters) {
    case 16: return launch_sized<kChannels, 16>(args, stream);
    case 32: return launch_sized<kChannels, 32>(args, stream);
    case 64: return launch_sized<kChannels, 64>(args, stream);
  }
  return "filters must be 16, 32 or 64";
}

}  // namespace

const char* launch_convolution(const ConvolutionArgs& args, void* stream) {
  switch (args.channels) {
    case 16: return launch_filters<16>(args, stream);
    case 32: return launch_filters<32>(args, stream);
    case 64: return launch_filters<64>(args, stream);
  }
  return "channels must be 16, 32 or 64";
}

}  // namespace ceat::cuda
