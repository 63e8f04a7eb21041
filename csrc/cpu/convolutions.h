// The convolution kernels that winograd.cpp and direct.cpp compile for this instruction set.
#pragma once

#include "kernels.h"

namespace ceat {
inline namespace CEAT_ISA {

void transform_filters(const ceat_cpu::FilterProblem& p, int64_t begin, int64_t end);
void convolve_tiles(const ceat_cpu::ConvolutionProblem& p, int64_t begin, int64_t end);
void convolve_pixels(const ceat_cpu::DirectProblem& p, int64_t begin, int64_t end);

}  // namespace CEAT_ISA
}  // namespace ceat
