// What the convolutions of one instruction set share: the shape of their inner products, and what follows the sums.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace ceat {
inline namespace CEAT_ISA {

// Filters come in blocks of so many vectors.
constexpr int kVectors = ceat_cpu::kChannelBlock / kLanes<float>;
// Rows of an inner product: with their vectors they take twelve registers, of the sixteen that AVX2 has.
constexpr int kRows = 12 / kVectors;

// A vector of sums, bias included, to be stored at `place` of the output.
inline __attribute__((always_inline)) VecF finish(const ceat_cpu::Epilogue& e, VecF sum, int64_t place) {
  if (e.residual != nullptr) sum += load<VecF>(e.residual + place);
  if (e.relu) sum = select(sum < 0.0f, VecF{}, sum);  // NaN stays
  if (e.gate != nullptr) sum = select(load<VecF>(e.gate + place) > 0.0f, sum, VecF{});
  return sum;
}

}  // namespace CEAT_ISA
}  // namespace ceat
