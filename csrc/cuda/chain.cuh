// Chains of 3x3 convolutions of one width and stride 1, in bf16 on the matrix units. A thread block takes one member
// through the whole chain for a few images, which stay in shared memory, so that a stage of a residual network is one
// launch and moves its first and last images alone through device memory.
//
// Each block holds two places per image. Link i reads place i % 2 and writes the other one; a residual is what stood
// there before: the input of the link before it. The gradient of a chain for its input is a chain of the links in
// reverse order with the same two places, whose ReLUs follow the masks that the forward pass left.
//
//   place   [channel / 8][pixel][channel % 8]: 8 pixels of 8 channels are 128 neighbouring bytes, as a matrix is read
//   task    16 filters of 8 rows of the image, 16 columns wide ("wide"), or the 8 columns of an image that has no more
//           ("narrow"); a tile is 16 pixels of it: a part of one row, or two rows
//
// A wide task reads a row of 16 pixels once for each of the three columns of taps and multiplies it into the three rows
// of sums that it is part of.
#pragma once

#ifdef CEAT_SIMT
#include CEAT_SIMT  // emulation on the host, for tests
#else
#include "matrix.cuh"
#define CEAT_DYNAMIC_SHARED(name) extern __shared__ uint4 name[]
#endif

#include "chain.h"

namespace ceat::cuda {

constexpr int kRows = 8;                 // of a task
constexpr int kTaskFilters = 16;         // two column tiles of the matrix units
constexpr int kChannelsOfPlane = 8;      // 16 bytes

// Sums of one task: [tile][column tile][element of the lane].
template <bool kWide>
struct Sums {
  static constexpr int kTiles = kWide ? kRows : kRows / 2;
  float of[kTiles][2][4];
};

// One task's share of an image.
struct Task {
  uint4* image;  // two places, one after the other
  int64_t masks;  // where the masks of its image begin, in tasks
  int number;    // of the task in its image
  int row, column, filter;  // the first ones
};

struct Image {
  int height, width, pixels;
};

// A link's weights in shared memory.
struct Filters {
  const uint4* weights;
  bool turned;
};

template <bool kWide>
__device__ inline int first_pixel(const Task& task, const Image& image, int tile) {
  return kWide ? (task.row + tile) * image.width + task.column : (task.row + 2 * tile) * image.width;
}

// The lane's word of two channels in a place.
__device__ inline uint32_t* word_of(uint4* place, const Image& image, int plane, int pixel, int lane) {
  return reinterpret_cast<uint32_t*>(place + plane * image.pixels + pixel + lane / 4) + lane % 4;
}

// Calls body(tile, column tile, half, word): all words of the lane in a place, of two elements each.
template <bool kWide, class Body>
__device__ inline void for_words(const Task& task, const Image& image, uint4* place, int lane, const Body& body) {
#pragma unroll
  for (int tile = 0; tile < Sums<kWide>::kTiles; ++tile) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      uint32_t* word =
          word_of(place, image, task.filter / kChannelsOfPlane + n, first_pixel<kWide>(task, image, tile), lane);
      body(tile, n, 0, word);
      body(tile, n, 1, word + 4 * 8);  // 8 pixels further
    }
  }
}

// Bits of a lane: one for each of its sums.
template <bool kWide>
__device__ inline uint64_t mask_bit(int tile, int n, int element) {
  return uint64_t(1) << ((tile * 2 + n) * 4 + element);
}

template <bool kWide>
__device__ inline uint64_t load_mask(const void* masks, int64_t task, int lane) {
  using Word = std::conditional_t<kWide, uint64_t, uint32_t>;
  return static_cast<const Word*>(masks)[task * kWarpSize + lane];
}

template <bool kWide>
__device__ inline void store_mask(void* masks, int64_t task, int lane, uint64_t bits) {
  using Word = std::conditional_t<kWide, uint64_t, uint32_t>;
  static_cast<Word*>(masks)[task * kWarpSize + lane] = Word(bits);
}

// Weights of the three taps of column v, for 16 channels and the task's filters.
template <int kChannels>
__device__ inline void load_taps(uint2 (&to)[3][2], const Filters& filters, int v, int step, int filter, int lane) {
  constexpr int kSteps = kChannels / 16, kColumnTiles = kChannels / 8;
#pragma unroll
  for (int u = 0; u < 3; ++u) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int tap = filters.turned ? kChainTaps - 1 - (3 * u + v) : 3 * u + v;
      const int tile = (tap * kSteps + step) * kColumnTiles + filter / 8 + n;
      to[u][n] = reinterpret_cast<const uint2*>(filters.weights)[tile * kWarpSize + lane];
    }
  }
}

template <int kChannels>
__device__ inline void convolve_wide(Sums<true>& sums, const Task& task, const Image& image, uint32_t place,
                                     uint32_t zeros, const Filters& filters, int lane) {
  const int column = task.column + lane % 16;
#pragma unroll 1
  for (int v = 0; v < 3; ++v) {
    const bool inside = column + v >= 1 && column + v <= image.width;
#pragma unroll 1
    for (int step = 0; step < kChannels / 16; ++step) {
      uint2 taps[3][2];
      load_taps<kChannels>(taps, filters, v, step, task.filter, lane);
      const int first = (2 * step + lane / 16) * image.pixels + task.row * image.width + column + v - 1;
#pragma unroll
      for (int i = -1; i <= kRows; ++i) {
        if (i == -1 && task.row == 0) continue;
        if (i == kRows && task.row + kRows == image.height) continue;
        uint32_t a[4];
        load_matrices(a, inside ? place + uint32_t(first + i * image.width) * 16 : zeros);
#pragma unroll
        for (int u = 0; u < 3; ++u) {
          const int r = i + 1 - u;
          if (r < 0 || r >= kRows) continue;
          multiply_add(sums.of[r][0], a[0], a[1], a[2], a[3], taps[u][0]);
          multiply_add(sums.of[r][1], a[0], a[1], a[2], a[3], taps[u][1]);
        }
      }
    }
  }
}

template <int kChannels>
__device__ inline void convolve_narrow(Sums<false>& sums, const Task& task, const Image& image, uint32_t place,
                                       uint32_t zeros, const Filters& filters, int lane) {
  const int column = lane % 8;
#pragma unroll 1
  for (int v = 0; v < 3; ++v) {
    const bool column_inside = column + v >= 1 && column + v <= image.width;
#pragma unroll 1
    for (int step = 0; step < kChannels / 16; ++step) {
      uint2 taps[3][2];
      load_taps<kChannels>(taps, filters, v, step, task.filter, lane);
      const int plane = (2 * step + lane / 16) * image.pixels;
      // Of each row the lower and the upper 8 channels, from the row above the task on.
      uint32_t low[kRows + 2], high[kRows + 2];
#pragma unroll
      for (int pair = 0; pair <= kRows / 2; ++pair) {
        const int row = task.row + 2 * pair - 1 + lane / 8 % 2;
        const bool inside = column_inside && row >= 0 && row < image.height;
        uint32_t a[4];
        load_matrices(a, inside ? place + uint32_t(plane + row * image.width + column + v - 1) * 16 : zeros);
        low[2 * pair] = a[0];
        low[2 * pair + 1] = a[1];
        high[2 * pair] = a[2];
        high[2 * pair + 1] = a[3];
      }
#pragma unroll
      for (int u = 0; u < 3; ++u) {
#pragma unroll
        for (int tile = 0; tile < Sums<false>::kTiles; ++tile) {
          const int r = 2 * tile + u;
          multiply_add(sums.of[tile][0], low[r], low[r + 1], high[r], high[r + 1], taps[u][0]);
          multiply_add(sums.of[tile][1], low[r], low[r + 1], high[r], high[r + 1], taps[u][1]);
        }
      }
    }
  }
}

// One link for one task: reads one place, writes the other.
template <int kChannels, bool kWide>
__device__ inline void run_link(const ChainArgs& args, int number, const Task& task, const Image& image,
                                const Filters& filters, uint32_t zeros, int64_t member, int lane) {
  constexpr int kPlanes = kChannels / kChannelsOfPlane;
  const ChainLink& link = args.links[number];
  const int64_t mask_at = task.masks + int64_t(link.mask) * args.tasks + task.number;
  // What is needed behind the sums is on its way meanwhile.
  float2 bias[2] = {};
  if (link.bias != nullptr) {
    const uint32_t* from = static_cast<const uint32_t*>(link.bias) + (member * kChannels + task.filter) / 2 + lane % 4;
    bias[0] = unpack(from[0]);
    bias[1] = unpack(from[4]);
  }
  const uint64_t gates = link.gated ? load_mask<kWide>(args.masks, mask_at, lane) : 0;

  Sums<kWide> sums{};
  const int size = kPlanes * image.pixels;
  const uint32_t from = shared_address(task.image + number % 2 * size);
  if constexpr (kWide) {
    convolve_wide<kChannels>(sums, task, image, from, zeros, filters, lane);
  } else {
    convolve_narrow<kChannels>(sums, task, image, from, zeros, filters, lane);
  }

  uint64_t positive = 0;
  for_words<kWide>(task, image, task.image + (1 - number % 2) * size, lane, [&](int tile, int n, int half, uint32_t* word) {
    float first = sums.of[tile][n][2 * half] + bias[n].x, second = sums.of[tile][n][2 * half + 1] + bias[n].y;
    if (link.residual) {
      const float2 other = unpack(*word);
      first += other.x;
      second += other.y;
    }
    if (link.relu) {
      // NaN stays NaN, and lets a gradient through.
      positive |= first <= 0 ? 0 : mask_bit<kWide>(tile, n, 2 * half);
      positive |= second <= 0 ? 0 : mask_bit<kWide>(tile, n, 2 * half + 1);
      first = first < 0 ? 0 : first;
      second = second < 0 ? 0 : second;
    }
    if (link.gated) {
      first = gates & mask_bit<kWide>(tile, n, 2 * half) ? first : 0;
      second = gates & mask_bit<kWide>(tile, n, 2 * half + 1) ? second : 0;
    }
    *word = pack(first, second);
  });
  if (link.relu && args.masks != nullptr) store_mask<kWide>(args.masks, mask_at, lane, positive);
}

// Images of 16-byte pieces: in device memory by pixel, in a place by plane.
template <int kPlanes, class Body>
__device__ inline void for_pieces(const Image& image, int images, const Body& body) {
  const int pieces = kPlanes * image.pixels;
  for (int i = int(threadIdx.x); i < images * pieces; i += int(blockDim.x)) {
    const int of_image = i % pieces;
    body(i, i / pieces * 2 * pieces + of_image % kPlanes * image.pixels + of_image / kPlanes);
  }
}

// Stores a place, where `gate` is given only what it lets through.
template <int kPlanes>
__device__ inline void store_place(void* to, const void* gate, int64_t offset, const uint4* place, const Image& image,
                                   int images) {
  for_pieces<kPlanes>(image, images, [&](int piece, int at) {
    uint4 values = place[at];
    if (gate != nullptr) {
      const uint4 gates = static_cast<const uint4*>(gate)[offset + piece];
      const uint32_t of_gate[4] = {gates.x, gates.y, gates.z, gates.w};
      uint32_t of[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 other = unpack(of_gate[i]), value = unpack(of[i]);
        of[i] = pack(other.x <= 0 ? 0 : value.x, other.y <= 0 ? 0 : value.y);
      }
      values = make_uint4(of[0], of[1], of[2], of[3]);
    }
    static_cast<uint4*>(to)[offset + piece] = values;
  });
}

template <int kChannels, bool kWide>
__device__ inline void run_chain(const ChainArgs& args) {
  constexpr int kPlanes = kChannels / kChannelsOfPlane, kWeightPieces = kChainTaps * kChannels * kChannels / 8;
  CEAT_DYNAMIC_SHARED(shared);
  const Image image{args.height, args.width, args.height * args.width};
  const int size = kPlanes * image.pixels;  // of a place
  const int64_t member = blockIdx.y, first = int64_t(blockIdx.x) * args.images;
  const int images = args.samples - first < args.images ? int(args.samples - first) : args.images;
  // Weights of two links, then zeros that stand for pixels outside, then the images.
  uint4 *weights = shared, *zeros = shared + 2 * kWeightPieces, *places = zeros + 1;
  const auto start_weights = [&](int link) {
    const uint4* from = static_cast<const uint4*>(args.links[link].weights) + member * kWeightPieces;
    uint4* to = weights + link % 2 * kWeightPieces;
    for (int i = int(threadIdx.x); i < kWeightPieces; i += int(blockDim.x)) start_copy(to + i, from + i);
  };
  const int64_t offset = (member * args.samples + first) * size;
  const auto start_place = [&](const void* tensor, int place) {
    for_pieces<kPlanes>(image, images, [&](int piece, int at) {
      start_copy(places + place * size + at, static_cast<const uint4*>(tensor) + offset + piece);
    });
  };
  if (threadIdx.x == 0) *zeros = make_uint4(0, 0, 0, 0);
  start_place(args.x, 0);
  if (args.residual != nullptr) start_place(args.residual, 1);
  start_weights(0);

  const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
  const int columns = kWide ? image.width / 16 : 1, strips = image.height / kRows * columns;
  const auto for_tasks = [&](const auto& body) {
    for (int i = warp; i < images * args.tasks; i += int(blockDim.x) / kWarpSize) {
      const int of_image = i / args.tasks, number = i % args.tasks, strip = number % strips;
      const int64_t sample = member * args.samples + first + of_image;
      body(Task{places + of_image * 2 * size, sample * args.masks_of_sample * args.tasks, number,
                strip / columns * kRows, strip % columns * 16, number / strips * kTaskFilters});
    }
  };
  if (args.gated_by >= 0) {
    finish_copies();
    for_tasks([&](const Task& task) {
      const uint64_t gates =
          load_mask<kWide>(args.masks, task.masks + int64_t(args.gated_by) * args.tasks + task.number, lane);
      for_words<kWide>(task, image, task.image, lane, [&](int tile, int n, int half, uint32_t* word) {
        const float2 values = unpack(*word);
        *word = pack(gates & mask_bit<kWide>(tile, n, 2 * half) ? values.x : 0,
                     gates & mask_bit<kWide>(tile, n, 2 * half + 1) ? values.y : 0);
      });
    });
  }
  for (int link = 0; link < args.count; ++link) {
    // All that this link reads is there, and nobody reads what is written from here on.
    finish_copies();
    if (link + 1 < args.count) start_weights(link + 1);
    for_tasks([&](const Task& task) {
      const Filters filters{weights + link % 2 * kWeightPieces, args.turned};
      run_link<kChannels, kWide>(args, link, task, image, filters, shared_address(zeros), member, lane);
    });
  }
  __syncthreads();
  store_place<kPlanes>(args.out, args.gate, offset, places + args.count % 2 * size, image, images);
  if (args.before_last != nullptr) {
    store_place<kPlanes>(args.before_last, nullptr, offset, places + (1 - args.count % 2) * size, image, images);
  }
}

}  // namespace ceat::cuda
