// What a chain of convolutions is made of; see chain.cuh.
#pragma once

#include <cstdint>

#include "divisor.h"
#include "plan.h"

namespace ceat::cuda {

constexpr int kChainTaps = 9;
constexpr int kMaxLinks = 48;

// One convolution of all members, (M, 9, C / 16, C / 8, 32 lanes, 4) bf16: lane 4 g + t of step s and column tile n has
// the weights of filter 8 n + g for the channels 16 s + 2 t, + 1, + 8, + 9.
struct ChainLink {
  const void* weights;
  const void* bias;  // (M, C), or null
  int mask;          // number of the mask that `relu` leaves or `gated` follows
  bool residual;     // add what stood where the sum goes: the input of the link before, or ChainArgs::residual
  bool relu, gated;
};

// bf16, contiguous, aligned to 16 bytes; images (M, B, height, width, C), whose height is a multiple of 8 and whose
// width is 8 or a multiple of 16.
struct ChainArgs {
  const void *x, *residual;  // residual of the first link, or null
  const void* gate;          // or null; out is 0 where it is not positive
  void *out, *before_last;   // before_last: the input of the last link, or null
  void* masks;               // null: ReLUs leave none
  int masks_of_sample;       // each of `tasks` times 32 lanes; 8 bytes of a lane, 4 if the width is 8
  int gated_by;              // mask that x is gated by at the start, or -1
  int channels, members, height, width, tasks;
  int images;  // of a thread block
  Divisor by_tasks, by_strips, by_columns;
  int64_t samples;
  bool turned;  // tap (u, v) has the weights of (2 - u, 2 - v)
  int count;
  ChainLink links[kMaxLinks];
};

// Tasks are numbered by group of 16 filters, then by 8 rows, then by 16 columns.
inline void set_tasks(ChainArgs& args) {
  const int columns = args.width == 8 ? 1 : args.width / 16, strips = args.height / 8 * columns;
  args.tasks = strips * (args.channels / 16);
  args.by_tasks = divisor(uint32_t(args.tasks));
  args.by_strips = divisor(uint32_t(strips));
  args.by_columns = divisor(uint32_t(columns));
}

// Bytes of shared memory that a block with so many images needs.
constexpr int64_t chain_bytes(int height, int width, int channels, int images) {
  return 2 * kChainTaps * channels * channels * 2 + 16 + int64_t(images) * 2 * height * width * channels * 2;
}

const char* launch_chain(const ChainArgs& args, void* stream);

}  // namespace ceat::cuda
