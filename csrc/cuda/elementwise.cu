// The PGD step, and the backward of the loss: gradients times the incoming gradient of their loss.
#include "elements.cuh"

namespace ceat::cuda {
namespace {

constexpr int kPgdPack = 4;

// The first `packs * kPgdPack` elements are moved in packs, the rest one by one.
template <class T, class G>
__global__ void __launch_bounds__(kThreads)
    pgd_step_kernel(const T* x_adv, const G* grad, const T* x, T* next, int64_t packs, int64_t count, T alpha, T eps) {
  for (int64_t i = first_item(); i < packs; i += item_stride()) {
    const auto from = reinterpret_cast<const Pack<T, kPgdPack>*>(x_adv)[i];
    const auto slope = reinterpret_cast<const Pack<G, kPgdPack>*>(grad)[i];
    const auto centre = reinterpret_cast<const Pack<T, kPgdPack>*>(x)[i];
    Pack<T, kPgdPack> to;
#pragma unroll
    for (int j = 0; j < kPgdPack; ++j) {
      to.values[j] = pgd_step(from.values[j], widen(slope.values[j]), centre.values[j], alpha, eps);
    }
    reinterpret_cast<Pack<T, kPgdPack>*>(next)[i] = to;
  }
  for (int64_t i = packs * kPgdPack + first_item(); i < count; i += item_stride()) {
    next[i] = pgd_step(x_adv[i], widen(grad[i]), x[i], alpha, eps);
  }
}

template <class T, class G>
const char* launch_pgd_typed(const PgdArgs& args, void* stream) {
  const bool vectorised = is_aligned<T, kPgdPack>(args.x_adv) && is_aligned<G, kPgdPack>(args.grad) &&
                          is_aligned<T, kPgdPack>(args.x) && is_aligned<T, kPgdPack>(args.next);
  const int64_t packs = vectorised ? args.count / kPgdPack : 0;
  return launch(pgd_step_kernel<T, G>, blocks_for(vectorised ? packs : args.count), kThreads, 0, stream,
                static_cast<const T*>(args.x_adv), static_cast<const G*>(args.grad), static_cast<const T*>(args.x),
                static_cast<T*>(args.next), packs, args.count, T(args.alpha), T(args.eps));
}

// A group of `lanes` threads walks over a row of both tensors, kPack classes at a time; kPack divides K.
template <class T, int kPack>
__global__ void __launch_bounds__(kThreads) scale_gradients_kernel(const ScaleArgs args, const int lanes) {
  using V = Compute<T>;
  using Packed = Pack<T, kPack>;
  const int64_t rows = args.shape.members * args.shape.batch;
  const int packs = args.shape.classes / kPack;
  for (int64_t row = first_item() / lanes; row < rows; row += item_stride() / lanes) {
    const int64_t member = row / args.shape.batch, sample = row % args.shape.batch;
    const V factor = static_cast<const V*>(args.loss_grad)[member * args.member_stride + sample * args.sample_stride];
    for (int k = int(threadIdx.x) % lanes; k < packs; k += lanes) {
      const int64_t i = row * packs + k;
      const auto adv = static_cast<const Packed*>(args.adv_grad)[i], nat = static_cast<const Packed*>(args.nat_grad)[i];
      Packed adv_out, nat_out;
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        adv_out.values[j] = narrow<T>(factor * widen(adv.values[j]));
        nat_out.values[j] = narrow<T>(factor * widen(nat.values[j]));
      }
      static_cast<Packed*>(args.adv_out)[i] = adv_out;
      static_cast<Packed*>(args.nat_out)[i] = nat_out;
    }
  }
}

template <class T, int kPack>
bool packs_fit(const ScaleArgs& args) {
  const bool aligned = is_aligned<T, kPack>(args.adv_grad) && is_aligned<T, kPack>(args.nat_grad) &&
                       is_aligned<T, kPack>(args.adv_out) && is_aligned<T, kPack>(args.nat_out);
  return aligned && args.shape.classes % kPack == 0;
}

template <class T, int kPack>
const char* launch_scale_packed(const ScaleArgs& args, void* stream) {
  int lanes = 1;
  while (lanes < kWarpSize && lanes < args.shape.classes / kPack) lanes *= 2;
  const int64_t threads = args.shape.members * args.shape.batch * lanes;
  return launch(scale_gradients_kernel<T, kPack>, blocks_for(threads), kThreads, 0, stream, args, lanes);
}

template <class T>
const char* launch_scale_typed(const ScaleArgs& args, void* stream) {
  if (packs_fit<T, 4>(args)) return launch_scale_packed<T, 4>(args, stream);
  if (packs_fit<T, 2>(args)) return launch_scale_packed<T, 2>(args, stream);
  return launch_scale_packed<T, 1>(args, stream);
}

}  // namespace

const char* launch_pgd_step(const PgdArgs& args, void* stream) {
  return with_type(args.grad_type, [&](auto slope) {
    using G = decltype(slope);
    return args.x_type == DType::kDouble ? launch_pgd_typed<double, G>(args, stream)
                                         : launch_pgd_typed<float, G>(args, stream);
  });
}

const char* launch_scale_gradients(const ScaleArgs& args, void* stream) {
  return with_type(args.dtype, [&](auto element) { return launch_scale_typed<decltype(element)>(args, stream); });
}

}  // namespace ceat::cuda
