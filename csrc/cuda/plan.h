// How a loss problem is laid out over thread blocks. Host arithmetic only.
//
// A row is the logits of one member for one sample (the adversarial and the clean ones together). A group of `lanes`
// neighbouring threads holds one row, and a block holds all members of its `samples` samples, because the members'
// losses depend on each other's true-class probabilities.
#pragma once

#include <algorithm>
#include <cstdint>

#include "divisor.h"

namespace ceat::cuda {

struct Shape {
  int members;
  int64_t batch;
  int classes;
};

// Where the logits of a row live: in the registers of one thread, of 8 threads, of a warp, or in memory, read anew in
// every pass.
enum class RowKind { kThread, kSubWarp, kWarp, kStreamed };

constexpr int kWarpSize = 32;
constexpr int kThreadClasses = 10, kSubWarpClasses = 128, kWarpClasses = 1024;

// The register budget: 65536 registers of an SM over this many threads. One thread per row leaves room for a whole
// batch of the usual size in one block, which then needs no second launch for the mean.
constexpr int max_threads(RowKind kind, bool is_double) {
  return kind == RowKind::kThread ? (is_double ? 512 : 768) : kind == RowKind::kStreamed ? 512 : 256;
}
// A warp's rows take many registers: blocks of few threads, kCrowdedBlocks of which share a multiprocessor, so that
// some load while others compute.
constexpr int kCrowdedThreads = 128, kCrowdedBlocks = 4;
constexpr int kMaxMembers = max_threads(RowKind::kStreamed, true);
// Class numbers are 32 bits wide, with room for the padding of a row.
constexpr int kMaxClasses = 1 << 30;

struct Plan {
  RowKind kind;
  int lanes, samples, threads;
  int64_t blocks;
  Divisor by_samples;
};

inline RowKind row_kind(int classes) {
  return classes <= kThreadClasses    ? RowKind::kThread
         : classes <= kSubWarpClasses ? RowKind::kSubWarp
         : classes <= kWarpClasses    ? RowKind::kWarp
                                      : RowKind::kStreamed;
}

// Needs 1 <= members <= kMaxMembers.
inline Plan make_plan(const Shape& shape, bool is_double) {
  Plan plan{};
  plan.kind = row_kind(shape.classes);
  plan.lanes = plan.kind == RowKind::kThread ? 1 : plan.kind == RowKind::kSubWarp ? 8 : kWarpSize;
  if (shape.members * plan.lanes > max_threads(plan.kind, is_double)) {
    plan.kind = RowKind::kStreamed;
    plan.lanes = kWarpSize;
    while (shape.members * plan.lanes > max_threads(plan.kind, is_double)) plan.lanes /= 2;
  }
  const int64_t block_threads = plan.kind == RowKind::kWarp ? kCrowdedThreads : 256;
  const int64_t sample_threads = int64_t(shape.members) * plan.lanes;
  const bool one_block = shape.batch <= max_threads(plan.kind, is_double) / sample_threads;
  plan.samples = int(std::max<int64_t>(1, one_block ? shape.batch : block_threads / sample_threads));
  plan.threads = int((plan.samples * sample_threads + kWarpSize - 1) / kWarpSize * kWarpSize);
  plan.blocks = (shape.batch + plan.samples - 1) / plan.samples;
  plan.by_samples = divisor(uint32_t(plan.samples));
  return plan;
}

}  // namespace ceat::cuda
