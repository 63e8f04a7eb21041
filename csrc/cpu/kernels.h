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

// Each call handles samples, elements or rows [begin, end).
struct Kernels {
  const char* name;
  void (*ceat_loss)(const CeatProblem&, int64_t begin, int64_t end);
  void (*ensemble_cross_entropy)(const EnsembleProblem&, int64_t begin, int64_t end);
  void (*pgd_step)(const PgdProblem&, int64_t begin, int64_t end);
  void (*scale_rows)(const ScaleProblem&, int64_t begin, int64_t end);
};

extern const Kernels kernels_portable;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;

// The best set that this CPU runs.
const Kernels& kernels();

}  // namespace ceat_cpu
