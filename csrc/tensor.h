// Small conveniences over the LibTorch stable ABI, for the CPU and the CUDA library.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>

// The headers of torch before 2.12 have the check of a call into the C shim under this name.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace ceat_tensor {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// An uninitialised tensor on the device of `like`. The C shim directly: half the cost of the dispatcher.
inline Tensor empty_strided(const Tensor& like, ScalarType dtype, int64_t dim, const int64_t* sizes,
                            const int64_t* strides) {
  int32_t device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, code, device_type, device_index, &handle));
  return Tensor(handle);
}

// An uninitialised contiguous tensor.
inline Tensor empty(const Tensor& like, ScalarType dtype, std::initializer_list<int64_t> sizes) {
  int64_t strides[5], stride = 1;
  const int64_t* size = sizes.begin();
  for (int i = int(sizes.size()) - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= size[i];
  }
  return empty_strided(like, dtype, int64_t(sizes.size()), size, strides);
}

// Uninitialised images (samples, channels, height, width) in the layout (samples, height, width, channels).
inline Tensor empty_channels_last(const Tensor& like, const int64_t (&sizes)[4]) {
  const int64_t channels = sizes[1], height = sizes[2], width = sizes[3];
  const int64_t strides[4] = {height * width * channels, 1, width * channels, channels};
  return empty_strided(like, like.scalar_type(), 4, sizes, strides);
}

// `t` with the strides of the dense tensor `like`, so that both can be walked as one flat array.
inline Tensor in_layout_of(const Tensor& like, const Tensor& t) {
  bool same = true;
  for (int64_t i = 0; i < like.dim(); ++i) same &= like.size(i) == 1 || t.stride(i) == like.stride(i);
  if (same) return t;
  Tensor copy = empty_strided(like, t.scalar_type(), like.dim(), like.sizes().data(), like.strides().data());
  torch::stable::copy_(copy, t);
  return copy;
}

// Losses are fp32, or fp64 for fp64 logits.
inline ScalarType loss_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Gradients have the type of the logits, but fp32 for fp16 (see ceat_fast/ops/__init__.py).
inline ScalarType gradient_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Half ? ScalarType::Float : logits.scalar_type();
}

// The contiguous op goes through the dispatcher even where there is nothing to do.
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline Tensor with_contiguous_rows(const Tensor& logits) {
  return logits.stride(logits.dim() - 1) == 1 ? logits : torch::stable::contiguous(logits);
}

inline void check_logits(const Tensor& logits, const Tensor& target) {
  STD_TORCH_CHECK(logits.dim() == 3, "logits must have shape (M, B, K), got ", logits.dim(), " dimensions");
  STD_TORCH_CHECK(target.dim() == 1 && target.size(0) == logits.size(1), "target must have shape (B,) = (",
                  logits.size(1), ",)");
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long, "target must be int64");
  STD_TORCH_CHECK(logits.size(0) >= 1 && logits.size(2) >= 2,
                  "logits (M, B, K) need M >= 1 and K >= 2, got M = ", logits.size(0), ", K = ", logits.size(2));
}

inline void check_same(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim() && a.scalar_type() == b.scalar_type() && a.device() == b.device();
  for (int64_t i = 0; same && i < a.dim(); ++i) same = a.size(i) == b.size(i);
  STD_TORCH_CHECK(same, "adv and nat must have the same shape, dtype and device");
}

}  // namespace ceat_tensor
