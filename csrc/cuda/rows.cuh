// Rows of logits held by groups of threads (see plan.h), and the sums over groups and blocks.
//
// Every sum is a butterfly or a strided walk in a fixed order: results are the same from run to run.
#pragma once

#include <cmath>
#include <initializer_list>

#include "elements.cuh"

namespace ceat::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

// NaN gives way to numbers: a row that holds one has a sum that is NaN.
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline double larger(double a, double b) { return fmax(a, b); }

// `lanes` is a power of two and groups start at its multiples. All threads of the warp must call.
template <class V>
__device__ V group_sum(V value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullWarp, value, offset);
  return value;
}

template <class V>
__device__ V group_max(V value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    value = larger(value, __shfl_xor_sync(kFullWarp, value, offset));
  }
  return value;
}

// The place of this thread. Threads beyond the last row take part in shuffles and barriers with zero classes.
struct Place {
  int lane, lanes;
  int member, local;  // local: index of the sample within the block
  int64_t sample;
  int classes;
  int label;  // -1 for one outside [0, K)
  bool in_block, active;
};

__device__ inline Place place_of_thread(const Plan& plan, const Shape& shape, const Labels& target, int lanes) {
  const int group = int(threadIdx.x) / lanes;
  Place at;
  at.lane = int(threadIdx.x) % lanes;
  at.lanes = lanes;
  at.member = int(divide(uint32_t(group), plan.by_samples));
  at.local = group - at.member * plan.samples;
  at.sample = int64_t(blockIdx.x) * plan.samples + at.local;
  at.in_block = at.member < shape.members;
  at.active = at.in_block && at.sample < shape.batch;
  at.classes = at.active ? shape.classes : 0;
  const int64_t label = at.active ? target.data[at.sample * target.stride] : -1;
  at.label = label >= 0 && label < at.classes ? int(label) : -1;
  return at;
}

template <class T>
__device__ const T* row_at(const Logits& logits, const Place& at) {
  const T* data = static_cast<const T*>(logits.data);
  return at.active ? data + at.member * logits.member_stride + at.sample * logits.sample_stride : data;
}

__device__ inline int64_t row_index(const Shape& shape, const Place& at) { return at.member * shape.batch + at.sample; }

// The label's logit stands by itself. Where there is no label nothing comes of it. It waits for the label, which what
// was fetched before must not.
template <class T>
__device__ Compute<T> true_logit_of(const T* row, const Place& at) {
  __syncwarp();
  return at.label >= 0 ? widen(row[at.label]) : Compute<T>(0);
}

// z -> e^(z - max), for z <= max.
template <class T>
struct ExpBelow {  // of fp64
  double max;
  __device__ explicit ExpBelow(double of_row) : max(of_row) {}
  __device__ double operator()(double z) const { return exp_nonpositive(z - max); }
};

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

// 2^h for the rounded h = d log2 e, and a correction by the remainder d - h ln 2. As h is rounded down, the remainder
// is not negative; saturating it drops what is not a number there where d is -inf.
template <>
struct ExpBelow<float> {
  float max;
  __device__ explicit ExpBelow(float of_row) : max(of_row) {}
  __device__ float operator()(float z) const {
    const float d = z - max, h = __fmul_rd(d, kLog2e), power = exp2_rough(h);
    return fmaf(power, __saturatef(fmaf(-h, kLn2, d)), power);
  }
};

// What this loses, d 2^-24 of the value for d = z - max, is little beside the rounding of such logits.
struct RoughExpBelow {
  float max;
  __device__ explicit RoughExpBelow(float of_row) : max(of_row) {}
  __device__ float operator()(float z) const { return exp2_rough((z - max) * kLog2e); }
};
template <>
struct ExpBelow<__half> : RoughExpBelow {
  using RoughExpBelow::RoughExpBelow;
};
template <>
struct ExpBelow<__nv_bfloat16> : RoughExpBelow {
  using RoughExpBelow::RoughExpBelow;
};

// Classes first, first + 1, ... of a row; others of it past its end: loads that depend on nothing can all be on their
// way at once, and the seven predicates of a thread would not do for a row.
template <class T, int kPack>
__device__ Pack<T, kPack> fetch_pack(const T* row, int first, int classes) {
  return *reinterpret_cast<const Pack<T, kPack>*>(row + (first < classes ? first : 0));
}

// With -inf past the end, and at the label, so that its probability is 0 and all sums run over the other classes.
template <class T, int kPack>
__device__ Pack<Compute<T>, kPack> other_logits(const Pack<T, kPack>& pack, int first, const Place& at) {
  Pack<Compute<T>, kPack> logits;
#pragma unroll
  for (int j = 0; j < kPack; ++j) logits.values[j] = first < at.classes ? widen(pack.values[j]) : Compute<T>(-INFINITY);
  const int offset = at.label - first;
  if (unsigned(offset) < unsigned(kPack)) {
#pragma unroll
    for (int j = 0; j < kPack; ++j) logits.values[j] = j == offset ? Compute<T>(-INFINITY) : logits.values[j];
  }
  return logits;
}

// Both kinds of rows deal the classes out to their lanes in packs of kPack, which divides K. `fetch` starts to load a
// row: the rows of both inputs are on their way before one is looked at. After exponentiate(max), exps(i) holds e^(z -
// max).

template <class T, RowKind kKind, int kLanes, int kPerLane, int kPackOf>
struct ResidentRow {
  using Element = T;
  using V = Compute<T>;
  static constexpr int kPack = kPackOf;
  static constexpr int kMaxThreads = max_threads(kKind, std::is_same_v<V, double>);
  static constexpr bool kCrowded = kKind == RowKind::kWarp && !std::is_same_v<V, double>;  // see kCrowdedThreads
  static constexpr int kPacks = (kPerLane + kPack - 1) / kPack;

  struct Fetched {
    Pack<T, kPack> packs[kPacks];
  };

  Pack<V, kPack> packs[kPacks];
  int lane;

  static __device__ int lanes(const Plan&) { return kLanes; }
  __device__ static constexpr int count() { return kPacks; }
  static __device__ int first_class(int i, int lane) { return (i * kLanes + lane) * kPack; }
  __device__ int first_class(int i) const { return first_class(i, lane); }

  static __device__ Fetched fetch(const T* row, const Place& at) {
    Fetched fetched;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      fetched.packs[i] = fetch_pack<T, kPack>(row, first_class(i, at.lane), at.classes);
    }
    return fetched;
  }

  __device__ ResidentRow(const Fetched& fetched, const Place& at) : lane(at.lane) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) packs[i] = other_logits(fetched.packs[i], first_class(i), at);
  }

  __device__ const Pack<V, kPack>& logits(int i) const { return packs[i]; }
  __device__ const Pack<V, kPack>& exps(int i) const { return packs[i]; }
  __device__ void exponentiate(V max) {
    const ExpBelow<T> exp_below(max);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
#pragma unroll
      for (int j = 0; j < kPack; ++j) packs[i].values[j] = exp_below(packs[i].values[j]);
    }
  }
};

template <class T, int kPackOf>
struct StreamedRow {
  using Element = T;
  using V = Compute<T>;
  static constexpr int kPack = kPackOf;
  static constexpr int kMaxThreads = max_threads(RowKind::kStreamed, std::is_same_v<V, double>);
  static constexpr bool kCrowded = false;

  using Fetched = const T*;

  const T* row;
  const Place& at;
  V max;

  static __device__ int lanes(const Plan& plan) { return plan.lanes; }
  __device__ int count() const { return (at.classes + kPack * at.lanes - 1) / (kPack * at.lanes); }
  __device__ int first_class(int i) const { return (i * at.lanes + at.lane) * kPack; }

  static __device__ Fetched fetch(const T* row, const Place&) { return row; }
  __device__ StreamedRow(Fetched data, const Place& place) : row(data), at(place), max(0) {}

  __device__ Pack<V, kPack> logits(int i) const {
    const int first = first_class(i);
    return other_logits(fetch_pack<T, kPack>(row, first, at.classes), first, at);
  }
  __device__ Pack<V, kPack> exps(int i) const {
    const ExpBelow<T> exp_below(max);
    auto pack = logits(i);
#pragma unroll
    for (int j = 0; j < kPack; ++j) pack.values[j] = exp_below(pack.values[j]);
    return pack;
  }
  __device__ void exponentiate(V of_row) { max = of_row; }
};

// Writes classes first, first + 1, ... of a contiguous row.
template <class G, class V, int kPack>
__device__ void store_pack(G* row, int first, int classes, const Pack<V, kPack>& pack) {
  if (first >= classes) return;
  Pack<G, kPack> narrowed;
#pragma unroll
  for (int j = 0; j < kPack; ++j) narrowed.values[j] = narrow<G>(pack.values[j]);
  *reinterpret_cast<Pack<G, kPack>*>(row + first) = narrowed;
}

// A contiguous row without a label.
template <class G>
__device__ void store_zeros(G* row, const Place& at) {
#pragma unroll 1
  for (int k = at.lane; k < at.classes; k += at.lanes) row[k] = narrow<G>(Compute<G>(0));
}

// The thread that holds the label among its packs: what it writes there later comes after the pack.
template <class Row>
__device__ bool holds_label(const Place& at) {
  return at.label >= 0 && at.label / Row::kPack % at.lanes == at.lane;
}

// Turns the logits of the row into e^(z - max).
template <class Row>
__device__ SoftmaxRow<typename Row::V> softmax_of(Row& row, typename Row::V true_logit, const Place& at) {
  using V = typename Row::V;
  V max = true_logit;
#pragma unroll
  for (int i = 0; i < row.count(); ++i) {
    const auto logits = row.logits(i);
#pragma unroll
    for (int j = 0; j < Row::kPack; ++j) max = larger(max, logits.values[j]);
  }
  max = group_max(max, at.lanes);
  row.exponentiate(max);
  V other = 0;
#pragma unroll
  for (int i = 0; i < row.count(); ++i) {
    const auto exps = row.exps(i);
#pragma unroll
    for (int j = 0; j < Row::kPack; ++j) other += exps.values[j];
  }
  other = group_sum(other, at.lanes);
  return softmax_row(max, true_logit, ExpBelow<typename Row::Element>(max)(true_logit), other);
}

// out[r * stride] = scale * sum of row r of the (rows, count) matrix in shared memory, one warp per row. The caller
// has synchronised the block.
template <class V>
__device__ void block_sums(const V* matrix, int rows, int count, V scale, V* out, int64_t stride) {
  const int lane = int(threadIdx.x) % kWarpSize;
  for (int r = int(threadIdx.x) / kWarpSize; r < rows; r += int(blockDim.x) / kWarpSize) {
    V sum = 0;
    for (int i = lane; i < count; i += kWarpSize) sum += matrix[r * count + i];
    sum = group_sum(sum, kWarpSize);
    if (lane == 0) out[r * stride] = sum * scale;
  }
}

// out[r] = sum of row r of a (gridDim.x, count) matrix.
template <class V>
__global__ void __launch_bounds__(kThreads) sum_rows_kernel(const V* matrix, int64_t count, V* out) {
  V* const shares = shared_memory<V>();
  const V* row = matrix + blockIdx.x * count;
  V sum = 0;
#pragma unroll 16  // loads on their way at once
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += row[i];
  shares[threadIdx.x] = sum;
  __syncthreads();
  block_sums(shares, 1, kThreads, V(1), out + blockIdx.x, 1);
}

// The second stage of a reduction over the batch, where the first left more than one share per row.
template <class V>
const char* add_up_sums(const Plan& plan, int rows, const void* sums, void* loss, void* stream) {
  if (sums == nullptr || plan.blocks == 1) return nullptr;
  return launch(sum_rows_kernel<V>, rows, kThreads, kThreads * sizeof(V), stream, static_cast<const V*>(sums),
                plan.blocks, static_cast<V*>(loss));
}

template <class T, int kPack>
bool rows_aligned(const Logits& logits) {
  return is_aligned<T, kPack>(logits.data) && logits.member_stride % kPack == 0 && logits.sample_stride % kPack == 0;
}

template <class Row>
struct RowTag {
  using type = Row;
};

template <class T, int kThreadPack, int kPack, class Body>
const char* with_packed_row(RowKind kind, const Body& body) {
  switch (kind) {
    case RowKind::kThread: return body(RowTag<ResidentRow<T, RowKind::kThread, 1, kThreadClasses, kThreadPack>>{});
    case RowKind::kSubWarp: return body(RowTag<ResidentRow<T, RowKind::kSubWarp, 8, kSubWarpClasses / 8, kPack>>{});
    case RowKind::kWarp:
      if constexpr (kPack > 1) {  // long rows that are not aligned are rare: no code of their own
        return body(RowTag<ResidentRow<T, RowKind::kWarp, kWarpSize, kWarpClasses / kWarpSize, kPack>>{});
      }
      [[fallthrough]];
    case RowKind::kStreamed: return body(RowTag<StreamedRow<T, kPack>>{});
  }
  return "unknown row kind";
}

// Calls body(RowTag<Row>{}) with the row type of the plan, for logits that are all in the given places.
template <class T, class Body>
const char* with_row(const Plan& plan, int classes, std::initializer_list<Logits> all, const Body& body) {
  constexpr int kThreadPack = 2, kPack = 4;
  const bool thread = plan.kind == RowKind::kThread;
  bool packed = classes % (thread ? kThreadPack : kPack) == 0;
  for (const Logits& logits : all) {
    packed = packed && (thread ? rows_aligned<T, kThreadPack>(logits) : rows_aligned<T, kPack>(logits));
  }
  return packed ? with_packed_row<T, kThreadPack, kPack>(plan.kind, body) : with_packed_row<T, 1, 1>(plan.kind, body);
}

}  // namespace ceat::cuda
