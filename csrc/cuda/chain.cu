// Instances and launches of chains; see chain.cuh.
#include "chain.cuh"

#include "elements.cuh"

namespace ceat::cuda {

namespace {

// Threads of a block: one warp for each task of an image that has a few, so that several blocks share a multiprocessor
// and their loads, products and stores overlap. With 64 channels the weights take most of shared memory: one block with
// several images takes their place.
constexpr int kThreadsOf64 = 384;
constexpr int kThreadsOfOthers = 128;
constexpr int threads_of(int channels) { return channels == 64 ? kThreadsOf64 : kThreadsOfOthers; }

template <int kChannels, bool kWide>
__global__ void __launch_bounds__(threads_of(kChannels), kChannels == 64 ? 1 : 3)
    chain_kernel(const __grid_constant__ ChainArgs args) {
  run_chain<kChannels, kWide>(args);
}

template <int kChannels, bool kWide>
const char* launch_instance(const ChainArgs& args, void* stream) {
  const auto kernel = chain_kernel<kChannels, kWide>;
  const int bytes = int(chain_bytes(args.height, args.width, args.channels, args.images));
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const dim3 blocks(unsigned((args.samples + args.images - 1) / args.images), unsigned(args.members));
  kernel<<<blocks, threads_of(kChannels), size_t(bytes), static_cast<cudaStream_t>(stream)>>>(args);
  const cudaError_t launched = cudaGetLastError();
  return launched == cudaSuccess ? nullptr : cudaGetErrorString(launched);
}

template <int kChannels>
const char* launch_width(const ChainArgs& args, void* stream) {
  return args.width == 8 ? launch_instance<kChannels, false>(args, stream)
                         : launch_instance<kChannels, true>(args, stream);
}

}  // namespace

const char* launch_chain(const ChainArgs& args, void* stream) {
  switch (args.channels) {
    case 16: return launch_width<16>(args, stream);
    case 32: return launch_width<32>(args, stream);
    case 64: return launch_width<64>(args, stream);
  }
  return "channels must be 16, 32 or 64";
}

}  // namespace ceat::cuda
