// exp and log1p for the row arithmetic, one spelling for scalars (device, and doubles on the host) and SIMD vectors.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define CEAT_HD static __host__ __device__ __forceinline__
#else
#define CEAT_HD static inline __attribute__((always_inline))
#endif

// The CPU kernels are compiled once per instruction set. Names that the linker could merge across those objects must
// differ, or an old CPU would run the code of a new one: they live in a namespace named after the instruction set, and
// what the kernels use of the standard library has to be inlined (tests/test_build.py looks at the symbols).
#ifndef CEAT_ISA
#define CEAT_ISA portable
#endif

namespace ceat {
inline namespace CEAT_ISA {

template <class V>
struct ScalarOf {
  using type = V;
};
template <class V>
using Scalar = typename ScalarOf<V>::type;

CEAT_HD float select(bool condition, float a, float b) { return condition ? a : b; }
CEAT_HD double select(bool condition, double a, double b) { return condition ? a : b; }

// exp(x) for x <= 0 (x = z - max z): cannot overflow.
CEAT_HD float exp_nonpositive(float x) { return expf(x); }
CEAT_HD double exp_nonpositive(double x) { return exp(x); }

CEAT_HD float exp_any(float x) { return expf(x); }
CEAT_HD double exp_any(double x) { return exp(x); }

// 1 / y and x / y for y >= 1, to about the last bit; `inverse` is reciprocal(y).
template <class V>
CEAT_HD V reciprocal(V y) {
  return V(Scalar<V>(1) / y);
}
template <class V>
CEAT_HD V quotient(V x, V y, V inverse) {
  (void)inverse;
  return x / y;
}

// A division on a GPU takes as many instructions as ten of these, and a branch.
CEAT_HD float reciprocal(float y) {
#ifdef __CUDA_ARCH__
  float rough;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(rough) : "f"(y));
  return fmaf(fmaf(-y, rough, 1), rough, rough);
#else
  return 1 / y;
#endif
}
CEAT_HD float quotient(float x, float y, float inverse) {
  const float rough = x * inverse;
  return fmaf(fmaf(-rough, y, x), inverse, rough);
}

// log(1 + t) for t >= 0.
CEAT_HD float log1p_nonnegative(float t) { return log1pf(t); }
CEAT_HD double log1p_nonnegative(double t) { return log1p(t); }

}  // namespace CEAT_ISA
}  // namespace ceat
