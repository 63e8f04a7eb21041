// The loss of eq. 22 and its gradients in one pass over the logits; the arithmetic is in loss_math.h.
#include "rows.cuh"

namespace ceat::cuda {
namespace {

// The pieces of the loss, in the order of CeatParts in ceat_fast/ops/reference.py.
template <class V>
struct RowParts {
  V ce, nat, adv, nat_disparity, adv_disparity, nat_weight, adv_weight;
};

template <class V>
__device__ V row_loss(const CeatSettings& s, const RowParts<V>& parts) {
  return V(s.ce_coefficient) * parts.ce + V(s.nat_coefficient) * parts.nat_weight * parts.nat +
         V(s.adv_coefficient) * parts.adv_weight * parts.adv;
}

template <class V>
__device__ void store_parts(V* parts, int64_t row, int64_t rows, const RowParts<V>& values, bool labelled) {
  const V ordered[] = {values.ce,         values.nat,       values.adv, values.nat_disparity, values.adv_disparity,
                       values.nat_weight, values.adv_weight};
#pragma unroll
  for (int i = 0; i < 7; ++i) parts[i * rows + row] = labelled ? ordered[i] : V(NAN);
}

// sum a^2, sum d^2, ... over the classes of both rows.
template <class Row, class V>
__device__ DistanceSums<V> distance_sums(const Row& adv, const Row& nat, const SoftmaxRow<V>& adv_softmax,
                                         const SoftmaxRow<V>& nat_softmax, int lanes) {
  DistanceSums<V> sums = DistanceSums<V>::zero();
#pragma unroll
  for (int i = 0; i < adv.count(); ++i) {
    const auto a = nat.exps(i), b = adv.exps(i);
#pragma unroll
    for (int j = 0; j < Row::kPack; ++j) {
      add_class(sums, a.values[j] * nat_softmax.inv_sum, b.values[j] * adv_softmax.inv_sum);
    }
  }
  sums.nat = group_sum(sums.nat, lanes);
  sums.adv = group_sum(sums.adv, lanes);
  sums.db = group_sum(sums.db, lanes);
  sums.da = group_sum(sums.da, lanes);
  add_class(sums, nat_softmax.true_residual, adv_softmax.true_residual);
  return sums;
}

template <class Row, class V, class G>
__device__ void store_gradients(const Row& adv, const Row& nat, const SoftmaxRow<V>& adv_softmax,
                                const SoftmaxRow<V>& nat_softmax, const DistanceSums<V>& sums, const GradientRow<V>& g,
                                const Place& at, G* adv_grad, G* nat_grad) {
#pragma unroll
  for (int i = 0; i < adv.count(); ++i) {
    Pack<V, Row::kPack> a = nat.exps(i), b = adv.exps(i);
#pragma unroll
    for (int j = 0; j < Row::kPack; ++j) {
      const V nat_prob = a.values[j] * nat_softmax.inv_sum, adv_prob = b.values[j] * adv_softmax.inv_sum;
      b.values[j] = adv_gradient(g, nat_prob, adv_prob);
      a.values[j] = nat_gradient(g, nat_prob, adv_prob);
    }
    store_pack(adv_grad, adv.first_class(i), at.classes, b);
    store_pack(nat_grad, adv.first_class(i), at.classes, a);
  }
  if (holds_label<Row>(at)) {
    adv_grad[at.label] = narrow<G>(true_adv_gradient(g, sums, adv_softmax));
    nat_grad[at.label] = narrow<G>(true_nat_gradient(g, sums, nat_softmax));
  }
}

// Shared memory: the true-class residuals of both rows, (samples, M) each, then the losses, (M, samples).
template <class Row, int kMaxThreads, int kMinBlocks>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks) ceat_loss_kernel(const CeatLossArgs args) {
  using T = typename Row::Element;
  using V = typename Row::V;
  using G = Gradient<T>;
  const int members = args.shape.members, samples = args.plan.samples;
  const Place at = place_of_thread(args.plan, args.shape, args.target, Row::lanes(args.plan));
  V* const adv_residuals = shared_memory<V>();
  V* const nat_residuals = adv_residuals + samples * members;
  V* const losses = nat_residuals + samples * members;

  const T* const adv_data = row_at<T>(args.adv, at);
  const T* const nat_data = row_at<T>(args.nat, at);
  const auto adv_fetched = Row::fetch(adv_data, at), nat_fetched = Row::fetch(nat_data, at);
  const V true_adv = true_logit_of(adv_data, at), true_nat = true_logit_of(nat_data, at);
  Row adv(adv_fetched, at), nat(nat_fetched, at);
  const SoftmaxRow<V> adv_softmax = softmax_of(adv, true_adv, at);
  const SoftmaxRow<V> nat_softmax = softmax_of(nat, true_nat, at);
  const DistanceSums<V> sums = distance_sums(adv, nat, adv_softmax, nat_softmax, at.lanes);
  if (at.in_block && at.lane == 0) {
    adv_residuals[at.local * members + at.member] = adv_softmax.true_residual;
    nat_residuals[at.local * members + at.member] = nat_softmax.true_residual;
  }
  __syncthreads();

  RowParts<V> parts;
  parts.ce = adv_softmax.ce;
  parts.nat = sums.nat;
  parts.adv = sums.adv;
  const int pair_reduction = args.settings.pair_reduction;
  parts.nat_disparity = disparity(nat_residuals + at.local * members, members, at.member, pair_reduction);
  parts.adv_disparity = disparity(adv_residuals + at.local * members, members, at.member, pair_reduction);
  parts.nat_weight = exponential_weight(parts.nat_disparity, args.settings.nat_exponent, args.settings.max_weight);
  parts.adv_weight = exponential_weight(parts.adv_disparity, args.settings.adv_exponent, args.settings.max_weight);

  const bool labelled = at.label >= 0;
  const int64_t row = row_index(args.shape, at);
  if (at.in_block && at.lane == 0) {
    const V loss = labelled ? row_loss(args.settings, parts) : V(NAN);
    losses[at.member * samples + at.local] = at.active ? loss : V(0);
    if (at.active && args.sums == nullptr) static_cast<V*>(args.loss)[row] = loss;
    if (at.active && args.parts != nullptr) {
      store_parts(static_cast<V*>(args.parts), row, members * args.shape.batch, parts, labelled);
    }
  }
  if (at.active && args.adv_grad != nullptr) {
    G* const adv_grad = static_cast<G*>(args.adv_grad) + row * at.classes;
    G* const nat_grad = static_cast<G*>(args.nat_grad) + row * at.classes;
    if (labelled) {
      const GradientRow<V> g = gradient_row(args.settings, args.scale, parts.nat_weight, parts.adv_weight, sums,
                                            nat_softmax.true_residual, adv_softmax.true_residual);
      store_gradients(adv, nat, adv_softmax, nat_softmax, sums, g, at, adv_grad, nat_grad);
    } else {
      store_zeros(adv_grad, at);
      store_zeros(nat_grad, at);
    }
  }
  if (args.sums != nullptr) {
    __syncthreads();
    block_sums(losses, members, samples, V(args.scale), static_cast<V*>(args.sums) + blockIdx.x, int64_t(gridDim.x));
  }
}

template <class T>
const char* launch_typed(const CeatLossArgs& args, void* stream) {
  using V = Compute<T>;
  const char* error = with_row<T>(args.plan, args.shape.classes, {args.adv, args.nat}, [&](auto tag) {
    using Row = typename decltype(tag)::type;
    const size_t shared_bytes = 3 * sizeof(V) * args.plan.samples * args.shape.members;
    auto kernel = ceat_loss_kernel<Row, Row::kMaxThreads, 1>;
    if constexpr (Row::kCrowded) {
      if (args.plan.threads <= kCrowdedThreads) kernel = ceat_loss_kernel<Row, kCrowdedThreads, kCrowdedBlocks>;
    }
    return launch(kernel, args.plan.blocks, args.plan.threads, shared_bytes, stream, args);
  });
  return error != nullptr ? error : add_up_sums<V>(args.plan, args.shape.members, args.sums, args.loss, stream);
}

}  // namespace

const char* launch_ceat_loss(DType dtype, const CeatLossArgs& args, void* stream) {
  return with_type(dtype, [&](auto element) { return launch_typed<decltype(element)>(args, stream); });
}

}  // namespace ceat::cuda
