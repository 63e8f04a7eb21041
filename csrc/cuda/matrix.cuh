// Instructions of the matrix units and of copies to shared memory, and bf16 in pairs.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace ceat::cuda {

#define CEAT_DYNAMIC_SHARED(name) extern __shared__ uint4 name[]

// From memory that no thread of the launch writes.
template <class T>
__device__ inline T read_only(const T* from) {
  return __ldg(from);
}

// Two bf16 in one word, and the two as floats.
__device__ inline float2 unpack(uint32_t word) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&word));
}

__device__ inline uint32_t pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// The same with 0 for what is negative; NaN stays NaN.
__device__ inline uint32_t pack_positive(float low, float high) {
#if __CUDA_ARCH__ >= 800
  uint32_t word;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return pack(low < 0 ? 0 : low, high < 0 ? 0 : high);
#endif
}

// For each half of the word 16 times its highest bit.
// Not by __byte_perm, which drops the bit that asks for signs.
__device__ inline uint32_t spread_signs(uint32_t word) {
  uint32_t signs;
  asm("prmt.b32 %0, %1, 0, 0xbb99;" : "=r"(signs) : "r"(word));
  return signs;
}

// sum += a b for a (16, 16) and b (16, 8). With lane = 4 g + t, the lane holds
//   a    rows g, g + 8, g, g + 8; columns 2 t and 2 t + 1, in the last two words 8 further
//   b    column g; rows 2 t, 2 t + 1, and 8 further
//   sum  row g, columns 2 t and 2 t + 1, then row g + 8
__device__ inline void multiply_add(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint2 b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b.x), "r"(b.y));
}

__device__ inline uint32_t shared_address(const void* place) { return uint32_t(__cvta_generic_to_shared(place)); }

// Four matrices of 8 rows of 16 bytes: lane l gives the address of row l % 8 of matrix l / 8, and gets of each matrix
// the bytes from 4 t on of row g.
__device__ inline void load_matrices(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address));
}

// Starts to copy 16 bytes to shared memory.
__device__ inline void start_copy(uint4* to, const uint4* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from));
}

// Waits for this thread's copies, then for all threads.
__device__ inline void finish_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
}

}  // namespace ceat::cuda
