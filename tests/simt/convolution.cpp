// csrc/cuda/convolution.cuh on the host. Reads a problem from standard input and writes the output to standard output.
//
//   numbers   channels filters members samples height width out_height out_width direction point flipped relu
//             has_bias has_residual has_gate
//   tensors   x, weights, bias, residual, gate
#define CEAT_SIMT "simt.h"
#include "../../csrc/cuda/convolution.cuh"
#include "problem.h"

using namespace ceat::cuda;

namespace {

template <int kChannels, int kFilters>
void run(const ConvolutionArgs& args) {
  switch (args.direction) {
    case Direction::kStride1: return run_convolution<kChannels, kFilters, Direction::kStride1>(args);
    case Direction::kStride2: return run_convolution<kChannels, kFilters, Direction::kStride2>(args);
    case Direction::kTransposed2: return run_convolution<kChannels, kFilters, Direction::kTransposed2>(args);
  }
}

template <int kChannels>
void run_filters(const ConvolutionArgs& args) {
  return args.filters == 16   ? run<kChannels, 16>(args)
         : args.filters == 32 ? run<kChannels, 32>(args)
                              : run<kChannels, 64>(args);
}

void run_any(const ConvolutionArgs& args) {
  return args.channels == 16   ? run_filters<16>(args)
         : args.channels == 32 ? run_filters<32>(args)
                               : run_filters<64>(args);
}

}  // namespace

int main() {
  ConvolutionArgs args{};
  args.channels = number(), args.filters = number(), args.members = number(), args.samples = number();
  args.height = number(), args.width = number(), args.out_height = number(), args.out_width = number();
  args.direction = Direction(number());
  args.point = number(), args.flipped = number(), args.relu = number();
  const bool has_bias = number(), has_residual = number(), has_gate = number();
  set_grid(args);
  const size_t images = size_t(args.members) * args.samples;
  const size_t bytes = images * args.out_height * args.out_width * args.filters * 2;
  const auto x = read(images * args.height * args.width * args.channels * 2);
  const auto weights = read(size_t(args.members) * taps_of(args) * args.channels * args.filters * 2);
  const auto bias = read(has_bias * size_t(args.members) * args.filters * 2);
  const auto residual = read(has_residual * bytes), gate = read(has_gate * bytes);
  std::vector<uint8_t> out(bytes, 0xa5);
  args.x = x.data(), args.weights = weights.data(), args.out = out.data();
  args.bias = has_bias ? bias.data() : nullptr;
  args.residual = has_residual ? residual.data() : nullptr;
  args.gate = has_gate ? gate.data() : nullptr;
  const Blocks blocks = blocks_of(args);
  for (unsigned z = 0; z < blocks.z; ++z) {
    for (unsigned y = 0; y < blocks.y; ++y) {
      for (unsigned x_block = 0; x_block < blocks.x; ++x_block) {
        simt::run_block({x_block, y, z}, kConvolutionThreads, shared_bytes(args), [&] { run_any(args); });
      }
    }
  }
  std::fwrite(out.data(), 1, out.size(), stdout);
  return 0;
}
