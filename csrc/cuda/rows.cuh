// Rows of logits held by groups of threads (see plan.h), and the sums over groups and blocks.
//
// Every sum is a butterfly or a strided walk in a fixed order: results are the same from run to run.
#pragma once

#include <cmath>

#include "elements.cuh"

namespace ceat::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

// `lanes` is a power of two and groups start at its multiples. All threads of the warp must call.
template <class V>
__device__ V group_sum(V value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullWarp, value, offset);
  return value;
}

template <class V>
__device__ V group_max(V value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    const V other = __shfl_xor_sync(kFullWarp, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

template <class V>
__device__ V* shared_memory() {
  extern __shared__ double ceat_shared_memory[];
  return reinterpret_cast<V*>(ceat_shared_memory);
}

// The place of this thread. Threads beyond the last row take part in shuffles and barriers with zero classes.
struct Place {
  int lane, lanes;
  int member, local;  // local: index of the sample within the block
  int64_t sample;
  int classes;
  bool in_block, active;
};

__device__ inline Place place_of_thread(const Plan& plan, const Shape& shape, int lanes) {
  const int group = int(threadIdx.x) / lanes;
  Place at;
  at.lane = int(threadIdx.x) % lanes;
  at.lanes = lanes;
  at.member = group / plan.samples;
  at.local = group % plan.samples;
  at.sample = int64_t(blockIdx.x) * plan.samples + at.local;
  at.in_block = at.member < shape.members;
  at.active = at.in_block && at.sample < shape.batch;
  at.classes = at.active ? shape.classes : 0;
  return at;
}

// -1 for a label outside [0, K).
__device__ inline int label_at(const Labels& target, const Place& at) {
  const int64_t label = at.active ? target.data[at.sample * target.stride] : -1;
  return label >= 0 && label < at.classes ? int(label) : -1;
}

template <class T>
__device__ const T* row_at(const Logits& logits, const Place& at) {
  const T* data = static_cast<const T*>(logits.data);
  return at.active ? data + at.member * logits.member_stride + at.sample * logits.sample_stride : data;
}

__device__ inline int64_t row_index(const Shape& shape, const Place& at) { return at.member * shape.batch + at.sample; }

// Both kinds of rows number a lane's classes 0 <= i < count() and deal the classes out in packs of kVector. After
// exponentiate(max), exp(i) is e^(z - max). Classes past the end have the logit -inf and so the probability 0.

template <class T, RowKind kKind, int kLanes, int kPerLane, int kPack>
struct ResidentRow {
  using Element = T;
  using V = Compute<T>;
  static constexpr int kVector = kPack;
  static constexpr int kMaxThreads = max_threads(kKind, std::is_same_v<V, double>);
  static constexpr bool kPairs = kKind == RowKind::kWarp && !std::is_same_v<V, double>;  // see kPairedThreads
  static_assert(kPerLane % kPack == 0);

  V values[kPerLane];
  int lane;

  static __device__ int lanes(const Plan&) { return kLanes; }
  __device__ static constexpr int count() { return kPerLane; }
  __device__ int class_of(int i) const { return (i / kPack * kLanes + lane) * kPack + i % kPack; }

  __device__ ResidentRow(const T* row, const Place& at, bool vectorised) : lane(at.lane) {
#pragma unroll
    for (int i = 0; i < kPerLane; i += kPack) {
      const int first = class_of(i);
      if (vectorised && first < at.classes) {
        const auto pack = *reinterpret_cast<const Pack<T, kPack>*>(row + first);
#pragma unroll
        for (int j = 0; j < kPack; ++j) values[i + j] = widen(pack.values[j]);
      } else {
#pragma unroll
        for (int j = 0; j < kPack; ++j) values[i + j] = first + j < at.classes ? widen(row[first + j]) : V(-INFINITY);
      }
    }
  }

  __device__ V logit(int i) const { return values[i]; }
  __device__ V exp(int i) const { return values[i]; }
  __device__ void exponentiate(V max) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) values[i] = exp_nonpositive(values[i] - max);
  }
};

template <class T>
struct StreamedRow {
  using Element = T;
  using V = Compute<T>;
  static constexpr int kVector = 1;
  static constexpr int kMaxThreads = max_threads(RowKind::kStreamed, std::is_same_v<V, double>);
  static constexpr bool kPairs = false;

  const T* row;
  int lane, lane_count, classes;
  V shift;

  static __device__ int lanes(const Plan& plan) { return plan.lanes; }
  __device__ int count() const { return (classes + lane_count - 1) / lane_count; }
  __device__ int class_of(int i) const { return i * lane_count + lane; }

  __device__ StreamedRow(const T* data, const Place& at, bool)
      : row(data), lane(at.lane), lane_count(at.lanes), classes(at.classes), shift(0) {}

  __device__ V logit(int i) const {
    const int k = class_of(i);
    return k < classes ? widen(row[k]) : V(-INFINITY);
  }
  __device__ V exp(int i) const { return exp_nonpositive(logit(i) - shift); }
  __device__ void exponentiate(V max) { shift = max; }
};

// Writes kCount values to classes first, first + 1, ... of a contiguous row.
template <class G, int kCount, class V>
__device__ void store_pack(G* row, int first, int classes, bool vectorised, const V (&values)[kCount]) {
  if (vectorised && first < classes) {
    Pack<G, kCount> pack;
#pragma unroll
    for (int j = 0; j < kCount; ++j) pack.values[j] = narrow<G>(values[j]);
    *reinterpret_cast<Pack<G, kCount>*>(row + first) = pack;
  } else {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if (first + j < classes) row[first + j] = narrow<G>(values[j]);
    }
  }
}

// Turns the logits of the row into e^(z - max). `data` is the row in memory: in registers, finding its true logit would
// take a search.
template <class Row>
__device__ SoftmaxRow<typename Row::V> softmax_of(Row& row, const typename Row::Element* data, int label, int lanes) {
  using V = typename Row::V;
  V max = V(-INFINITY);
#pragma unroll
  for (int i = 0; i < row.count(); ++i) max = row.logit(i) > max ? row.logit(i) : max;
  max = group_max(max, lanes);
  row.exponentiate(max);
  V other = 0;
#pragma unroll
  for (int i = 0; i < row.count(); ++i) other += row.class_of(i) == label ? V(0) : row.exp(i);
  other = group_sum(other, lanes);
  const V true_logit = label >= 0 ? widen(data[label]) : V(0);
  return softmax_row(max, true_logit, exp_nonpositive(true_logit - max), other);
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

// Calls body(RowTag<Row>{}) with the row type of the plan.
template <class T, class Body>
const char* with_row(RowKind kind, const Body& body) {
  switch (kind) {
    case RowKind::kThread: return body(RowTag<ResidentRow<T, RowKind::kThread, 1, kThreadClasses, 2>>{});
    case RowKind::kSubWarp: return body(RowTag<ResidentRow<T, RowKind::kSubWarp, 8, kSubWarpClasses / 8, 4>>{});
    case RowKind::kWarp: return body(RowTag<ResidentRow<T, RowKind::kWarp, kWarpSize, kWarpClasses / kWarpSize, 4>>{});
    case RowKind::kStreamed: return body(RowTag<StreamedRow<T>>{});
  }
  return "unknown row kind";
}

}  // namespace ceat::cuda
