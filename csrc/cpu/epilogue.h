// What follows the sums of a convolution.
#pragma once

#include "inner_product.h"

namespace ceat {
inline namespace CEAT_ISA {

// Finishes a vector of sums for `place` of the output: + offset + residual, ReLU, gate.
template <class E>
inline __attribute__((always_inline)) void finish(const ceat_cpu::Epilogue& e, VecF sum, VecF offset, int64_t place,
                                                  E* out) {
  sum += offset;
  if (e.residual != nullptr) sum += load_wide(static_cast<const E*>(e.residual) + place);
  if (e.relu) sum = select(sum < 0.0f, VecF{}, sum);  // NaN stays
  if (e.gate != nullptr) sum = select(load_wide(static_cast<const E*>(e.gate) + place) > 0.0f, sum, VecF{});
  store_rounded(out + place, sum);
}

// The biases of kLanes filters from `filter` on, of one member.
template <class E>
inline VecF offset_of(const ceat_cpu::Epilogue& e, int64_t filter) {
  return e.bias != nullptr ? load_wide(static_cast<const E*>(e.bias) + filter) : VecF{};
}

}  // namespace CEAT_ISA
}  // namespace ceat
