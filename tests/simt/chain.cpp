// csrc/cuda/chain.cuh on the host. Reads a problem from standard input and writes its tensors to standard output.
//
//   numbers   channels members samples height width images threads count masks_of_sample gated_by
//             has_residual has_gate wants_before_last keeps_masks turned; of each link: mask residual relu gated
//             has_bias
//   tensors   x, residual, gate, weights and bias of each link, masks; then out, before_last, masks
#define CEAT_SIMT "simt.h"
#include "../../csrc/cuda/chain.cuh"
#include "problem.h"

using namespace ceat::cuda;

namespace {

using Kernel = void (*)(const ChainArgs&);

Kernel kernel_of(int channels, bool wide) {
  if (channels == 16) return wide ? run_chain<16, true> : run_chain<16, false>;
  if (channels == 32) return wide ? run_chain<32, true> : run_chain<32, false>;
  return wide ? run_chain<64, true> : run_chain<64, false>;
}

}  // namespace

int main() {
  ChainArgs args{};
  args.channels = number(), args.members = number(), args.samples = number();
  args.height = number(), args.width = number(), args.images = number();
  const int threads = number();
  args.count = number(), args.masks_of_sample = number(), args.gated_by = number();
  const bool has_residual = number(), has_gate = number(), wants_before_last = number(), keeps_masks = number();
  args.turned = number();
  std::vector<bool> has_bias;
  for (int i = 0; i < args.count; ++i) {
    ChainLink& link = args.links[i];
    link.mask = number(), link.residual = number(), link.relu = number(), link.gated = number();
    has_bias.push_back(number());
  }
  set_tasks(args);
  const size_t bytes = size_t(args.members) * args.samples * args.height * args.width * args.channels * 2;
  const auto x = read(bytes), residual = read(has_residual * bytes), gate = read(has_gate * bytes);
  std::vector<std::vector<uint8_t>> kept;
  for (int i = 0; i < args.count; ++i) {
    kept.push_back(read(size_t(args.members) * kChainTaps * args.channels * args.channels * 2));
    args.links[i].weights = kept.back().data();
    kept.push_back(read(has_bias[i] * size_t(args.members) * args.channels * 2));
    args.links[i].bias = has_bias[i] ? kept.back().data() : nullptr;
  }
  const size_t mask_bytes =
      size_t(args.members) * args.samples * args.masks_of_sample * args.tasks * kWarpSize * (args.width == 8 ? 4 : 8);
  auto masks = read(keeps_masks * mask_bytes);
  std::vector<uint8_t> out(bytes), before_last(wants_before_last * bytes);
  args.x = x.data(), args.residual = has_residual ? residual.data() : nullptr;
  args.gate = has_gate ? gate.data() : nullptr, args.out = out.data();
  args.before_last = wants_before_last ? before_last.data() : nullptr;
  args.masks = keeps_masks ? masks.data() : nullptr;
  const size_t shared = size_t(chain_bytes(args.height, args.width, args.channels, args.images));
  const Kernel kernel = kernel_of(args.channels, args.width != 8);
  for (int member = 0; member < args.members; ++member) {
    for (int64_t first = 0; first * args.images < args.samples; ++first) {
      simt::run_block({unsigned(first), unsigned(member), 0}, threads, shared, [&] { kernel(args); });
    }
  }
  for (const auto* tensor : {&out, &before_last, &masks}) std::fwrite(tensor->data(), 1, tensor->size(), stdout);
  return 0;
}
