// Row arithmetic of the losses, shared by the CPU and CUDA kernels, so that CPU tests check what the GPU runs.
//
// V is a float or double on the device (one row per thread, or one slice of a row per lane) and a SIMD vector on the
// host.
//
// Notation for one sample, one member: z logits, y the label, e_k = exp(z_k - max z), other = sum of e_k over k != y,
// s = other + e_y, p = e / s. Nothing below subtracts nearly equal numbers, because the residual of a row,
//
//     a_k = p_k - [k == y]:   a_k = e_k / s  for k != y,   a_y = -other / s,
//
// is formed without computing p_y - 1. With a (clean) and b (adversarial) residuals and d = b - a:
//
//     h_i - h_j = a_y(i) - a_y(j)
//     L_nat     = sum a_k^2
//     L_adv     = sum d_k^2
//     d(L_nat/2)/dz_nat_k =  p_nat_k (a_k - a_y - sum a^2)       since <a, p> = sum a^2 + a_y
//     d(L_adv/2)/dz_adv_k =  p_adv_k (d_k - d_y - sum d b)       since <d, p_adv> = sum d b + d_y
//     d(L_adv/2)/dz_nat_k = -p_nat_k (d_k - d_y - sum d a)
//     d CE / dz_adv_k     =  b_k
//
// At k == y the first two terms in each bracket vanish.
#pragma once

#include "scalar_math.h"

namespace ceat {
inline namespace CEAT_ISA {

enum PairReduction : int { kMax = 0, kMean = 1, kSum = 2 };
enum Reduction : int { kNone = 0, kBatchMean = 1, kBatchSum = 2 };

// The scalars of eq. 22; see CeatSettings in ceat_fast/ops/reference.py.
struct CeatSettings {
  double ce_coefficient, nat_coefficient, adv_coefficient, nat_exponent, adv_exponent, max_weight;
  int pair_reduction, reduction;
  bool detach_nat;
};

// Softmax of one row, as far as it is the same for all classes.
template <class V>
struct SoftmaxRow {
  V inv_sum;        // 1 / s
  V true_prob;      // p_y
  V true_residual;  // p_y - 1
  V ce;             // -log p_y
};

template <class V>
CEAT_HD SoftmaxRow<V> softmax_row(V max, V true_logit, V true_exp, V other) {
  const V sum = other + true_exp;
  SoftmaxRow<V> row;
  row.inv_sum = reciprocal(sum);
  // Not products with the rounded inverse: these two enter the exponents of the weights.
  row.true_prob = quotient(true_exp, sum, row.inv_sum);
  row.true_residual = -quotient(other, sum, row.inv_sum);
  // log s = log1p(s - 1); where y is the largest logit, s - 1 is `other`, exactly.
  const V excess = select(true_logit == max, other, sum - Scalar<V>(1));
  row.ce = (max - true_logit) + log1p_nonnegative(excess);
  return row;
}

// Sums over the classes of one member's pair of rows. Accumulate over k != y, then add the true class.
template <class V>
struct DistanceSums {
  V nat;  // sum a^2
  V adv;  // sum d^2
  V db;   // sum d b
  V da;   // sum d a

  CEAT_HD DistanceSums zero() { return DistanceSums{V{}, V{}, V{}, V{}}; }
};

template <class V>
CEAT_HD void add_class(DistanceSums<V>& sums, V a, V b) {
  const V d = b - a;
  sums.nat += a * a;
  sums.adv += d * d;
  sums.db += d * b;
  sums.da += d * a;
}

// Leave-one-out disparity D_m of eq. 18 from the true-class residuals h[0..members), stride apart.
// Sums run over the peer pairs directly: a total minus the member's own share would cancel.
template <class V>
CEAT_HD V disparity(const V* h, int members, int m, int pair_reduction) {
  V result{};
  if (members <= 2) return result;
  if (pair_reduction == kMax) {
    const int first = m == 0 ? 1 : 0;
    V low = h[first], high = h[first];
    for (int i = first + 1; i < members; ++i) {
      if (i == m) continue;
      low = select(h[i] < low, h[i], low);
      high = select(h[i] > high, h[i], high);
      result += h[i] - h[i];  // zero, or the NaN that a comparison would hide
    }
    return result + (high - low);
  }
  for (int i = 0; i < members; ++i) {
    if (i == m) continue;
    V row{};
    for (int j = i + 1; j < members; ++j) {
      if (j == m) continue;
      const V gap = h[i] - h[j];
      row += select(gap < V{}, -gap, gap);
    }
    result += row;
  }
  if (pair_reduction == kMean) result = result * Scalar<V>(2.0 / (double(members - 1) * (members - 2)));
  return result;
}

template <class V>
CEAT_HD V exponential_weight(V disparity, double exponent, double max_weight) {
  const V weight = exp_any(disparity * Scalar<V>(exponent));
  const V cap = V{} + Scalar<V>(max_weight);
  return select(weight > cap, cap, weight);
}

// The gradients of one member's pair of rows for k != y, where probabilities are residuals, as polynomials:
//
//     adv_k = b_k (adv_base + adv d_k),   nat_k = a_k (nat_base + nat a_k - adv_to_nat d_k)
//
// with what is the same for all classes in the bases; the batch average is folded in.
template <class V>
struct GradientRow {
  V ce;          // coefficient of b_k
  V nat, adv;    // 2 * coefficient * weight of the two distances
  V adv_to_nat;  // adv, or 0 where the clean probabilities are detached
  V adv_base, nat_base;
};

template <class V>
CEAT_HD GradientRow<V> gradient_row(const CeatSettings& s, double scale, V nat_weight, V adv_weight,
                                    const DistanceSums<V>& sums, V a_true, V b_true) {
  const V d_true = b_true - a_true;
  GradientRow<V> g;
  g.ce = V{} + Scalar<V>(s.ce_coefficient * scale);
  g.nat = nat_weight * Scalar<V>(2 * s.nat_coefficient * scale);
  g.adv = adv_weight * Scalar<V>(2 * s.adv_coefficient * scale);
  g.adv_to_nat = s.detach_nat ? V{} : g.adv;
  g.adv_base = g.ce - g.adv * (d_true + sums.db);
  g.nat_base = g.adv_to_nat * (d_true + sums.da) - g.nat * (a_true + sums.nat);
  return g;
}

template <class V>
CEAT_HD V adv_gradient(const GradientRow<V>& g, V a, V b) {
  return b * (g.adv_base + g.adv * (b - a));
}
template <class V>
CEAT_HD V nat_gradient(const GradientRow<V>& g, V a, V b) {
  return a * (g.nat_base + g.nat * a - g.adv_to_nat * (b - a));
}

// The true class.
template <class V>
CEAT_HD V true_adv_gradient(const GradientRow<V>& g, const DistanceSums<V>& sums, const SoftmaxRow<V>& adv) {
  return g.ce * adv.true_residual - g.adv * adv.true_prob * sums.db;
}
template <class V>
CEAT_HD V true_nat_gradient(const GradientRow<V>& g, const DistanceSums<V>& sums, const SoftmaxRow<V>& nat) {
  return nat.true_prob * (g.adv_to_nat * sums.da - g.nat * sums.nat);
}

// Cross-entropy of the mean probability (eq. 1), from the members' true-class values of one sample.
// Also turns ce[m] into the member's share r_m = p_m[y] / sum_j p_j[y], which scales its gradient r_m (p_m - onehot).
template <class V>
CEAT_HD V ensemble_cross_entropy(V* ce, const V* true_residual, int members) {
  V best = ce[0], mean_residual{};
  for (int m = 0; m < members; ++m) {
    best = select(ce[m] < best, ce[m], best);
    mean_residual += true_residual[m];
  }
  mean_residual = mean_residual * Scalar<V>(1.0 / members);
  V total{};
  for (int m = 0; m < members; ++m) {
    // Where all members rule the label out, best is infinite: they share its gradient.
    ce[m] = select(ce[m] == best, V{} + Scalar<V>(1), exp_nonpositive(best - ce[m]));
    total += ce[m];
  }
  for (int m = 0; m < members; ++m) ce[m] = ce[m] / total;
  // -log(1 - x) = log1p(x / (1 - x)) keeps the digits of confident samples; the other form those of hopeless ones.
  const V miss = -mean_residual;
  const V confident = log1p_nonnegative(miss / (Scalar<V>(1) - miss));
  const V hopeless = best + log1p_nonnegative(Scalar<V>(members) / total - Scalar<V>(1));
  return select(miss < V{} + Scalar<V>(0.5), confident, hopeless);
}

// One coordinate of the Linf PGD step: ascend by alpha, project to [x - eps, x + eps] and [0, 1]. NaN stays NaN.
template <class T, class G>
CEAT_HD T pgd_step(T x_adv, G grad, T x, T alpha, T eps) {
  const T sign = grad > 0 ? T(1) : grad < 0 ? T(-1) : T(grad);
  T next = x_adv + alpha * sign;
  const T low = x - eps, high = x + eps;
  next = next < low ? low : next;
  next = next > high ? high : next;
  next = next < T(0) ? T(0) : next;
  next = next > T(1) ? T(1) : next;
  return x != x ? x : next;
}

}  // namespace CEAT_ISA
}  // namespace ceat
