// CPU implementations of the ceat_fast ops. Schemas, fake kernels and autograd are in ceat_fast/ops/native.py.
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../tensor.h"
#include "kernels.h"
#include "scratch.h"

namespace {

using namespace ceat_tensor;
using ceat_cpu::DType;

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat;
    case ScalarType::Double: return DType::kDouble;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kHalf;
    default: STD_TORCH_CHECK(false, "tensors must be float32, float64, bfloat16 or float16");
  }
}

// Elements that justify waking a second thread, about ten microseconds of work.
constexpr int64_t kElementsPerThread = 16384;
// Ranges are handed out in blocks, so that threads share no SIMD tile and write to no common cache line.
constexpr int64_t kBlock = 16;

// Runs body(begin, end) over [0, count) where each item costs `elements`.
template <class Body>
void in_parallel(int64_t count, int64_t elements, const Body& body, int64_t block = kBlock) {
  if (count * elements <= kElementsPerThread) return body(0, count);
  const int64_t blocks = (count + block - 1) / block;
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / (elements * block));
  torch::stable::parallel_for(0, blocks, grain,
                              [&](int64_t begin, int64_t end) { body(begin * block, std::min(end * block, count)); });
}

const int64_t* checked_labels(const Tensor& target, int64_t classes) {
  const int64_t* labels = target.const_data_ptr<int64_t>();
  const int64_t samples = target.size(0);
  bool valid = true;
  for (int64_t b = 0; b < samples; ++b) valid &= uint64_t(labels[b]) < uint64_t(classes);
  STD_TORCH_CHECK(valid, "target holds a label outside [0, ", classes, ")");
  return labels;
}

ceat_cpu::Logits logits_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1)}; }

// (..., B) -> (...), in a fixed order and in double, so that the result depends on neither threads nor SIMD width.
template <class T>
void reduce_rows(const T* in, T* out, int64_t rows, int64_t samples, double scale) {
  for (int64_t m = 0; m < rows; ++m) {
    double sum = 0;
    for (int64_t b = 0; b < samples; ++b) sum += in[m * samples + b];
    out[m] = T(sum * scale);
  }
}

enum Reduction { kNone = 0, kMean = 1, kSum = 2 };

double batch_scale(int64_t reduction, int64_t samples) { return reduction == kMean ? 1.0 / double(samples) : 1.0; }

Tensor reduce_batch(const Tensor& losses, Tensor out, int64_t rows, int64_t samples, double scale) {
  if (losses.scalar_type() == ScalarType::Double) {
    reduce_rows(losses.const_data_ptr<double>(), out.mutable_data_ptr<double>(), rows, samples, scale);
  } else {
    reduce_rows(losses.const_data_ptr<float>(), out.mutable_data_ptr<float>(), rows, samples, scale);
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ceat_loss(const Tensor& adv_in, const Tensor& nat_in,
                                                     const Tensor& target_in, double ce_coefficient,
                                                     double nat_coefficient, double adv_coefficient,
                                                     double nat_exponent, double adv_exponent, double max_weight,
                                                     int64_t pair_reduction, int64_t reduction, bool detach_nat,
                                                     bool need_grad, bool need_parts) {
  check_logits(adv_in, target_in);
  check_same(adv_in, nat_in);
  const Tensor adv = with_contiguous_rows(adv_in), nat = with_contiguous_rows(nat_in);
  const Tensor target = dense(target_in);
  const int64_t members = adv.size(0), samples = adv.size(1), classes = adv.size(2);
  const ScalarType loss_dtype = loss_type(adv), grad_dtype = gradient_type(adv);

  Tensor losses = empty(adv, loss_dtype, {members, samples});
  Tensor adv_grad = need_grad ? empty(adv, grad_dtype, {members, samples, classes}) : empty(adv, grad_dtype, {0});
  Tensor nat_grad = need_grad ? empty(adv, grad_dtype, {members, samples, classes}) : empty(adv, grad_dtype, {0});
  Tensor parts = need_parts ? empty(adv, loss_dtype, {7, members, samples}) : empty(adv, loss_dtype, {0});

  const ceat_cpu::CeatProblem problem{
      dtype_of(adv),
      {members, samples, classes},
      logits_of(adv),
      logits_of(nat),
      checked_labels(target, classes),
      {ce_coefficient, nat_coefficient, adv_coefficient, nat_exponent, adv_exponent, max_weight, int(pair_reduction),
       int(reduction), detach_nat},
      batch_scale(reduction, samples),
      losses.data_ptr(),
      need_grad ? adv_grad.data_ptr() : nullptr,
      need_grad ? nat_grad.data_ptr() : nullptr,
      need_parts ? parts.data_ptr() : nullptr,
  };
  in_parallel(samples, 2 * members * classes,
              [&](int64_t begin, int64_t end) { ceat_cpu::kernels().ceat_loss(problem, begin, end); });
  if (reduction != kNone) {
    losses = reduce_batch(losses, empty(adv, loss_dtype, {members}), members, samples, problem.scale);
  }
  return {losses, adv_grad, nat_grad, parts};
}

std::tuple<Tensor, Tensor> ensemble_cross_entropy(const Tensor& logits_in, const Tensor& target_in, int64_t reduction,
                                                  bool need_grad) {
  check_logits(logits_in, target_in);
  const Tensor logits = with_contiguous_rows(logits_in);
  const Tensor target = dense(target_in);
  const int64_t members = logits.size(0), samples = logits.size(1), classes = logits.size(2);
  const ScalarType loss_dtype = loss_type(logits), grad_dtype = gradient_type(logits);

  Tensor losses = empty(logits, loss_dtype, {samples});
  Tensor grad = need_grad ? empty(logits, grad_dtype, {members, samples, classes}) : empty(logits, grad_dtype, {0});
  const ceat_cpu::EnsembleProblem problem{
      dtype_of(logits),
      {members, samples, classes},
      logits_of(logits),
      checked_labels(target, classes),
      batch_scale(reduction, samples),
      losses.data_ptr(),
      need_grad ? grad.data_ptr() : nullptr,
  };
  in_parallel(samples, members * classes,
              [&](int64_t begin, int64_t end) { ceat_cpu::kernels().ensemble_cross_entropy(problem, begin, end); });
  if (reduction != kNone) losses = reduce_batch(losses, empty(logits, loss_dtype, {}), 1, samples, problem.scale);
  return {losses, grad};
}

Tensor pgd_step(const Tensor& x_adv_in, const Tensor& grad_in, const Tensor& x_in, double alpha, double eps) {
  STD_TORCH_CHECK(x_in.scalar_type() == ScalarType::Float || x_in.scalar_type() == ScalarType::Double,
                  "x must be float32 or float64");
  STD_TORCH_CHECK(x_adv_in.scalar_type() == x_in.scalar_type(), "x_adv and x must have the same dtype");
  STD_TORCH_CHECK(x_adv_in.numel() == x_in.numel() && grad_in.numel() == x_in.numel(),
                  "x_adv, grad and x must have one shape");
  Tensor next = torch::stable::empty_like(x_in);
  const Tensor x_adv = in_layout_of(next, x_adv_in), grad = in_layout_of(next, grad_in), x = in_layout_of(next, x_in);
  const ceat_cpu::PgdProblem problem{
      dtype_of(x), dtype_of(grad), x_adv.data_ptr(), grad.data_ptr(), x.data_ptr(), alpha, eps, next.data_ptr()};
  in_parallel(x.numel(), 1, [&](int64_t begin, int64_t end) { ceat_cpu::kernels().pgd_step(problem, begin, end); });
  return next;
}

double element(const Tensor& t, int64_t offset) {
  return t.scalar_type() == ScalarType::Double ? static_cast<const double*>(t.data_ptr())[offset]
                                               : double(static_cast<const float*>(t.data_ptr())[offset]);
}

std::tuple<Tensor, Tensor> scale_gradients(const Tensor& adv_grad, const Tensor& nat_grad, const Tensor& loss_grad) {
  check_same(adv_grad, nat_grad);
  STD_TORCH_CHECK(adv_grad.dim() == 3, "gradients must have shape (M, B, K)");
  STD_TORCH_CHECK(loss_grad.scalar_type() == ScalarType::Float || loss_grad.scalar_type() == ScalarType::Double,
                  "loss_grad must be float32 or float64");
  const int64_t members = adv_grad.size(0), samples = adv_grad.size(1), classes = adv_grad.size(2);
  const bool per_sample = loss_grad.dim() == 2;
  STD_TORCH_CHECK(loss_grad.size(0) == members && (!per_sample || loss_grad.size(1) == samples),
                  "loss_grad must have shape (M,) or (M, B)");
  std::vector<double> factors(members * samples);
  for (int64_t m = 0; m < members; ++m) {
    for (int64_t b = 0; b < samples; ++b) {
      factors[m * samples + b] =
          element(loss_grad, m * loss_grad.stride(0) + (per_sample ? b * loss_grad.stride(1) : 0));
    }
  }
  const auto scale = [&](const Tensor& in) {
    const Tensor grad = dense(in);
    Tensor out = empty(grad, grad.scalar_type(), {members, samples, classes});
    const ceat_cpu::ScaleProblem problem{dtype_of(grad), classes, grad.data_ptr(), factors.data(), out.data_ptr()};
    in_parallel(members * samples, classes,
                [&](int64_t begin, int64_t end) { ceat_cpu::kernels().scale_rows(problem, begin, end); });
    return out;
  };
  return {scale(adv_grad), scale(nat_grad)};
}

// Images (samples, channels, height, width) whose memory is (samples, height, width, channels).
bool is_channels_last(const Tensor& x) {
  const int64_t channels = x.size(1), height = x.size(2), width = x.size(3);
  const int64_t strides[4] = {height * width * channels, 1, width * channels, channels};
  bool dense = true;
  for (int i = 0; i < 4; ++i) dense &= x.size(i) == 1 || x.stride(i) == strides[i];
  return dense;
}

// Runs the blocks of all members.
void convolve(const ceat_cpu::ConvolutionProblem& p) {
  in_parallel(
      p.members * p.blocks(), ceat_cpu::kTileBlock * ceat_cpu::kTilePoints * p.channels * p.filters / 16,
      [&](int64_t begin, int64_t end) { ceat_cpu::kernels().convolve_tiles(p, begin, end); }, 1);
}
void convolve(const ceat_cpu::DirectProblem& p) {
  in_parallel(
      p.members * p.blocks(), ceat_cpu::kPixelBlock * (p.taps * p.channels + 16) * p.filters / 16,
      [&](int64_t begin, int64_t end) { ceat_cpu::kernels().convolve_pixels(p, begin, end); }, 1);
}

Tensor winograd_convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool transposed) {
  STD_TORCH_CHECK(x.dim() == 4 && x.scalar_type() == ScalarType::Float && is_channels_last(x),
                  "x must be float32 images (B, C, H, W), dense in channels_last");
  STD_TORCH_CHECK(
      weight.dim() == 4 && weight.scalar_type() == ScalarType::Float && weight.size(2) == 3 && weight.size(3) == 3,
      "weight must be float32 of shape (F, C, 3, 3)");
  const int64_t channels = weight.size(transposed ? 0 : 1), filters = weight.size(transposed ? 1 : 0);
  STD_TORCH_CHECK(x.size(1) == channels, "x must have ", channels, " channels, got ", x.size(1));
  STD_TORCH_CHECK(channels % ceat_cpu::kChannelBlock == 0 && filters % ceat_cpu::kChannelBlock == 0 && channels > 0,
                  "channels and filters must be multiples of 16, got ", channels, " and ", filters);
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == filters && bias->scalar_type() == ScalarType::Float),
                  "bias must be float32 of shape (", filters, ",)");
  const int64_t samples = x.size(0), height = x.size(2), width = x.size(3);

  ceat_cpu::Scratch points(ceat_cpu::kTilePoints * channels * filters * sizeof(float));
  ceat_cpu::FilterProblem filter{weight.const_data_ptr<float>(),
                                 {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)},
                                 filters,
                                 channels,
                                 points.take<float>(ceat_cpu::kTilePoints * channels * filters)};
  if (transposed) {
    // The gradient for the input is the convolution of the output's with the filters turned by 180 degrees.
    filter.weight += 2 * filter.strides[2] + 2 * filter.strides[3];
    std::swap(filter.strides[0], filter.strides[1]);
    filter.strides[2] = -filter.strides[2];
    filter.strides[3] = -filter.strides[3];
  }
  Tensor out = empty_channels_last(x, {samples, filters, height, width});
  const Tensor offset = bias ? dense(*bias) : out;
  const ceat_cpu::ConvolutionProblem problem{DType::kFloat,
                                             x.const_data_ptr<float>(),
                                             filter.out,
                                             {bias ? offset.const_data_ptr<float>() : nullptr, nullptr, nullptr, false},
                                             1,
                                             samples,
                                             height,
                                             width,
                                             channels,
                                             filters,
                                             out.mutable_data_ptr<float>()};
  in_parallel(
      filters / ceat_cpu::kChannelBlock, ceat_cpu::kTilePoints * channels * ceat_cpu::kChannelBlock,
      [&](int64_t begin, int64_t end) { ceat_cpu::kernels().transform_filters(filter, begin, end); }, 1);
  convolve(problem);
  return out;
}

// How the taps of an output pixel are found: a convolution of stride 1 or 2, or the gradient of one of stride 2.
enum Direction { kStride1 = 0, kStride2 = 1, kTransposed2 = 2 };

// Output pixels (parity[0] + step i, parity[1] + step j), and the taps that reach them.
ceat_cpu::PixelGrid pixel_grid(Direction direction, bool point, bool flipped, const int64_t (&size)[2],
                               const int (&parity)[2]) {
  ceat_cpu::PixelGrid grid{};
  grid.step = direction == kTransposed2 ? 2 : 1;
  grid.in_step = direction == kStride2 ? 2 : 1;
  for (int axis = 0; axis < 2; ++axis) {
    grid.first[axis] = parity[axis];
    grid.count[axis] = (size[axis] - parity[axis] + grid.step - 1) / grid.step;
  }
  for (int tap = 0; tap < ceat_cpu::kMaxTaps; ++tap) {
    int offset[2] = {tap / 3 - 1, tap % 3 - 1};
    if (point && tap != ceat_cpu::kMaxTaps / 2) continue;
    if (direction == kTransposed2) {
      // Input i reaches output 2 i + offset.
      const int twice[2] = {parity[0] - offset[0], parity[1] - offset[1]};
      if (twice[0] % 2 != 0 || twice[1] % 2 != 0) continue;
      for (int axis = 0; axis < 2; ++axis) offset[axis] = twice[axis] / 2;
    }
    grid.tap[grid.taps] = point ? 0 : flipped ? ceat_cpu::kMaxTaps - 1 - tap : tap;
    for (int axis = 0; axis < 2; ++axis) grid.offset[grid.taps][axis] = offset[axis];
    ++grid.taps;
  }
  return grid;
}

const void* data_of(const std::optional<Tensor>& t, const char* name, ScalarType dtype,
                    std::initializer_list<int64_t> sizes) {
  if (!t) return nullptr;
  bool fits = t->dim() == int64_t(sizes.size()) && t->scalar_type() == dtype && t->is_contiguous();
  for (int64_t i = 0; fits && i < t->dim(); ++i) fits = t->size(i) == sizes.begin()[i];
  STD_TORCH_CHECK(fits, name, " must be contiguous, of out's type and of the shape that x, weights and sizes give");
  return t->data_ptr();
}

// x (M, B, H, W, C), out (M, B, H', W', F), fp32 or bf16; weights (M, F/16, P, words, 16, channels per word), see
// inner_product.h: P = 36 filters at the points of winograd.cpp, 9 taps, or 1.
void member_convolution(const Tensor& out, const Tensor& x, const Tensor& weights, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& residual, const std::optional<Tensor>& gate, int64_t direction,
                        bool point, bool flipped, bool relu) {
  const ScalarType dtype = out.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "out must be float32 or bfloat16");
  STD_TORCH_CHECK(out.dim() == 5 && out.is_contiguous(), "out must be contiguous (M, B, H, W, F)");
  const int64_t out_height = out.size(2), out_width = out.size(3), filters = out.size(4);
  STD_TORCH_CHECK(x.dim() == 5 && x.scalar_type() == dtype && x.is_contiguous(),
                  "x must be contiguous (M, B, H, W, C) of out's type");
  const int64_t members = x.size(0), samples = x.size(1), height = x.size(2), width = x.size(3), channels = x.size(4);
  STD_TORCH_CHECK(out.size(0) == members && out.size(1) == samples, "out must have the members and samples of x");
  const int64_t per_word = dtype == ScalarType::BFloat16 ? 2 : 1;
  STD_TORCH_CHECK(channels % per_word == 0, "channels of bfloat16 come in pairs, got ", channels);
  const int64_t products = weights.dim() == 6 ? weights.size(2) : 0;
  const bool by_points = products == ceat_cpu::kTilePoints;
  const std::optional<Tensor> given = weights;
  const void* packed =
      data_of(given, "weights", dtype,
              {members, filters / 16, products, channels / per_word, ceat_cpu::kChannelBlock, per_word});
  STD_TORCH_CHECK(filters > 0 && filters % ceat_cpu::kChannelBlock == 0, "filters must be a multiple of 16, got ",
                  filters);
  STD_TORCH_CHECK(by_points ? direction == kStride1 && !point && channels % ceat_cpu::kChannelBlock == 0
                            : products == (point ? 1 : ceat_cpu::kMaxTaps),
                  "weights have ", products, " products, which do not go with the direction or the channels");
  STD_TORCH_CHECK(direction >= kStride1 && direction <= kTransposed2, "direction must be 0, 1 or 2, got ", direction);
  const auto reached = [&](int64_t in) { return direction == kStride2 ? (in + 1) / 2 : in; };
  STD_TORCH_CHECK(direction == kTransposed2 ? (out_height + 1) / 2 == height && (out_width + 1) / 2 == width
                                            : reached(height) == out_height && reached(width) == out_width,
                  "an output of ", out_height, " x ", out_width, " does not belong to an input of ", height, " x ",
                  width);

  const auto like_out = [&](const std::optional<Tensor>& t, const char* name) {
    return data_of(t, name, dtype, {members, samples, out_height, out_width, filters});
  };
  const ceat_cpu::Epilogue epilogue{data_of(bias, "bias", dtype, {members, filters}), like_out(residual, "residual"),
                                    like_out(gate, "gate"), relu};
  const DType type = dtype_of(out);
  const void* from = x.data_ptr();
  void* to = out.data_ptr();
  if (by_points) {
    return convolve({type, from, packed, epilogue, members, samples, height, width, channels, filters, to});
  }
  ceat_cpu::DirectProblem problem{type,     from,       packed,    epilogue, members,  samples, height, width,
                                  channels, out_height, out_width, filters,  products, 0,       {},     to};
  const int parities = direction == kTransposed2 ? 2 : 1;
  for (int y = 0; y < parities; ++y) {
    for (int x_parity = 0; x_parity < parities; ++x_parity) {
      problem.grid[problem.grids++] =
          pixel_grid(Direction(direction), point, flipped, {out_height, out_width}, {y, x_parity});
    }
  }
  convolve(problem);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ceat_fast, CPU, m) {
  m.impl("ceat_loss_native", TORCH_BOX(&ceat_loss));
  m.impl("ensemble_cross_entropy_native", TORCH_BOX(&ensemble_cross_entropy));
  m.impl("pgd_step_native", TORCH_BOX(&pgd_step));
  m.impl("scale_gradients_native", TORCH_BOX(&scale_gradients));
  m.impl("winograd_convolution_native", TORCH_BOX(&winograd_convolution));
  m.impl("member_convolution_into_native", TORCH_BOX(&member_convolution));
}
