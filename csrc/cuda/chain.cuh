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
#endif

#include "chain.h"

namespace ceat::cuda {

constexpr int kRows = 8;             // of a task
constexpr int kTaskFilters = 16;     // two column tiles of the matrix units
constexpr int kChannelsOfPlane = 8;  // 16 bytes
constexpr int kPixelsOfMatrix = 8;

// Sums of one task: [tile][column tile][element of the lane].
template <bool kWide>
struct Sums {
  static constexpr int kTiles = kWide ? kRows : kRows / 2;
  float of[kTiles][2][4];
};

// One task's share of an image.
struct Task {
  uint4* image;             // two places, one after the other
  int64_t masks;            // where the masks of its image begin, in tasks
  int number;               // of the task in its image
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

// Pixels from one tile of a task to the next, and the first pixel of the first one.
template <bool kWide>
__device__ inline int tile_step(const Image& image) {
  return kWide ? image.width : 2 * kPixelsOfMatrix;
}

__device__ inline int first_pixel(const Task& task, const Image& image) { return task.row * image.width + task.column; }

// Calls body(number, word) for all words of the lane in a place, of two channels each, numbered in the order of its
// sums: two of each column tile of each tile.
template <bool kWide, class Body>
__device__ inline void for_words(const Task& task, const Image& image, uint4* place, int lane, const Body& body) {
  constexpr int kWordsOfPixel = sizeof(uint4) / sizeof(uint32_t);
  uint4* pixel = place + task.filter / kChannelsOfPlane * image.pixels + first_pixel(task, image) + lane / 4;
  uint32_t* word = reinterpret_cast<uint32_t*>(pixel) + lane % 4;
  const int step = tile_step<kWide>(image) * kWordsOfPixel, plane = image.pixels * kWordsOfPixel;
#pragma unroll
  for (int tile = 0; tile < Sums<kWide>::kTiles; ++tile) {
    uint32_t* of_tile = word + tile * step;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      body(4 * tile + 2 * n, of_tile + n * plane);
      body(4 * tile + 2 * n + 1, of_tile + n * plane + kPixelsOfMatrix * kWordsOfPixel);
    }
  }
}

// What of a lane's words is positive. Word i has bits i % 16 and i % 16 + 16 of entry i / 16.
template <bool kWide>
struct Mask {
  static constexpr int kWords = 16, kEntries = 4 * Sums<kWide>::kTiles / kWords;
  uint32_t bits[kEntries];

  __device__ void load(const void* masks, int64_t task, int lane) {
    const uint32_t* from = static_cast<const uint32_t*>(masks) + (task * kWarpSize + lane) * kEntries;
#pragma unroll
    for (int i = 0; i < kEntries; ++i) bits[i] = from[i];
  }

  __device__ void store(void* masks, int64_t task, int lane) const {
    uint32_t* to = static_cast<uint32_t*>(masks) + (task * kWarpSize + lane) * kEntries;
#pragma unroll
    for (int i = 0; i < kEntries; ++i) to[i] = bits[i];
  }

  // Notes a word of two numbers without a sign: what is not 0, NaN included, lets a gradient through. To be called for
  // all words in order: each moves what is there one bit down.
  __device__ void note(int number, uint32_t word) {
    uint32_t& of = bits[number / kWords];
    of = (of >> 1) | ((word + 0x7fff7fffu) & 0x80008000u);
  }

  __device__ uint32_t gated(int number, uint32_t word) const {
    // The two bits at the top of the two halves, then all over them.
    return word & spread_signs(bits[number / kWords] << (kWords - 1 - number % kWords));
  }
};

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
#pragma unroll(kChannels == 16 ? 3 : 1)
  for (int v = 0; v < 3; ++v) {
    const bool inside = column + v >= 1 && column + v <= image.width;
#pragma unroll 1
    for (int step = 0; step < kChannels / 16; ++step) {
      uint2 taps[3][2];
      load_taps<kChannels>(taps, filters, v, step, task.filter, lane);
      // A lane whose pixels lie outside reads zeros in every row.
      const int first = (2 * step + lane / 16) * image.pixels + task.row * image.width + column + v - 1;
      const uint32_t from = inside ? place + uint32_t(first) * 16 : zeros, row = inside ? image.width * 16 : 0;
#pragma unroll
      for (int i = -1; i <= kRows; ++i) {
        if (i == -1 && task.row == 0) continue;
        if (i == kRows && task.row + kRows == image.height) continue;
        uint32_t a[4];
        load_matrices(a, from + i * row);
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

// Adds what stands where the sums will go, as a product with the identity: one instruction where unpacking takes ten.
template <bool kWide>
__device__ inline void add_place(Sums<kWide>& sums, const Task& task, const Image& image, const uint4* place,
                                 int lane) {
  constexpr uint32_t kOne = 0x3f80;  // of bf16
  const uint32_t diagonal = lane / 4 / 2 == lane % 4 ? kOne << lane / 4 % 2 * 16 : 0;
  const uint2 lower{diagonal, 0}, upper{0, diagonal};
  const int plane = task.filter / kChannelsOfPlane + lane / 16;
  const uint32_t from = shared_address(place + plane * image.pixels + first_pixel(task, image) + lane % 16);
#pragma unroll
  for (int tile = 0; tile < Sums<kWide>::kTiles; ++tile) {
    uint32_t a[4];
    load_matrices(a, from + tile * tile_step<kWide>(image) * 16);
    multiply_add(sums.of[tile][0], a[0], a[1], a[2], a[3], lower);
    multiply_add(sums.of[tile][1], a[0], a[1], a[2], a[3], upper);
  }
}

// Sums that begin with the bias.
template <int kChannels, bool kWide>
__device__ inline void begin_sums(Sums<kWide>& sums, const void* bias, int64_t member, int filter, int lane) {
  float2 of[2] = {};
  if (bias != nullptr) {
    const uint32_t* from = static_cast<const uint32_t*>(bias) + (member * kChannels + filter) / 2 + lane % 4;
    of[0] = unpack(from[0]);
    of[1] = unpack(from[4]);
  }
#pragma unroll
  for (int i = 0; i < 2 * Sums<kWide>::kTiles; ++i) {
    float (&sum)[4] = sums.of[i / 2][i % 2];
    sum[0] = sum[2] = of[i % 2].x;
    sum[1] = sum[3] = of[i % 2].y;
  }
}

// One link for one task: reads one place, writes the other.
template <int kChannels, bool kWide>
__device__ inline void run_link(const ChainArgs& args, int number, const Task& task, const Image& image,
                                const Filters& filters, uint32_t zeros, int64_t member, int lane) {
  const ChainLink& link = args.links[number];
  const int64_t mask_at = task.masks + int64_t(link.mask) * args.tasks + task.number;
  Mask<kWide> mask{};
  if (link.gated) mask.load(args.masks, mask_at, lane);  // on its way meanwhile
  const int size = kChannels / kChannelsOfPlane * image.pixels;
  const uint32_t from = shared_address(task.image + number % 2 * size);
  uint4* to = task.image + (1 - number % 2) * size;

  Sums<kWide> sums;
  begin_sums<kChannels, kWide>(sums, link.bias, member, task.filter, lane);
  if (link.residual) add_place<kWide>(sums, task, image, to, lane);
  if constexpr (kWide) {
    convolve_wide<kChannels>(sums, task, image, from, zeros, filters, lane);
  } else {
    convolve_narrow<kChannels>(sums, task, image, from, zeros, filters, lane);
  }

  const auto pair = [&](int word) { return &sums.of[word / 4][word / 2 % 2][word % 2 * 2]; };
  if (link.relu) {
    for_words<kWide>(task, image, to, lane, [&](int number, uint32_t* word) {
      const float* values = pair(number);
      *word = pack_positive(values[0], values[1]);
      mask.note(number, *word);
    });
    if (args.masks != nullptr) mask.store(args.masks, mask_at, lane);
  } else if (link.gated) {
    for_words<kWide>(task, image, to, lane, [&](int number, uint32_t* word) {
      *word = mask.gated(number, pack(pair(number)[0], pair(number)[1]));
    });
  } else {
    for_words<kWide>(task, image, to, lane,
                     [&](int number, uint32_t* word) { *word = pack(pair(number)[0], pair(number)[1]); });
  }
}

// Calls body(number, place) for the 16-byte pieces of an image: in device memory they lie by pixel, in a place by
// plane.
template <int kPlanes, class Body>
__device__ inline void for_pieces(const Image& image, const Body& body) {
  for (int i = int(threadIdx.x); i < kPlanes * image.pixels; i += int(blockDim.x)) {
    body(i, i % kPlanes * image.pixels + i / kPlanes);
  }
}

__device__ inline uint4 gated_by(uint4 values, const uint4& gates) {
  const uint32_t of_gate[4] = {gates.x, gates.y, gates.z, gates.w};
  uint32_t of[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 other = unpack(of_gate[i]), value = unpack(of[i]);
    of[i] = pack(other.x <= 0 ? 0 : value.x, other.y <= 0 ? 0 : value.y);
  }
  return make_uint4(of[0], of[1], of[2], of[3]);
}

// Stores an image; with `gate` only what it lets through.
template <int kPlanes>
__device__ inline void store_image(void* to, const void* gate, int64_t offset, const uint4* place, const Image& image) {
  for_pieces<kPlanes>(image, [&](int piece, int at) {
    uint4 values = place[at];
    if (gate != nullptr) values = gated_by(values, static_cast<const uint4*>(gate)[offset + piece]);
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
    for (int image_of = 0; image_of < images; ++image_of) {
      uint4* to = places + (2 * image_of + place) * size;
      const uint4* from = static_cast<const uint4*>(tensor) + offset + image_of * size;
      for_pieces<kPlanes>(image, [&](int piece, int at) { start_copy(to + at, from + piece); });
    }
  };
  if (threadIdx.x == 0) *zeros = make_uint4(0, 0, 0, 0);
  start_place(args.x, 0);
  if (args.residual != nullptr) start_place(args.residual, 1);
  start_weights(0);

  const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
  const auto for_tasks = [&](const auto& body) {
    for (int i = warp; i < images * args.tasks; i += int(blockDim.x) / kWarpSize) {
      const int of_image = int(divide(uint32_t(i), args.by_tasks)), number = i - of_image * args.tasks;
      const int group = int(divide(uint32_t(number), args.by_strips)),
                strip = number - group * int(args.by_strips.value);
      const int line = int(divide(uint32_t(strip), args.by_columns)),
                column = strip - line * int(args.by_columns.value);
      const int64_t sample = member * args.samples + first + of_image;
      body(Task{places + of_image * 2 * size, sample * args.masks_of_sample * args.tasks, number, line * kRows,
                column * 16, group * kTaskFilters});
    }
  };
  if (args.gated_by >= 0) {
    finish_copies();
    for_tasks([&](const Task& task) {
      Mask<kWide> mask;
      mask.load(args.masks, task.masks + int64_t(args.gated_by) * args.tasks + task.number, lane);
      for_words<kWide>(task, image, task.image, lane,
                       [&](int number, uint32_t* word) { *word = mask.gated(number, *word); });
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
  for (int image_of = 0; image_of < images; ++image_of) {
    const uint4* of = places + 2 * image_of * size;
    const int64_t to = offset + image_of * size;
    store_image<kPlanes>(args.out, args.gate, to, of + args.count % 2 * size, image);
    if (args.before_last != nullptr) {
      store_image<kPlanes>(args.before_last, nullptr, to, of + (1 - args.count % 2) * size, image);
    }
  }
}

}  // namespace ceat::cuda
