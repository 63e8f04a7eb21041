// Runs a kernel of csrc/cuda on the host: one fiber per thread, which give way to each other at barriers and at the
// instructions that a warp executes together. Stands in for matrix.cuh and the headers of CUDA.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(...)
#define CEAT_DYNAMIC_SHARED(name) uint4* name = reinterpret_cast<uint4*>(simt::shared.data())

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace simt {

struct Place {
  unsigned x = 0, y = 0, z = 0;
};

constexpr int kLanes = 32;
constexpr size_t kStack = 1 << 18;

// What the lanes of a warp hand in, and what they get.
struct Warp {
  int arrived = 0;
  uint64_t round = 0;
  double values[kLanes];
  float sums[kLanes][4];
  uint32_t a[kLanes][4], b[kLanes][2], address[kLanes], rows[kLanes][4];
};

inline std::vector<uint8_t> shared;
inline std::vector<ucontext_t> threads;
inline std::vector<std::unique_ptr<uint8_t[]>> stacks;
inline std::vector<bool> ended;
inline std::vector<Warp> warps;
inline ucontext_t scheduler;
inline int current = 0, at_barrier = 0;
inline uint64_t barrier_round = 0;
inline std::function<void()> body;

inline void give_way() { swapcontext(&threads[current], &scheduler); }

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "thread %d: %s\n", current, what);
  std::exit(1);
}

inline void run_thread() {
  body();
  ended[current] = true;
  give_way();
}

template <class Compute>
void together(const Compute& compute) {
  Warp& warp = warps[current / kLanes];
  const uint64_t round = warp.round;
  if (++warp.arrived == kLanes) {
    compute(warp);
    warp.arrived = 0;
    ++warp.round;
  }
  while (warp.round == round) give_way();
}

}  // namespace simt

inline simt::Place threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() {
  const uint64_t round = simt::barrier_round;
  if (++simt::at_barrier == int(simt::threads.size())) {
    simt::at_barrier = 0;
    ++simt::barrier_round;
  }
  while (simt::barrier_round == round) simt::give_way();
}

namespace simt {

// Runs one thread block. The contents of shared memory are arbitrary at first.
inline void run_block(Place block, int count, size_t shared_bytes, const std::function<void()>& kernel) {
  body = kernel;
  blockIdx = block;
  blockDim = {unsigned(count), 1, 1};
  shared.assign(shared_bytes, 0xa5);
  threads.assign(count, {});
  ended.assign(count, false);
  warps.assign((count + kLanes - 1) / kLanes, {});
  while (int(stacks.size()) < count) stacks.push_back(std::make_unique<uint8_t[]>(kStack));
  at_barrier = 0;
  for (int i = 0; i < count; ++i) {
    getcontext(&threads[i]);
    threads[i].uc_stack.ss_sp = stacks[i].get();
    threads[i].uc_stack.ss_size = kStack;
    makecontext(&threads[i], run_thread, 0);
  }
  for (int left = count; left > 0;) {
    left = 0;
    for (current = 0; current < count; ++current) {
      if (ended[current]) continue;
      threadIdx.x = unsigned(current);
      swapcontext(&scheduler, &threads[current]);
      left += !ended[current];
    }
  }
}

}  // namespace simt

template <class T>
T __shfl_xor_sync(unsigned, T value, int offset) {
  const int lane = simt::current % simt::kLanes;
  simt::Warp& own = simt::warps[simt::current / simt::kLanes];
  own.values[lane] = value;
  T other;
  simt::together([](simt::Warp&) {});
  other = T(own.values[lane ^ offset]);
  simt::together([](simt::Warp&) {});
  return other;
}

inline void __syncwarp() {
  simt::together([](simt::Warp&) {});
}

inline float __saturatef(float x) { return x > 0 ? x < 1 ? x : 1 : 0; }
inline float __fmul_rd(float x, float y) {
  const double product = double(x) * y;  // exact
  const float rounded = float(product);
  return rounded > product ? std::nextafter(rounded, -INFINITY) : rounded;
}

using __half = _Float16;
inline float __half2float(__half x) { return x; }
inline __half __float2half_rn(float x) { return __half(x); }

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

namespace ceat::cuda {

template <class T>
T read_only(const T* from) {
  return *from;
}

inline float widen_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Rounds to nearest, ties to even.
inline uint32_t bf16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline float2 unpack(uint32_t word) { return {widen_bits(word << 16), widen_bits(word & 0xffff0000u)}; }
inline uint32_t pack(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }

inline uint32_t pack_positive(float low, float high) {
  return pack(low < 0 ? 0 : low, high < 0 ? 0 : high) & 0x7fff7fffu;
}
inline uint32_t spread_signs(uint32_t word) { return (word >> 15 & 1) * 0xffffu | (word >> 31) * 0xffff0000u; }

inline void multiply_add(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint2 b) {
  const int lane = simt::current % simt::kLanes;
  simt::Warp& own = simt::warps[simt::current / simt::kLanes];
  const uint32_t a[4] = {a0, a1, a2, a3}, both[2] = {b.x, b.y};
  std::memcpy(own.sums[lane], sum, sizeof sum);
  std::memcpy(own.a[lane], a, sizeof a);
  std::memcpy(own.b[lane], both, sizeof both);
  simt::together([](simt::Warp& warp) {
    float rows[16][16], columns[16][8];
    for (int l = 0; l < simt::kLanes; ++l) {
      const int g = l / 4, t = l % 4;
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack(warp.a[l][i]);
        rows[g + i % 2 * 8][i / 2 * 8 + 2 * t] = pair.x;
        rows[g + i % 2 * 8][i / 2 * 8 + 2 * t + 1] = pair.y;
      }
      for (int i = 0; i < 2; ++i) {
        const float2 pair = unpack(warp.b[l][i]);
        columns[8 * i + 2 * t][g] = pair.x;
        columns[8 * i + 2 * t + 1][g] = pair.y;
      }
    }
    for (int l = 0; l < simt::kLanes; ++l) {
      for (int e = 0; e < 4; ++e) {
        double total = warp.sums[l][e];
        for (int k = 0; k < 16; ++k) total += double(rows[l / 4 + e / 2 * 8][k]) * columns[k][l % 4 * 2 + e % 2];
        warp.sums[l][e] = float(total);
      }
    }
  });
  std::memcpy(sum, own.sums[lane], sizeof sum);
}

inline uint32_t shared_address(const void* place) {
  return uint32_t(static_cast<const uint8_t*>(place) - simt::shared.data());
}

inline void load_matrices(uint32_t (&to)[4], uint32_t address) {
  const int lane = simt::current % simt::kLanes;
  simt::Warp& own = simt::warps[simt::current / simt::kLanes];
  if (address % 16 != 0 || address + 16 > simt::shared.size()) simt::fail("a matrix lies outside of shared memory");
  own.address[lane] = address;
  simt::together([](simt::Warp& warp) {
    for (int l = 0; l < simt::kLanes; ++l) {
      for (int i = 0; i < 4; ++i) {
        std::memcpy(&warp.rows[l][i], &simt::shared[warp.address[8 * i + l / 4] + 4 * (l % 4)], 4);
      }
    }
  });
  std::memcpy(to, own.rows[lane], sizeof to);
}

inline void start_copy(uint4* to, const uint4* from) {
  const uint8_t* place = reinterpret_cast<const uint8_t*>(to);
  if (place < simt::shared.data() || place + 16 > simt::shared.data() + simt::shared.size()) {
    simt::fail("a copy leaves shared memory");
  }
  *to = *from;
}

inline void finish_copies() { __syncthreads(); }

inline float exp2_rough(float x) { return x < -126 ? 0 : std::exp2(x); }

template <class V>
V* shared_memory() {
  return reinterpret_cast<V*>(simt::shared.data());
}

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, void*,
                   const Arguments&... arguments) {
  gridDim = {unsigned(blocks), 1, 1};
  for (unsigned block = 0; block < blocks; ++block) {
    simt::run_block({block, 0, 0}, threads, shared_bytes, [&] { kernel(arguments...); });
  }
  return nullptr;
}

}  // namespace ceat::cuda

inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {uint16_t(ceat::cuda::bf16_bits(x))}; }
