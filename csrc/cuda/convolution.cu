// Instances and launches of convolutions; see convolution.cuh.
#include "convolution.cuh"

#include "elements.cuh"

namespace ceat::cuda {

namespace {

template <int kChannels, int kFilters, Direction kDirection>
__global__ void __launch_bounds__(kConvolutionThreads,
                                  kChannels == 64 || kPixelTilesOf<kFilters, kDirection> == 4 ? 3 : 4)
    convolution_kernel(const __grid_constant__ ConvolutionArgs args) {
  run_convolution<kChannels, kFilters, kDirection>(args);
}

template <int kChannels, int kFilters, Direction kDirection>
const char* launch_directed(const ConvolutionArgs& args, void* stream) {
  const auto kernel = convolution_kernel<kChannels, kFilters, kDirection>;
  const size_t bytes = shared_bytes(args);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const Blocks blocks = blocks_of(args);
  kernel<<<dim3(blocks.x, blocks.y, blocks.z), kConvolutionThreads, bytes, static_cast<cudaStream_t>(stream)>>>(args);
  const cudaError_t launched = cudaGetLastError();
  return launched == cudaSuccess ? nullptr : cudaGetErrorString(launched);
}

template <int kChannels, int kFilters>
const char* launch_sized(const ConvolutionArgs& args, void* stream) {
  switch (args.direction) {
    case Direction::kStride1: return launch_directed<kChannels, kFilters, Direction::kStride1>(args, stream);
    case Direction::kStride2: return launch_directed<kChannels, kFilters, Direction::kStride2>(args, stream);
    case Direction::kTransposed2: return launch_directed<kChannels, kFilters, Direction::kTransposed2>(args, stream);
  }
  return "unknown direction";
}

template <int kChannels>
const char* launch_filters(const ConvolutionArgs& args, void* stream) {
  switch (args.filters) {
    case 16: return launch_sized<kChannels, 16>(args, stream);
    case 32: return launch_sized<kChannels, 32>(args, stream);
    case 64: return launch_sized<kChannels, 64>(args, stream);
  }
  return "filters must be 16, 32 or 64";
}

}  // namespace

const char* launch_convolution(const ConvolutionArgs& args, void* stream) {
  switch (args.channels) {
    case 16: return launch_filters<16>(args, stream);
    case 32: return launch_filters<32>(args, stream);
    case 64: return launch_filters<64>(args, stream);
  }
  return "channels must be 16, 32 or 64";
}

}  // namespace ceat::cuda
