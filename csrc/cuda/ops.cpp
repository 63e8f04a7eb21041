// CUDA implementations of the ceat_fast ops. Schemas, fake kernels and autograd are in ceat_fast/ops/native.py.
//
// A label outside [0, K) cannot be refused without waiting for the device: its losses and parts are NaN and its
// gradients zero.
#include <torch/csrc/stable/accelerator.h>

#include <limits>
#include <optional>
#include <tuple>

#include "../tensor.h"
#include "chain.h"
#include "convolution.h"
#include "launch.h"

namespace {

using namespace ceat_tensor;
using namespace ceat::cuda;
using torch::stable::accelerator::DeviceGuard;

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat;
    case ScalarType::Double: return DType::kDouble;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kHalf;
    default: STD_TORCH_CHECK(false, "tensors must be float32, float64, bfloat16 or float16");
  }
}

void* current_stream(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

void check_launch(const char* error, const char* op) {
  STD_TORCH_CHECK(error == nullptr, op, ": CUDA kernel launch failed: ", error);
}

void check_device(const Tensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(t.device() == like.device(), name, " is on another device than the other tensors");
}

Shape shape_of(const Tensor& logits) {
  const int64_t members = logits.size(0), classes = logits.size(2);
  STD_TORCH_CHECK(members <= kMaxMembers, "the CUDA kernels take at most M = ", kMaxMembers, " members, got ", members);
  STD_TORCH_CHECK(classes <= kMaxClasses, "the CUDA kernels take at most K = ", kMaxClasses, " classes, got ", classes);
  return {int(members), logits.size(1), int(classes)};
}

Plan checked_plan(const Shape& shape, bool is_double) {
  const Plan plan = make_plan(shape, is_double);
  STD_TORCH_CHECK(plan.blocks <= std::numeric_limits<int32_t>::max(), "batch too large: B = ", shape.batch);
  return plan;
}

Logits logits_of(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }

Labels labels_of(const Tensor& target) { return {target.const_data_ptr<int64_t>(), target.stride(0)}; }

Tensor gradient_for(const Tensor& logits, bool need_grad) {
  const ScalarType dtype = gradient_type(logits);
  return need_grad ? empty(logits, dtype, {logits.size(0), logits.size(1), logits.size(2)}) : empty(logits, dtype, {0});
}

void* data_or_null(const Tensor& t) { return t.numel() > 0 ? t.mutable_data_ptr() : nullptr; }

double batch_scale(int64_t reduction, int64_t batch) {
  return reduction == ceat::kBatchMean ? 1.0 / double(batch) : 1.0;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ceat_loss(const Tensor& adv_in, const Tensor& nat_in, const Tensor& target,
                                                     double ce_coefficient, double nat_coefficient,
                                                     double adv_coefficient, double nat_exponent, double adv_exponent,
                                                     double max_weight, int64_t pair_reduction, int64_t reduction,
                                                     bool detach_nat, bool need_grad, bool need_parts) {
  check_logits(adv_in, target);
  check_same(adv_in, nat_in);
  check_device(target, adv_in, "target");
  const DeviceGuard guard(adv_in.get_device_index());
  const Tensor adv = with_contiguous_rows(adv_in), nat = with_contiguous_rows(nat_in);
  const Shape shape = shape_of(adv);
  const ScalarType loss_dtype = loss_type(adv);
  const Plan plan = checked_plan(shape, loss_dtype == ScalarType::Double);
  const bool reduce = reduction != ceat::kNone;

  Tensor loss = reduce ? empty(adv, loss_dtype, {shape.members}) : empty(adv, loss_dtype, {shape.members, shape.batch});
  Tensor sums = reduce && plan.blocks != 1 ? empty(adv, loss_dtype, {shape.members, plan.blocks}) : loss;
  Tensor adv_grad = gradient_for(adv, need_grad), nat_grad = gradient_for(adv, need_grad);
  Tensor parts = need_parts ? empty(adv, loss_dtype, {7, shape.members, shape.batch}) : empty(adv, loss_dtype, {0});
  if (shape.batch == 0) return {torch::stable::zero_(loss), adv_grad, nat_grad, parts};

  const CeatLossArgs args{
      plan,
      shape,
      logits_of(adv),
      logits_of(nat),
      labels_of(target),
      {ce_coefficient, nat_coefficient, adv_coefficient, nat_exponent, adv_exponent, max_weight, int(pair_reduction),
       int(reduction), detach_nat},
      batch_scale(reduction, shape.batch),
      loss.mutable_data_ptr(),
      reduce ? sums.mutable_data_ptr() : nullptr,
      data_or_null(adv_grad),
      data_or_null(nat_grad),
      data_or_null(parts),
  };
  check_launch(launch_ceat_loss(dtype_of(adv), args, current_stream(adv)), "ceat_loss");
  return {loss, adv_grad, nat_grad, parts};
}

std::tuple<Tensor, Tensor> ensemble_cross_entropy(const Tensor& logits_in, const Tensor& target, int64_t reduction,
                                                  bool need_grad) {
  check_logits(logits_in, target);
  check_device(target, logits_in, "target");
  const DeviceGuard guard(logits_in.get_device_index());
  const Tensor logits = with_contiguous_rows(logits_in);
  const Shape shape = shape_of(logits);
  const ScalarType loss_dtype = loss_type(logits);
  const Plan plan = checked_plan(shape, loss_dtype == ScalarType::Double);
  const bool reduce = reduction != ceat::kNone;

  Tensor loss = reduce ? empty(logits, loss_dtype, {}) : empty(logits, loss_dtype, {shape.batch});
  Tensor sums = reduce && plan.blocks != 1 ? empty(logits, loss_dtype, {plan.blocks}) : loss;
  Tensor grad = gradient_for(logits, need_grad);
  if (shape.batch == 0) return {torch::stable::zero_(loss), grad};

  const EnsembleArgs args{
      plan,
      shape,
      logits_of(logits),
      labels_of(target),
      batch_scale(reduction, shape.batch),
      loss.mutable_data_ptr(),
      reduce ? sums.mutable_data_ptr() : nullptr,
      data_or_null(grad),
  };
  check_launch(launch_ensemble_cross_entropy(dtype_of(logits), args, current_stream(logits)), "ensemble_cross_entropy");
  return {loss, grad};
}

void check_shape(const Tensor& t, const Tensor& like, const char* name) {
  bool same = t.dim() == like.dim();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == like.size(i);
  STD_TORCH_CHECK(same, name, " must have the shape of x");
}

Tensor pgd_step(const Tensor& x_adv_in, const Tensor& grad_in, const Tensor& x_in, double alpha, double eps) {
  STD_TORCH_CHECK(x_in.scalar_type() == ScalarType::Float || x_in.scalar_type() == ScalarType::Double,
                  "x must be float32 or float64");
  STD_TORCH_CHECK(x_adv_in.scalar_type() == x_in.scalar_type(), "x_adv and x must have the same dtype");
  check_shape(x_adv_in, x_in, "x_adv");
  check_shape(grad_in, x_in, "grad");
  check_device(x_adv_in, x_in, "x_adv");
  check_device(grad_in, x_in, "grad");
  const DeviceGuard guard(x_in.get_device_index());
  Tensor next = torch::stable::empty_like(x_in);
  if (next.numel() == 0) return next;
  const Tensor x_adv = in_layout_of(next, x_adv_in), grad = in_layout_of(next, grad_in), x = in_layout_of(next, x_in);
  const PgdArgs args{dtype_of(x),
                     dtype_of(grad),
                     x_adv.const_data_ptr(),
                     grad.const_data_ptr(),
                     x.const_data_ptr(),
                     next.mutable_data_ptr(),
                     x.numel(),
                     alpha,
                     eps};
  check_launch(launch_pgd_step(args, current_stream(x)), "pgd_step");
  return next;
}

std::tuple<Tensor, Tensor> scale_gradients(const Tensor& adv_grad_in, const Tensor& nat_grad_in,
                                           const Tensor& loss_grad) {
  check_same(adv_grad_in, nat_grad_in);
  check_device(loss_grad, adv_grad_in, "loss_grad");
  STD_TORCH_CHECK(adv_grad_in.dim() == 3, "gradients must have shape (M, B, K), got ", adv_grad_in.dim(),
                  " dimensions");
  STD_TORCH_CHECK(loss_grad.scalar_type() == loss_type(adv_grad_in),
                  "loss_grad must be float64 for float64 gradients, else float32");
  const Shape shape = shape_of(adv_grad_in);
  const bool per_sample = loss_grad.dim() == 2;
  STD_TORCH_CHECK(
      (per_sample ? loss_grad.size(1) == shape.batch : loss_grad.dim() == 1) && loss_grad.size(0) == shape.members,
      "loss_grad must have shape (M,) or (M, B)");
  const DeviceGuard guard(adv_grad_in.get_device_index());
  const Tensor adv_grad = dense(adv_grad_in), nat_grad = dense(nat_grad_in);
  Tensor adv_out = torch::stable::empty_like(adv_grad), nat_out = torch::stable::empty_like(nat_grad);
  if (adv_grad.numel() == 0) return {adv_out, nat_out};
  const ScaleArgs args{dtype_of(adv_grad),
                       shape,
                       adv_grad.const_data_ptr(),
                       nat_grad.const_data_ptr(),
                       loss_grad.const_data_ptr(),
                       loss_grad.stride(0),
                       per_sample ? loss_grad.stride(1) : 0,
                       adv_out.mutable_data_ptr(),
                       nat_out.mutable_data_ptr()};
  check_launch(launch_scale_gradients(args, current_stream(adv_grad)), "scale_gradients");
  return {adv_out, nat_out};
}

const void* aligned_bf16(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::BFloat16 && t.is_contiguous(), name, " must be contiguous bfloat16");
  const void* data = t.const_data_ptr();
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0, name, " must be aligned to 16 bytes");
  return data;
}

const void* optional_bf16(const std::optional<Tensor>& t, int64_t count, const char* name) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(t->numel() == count, name, " has ", t->numel(), " elements instead of ", count);
  return aligned_bf16(*t, name);
}

Tensor member_convolution(const Tensor& x, const Tensor& weights, const std::optional<Tensor>& bias,
                          const std::optional<Tensor>& residual, const std::optional<Tensor>& gate, int64_t filters,
                          int64_t out_height, int64_t out_width, int64_t direction, bool point, bool flipped,
                          bool relu) {
  STD_TORCH_CHECK(x.dim() == 5, "x must be (M, B, H, W, C), got ", x.dim(), " dimensions");
  const int64_t members = x.size(0), samples = x.size(1), channels = x.size(4);
  STD_TORCH_CHECK(weights.numel() == members * (point ? 1 : 9) * channels * filters, "weights have a wrong size");
  STD_TORCH_CHECK(direction >= 0 && direction <= 2, "direction must be 0, 1 or 2, got ", direction);
  STD_TORCH_CHECK(members <= 65535, "at most 65,535 members, got ", members);
  STD_TORCH_CHECK(samples * out_height * out_width < int64_t(1) << 31, "at most 2^31 pixels of a member");
  check_device(weights, x, "weights");
  const DeviceGuard guard(x.get_device_index());
  Tensor out = empty(x, x.scalar_type(), {members, samples, out_height, out_width, filters});
  if (out.numel() == 0) return out;
  ConvolutionArgs args{aligned_bf16(x, "x"),
                       aligned_bf16(weights, "weights"),
                       optional_bf16(bias, members * filters, "bias"),
                       optional_bf16(residual, out.numel(), "residual"),
                       optional_bf16(gate, out.numel(), "gate"),
                       out.mutable_data_ptr(),
                       int(members),
                       int(channels),
                       int(filters),
                       samples,
                       int(x.size(2)),
                       int(x.size(3)),
                       int(out_height),
                       int(out_width),
                       {},
                       {},
                       Direction(direction),
                       point,
                       flipped,
                       relu};
  set_grid(args);
  check_launch(launch_convolution(args, current_stream(x)), "member_convolution");
  return out;
}

// What both directions of a chain share; links have no weights yet.
ChainArgs chain_of(const Tensor& x, const Tensor& weights, int64_t images) {
  STD_TORCH_CHECK(x.dim() == 5, "x must be (M, B, H, W, C), got ", x.dim(), " dimensions");
  ChainArgs args{};
  args.members = int(x.size(0)), args.samples = x.size(1), args.channels = int(x.size(4));
  args.height = int(x.size(2)), args.width = int(x.size(3)), args.images = int(images);
  const int64_t channels = x.size(4), count = weights.size(0);
  STD_TORCH_CHECK(channels == 16 || channels == 32 || channels == 64, "a chain has 16, 32 or 64 channels");
  STD_TORCH_CHECK(args.height % 8 == 0 && (args.width == 8 || args.width % 16 == 0), "images of ", args.height, "x",
                  args.width, " are no chain's");
  STD_TORCH_CHECK(count >= 1 && count <= kMaxLinks, "a chain has up to ", kMaxLinks, " links, got ", count);
  STD_TORCH_CHECK(weights.numel() == count * args.members * kChainTaps * channels * channels,
                  "weights have a wrong size");
  STD_TORCH_CHECK(args.members <= 65535, "at most 65,535 members, got ", args.members);
  STD_TORCH_CHECK(images >= 1, "images must be at least 1, got ", images);
  check_device(weights, x, "weights");
  args.x = aligned_bf16(x, "x");
  args.gated_by = -1;
  set_tasks(args);
  args.masks_of_sample = int(count);
  args.count = int(count);
  return args;
}

// Weights of link `number` among those of all links.
const void* weights_of(const Tensor& weights, int64_t number) {
  const char* data = static_cast<const char*>(aligned_bf16(weights, "weights"));
  return data + number * (weights.numel() / weights.size(0)) * 2;
}

bool has_bit(int64_t bits, int64_t number) { return bits >> number & 1; }

// Bit i of `residuals` and `relus` is about link i.
std::tuple<Tensor, Tensor> member_chain(const Tensor& x, const Tensor& weights, const Tensor& bias,
                                        const std::optional<Tensor>& residual, int64_t residuals, int64_t relus,
                                        bool masked, int64_t images) {
  const DeviceGuard guard(x.get_device_index());
  ChainArgs args = chain_of(x, weights, images);
  const int64_t members = args.members, channels = args.channels, count = args.count;
  STD_TORCH_CHECK(bias.numel() == count * members * channels, "bias has a wrong size");
  STD_TORCH_CHECK(residual.has_value() == has_bit(residuals, 0), "the first link's residual is given where it has one");
  Tensor out = torch::stable::empty_like(x);
  const ScalarType word = args.width == 8 ? ScalarType::Int : ScalarType::Long;
  Tensor masks = masked ? empty(x, word, {members, args.samples, count, args.tasks, 32}) : empty(x, word, {0});
  if (x.numel() == 0) return {out, masks};
  args.residual = optional_bf16(residual, x.numel(), "residual");
  args.out = out.mutable_data_ptr();
  args.masks = data_or_null(masks);
  const char* biases = static_cast<const char*>(aligned_bf16(bias, "bias"));
  for (int64_t i = 0; i < count; ++i) {
    args.links[i] = {weights_of(weights, i),
                     biases + i * members * channels * 2,
                     int(i),
                     has_bit(residuals, i),
                     has_bit(relus, i),
                     false};
  }
  check_launch(launch_chain(args, current_stream(x)), "member_chain");
  return {out, masks};
}

// The gradients for x and for the first link's residual, if it has one, of a chain that left these masks. `weights` are
// those of each link with channels and filters exchanged.
std::tuple<Tensor, Tensor> member_chain_gradient(const Tensor& grad, const Tensor& weights, const Tensor& masks,
                                                 const std::optional<Tensor>& gate, int64_t residuals, int64_t relus,
                                                 int64_t images) {
  const DeviceGuard guard(grad.get_device_index());
  ChainArgs args = chain_of(grad, weights, images);
  const int64_t count = args.count;
  const int64_t words = args.members * args.samples * count * args.tasks * 32;
  STD_TORCH_CHECK(masks.numel() == words && masks.is_contiguous() &&
                      masks.scalar_type() == (args.width == 8 ? ScalarType::Int : ScalarType::Long),
                  "masks are not those of such a chain");
  Tensor out = torch::stable::empty_like(grad);
  Tensor for_residual = has_bit(residuals, 0) ? torch::stable::empty_like(grad) : empty(grad, grad.scalar_type(), {0});
  if (grad.numel() == 0) return {out, for_residual};
  args.gate = optional_bf16(gate, grad.numel(), "gate");
  args.out = out.mutable_data_ptr();
  args.before_last = data_or_null(for_residual);
  args.masks = const_cast<void*>(masks.const_data_ptr());
  args.turned = true;
  args.gated_by = has_bit(relus, count - 1) ? int(count - 1) : -1;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t link = count - 1 - i;  // of the forward pass; its input came out of the one before
    args.links[i] = {
        weights_of(weights, link),           nullptr, int(link - 1), i > 0 && has_bit(residuals, link + 1), false,
        link > 0 && has_bit(relus, link - 1)};
  }
  check_launch(launch_chain(args, current_stream(grad)), "member_chain_gradient");
  return {out, for_residual};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ceat_fast, CUDA, m) {
  m.impl("member_chain_native", TORCH_BOX(&member_chain));
  m.impl("member_chain_gradient_native", TORCH_BOX(&member_chain_gradient));
  m.impl("member_convolution_native", TORCH_BOX(&member_convolution));
  m.impl("ceat_loss_native", TORCH_BOX(&ceat_loss));
  m.impl("ensemble_cross_entropy_native", TORCH_BOX(&ensemble_cross_entropy));
  m.impl("pgd_step_native", TORCH_BOX(&pgd_step));
  m.impl("scale_gradients_native", TORCH_BOX(&scale_gradients));
}
