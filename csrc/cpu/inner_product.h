// The inner products of convolutions: sixteen filters at several rows of inputs, whose sums stay in registers.
//
// Inputs and weights are read as 32-bit words: a float, or two bf16 of neighbouring channels, whose two products go
// into one sum. Weights are (words, 16, channels per word), so that a vector of them belongs to as many filters. Sums
// are fp32.
#pragma once

#include <utility>

#include "convert.h"
#include "kernels.h"
#include "vec.h"

namespace ceat {
inline namespace CEAT_ISA {

// Filters come in blocks of so many vectors.
constexpr int kVectors = ceat_cpu::kChannelBlock / kLanes<float>;
// Rows of an inner product: their sums take all registers but a few.
#ifdef __AVX512F__
constexpr int kRows = 24 / kVectors;
#else
constexpr int kRows = 12 / kVectors;
#endif
static_assert(ceat_cpu::kTileBlock % kRows == 0 && ceat_cpu::kPixelBlock % kRows == 0, "blocks are whole rows");

// Channels of a word.
template <class E>
constexpr int kChannelsPerWord = 4 / int(sizeof(E));

typedef MaskF Words;

template <class E>
struct Product;
template <>
struct Product<float> {
  static inline __attribute__((always_inline)) VecF add(VecF sum, Words x, Words weights) {
    return sum + reinterpret_cast<VecF>(x) * reinterpret_cast<VecF>(weights);
  }
};
template <>
struct Product<BFloat16> {
  static inline __attribute__((always_inline)) VecF add(VecF sum, Words x, Words weights) {
#ifdef __AVX512BF16__
    return VecF(_mm512_dpbf16_ps(__m512(sum), __m512bh(x), __m512bh(weights)));
#else
    const auto low = [](Words pair) { return reinterpret_cast<VecF>(pair << 16); };
    const auto high = [](Words pair) { return reinterpret_cast<VecF>(pair & int32_t(0xffff0000)); };
    return sum + low(x) * low(weights) + high(x) * high(weights);
#endif
  }
};

// body(0), ..., body(count - 1), where each number is a constant: arrays that it indexes can lie in registers.
template <class Body, size_t... index>
inline __attribute__((always_inline)) void unrolled(const Body& body, std::index_sequence<index...>) {
  (body(std::integral_constant<int, int(index)>()), ...);
}
template <int count, class Body>
inline __attribute__((always_inline)) void unrolled(const Body& body) {
  unrolled(body, std::make_index_sequence<size_t(count)>());
}

// Sums of sixteen filters at kRows rows. Whatever takes its address would put it into memory.
template <class E>
class Sums {
 public:
  static constexpr int kWeights = ceat_cpu::kChannelBlock * kChannelsPerWord<E>;  // of a word

  inline __attribute__((always_inline)) Sums() {
    unrolled<kRows * kVectors>([&](auto i) { at_[i] = VecF{}; });
  }

  // Adds the products of a word of each row, at from(row), and its weights.
  template <class From>
  inline __attribute__((always_inline)) void add(const From& from, const E* weights) {
    Words weight[kVectors];
    unrolled<kVectors>([&](auto v) { weight[v] = load<Words>(weights + v * (kWeights / kVectors)); });
    unrolled<kRows>([&](auto row) {
      int32_t word;
      std::memcpy(&word, from(row), sizeof(word));
      const Words value = Words{} + word;
      unrolled<kVectors>([&](auto v) {
        constexpr int i = row * kVectors + v;
        at_[i] = Product<E>::add(at_[i], value, weight[v]);
      });
    });
  }

  // Writes (kRows, 16).
  inline __attribute__((always_inline)) void write(float* out) const {
    unrolled<kRows * kVectors>([&](auto i) { store(out + i * kLanes<float>, at_[i]); });
  }

 private:
  VecF at_[kRows * kVectors];  // row by row
};

}  // namespace CEAT_ISA
}  // namespace ceat
