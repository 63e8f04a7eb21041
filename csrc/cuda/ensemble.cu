// Cross-entropy of the mean member probability (eq. 1) and its gradient; the arithmetic is in loss_math.h.
#include "rows.cuh"

namespace ceat::cuda {
namespace {

// Gradient of row m: r_m (p_m - onehot), with the share r_m and the batch average in `factor`.
template <class Row, class V, class G>
__device__ void store_gradient(const Row& row, const SoftmaxRow<V>& softmax, V factor, int label, int classes,
                               bool vectorised, G* grad) {
  constexpr int kVector = Row::kVector;
#pragma unroll
  for (int i = 0; i < row.count(); i += kVector) {
    V values[kVector];
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const V residual = row.class_of(i + j) == label ? softmax.true_residual : row.exp(i + j) * softmax.inv_sum;
      values[j] = label < 0 ? V(0) : factor * residual;
    }
    store_pack(grad, row.class_of(i), classes, vectorised, values);
  }
}

// Shared memory: the members' cross-entropies, later their shares, and true-class residuals, (samples, M) each; then
// the losses, (samples,).
template <class Row>
__global__ void __launch_bounds__(Row::kMaxThreads, 1) ensemble_kernel(const EnsembleArgs args, const bool vectorised) {
  using T = typename Row::Element;
  using V = typename Row::V;
  using G = Gradient<T>;
  const int members = args.shape.members, samples = args.plan.samples;
  const Place at = place_of_thread(args.plan, args.shape, Row::lanes(args.plan));
  const int label = label_at(args.target, at);
  V* const shares = shared_memory<V>();
  V* const residuals = shares + samples * members;
  V* const losses = residuals + samples * members;

  const T* const data = row_at<T>(args.logits, at);
  Row logits(data, at, vectorised);
  const SoftmaxRow<V> softmax = softmax_of(logits, data, label, at.lanes);
  if (at.in_block && at.lane == 0) {
    shares[at.local * members + at.member] = softmax.ce;
    residuals[at.local * members + at.member] = softmax.true_residual;
  }
  __syncthreads();

  if (at.in_block && at.member == 0 && at.lane == 0) {
    const V value = ensemble_cross_entropy(shares + at.local * members, residuals + at.local * members, members);
    const V loss = label < 0 ? V(NAN) : value;
    losses[at.local] = at.active ? loss : V(0);
    if (at.active && args.sums == nullptr) static_cast<V*>(args.loss)[at.sample] = loss;
  }
  __syncthreads();

  if (at.active && args.grad != nullptr) {
    const V factor = shares[at.local * members + at.member] * V(args.scale);
    store_gradient(logits, softmax, factor, label, at.classes, vectorised,
                   static_cast<G*>(args.grad) + row_index(args.shape, at) * at.classes);
  }
  if (args.sums != nullptr) block_sums(losses, 1, samples, V(args.scale), static_cast<V*>(args.sums) + blockIdx.x, 1);
}

template <class T>
const char* launch_typed(const EnsembleArgs& args, void* stream) {
  using V = Compute<T>;
  const char* error = with_row<T>(args.plan.kind, [&](auto tag) {
    using Row = typename decltype(tag)::type;
    const bool vectorised = args.shape.classes % Row::kVector == 0 && rows_aligned<T, Row::kVector>(args.logits);
    const size_t shared_bytes = sizeof(V) * args.plan.samples * (2 * args.shape.members + 1);
    return launch(ensemble_kernel<Row>, args.plan.blocks, args.plan.threads, shared_bytes, stream, args, vectorised);
  });
  return error != nullptr ? error : add_up_sums<V>(args.plan, 1, args.sums, args.loss, stream);
}

}  // namespace

const char* launch_ensemble_cross_entropy(DType dtype, const EnsembleArgs& args, void* stream) {
  return with_type(dtype, [&](auto element) { return launch_typed<decltype(element)>(args, stream); });
}

}  // namespace ceat::cuda
