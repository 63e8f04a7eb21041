// Element types, vector access and the launch call: what every kernel file needs.
#pragma once

#ifdef CEAT_SIMT
#include CEAT_SIMT  // emulation on the host, for tests
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "launch.h"

namespace ceat::cuda {

// Arithmetic is in fp32, or fp64 for fp64.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

// fp16 gradients are left in fp32 until the loss scale is known.
template <class T>
using Gradient = std::conditional_t<std::is_same_v<T, __half>, float, T>;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T, class V>
__device__ T narrow(V x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

// kCount neighbouring elements, moved by as few 16-byte accesses as they need.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
  T values[kCount];
};

template <class T, int kCount>
bool is_aligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % alignof(Pack<T, kCount>) == 0;
}

// Calls body(T{}) with the element type that dtype names.
template <class Body>
const char* with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat: return body(float{});
    case DType::kDouble: return body(double{});
    case DType::kHalf: return body(__half{});
    case DType::kBFloat16: return body(__nv_bfloat16{});
  }
  return "unknown element type";
}

#ifndef CEAT_SIMT
// 2^x to two units in the last place; 0 below 2^-126.
__device__ inline float exp2_rough(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

template <class V>
__device__ V* shared_memory() {
  extern __shared__ double ceat_shared_memory[];
  return reinterpret_cast<V*>(ceat_shared_memory);
}

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, void* stream,
                   const Arguments&... arguments) {
  kernel<<<unsigned(blocks), unsigned(threads), shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif

// Blocks of kThreads for kernels whose threads walk over `items` with a stride of the whole grid.
constexpr int kThreads = 256;
inline int64_t blocks_for(int64_t items) {
  constexpr int64_t kMaxBlocks = int64_t(1) << 20;
  const int64_t blocks = (items + kThreads - 1) / kThreads;
  return blocks < 1 ? 1 : blocks > kMaxBlocks ? kMaxBlocks : blocks;
}
__device__ inline int64_t first_item() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ inline int64_t item_stride() { return int64_t(gridDim.x) * blockDim.x; }

}  // namespace ceat::cuda
