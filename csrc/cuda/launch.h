// What the torch side (ops.cpp) hands to the kernels: plain pointers and numbers, so that the .cu files need no torch
// header and ops.cpp no CUDA header.
//
// Every launch_* call enqueues on `stream` (a cudaStream_t), neither waits nor allocates, and returns nullptr or the
// text of the CUDA error.
#pragma once

#include <cstdint>

#include "../loss_math.h"
#include "plan.h"

namespace ceat::cuda {

enum class DType { kFloat, kDouble, kHalf, kBFloat16 };

// (M, B, K) whose classes are contiguous; strides count elements.
struct Logits {
  const void* data;
  int64_t member_stride, sample_stride;
};

// (B,)
struct Labels {
  const int64_t* data;
  int64_t stride;
};

// Outputs are contiguous. Losses and parts are in the compute type: fp64 for fp64 logits, else fp32.
//
// Reduction over the batch: each block writes its share to `sums`, (M, blocks), which a second kernel adds up in
// `loss`, (M,). With one block `sums` is `loss` and nothing is left to add. Without a reduction `loss` is (M, B) and
// `sums` null.
struct CeatLossArgs {
  Plan plan;
  Shape shape;
  Logits adv, nat;
  Labels target;
  CeatSettings settings;
  double scale;  // of the gradients and of the reduced loss: 1, or 1/B for the mean
  void *loss, *sums;
  void *adv_grad, *nat_grad;  // (M, B, K), or null
  void* parts;                // (7, M, B), or null
};
const char* launch_ceat_loss(DType dtype, const CeatLossArgs& args, void* stream);

// As above with one loss for all members: `sums` is (blocks,), `loss` () or (B,).
struct EnsembleArgs {
  Plan plan;
  Shape shape;
  Logits logits;
  Labels target;
  double scale;
  void *loss, *sums;
  void* grad;  // (M, B, K), or null
};
const char* launch_ensemble_cross_entropy(DType dtype, const EnsembleArgs& args, void* stream);

// Dense, of one layout, `count` elements each; x_adv, x and next in x_type (kFloat or kDouble).
struct PgdArgs {
  DType x_type, grad_type;
  const void *x_adv, *grad, *x;
  void* next;
  int64_t count;
  double alpha, eps;
};
const char* launch_pgd_step(const PgdArgs& args, void* stream);

// Gradients (M, B, K), contiguous; loss_grad[m, b] in the compute type, strides in elements, 0 where it is expanded.
struct ScaleArgs {
  DType dtype;
  Shape shape;
  const void *adv_grad, *nat_grad, *loss_grad;
  int64_t member_stride, sample_stride;
  void *adv_out, *nat_out;
};
const char* launch_scale_gradients(const ScaleArgs& args, void* stream);

}  // namespace ceat::cuda
