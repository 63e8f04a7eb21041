// What the CPU ops need from the kernels, which are compiled once per instruction set.
#pragma once

#include <cstdint>

namespace ceat_cpu {

enum class DType { kFloat, kDouble, kBFloat16, kHalf };

// Logits (M, B, K) whose classes are contiguous; strides count elements.
struct Logits {
  const void* data;
  int64_t member_stride, sample_stride;
};

struct Shape {
  int64_t members, samples, classes;
};

struct Scalars {
  double ce_coefficient, nat_coefficient, adv_coefficient, nat_exponent, adv_exponent, max_weight;
  int pair_reduction, reduction;
  bool detach_nat;
};

// Outputs are contiguous; gradients and parts may be null. fp32, or fp64 for fp64 logits, except the gradients.
struct CeatProblem {
  DType dtype;
  Shape shape;
  Logits adv, nat;
  const int64_t* target;
  Scalars settings;
  double scale;  // of the gradients: 1, or 1/B for the mean over the batch
  void *loss, *adv_grad, *nat_grad, *parts;
};

struct EnsembleProblem {
  DType dtype;
  Shape shape;
  Logits logits;
  const int64_t* target;
  double scale;
  void *loss, *grad;
};

// Contiguous, `x_type` is kFloat or kDouble.
struct PgdProblem {
  DType x_type, grad_type;
  const void *x_adv, *grad, *x;
  double alpha, eps;
  void* next;
};

// out[row, :] = in[row, :] * factor, contiguous rows.
struct ScaleProblem {
  DType dtype;
  int64_t classes;
  const void* in;
  const double* factors;  // one per row
  void* out;
};

// Filters and input channels come in blocks of this many.
constexpr int64_t kChannelBlock = 16;
// Products of a tile of 4x4 outputs: one per pixel of the 6x6 inputs that it depends on.
constexpr int64_t kTilePoints = 36;
// Tiles that are transformed before they are multiplied: their inputs at all points stay in the second-level cache.
constexpr int64_t kTileBlock = 24;

// weight[f, c, y, x] of 3x3 filters, strides in elements; out: (filters / 16, 36, channels, 16).
struct FilterProblem {
  const float* weight;
  int64_t strides[4];
  int64_t filters, channels;
  float* out;
};

// What a convolution does to each sum: + bias[filter] + residual, ReLU, and 0 where `gate` is not positive. Each may be
// missing (null or false); residual and gate are of the output's shape, and all of its type.
struct Epilogue {
  const void *bias, *residual, *gate;
  bool relu;
};

// 3x3 with stride 1 and padding 1, of every member: x (members, samples, height, width, channels), out (members,
// samples, height, width, filters), bias (members, filters), all kFloat or all kBFloat16. filters_at_points (members,
// filters / 16, 36, words, 16, channels per word), see inner_product.h.
struct ConvolutionProblem {
  DType dtype;
  const void *x, *filters_at_points;
  Epilogue epilogue;
  int64_t members, samples, height, width, channels, filters;
  void* out;

  int64_t tiles_down() const { return (height + 3) / 4; }
  int64_t tiles_across() const { return (width + 3) / 4; }
  int64_t tiles() const { return samples * tiles_down() * tiles_across(); }
  int64_t blocks() const { return (tiles() + kTileBlock - 1) / kTileBlock; }  // of one member
};

// Output pixels that direct kernels compute at a time.
constexpr int64_t kPixelBlock = 96;
constexpr int kMaxTaps = 9;

// Output pixels (first + step * i, i < count) along each axis that use the same taps of the filters, each at input
// pixel in_step * i + offset.
struct PixelGrid {
  int64_t first[2], step, count[2], in_step;
  int taps, tap[kMaxTaps], offset[kMaxTaps][2];
};
constexpr int kMaxGrids = 4;

// Any taps and channels, by its definition: kFloat, or kBFloat16 with channels in pairs; weights (members,
// filters / 16, taps, words, 16, channels per word). The first grid has the most pixels.
struct DirectProblem {
  DType dtype;
  const void *x, *weights;
  Epilogue epilogue;
  int64_t members, samples, in_height, in_width, channels, out_height, out_width, filters, taps;
  int grids;
  PixelGrid grid[kMaxGrids];
  void* out;

  int64_t pixels() const { return samples * grid[0].count[0] * grid[0].count[1]; }
  int64_t blocks() const { return (pixels() + kPixelBlock - 1) / kPixelBlock; }  // of one member
};

// Each call handles samples, elements, rows, blocks of filters, or blocks of all members' tiles or pixels [begin, end).
struct Kernels {
  const char* name;
  void (*ceat_loss)(const CeatProblem&, int64_t begin, int64_t end);
  void (*ensemble_cross_entropy)(const EnsembleProblem&, int64_t begin, int64_t end);
  void (*pgd_step)(const PgdProblem&, int64_t begin, int64_t end);
  void (*scale_rows)(const ScaleProblem&, int64_t begin, int64_t end);
  void (*transform_filters)(const FilterProblem&, int64_t begin, int64_t end);
  void (*convolve_tiles)(const ConvolutionProblem&, int64_t begin, int64_t end);
  void (*convolve_pixels)(const DirectProblem&, int64_t begin, int64_t end);
};

extern const Kernels kernels_portable;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;

// The best set that this CPU runs.
const Kernels& kernels();

}  // namespace ceat_cpu
