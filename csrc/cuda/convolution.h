// What a convolution of all members is made of; see convolution.cuh.
#pragma once

#include <cstdint>

#include "divisor.h"
#include "plan.h"

namespace ceat::cuda {

// How output pixels find their taps: the sum over (u, v) of in[s r + u - 1, s q + v - 1] W[u, v] with the stride s, or
// the gradient of that with stride 2 for its input, in[(r + 1 - u) / 2, (q + 1 - v) / 2] W[u, v] where 2 divides both.
enum class Direction { kStride1, kStride2, kTransposed2 };

// bf16, contiguous, aligned to 16 bytes: x (M, B, height, width, channels) and out, residual and gate
// (M, B, out_height, out_width, filters); bias (M, filters). Where gate is not positive, out is 0.
struct ConvolutionArgs {
  const void *x, *weights;  // weights (M, taps, channels / 16, filters / 8, 32 lanes, 4), see convolution.cuh
  const void *bias, *residual, *gate;  // or null
  void* out;
  int members, channels, filters;
  int64_t samples;
  int height, width, out_height, out_width;
  Divisor by_height, by_width;  // of the grid of output pixels, see set_grid
  Direction direction;
  bool point;    // only the middle tap, and `weights` has no other
  bool flipped;  // tap (u, v) has the weights of (2 - u, 2 - v)
  bool relu;
};

// With kTransposed2 the taps of an output pixel depend on whether its row and its column are even. Pixels of one of the
// four kinds are computed together; a grid of them has half the sides.
inline void set_grid(ConvolutionArgs& args) {
  const int part = args.direction == Direction::kTransposed2 ? 2 : 1;
  args.by_height = divisor(uint32_t((args.out_height + part - 1) / part));
  args.by_width = divisor(uint32_t((args.out_width + part - 1) / part));
}

const char* launch_convolution(const ConvolutionArgs& args, void* stream);

}  // namespace ceat::cuda
