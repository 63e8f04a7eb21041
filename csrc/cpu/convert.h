// Element types of logits and gradients, and their conversion to and from the type that is computed in.
#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "vec.h"

namespace ceat {
inline namespace CEAT_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class To, class From>
CEAT_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// bf16 is the upper half of fp32. Bits and F are an unsigned integer and the float of its size, or vectors of them.
template <class F, class Bits>
CEAT_HD F from_bfloat16(Bits bits) {
  return bit_cast<F>(bits << 16);
}
// fp16: re-bias the exponent by a multiplication, which also normalises denormals; infinity and NaN keep a full one.
template <class F, class Bits>
CEAT_HD F from_half(Bits bits) {
  const Bits magnitude = (bits & 0x7fff) << 13;
  const Bits rescaled = bit_cast<Bits>(bit_cast<F>(magnitude) * 0x1p112f);
  const Bits full = magnitude >= 0x0f800000u ? Bits{} + 0x7f800000u : Bits{};
  return bit_cast<F>(rescaled | full | (bits & 0x8000) << 16);
}

template <class T>
CEAT_HD T widen(float x) {
  return T(x);
}
template <class T>
CEAT_HD T widen(double x) {
  return T(x);
}
template <class T>
CEAT_HD T widen(BFloat16 x) {
  return T(from_bfloat16<float>(uint32_t(x.bits)));
}
template <class T>
CEAT_HD T widen(Half x) {
  return T(from_half<float>(uint32_t(x.bits)));
}

// A vector of elements.
typedef uint32_t WideBits __attribute__((vector_size(kVecBytes)));
typedef uint16_t HalfBits __attribute__((vector_size(kVecBytes / 2)));

CEAT_HD VecF load_wide(const float* from) { return load<VecF>(from); }
CEAT_HD VecD load_wide(const double* from) { return load<VecD>(from); }
CEAT_HD VecF load_wide(const BFloat16* from) {
#ifdef __AVX512F__
  // The form without a mask warns of an uninitialised operand in GCC 12.
  return from_bfloat16<VecF>(WideBits(_mm512_maskz_cvtepu16_epi32(0xffff, load<__m256i>(from))));
#else
  return from_bfloat16<VecF>(__builtin_convertvector(load<HalfBits>(from), WideBits));
#endif
}
CEAT_HD VecF load_wide(const Half* from) {
  return from_half<VecF>(__builtin_convertvector(load<HalfBits>(from), WideBits));
}

template <class Out, class T>
struct Narrow {
  CEAT_HD Out from(T x) { return Out(x); }
};
template <class T>
struct Narrow<BFloat16, T> {
  CEAT_HD BFloat16 from(T x) {
    const uint32_t bits = bit_cast<uint32_t>(float(x));
    const uint32_t nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return BFloat16{uint16_t(x != x ? 0x7fc0 : nearest_even)};
  }
};
template <class Out, class T>
CEAT_HD Out narrow(T x) {
  return Narrow<Out, T>::from(x);
}

CEAT_HD void store_narrow(float* to, VecF v) { store(to, v); }
CEAT_HD void store_narrow(double* to, VecD v) { store(to, v); }
CEAT_HD void store_narrow(BFloat16* to, VecF v) {
  const WideBits bits = bit_cast<WideBits>(v);
  const WideBits nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const WideBits rounded = v != v ? WideBits{} + 0x7fc0 : nearest_even;
  store(to, __builtin_convertvector(rounded, HalfBits));
}

// The same by the fastest instruction, which takes denormals for zeros: gradients of the loss keep theirs.
CEAT_HD void store_rounded(float* to, VecF v) { store(to, v); }
CEAT_HD void store_rounded(BFloat16* to, VecF v) {
#ifdef __AVX512BF16__
  store(to, _mm512_cvtneps_pbh(__m512(v)));
#else
  store_narrow(to, v);
#endif
}

// Half precision is computed in fp32; fp16 gradients leave in fp32 (see ceat_fast/ops/__init__.py).
template <class In>
struct TypesOf {
  using Compute = float;
  using Gradient = In;
};
template <>
struct TypesOf<double> {
  using Compute = double;
  using Gradient = double;
};
template <>
struct TypesOf<Half> {
  using Compute = float;
  using Gradient = float;
};

}  // namespace CEAT_ISA
}  // namespace ceat
