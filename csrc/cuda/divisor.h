// Division by a number that is known when a kernel is launched.
#pragma once

#include <cstdint>

namespace ceat::cuda {

// Division of numbers below 2^31 by one that is known when a kernel is launched: on a GPU a division takes as long as
// twenty multiplications (Granlund and Montgomery, 1994).
struct Divisor {
  uint32_t value, multiplier, shift;
};
constexpr Divisor divisor(uint32_t value) {
  uint32_t shift = 0;
  while ((uint64_t(1) << shift) < value) ++shift;
  const uint64_t rest = (uint64_t(1) << shift) - value;
  return {value, uint32_t((rest << 32) / value + 1), shift};
}
#ifdef __CUDACC__
__host__ __device__
#endif
    inline uint32_t divide(uint32_t number, const Divisor& by) {
  return (uint32_t(uint64_t(number) * by.multiplier >> 32) + number) >> by.shift;
}

}  // namespace ceat::cuda
