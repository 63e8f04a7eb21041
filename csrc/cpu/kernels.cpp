// The CPU kernels. Compiled once per instruction set, with CEAT_ISA naming it.
#include "kernels.h"

#include "scratch.h"

// Before loss_math.h, whose templates call the vector functions.
#include "tile.h"
#include "vec.h"
#include "convolutions.h"
//
#include "../loss_math.h"

namespace ceat {
inline namespace CEAT_ISA {

using ceat_cpu::CeatProblem;
using ceat_cpu::DType;
using ceat_cpu::EnsembleProblem;
using ceat_cpu::Logits;
using ceat_cpu::PgdProblem;
using ceat_cpu::ScaleProblem;
using ceat_cpu::Scratch;
using ceat_cpu::Shape;

// Fills `tile` with the rows' exponentials, zero at the true class, and returns their softmax.
template <class L, class T, class In, class V = VecOf<T>>
CEAT_HD SoftmaxRow<V> exponentiate(const L& layout, const In* rows, int64_t sample_stride, T* tile) {
  const int64_t strip = L::strip(layout.classes), strips = L::strips(layout.samples);
  V max{}, true_logit{}, other{};
  for (int64_t s = 0; s < strips; ++s) {
    T* const at = tile + s * strip;
    const V largest = layout.load_strip(rows + s * sample_stride, sample_stride, at);
    L::put(s, largest, max);
    L::put(s, layout.true_class(at, s), true_logit);
    layout.rule_out_true_class(at, s);
    V sum{};
    for (int64_t i = 0; i < strip; i += kLanes<T>) {
      const V e = exp_nonpositive(load<V>(at + i) - largest);
      sum += e;
      store(at + i, e);
    }
    L::put(s, L::row_sum(sum), other);
  }
  return softmax_row(max, true_logit, exp_nonpositive(true_logit - max), other);
}

template <class V>
struct MemberState {
  SoftmaxRow<V> adv, nat;
  DistanceSums<V> sums;
  V adv_disparity, nat_disparity, adv_weight, nat_weight;
};

// Turns exponentials into residuals, zero at the true class, and returns the sums over all classes.
template <class L, class T, class V = VecOf<T>>
CEAT_HD DistanceSums<V> residuals(const L& layout, const SoftmaxRow<V>& adv, const SoftmaxRow<V>& nat, T* adv_tile,
                                  T* nat_tile) {
  const int64_t strip = L::strip(layout.classes), strips = L::strips(layout.samples);
  auto sums = DistanceSums<V>::zero();
  for (int64_t s = 0; s < strips; ++s) {
    T *b_at = adv_tile + s * strip, *a_at = nat_tile + s * strip;
    const V b_inverse = L::spread(adv.inv_sum, s), a_inverse = L::spread(nat.inv_sum, s);
    auto of_strip = DistanceSums<V>::zero();
    for (int64_t i = 0; i < strip; i += kLanes<T>) {
      const V b = load<V>(b_at + i) * b_inverse, a = load<V>(a_at + i) * a_inverse;
      add_class(of_strip, a, b);
      store(b_at + i, b);
      store(a_at + i, a);
    }
    L::put(s, L::row_sum(of_strip.nat), sums.nat);
    L::put(s, L::row_sum(of_strip.adv), sums.adv);
    L::put(s, L::row_sum(of_strip.db), sums.db);
    L::put(s, L::row_sum(of_strip.da), sums.da);
  }
  add_class(sums, nat.true_residual, adv.true_residual);
  return sums;
}

template <class V>
CEAT_HD void weigh(const CeatSettings& s, MemberState<V>* states, V* true_residuals, int members) {
  for (int m = 0; m < members; ++m) true_residuals[m] = states[m].adv.true_residual;
  for (int m = 0; m < members; ++m) {
    states[m].adv_disparity = disparity(true_residuals, members, m, s.pair_reduction);
    states[m].adv_weight = exponential_weight(states[m].adv_disparity, s.adv_exponent, s.max_weight);
  }
  for (int m = 0; m < members; ++m) true_residuals[m] = states[m].nat.true_residual;
  for (int m = 0; m < members; ++m) {
    states[m].nat_disparity = disparity(true_residuals, members, m, s.pair_reduction);
    states[m].nat_weight = exponential_weight(states[m].nat_disparity, s.nat_exponent, s.max_weight);
  }
}

template <class L, class T, class Out, class V = VecOf<T>>
CEAT_HD void write_gradients(const L& layout, const GradientRow<V>& g, const MemberState<V>& state, const T* adv_tile,
                             const T* nat_tile, Out* adv_out, Out* nat_out) {
  const int64_t strip = L::strip(layout.classes), strips = L::strips(layout.samples);
  for (int64_t s = 0; s < strips; ++s) {
    const GradientRow<V> of_strip{L::spread(g.ce, s),         L::spread(g.nat, s),      L::spread(g.adv, s),
                                  L::spread(g.adv_to_nat, s), L::spread(g.adv_base, s), L::spread(g.nat_base, s)};
    for (int64_t i = 0; i < strip; i += kLanes<T>) {
      const V b = load<V>(adv_tile + s * strip + i), a = load<V>(nat_tile + s * strip + i);
      layout.store_classes(s, i / kLanes<T>, adv_gradient(of_strip, a, b), adv_out);
      layout.store_classes(s, i / kLanes<T>, nat_gradient(of_strip, a, b), nat_out);
    }
  }
  layout.store_true_class(true_adv_gradient(g, state.sums, state.adv), adv_out);
  layout.store_true_class(true_nat_gradient(g, state.sums, state.nat), nat_out);
}

template <class L, class V, class T>
CEAT_HD void write_samples(const L& layout, V values, T* out) {
  for (int64_t w = 0; w < layout.samples; ++w) out[w] = values[w];
}

template <class L, class V, class T>
CEAT_HD void write_parts(const L& layout, const MemberState<V>& state, T* out, int64_t stride) {
  const V parts[] = {state.adv.ce,        state.sums.nat,   state.sums.adv,  state.nat_disparity,
                     state.adv_disparity, state.nat_weight, state.adv_weight};
  for (int i = 0; i < 7; ++i) write_samples(layout, parts[i], out + i * stride);
}

template <template <class> class Layout, class In>
void ceat_loss(const CeatProblem& p, int64_t begin, int64_t end) {
  using T = typename TypesOf<In>::Compute;
  using Out = typename TypesOf<In>::Gradient;
  using L = Layout<T>;
  using V = VecOf<T>;
  const auto [members, samples, classes] = p.shape;
  const auto& in = p.settings;
  const CeatSettings s{in.ce_coefficient, in.nat_coefficient, in.adv_coefficient, in.nat_exponent, in.adv_exponent,
                       in.max_weight,     in.pair_reduction,  in.reduction,       in.detach_nat};
  const int64_t most = L::most_samples(classes, members), row = L::strip(classes) * L::strips(most);

  Scratch scratch(2 * Scratch::round_up(members * row * sizeof(T)) + members * (sizeof(MemberState<V>) + sizeof(V)) +
                  256);
  T* adv_tiles = scratch.take<T>(members * row);
  T* nat_tiles = scratch.take<T>(members * row);
  auto* states = scratch.take<MemberState<V>>(members);
  V* true_residuals = scratch.take<V>(members);

  for (int64_t b = begin; b < end; b += most) {
    const L layout(classes, end - b < most ? end - b : most, p.target + b);
    for (int64_t m = 0; m < members; ++m) {
      T *adv_tile = adv_tiles + m * row, *nat_tile = nat_tiles + m * row;
      const auto* adv = static_cast<const In*>(p.adv.data) + m * p.adv.member_stride + b * p.adv.sample_stride;
      const auto* nat = static_cast<const In*>(p.nat.data) + m * p.nat.member_stride + b * p.nat.sample_stride;
      MemberState<V>& state = states[m];
      state.adv = exponentiate(layout, adv, p.adv.sample_stride, adv_tile);
      state.nat = exponentiate(layout, nat, p.nat.sample_stride, nat_tile);
      state.sums = residuals(layout, state.adv, state.nat, adv_tile, nat_tile);
    }
    weigh(s, states, true_residuals, int(members));

    for (int64_t m = 0; m < members; ++m) {
      const MemberState<V>& state = states[m];
      const V loss = T(s.ce_coefficient) * state.adv.ce + T(s.nat_coefficient) * state.nat_weight * state.sums.nat +
                     T(s.adv_coefficient) * state.adv_weight * state.sums.adv;
      write_samples(layout, loss, static_cast<T*>(p.loss) + m * samples + b);
      if (p.parts != nullptr) {
        write_parts(layout, state, static_cast<T*>(p.parts) + m * samples + b, members * samples);
      }
      if (p.adv_grad != nullptr) {
        const auto g = gradient_row(s, p.scale, state.nat_weight, state.adv_weight, state.sums, state.nat.true_residual,
                                    state.adv.true_residual);
        const int64_t at = (m * samples + b) * classes;
        write_gradients(layout, g, state, adv_tiles + m * row, nat_tiles + m * row, static_cast<Out*>(p.adv_grad) + at,
                        static_cast<Out*>(p.nat_grad) + at);
      }
    }
  }
}

template <template <class> class Layout, class In>
void ensemble_cross_entropy(const EnsembleProblem& p, int64_t begin, int64_t end) {
  using T = typename TypesOf<In>::Compute;
  using Out = typename TypesOf<In>::Gradient;
  using L = Layout<T>;
  using V = VecOf<T>;
  const auto [members, samples, classes] = p.shape;
  const int64_t most = L::most_samples(classes, members), row = L::strip(classes) * L::strips(most);

  Scratch scratch(Scratch::round_up(members * row * sizeof(T)) + members * (sizeof(SoftmaxRow<V>) + 2 * sizeof(V)) +
                  256);
  T* tiles = scratch.take<T>(members * row);
  auto* rows = scratch.take<SoftmaxRow<V>>(members);
  V* shares = scratch.take<V>(members);
  V* true_residuals = scratch.take<V>(members);

  for (int64_t b = begin; b < end; b += most) {
    const L layout(classes, end - b < most ? end - b : most, p.target + b);
    for (int64_t m = 0; m < members; ++m) {
      const auto* logits =
          static_cast<const In*>(p.logits.data) + m * p.logits.member_stride + b * p.logits.sample_stride;
      rows[m] = exponentiate(layout, logits, p.logits.sample_stride, tiles + m * row);
      shares[m] = rows[m].ce;
      true_residuals[m] = rows[m].true_residual;
    }
    const V loss = ensemble_cross_entropy(shares, true_residuals, int(members));
    write_samples(layout, loss, static_cast<T*>(p.loss) + b);
    if (p.grad == nullptr) continue;

    for (int64_t m = 0; m < members; ++m) {
      const T* tile = tiles + m * row;
      const V share = shares[m] * T(p.scale), factor = rows[m].inv_sum * share;
      Out* out = static_cast<Out*>(p.grad) + (m * samples + b) * classes;
      const int64_t strip = L::strip(classes);
      for (int64_t s = 0; s < L::strips(layout.samples); ++s) {
        const V of_strip = L::spread(factor, s);
        for (int64_t i = 0; i < strip; i += kLanes<T>) {
          layout.store_classes(s, i / kLanes<T>, load<V>(tile + s * strip + i) * of_strip, out);
        }
      }
      layout.store_true_class(rows[m].true_residual * share, out);
    }
  }
}

template <class X, class G>
void pgd_step(const PgdProblem& p, int64_t begin, int64_t end) {
  const auto *x_adv = static_cast<const X*>(p.x_adv), *x = static_cast<const X*>(p.x);
  const auto* grad = static_cast<const G*>(p.grad);
  auto* next = static_cast<X*>(p.next);
  const X alpha = X(p.alpha), eps = X(p.eps);
  for (int64_t i = begin; i < end; ++i) {
    next[i] = pgd_step(x_adv[i], widen<typename TypesOf<G>::Compute>(grad[i]), x[i], alpha, eps);
  }
}

template <class E>
void scale_rows(const ScaleProblem& p, int64_t begin, int64_t end) {
  using T = typename TypesOf<E>::Compute;
  for (int64_t r = begin; r < end; ++r) {
    const auto* in = static_cast<const E*>(p.in) + r * p.classes;
    auto* out = static_cast<E*>(p.out) + r * p.classes;
    const T factor = T(p.factors[r]);
    for (int64_t k = 0; k < p.classes; ++k) out[k] = narrow<E>(widen<T>(in[k]) * factor);
  }
}

// Up to this many classes the transposition that SampleLanes needs costs less than idle lanes at the end of a row.
constexpr int64_t kMaxSampleLaneClasses = 32;

template <class Call>
void with_dtype(DType dtype, Call call) {
  switch (dtype) {
    case DType::kFloat: return call(float{});
    case DType::kDouble: return call(double{});
    case DType::kBFloat16: return call(BFloat16{});
    case DType::kHalf: return call(Half{});
  }
}

void run_ceat_loss(const CeatProblem& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto in) {
    using In = decltype(in);
    p.shape.classes <= kMaxSampleLaneClasses ? ceat_loss<SampleLanes, In>(p, begin, end)
                                             : ceat_loss<ClassLanes, In>(p, begin, end);
  });
}

void run_ensemble_cross_entropy(const EnsembleProblem& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto in) {
    using In = decltype(in);
    p.shape.classes <= kMaxSampleLaneClasses ? ensemble_cross_entropy<SampleLanes, In>(p, begin, end)
                                             : ensemble_cross_entropy<ClassLanes, In>(p, begin, end);
  });
}

void run_pgd_step(const PgdProblem& p, int64_t begin, int64_t end) {
  with_dtype(p.grad_type, [&](auto grad) {
    using G = decltype(grad);
    p.x_type == DType::kDouble ? pgd_step<double, G>(p, begin, end) : pgd_step<float, G>(p, begin, end);
  });
}

void run_scale_rows(const ScaleProblem& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto logit) { scale_rows<typename TypesOf<decltype(logit)>::Gradient>(p, begin, end); });
}

}  // namespace CEAT_ISA
}  // namespace ceat

#define CEAT_CONCAT_(a, b) a##b
#define CEAT_CONCAT(a, b) CEAT_CONCAT_(a, b)
#define CEAT_STRING_(a) #a
#define CEAT_STRING(a) CEAT_STRING_(a)

const ceat_cpu::Kernels ceat_cpu::CEAT_CONCAT(kernels_, CEAT_ISA) = {
    CEAT_STRING(CEAT_ISA), ceat::run_ceat_loss,  ceat::run_ensemble_cross_entropy,
    ceat::run_pgd_step,    ceat::run_scale_rows, ceat::transform_filters,
    ceat::convolve_tiles,  ceat::convolve_pixels};
