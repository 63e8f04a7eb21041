// Cross-entropy of the mean member probability (eq. 1) and its gradient; the arithmetic is in loss_math.h.
#include "rows.cuh"

namespace ceat::cuda {
namespace {

// Gradient of row m: r_m (p_m - onehot), with the share r_m and the batch average in `factor`.
template <class Row, class V, class G>
__device__ void store_gradient(const Row& row, const SoftmaxRow<V>& softmax, V factor, const Place& at, G* grad) {
  const V scale = factor * softmax.inv_sum;
#pragma unroll
  for (int i = 0; i < row.count(); ++i) {
    auto pack = row.exps(i);
#pragma unroll
    for (int j = 0; j < Row::kPack; ++j) pack.values[j] *= scale;
    store_pack(grad, row.first_class(i), at.classes, pack);
  }
  if (holds_label<Row>(at)) grad[at.label] = narrow<G>(factor * softmax.true_residual);
}

// Shared memory: the members' cross-entropies, later their shares, and true-class residuals, (samples, M) each; then
// the losses, (samples,).
template <class Row>
__global__ void __launch_bounds__(Row::kMaxThreads, 1) ensemble_kernel(const EnsembleArgs args) {
  using T = typename Row::Element;
  using V = typename Row::V;
  using G = Gradient<T>;
  const int members = args.shape.members, samples = args.plan.samples;
  const Place at = place_of_thread(args.plan, args.shape, args.target, Row::lanes(args.plan));
  V* const shares = shared_memory<V>();
  V* const residuals = shares + samples * members;
  V* const losses = residuals + samples * members;

  const T* const data = row_at<T>(args.logits, at);
  const auto fetched = Row::fetch(data, at);
  const V true_logit = true_logit_of(data, at);
  Row logits(fetched, at);
  const SoftmaxRow<V> softmax = softmax_of(logits, true_logit, at);
  if (at.in_block && at.lane == 0) {
    shares[at.local * members + at.member] = softmax.ce;
    residuals[at.local * members + at.member] = softmax.true_residual;
  }
  __syncthreads();

  if (at.in_block && at.member == 0 && at.lane == 0) {
    const V value = ensemble_cross_entropy(shares + at.local * members, residuals + at.local * members, members);
    const V loss = at.label >= 0 ? value : V(NAN);
    losses[at.local] = at.active ? loss : V(0);
    if (at.active && args.sums == nullptr) static_cast<V*>(args.loss)[at.sample] = loss;
  }
  __syncthreads();

  if (at.active && args.grad != nullptr) {
    G* const grad = static_cast<G*>(args.grad) + row_index(args.shape, at) * at.classes;
    if (at.label >= 0) {
      store_gradient(logits, softmax, shares[at.local * members + at.member] * V(args.scale), at, grad);
    } else {
      store_zeros(grad, at);
    }
  }
  if (args.sums != nullptr) block_sums(losses, 1, samples, V(args.scale), static_cast<V*>(args.sums) + blockIdx.x, 1);
}

template <class T>
const char* launch_typed(const EnsembleArgs& args, void* stream) {
  using V = Compute<T>;
  const char* error = with_row<T>(args.plan, args.shape.classes, {args.logits}, [&](auto tag) {
    using Row = typename decltype(tag)::type;
    const size_t shared_bytes = sizeof(V) * args.plan.samples * (2 * args.shape.members + 1);
    return launch(ensemble_kernel<Row>, args.plan.blocks, args.plan.threads, shared_bytes, stream, args);
  });
  return error != nullptr ? error : add_up_sums<V>(args.plan, 1, args.sums, args.loss, stream);
}

}  // namespace

const char* launch_ensemble_cross_entropy(DType dtype, const EnsembleArgs& args, void* stream) {
  return with_type(dtype, [&](auto element) { return launch_typed<decltype(element)>(args, stream); });
}

}  // namespace ceat::cuda
