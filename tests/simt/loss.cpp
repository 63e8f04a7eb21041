// csrc/cuda/ceat_loss.cu and ensemble.cu on the host. Reads a problem from standard input and writes its tensors to
// standard output.
//
//   numbers   of_ensemble dtype members samples classes; of the storage: member stride, sample stride, offset,
//   elements;
//             reduction pair_reduction detach_nat
//   tensors   scalars: six of CeatSettings and the scale (fp64), storage of adv, of nat (but for the ensemble), labels;
//             then loss, gradients, parts
#define CEAT_SIMT "simt.h"
#include "../../csrc/cuda/ceat_loss.cu"
#include "../../csrc/cuda/ensemble.cu"
#include "problem.h"

using namespace ceat::cuda;

namespace {

constexpr size_t kBytes[] = {4, 8, 2, 2}, kLossBytes[] = {4, 8, 4, 4}, kGradientBytes[] = {4, 8, 4, 2};

void write(const std::vector<uint8_t>& data) { std::fwrite(data.data(), 1, data.size(), stdout); }

}  // namespace

int main() {
  const bool of_ensemble = number();
  const int dtype = number();
  Shape shape{};
  shape.members = number(), shape.batch = number(), shape.classes = number();
  const int member_stride = number(), sample_stride = number(), offset = number(), elements = number();
  const int reduction = number(), pair_reduction = number();
  const bool detach_nat = number();
  double scalars[7];
  std::memcpy(scalars, read(sizeof scalars).data(), sizeof scalars);
  auto adv = read(elements * kBytes[dtype]), nat = read(of_ensemble ? 0 : elements * kBytes[dtype]);
  auto labels = read(shape.batch * 8);

  const Plan plan = make_plan(shape, DType(dtype) == DType::kDouble);
  const bool reduced = reduction != ceat::kNone;
  const size_t rows = of_ensemble ? 1 : shape.members, of_loss = kLossBytes[dtype];
  const size_t numbers = size_t(shape.members) * shape.batch * shape.classes;
  std::vector<uint8_t> loss(rows * (reduced ? 1 : shape.batch) * of_loss), sums(rows * plan.blocks * of_loss);
  std::vector<uint8_t> adv_grad(numbers * kGradientBytes[dtype], 0xa5),
      nat_grad(of_ensemble ? 0 : adv_grad.size(), 0xa5);
  std::vector<uint8_t> parts(of_ensemble ? 0 : 7 * shape.members * shape.batch * of_loss);
  void* const shares = !reduced ? nullptr : plan.blocks == 1 ? loss.data() : sums.data();
  const auto logits = [&](const std::vector<uint8_t>& data) {
    return Logits{data.data() + offset * kBytes[dtype], member_stride, sample_stride};
  };
  const Labels target{reinterpret_cast<const int64_t*>(labels.data()), 1};
  if (of_ensemble) {
    launch_ensemble_cross_entropy(
        DType(dtype), {plan, shape, logits(adv), target, scalars[6], loss.data(), shares, adv_grad.data()}, nullptr);
  } else {
    const ceat::CeatSettings settings{scalars[0], scalars[1],     scalars[2], scalars[3], scalars[4],
                                      scalars[5], pair_reduction, reduction,  detach_nat};
    launch_ceat_loss(DType(dtype),
                     {plan, shape, logits(adv), logits(nat), target, settings, scalars[6], loss.data(), shares,
                      adv_grad.data(), nat_grad.data(), parts.data()},
                     nullptr);
  }
  for (const auto* tensor : {&loss, &adv_grad, &nat_grad, &parts}) write(*tensor);
  return 0;
}
