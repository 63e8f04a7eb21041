// SIMD vectors of the instruction set this file is compiled for, and exp and log1p on them.
//
// The compiler's vector extension gives arithmetic, comparison and selection on any target; only the two
// transcendental functions need spelling out.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "../scalar_math.h"

namespace ceat {
inline namespace CEAT_ISA {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

typedef float VecF __attribute__((vector_size(kVecBytes)));
typedef double VecD __attribute__((vector_size(kVecBytes)));
typedef int32_t MaskF __attribute__((vector_size(kVecBytes)));
typedef int64_t MaskD __attribute__((vector_size(kVecBytes)));

template <>
struct ScalarOf<VecF> {
  using type = float;
};
template <>
struct ScalarOf<VecD> {
  using type = double;
};

template <class T>
struct VecTraits;
template <>
struct VecTraits<float> {
  using Vec = VecF;
};
template <>
struct VecTraits<double> {
  using Vec = VecD;
};
template <class T>
using VecOf = typename VecTraits<T>::Vec;
template <class T>
constexpr int kLanes = kVecBytes / int(sizeof(T));

CEAT_HD VecF select(MaskF condition, VecF a, VecF b) { return condition ? a : b; }
CEAT_HD VecD select(MaskD condition, VecD a, VecD b) { return condition ? a : b; }

template <class V, class P>
CEAT_HD V load(const P* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}
template <class V, class P>
CEAT_HD void store(P* to, V v) {
  std::memcpy(to, &v, sizeof(V));
}

CEAT_HD VecF max(VecF a, VecF b) { return select(a > b, a, b); }  // b where either is NaN
CEAT_HD VecD max(VecD a, VecD b) { return select(a > b, a, b); }

// exp on [-88, 88]: x = n log 2 + r, |r| <= log(2)/2, and a degree-6 minimax polynomial for exp(r); below 1 ulp off.
// At the lower end n = -127 makes the factor 2^n a zero, so that -88 stands for everything below it.
CEAT_HD VecF exp_in_range(VecF x) {
  // Adding 1.5 * 2^23 rounds to an integer and leaves n in the low bits.
  constexpr float kRound = 12582912.0f;
  const VecF shifted = x * 1.44269504f + kRound;
  const VecF n = shifted - kRound;
  VecF r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  // exp(r) = 1 + r + r^2 p(r), with p in pairs instead of Horner's chain: the loops around this wait for its latency.
  const VecF square = r * r;
  const VecF low = 1.6666665459e-1f * r + 5.0000001201e-1f;
  const VecF middle = 8.3334519073e-3f * r + 4.1665795894e-2f;
  const VecF high = 1.9875691500e-4f * r + 1.3981999507e-3f;
  const VecF p = high * (square * square) + (middle * square + low);
  const VecF power = reinterpret_cast<VecF>((reinterpret_cast<MaskF>(shifted) + 127) << 23);
  return (p * square + r) * power + power;
}
CEAT_HD VecF exp_nonpositive(VecF x) { return exp_in_range(max(VecF{} - 88.0f, x)); }
CEAT_HD VecF exp_any(VecF x) {
  const VecF ceiling = VecF{} + 88.0f;
  const VecF infinity = VecF{} + std::numeric_limits<float>::infinity();
  return select(x > ceiling, infinity, exp_nonpositive(select(x > ceiling, ceiling, x)));
}

// log(1 + t), t >= 0: u = 1 + t = 2^e m with m in [sqrt 1/2, sqrt 2), a polynomial for log m, and the digits that
// rounding 1 + t lost put back to first order. NaN comes through that last term.
CEAT_HD VecF log1p_nonnegative(VecF t) {
  const VecF u = 1.0f + t;
  const MaskF bits = reinterpret_cast<MaskF>(u);
  const MaskF exponent = (bits - 0x3f3504f3) >> 23;
  const VecF x = reinterpret_cast<VecF>(bits - (exponent << 23)) - 1.0f;
  const VecF e = __builtin_convertvector(exponent, VecF);
  VecF p = VecF{} + 7.0376836292e-2f;
  p = p * x - 1.1514610310e-1f;
  p = p * x + 1.1676998740e-1f;
  p = p * x - 1.2420140846e-1f;
  p = p * x + 1.4249322787e-1f;
  p = p * x - 1.6668057665e-1f;
  p = p * x + 2.0000714765e-1f;
  p = p * x - 2.4999993993e-1f;
  p = p * x + 3.3333331174e-1f;
  const VecF square = x * x;
  VecF y = p * x * square + e * -2.12194440e-4f - 0.5f * square + (t - (u - 1.0f)) / u;
  return (x + y) + e * 0.693359375f;
}

// fp64 is the reference precision, not the fast path: the C library's functions, lane by lane.
template <double (*f)(double)>
CEAT_HD VecD each_lane(VecD x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = f(x[i]);
  return x;
}
CEAT_HD VecD exp_nonpositive(VecD x) { return each_lane<::exp>(x); }
CEAT_HD VecD exp_any(VecD x) { return each_lane<::exp>(x); }
CEAT_HD VecD log1p_nonnegative(VecD t) { return each_lane<::log1p>(t); }

// Lanes first, first + 1, ... of v. Not by memcpy where there is a choice: what has its address taken stays in memory,
// also in the loop that adds it up.
template <class Part, int first, class V, int... lane>
CEAT_HD Part part_of(V v, std::integer_sequence<int, lane...>) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(v, v, (first + lane)...);
#else
  Part part;
  for (int i = 0; i < int(sizeof...(lane)); ++i) part[i] = v[first + i];
  return part;
#endif
}

// The lanes of v combined by halves: few instructions, and rounding that grows with their logarithm only.
template <class T, int count, class V, class Combine>
CEAT_HD T fold_lanes(V v, Combine combine) {
  if constexpr (count == 2) {
    return combine(v[0], v[1]);
  } else {
    constexpr int kHalf = count / 2;
    typedef T Half __attribute__((vector_size(kHalf * sizeof(T))));
    using Lanes = std::make_integer_sequence<int, kHalf>;
    return fold_lanes<T, kHalf>(combine(part_of<Half, 0>(v, Lanes{}), part_of<Half, kHalf>(v, Lanes{})), combine);
  }
}

}  // namespace CEAT_ISA
}  // namespace ceat
