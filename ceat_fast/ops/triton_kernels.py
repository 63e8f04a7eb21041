# Kernel arguments are pointers and numbers of triton, which has no types to offer.
# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, untyped-decorator"
"""Triton kernels of the ops. Importing this file imports triton; `triton_backend` does so at the first launch.

Notation for one member and one sample, y the label, z the logits: e_k = exp(z_k - max z), p_k = e_k / s with
s = other + e_y, other = sum over k != y of e_k. Every result is built from the residual

    r_k = p_k - [k == y]  =  e_k / s  for k != y,   -other / s  for k == y

which holds all its digits when p_y rounds to 1. With b the residual of the adversarial and a that of the clean row:

    h_i - h_j = a_i[y] - a_j[y]                      CE = (max z - z_y) + log(1 + t),  1 + t = s
    nat = sum a_k^2,  adv = sum d_k^2,  d = b - a     dCE / dz_adv[k] = b_k
    d(nat / 2) / dz_nat[k] =  p_nat[k] (a_k - a_y - sum_j a_j^2)
    d(adv / 2) / dz_adv[k] =  p_adv[k] (d_k - d_y - sum_j d_j b_j)
    d(adv / 2) / dz_nat[k] = -p_nat[k] (d_k - d_y - sum_j d_j a_j)

Tiles are (PADDED_M members, BLOCK_B samples, BLOCK_K classes), so that the members of a sample meet in registers. K and
BLOCK_K are constants: where one tile holds all classes the loops over tiles vanish at compilation and every logit is
read once; otherwise each pass reads the rows again. fp16 and bf16 are widened right at the load; scalars arrive as fp64
and are rounded once to the compute type, which is the type of the loss.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Finite, so that a first tile of -inf logits leaves exp(-inf) = 0 and not exp(-inf + inf).
_LOWEST = tl.constexpr(-3.0e38)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LOG2_E_TAIL = tl.constexpr(1.925963033500e-08)  # log2(e) minus its fp32 rounding
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _exp(x):
    """exp(x): in fp32 `tl.exp` loses digits in proportion to |x|, because it rounds x * log2(e)."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    x = tl.where(x < -150.0, -150.0, x)  # exp underflows to 0 before that; -inf would become NaN below
    power = x * _LOG2_E
    tail = tl.fma(x, _LOG2_E, -power) + x * _LOG2_E_TAIL
    return tl.exp2(power) * (1.0 + tail * _LN_2)


@triton.jit
def _log1p(x):
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) + (x - (u - 1.0)) / u)


@triton.jit
def _max_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _min_or_nan(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _rows(pointer, members, samples, member_stride, sample_stride):
    """(PADDED_M, BLOCK_B) pointers to the first class of each row."""
    return pointer + members[:, None].to(tl.int64) * member_stride + samples[None, :] * sample_stride


@triton.jit
def _load_classes(rows, in_use, classes, K: tl.constexpr, DTYPE: tl.constexpr):
    """Logits of one tile; classes beyond K are -inf, rows beyond M or B are zero and stay finite."""
    exists = (classes < K)[None, None, :]
    logits = tl.load(rows[:, :, None] + classes[None, None, :], mask=in_use[:, :, None] & exists, other=0.0)
    return tl.where(exists, logits.to(DTYPE), float("-inf"))


@triton.jit
def _load_labels(target_ptr, target_stride, samples, B, K: tl.constexpr):
    """(labels, whether they lie in [0, K)); a label outside is replaced by 0 to keep addresses in bounds."""
    target = tl.load(target_ptr + samples * target_stride, mask=samples < B, other=0)
    valid = (target >= 0) & (target < K)
    return tl.where(valid, target, 0), valid


@triton.jit
def _statistics(rows, in_use, label, K: tl.constexpr, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr):
    """(max logit, s, residual of the true class, cross-entropy) of each row."""
    top = tl.full(in_use.shape, _LOWEST, DTYPE)
    other = tl.zeros(in_use.shape, DTYPE)
    for start in range(0, K, BLOCK_K):
        classes = start + tl.arange(0, BLOCK_K)
        logits = _load_classes(rows, in_use, classes, K, DTYPE)
        is_true = classes[None, None, :] == label[None, :, None]
        new_top = tl.maximum(top, tl.max(logits, 2))
        exps = tl.where(is_true, 0.0, _exp(logits - new_top[:, :, None]))
        other = other * _exp(top - new_top) + tl.sum(exps, 2)
        top = new_top
    true_logit = tl.load(rows + label[None, :], mask=in_use, other=0.0).to(DTYPE)
    total = other + _exp(true_logit - top)
    # total - 1 is exact enough only where a class other than y contributes the 1.
    cross_entropy = (top - true_logit) + _log1p(tl.where(true_logit == top, other, total - 1.0))
    return top, total, -other / total, cross_entropy


@triton.jit
def _probabilities(rows, in_use, classes, top, total, K: tl.constexpr, DTYPE: tl.constexpr):
    logits = _load_classes(rows, in_use, classes, K, DTYPE)
    return _exp(logits - top[:, :, None]) / total[:, :, None]


@triton.jit
def _residuals(prob, true_residual, is_true):
    return tl.where(is_true, true_residual[:, :, None], prob)


@triton.jit
def _disparity(true_residual, members, M: tl.constexpr, PAIR_REDUCTION: tl.constexpr):
    """Leave-one-out pairwise disparity: (PADDED_M, BLOCK_B) -> the same shape."""
    if M <= 2:
        return tl.zeros_like(true_residual)
    left_out = members[:, None, None]
    peer = members[None, :, None]
    is_peer = (peer != left_out) & (peer < M)
    values = true_residual[None, :, :]
    if PAIR_REDUCTION == 0:  # the largest gap is the spread of the peers; residuals lie in [-1, 0]
        highest = tl.reduce(tl.where(is_peer, values, -1.0), 1, _max_or_nan)
        return highest - tl.reduce(tl.where(is_peer, values, 0.0), 1, _min_or_nan)
    # Summing the pairs that remain keeps a small disparity exact; a total minus the pairs of m would cancel.
    result = tl.zeros_like(true_residual)
    for first in range(M):
        value = tl.sum(tl.where(members[:, None] == first, true_residual, 0.0), 0)
        gaps = tl.abs(values - value[None, None, :])
        result += tl.sum(tl.where(is_peer & (peer > first) & (left_out != first), gaps, 0.0), 1)
    if PAIR_REDUCTION == 1:
        result /= (M - 1) * (M - 2) // 2
    return result


@triton.jit
def _weight(disparity, exponent, max_weight):
    weight = _exp(disparity * tl.full((), exponent, disparity.dtype))
    cap = tl.full((), max_weight, disparity.dtype)
    return tl.where(weight > cap, cap, weight)


@triton.jit(do_not_specialize=["B"])
def ceat_loss_kernel(
    adv_ptr,
    nat_ptr,
    target_ptr,
    loss_ptr,  # (M, B)
    parts_ptr,  # (7, M, B) in the order of CeatParts
    adv_grad_ptr,  # (M, B, K)
    nat_grad_ptr,  # (M, B, K)
    B,
    adv_member_stride,
    adv_sample_stride,
    nat_member_stride,
    nat_sample_stride,
    target_stride,
    ce_coefficient: tl.float64,
    nat_coefficient: tl.float64,
    adv_coefficient: tl.float64,
    nat_exponent: tl.float64,
    adv_exponent: tl.float64,
    max_weight: tl.float64,
    M: tl.constexpr,
    K: tl.constexpr,
    PADDED_M: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PAIR_REDUCTION: tl.constexpr,
    MEAN: tl.constexpr,
    DETACH_NAT: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    NEED_PARTS: tl.constexpr,
):
    """Per-sample losses, and the gradients of their sum, or of their batch mean if MEAN. Grid: cdiv(B, BLOCK_B)."""
    DTYPE: tl.constexpr = loss_ptr.dtype.element_ty
    members = tl.arange(0, PADDED_M)
    samples = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    in_use = (members < M)[:, None] & (samples < B)[None, :]
    label, valid = _load_labels(target_ptr, target_stride, samples, B, K)
    adv_rows = _rows(adv_ptr, members, samples, adv_member_stride, adv_sample_stride)
    nat_rows = _rows(nat_ptr, members, samples, nat_member_stride, nat_sample_stride)

    adv_top, adv_total, adv_true, ce = _statistics(adv_rows, in_use, label, K, BLOCK_K, DTYPE)
    nat_top, nat_total, nat_true, _ = _statistics(nat_rows, in_use, label, K, BLOCK_K, DTYPE)
    adv_disparity = _disparity(adv_true, members, M, PAIR_REDUCTION)
    nat_disparity = _disparity(nat_true, members, M, PAIR_REDUCTION)
    adv_weight = _weight(adv_disparity, adv_exponent, max_weight)
    nat_weight = _weight(nat_disparity, nat_exponent, max_weight)
    ce_scale = tl.full((), ce_coefficient, DTYPE)
    adv_scale = tl.full((), adv_coefficient, DTYPE) * adv_weight
    nat_scale = tl.full((), nat_coefficient, DTYPE) * nat_weight

    nat_distance = tl.zeros(in_use.shape, DTYPE)
    adv_distance = tl.zeros(in_use.shape, DTYPE)
    shift_dot_adv = tl.zeros(in_use.shape, DTYPE)
    shift_dot_nat = tl.zeros(in_use.shape, DTYPE)
    for start in range(0, K, BLOCK_K):
        classes = start + tl.arange(0, BLOCK_K)
        is_true = classes[None, None, :] == label[None, :, None]
        adv_prob = _probabilities(adv_rows, in_use, classes, adv_top, adv_total, K, DTYPE)
        nat_prob = _probabilities(nat_rows, in_use, classes, nat_top, nat_total, K, DTYPE)
        adv_residual = _residuals(adv_prob, adv_true, is_true)
        nat_residual = _residuals(nat_prob, nat_true, is_true)
        shift = adv_residual - nat_residual
        nat_distance += tl.sum(nat_residual * nat_residual, 2)
        adv_distance += tl.sum(shift * shift, 2)
        if NEED_GRAD:
            shift_dot_adv += tl.sum(shift * adv_residual, 2)
            shift_dot_nat += tl.sum(shift * nat_residual, 2)

    loss = ce_scale * ce + nat_scale * nat_distance + adv_scale * adv_distance
    cells = _rows(0, members, samples, B, 1)

    if NEED_GRAD:
        if MEAN:
            share = 1.0 / tl.full((), B, DTYPE)
            ce_scale *= share
            adv_scale *= share
            nat_scale *= share
        adv_factor = (2.0 * adv_scale)[:, :, None]
        nat_factor = (2.0 * nat_scale)[:, :, None]
        for start in range(0, K, BLOCK_K):
            classes = start + tl.arange(0, BLOCK_K)
            is_true = classes[None, None, :] == label[None, :, None]
            adv_prob = _probabilities(adv_rows, in_use, classes, adv_top, adv_total, K, DTYPE)
            nat_prob = _probabilities(nat_rows, in_use, classes, nat_top, nat_total, K, DTYPE)
            adv_residual = _residuals(adv_prob, adv_true, is_true)
            nat_residual = _residuals(nat_prob, nat_true, is_true)

            shift = (adv_residual - nat_residual) - (adv_true - nat_true)[:, :, None]
            adv_grad = adv_factor * adv_prob * (shift - shift_dot_adv[:, :, None]) + ce_scale * adv_residual
            nat_grad = nat_factor * (nat_residual - nat_true[:, :, None] - nat_distance[:, :, None])
            if not DETACH_NAT:
                nat_grad -= adv_factor * (shift - shift_dot_nat[:, :, None])
            nat_grad *= nat_prob

            places = (cells * K)[:, :, None] + classes[None, None, :]
            mask = in_use[:, :, None] & (classes < K)[None, None, :]
            keep = valid[None, :, None]
            tl.store(adv_grad_ptr + places, tl.where(keep, adv_grad, 0.0), mask=mask)
            tl.store(nat_grad_ptr + places, tl.where(keep, nat_grad, 0.0), mask=mask)

    # Behind the gradients: the compiler reuses loaded logits only up to the first store.
    tl.store(loss_ptr + cells, tl.where(valid[None, :], loss, float("nan")), mask=in_use)
    if NEED_PARTS:
        part_stride = tl.full((), B, tl.int64) * M
        parts = (ce, nat_distance, adv_distance, nat_disparity, adv_disparity, nat_weight, adv_weight)
        for i in tl.static_range(7):
            part = tl.where(valid[None, :], parts[i], float("nan"))
            tl.store(parts_ptr + i * part_stride + cells, part, mask=in_use)


@triton.jit(do_not_specialize=["B"])
def ensemble_cross_entropy_kernel(
    logits_ptr,
    target_ptr,
    loss_ptr,  # (B,)
    grad_ptr,  # (M, B, K)
    B,
    member_stride,
    sample_stride,
    target_stride,
    M: tl.constexpr,
    K: tl.constexpr,
    PADDED_M: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MEAN: tl.constexpr,
    NEED_GRAD: tl.constexpr,
):
    """-log of the mean of p_m[y] per sample; gradient p_m[y] / sum_j p_j[y] * r_m. Grid: cdiv(B, BLOCK_B)."""
    DTYPE: tl.constexpr = loss_ptr.dtype.element_ty
    members = tl.arange(0, PADDED_M)
    samples = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    in_use = (members < M)[:, None] & (samples < B)[None, :]
    label, valid = _load_labels(target_ptr, target_stride, samples, B, K)
    rows = _rows(logits_ptr, members, samples, member_stride, sample_stride)

    top, total, true_residual, ce = _statistics(rows, in_use, label, K, BLOCK_K, DTYPE)
    is_member = (members < M)[:, None]
    lowest = tl.min(tl.where(is_member, ce, float("inf")), 0)
    # Where all members rule the label out, the lowest is infinite: they share its gradient.
    share = tl.where(ce == lowest[None, :], 1.0, _exp(lowest[None, :] - ce))
    share = tl.where(is_member, share, 0.0)
    share_sum = tl.sum(share, 0)
    # Where the mean of p_y is near 1, one minus it is known to more digits than itself.
    mean_residual = tl.sum(tl.where(is_member, true_residual, 0.0), 0) / M
    loss = tl.where(mean_residual > -0.5, -_log1p(mean_residual), lowest - tl.log(share_sum / M))

    if NEED_GRAD:
        factor = share / share_sum[None, :]
        if MEAN:
            factor /= tl.full((), B, DTYPE)
        cells = _rows(0, members, samples, B, 1)
        for start in range(0, K, BLOCK_K):
            classes = start + tl.arange(0, BLOCK_K)
            is_true = classes[None, None, :] == label[None, :, None]
            prob = _probabilities(rows, in_use, classes, top, total, K, DTYPE)
            residual = _residuals(prob, true_residual, is_true)
            grad = tl.where(valid[None, :, None], factor[:, :, None] * residual, 0.0)
            places = (cells * K)[:, :, None] + classes[None, None, :]
            tl.store(grad_ptr + places, grad, mask=in_use[:, :, None] & (classes < K)[None, None, :])

    tl.store(loss_ptr + samples, tl.where(valid, loss, float("nan")), mask=samples < B)


@triton.jit
def pgd_step_kernel(x_adv_ptr, grad_ptr, x_ptr, out_ptr, size, alpha: tl.float64, eps: tl.float64, BLOCK: tl.constexpr):
    """One step along sign(grad), projected to the ball around x and to [0, 1]. Grid: cdiv(size, BLOCK)."""
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < size
    x_adv = tl.load(x_adv_ptr + places, mask=mask, other=0.0)
    x = tl.load(x_ptr + places, mask=mask, other=0.0)
    grad = tl.load(grad_ptr + places, mask=mask, other=0.0)
    if grad.dtype.primitive_bitwidth < 32:
        grad = grad.to(tl.float32)
    sign = tl.where(grad > 0, 1.0, tl.where(grad < 0, -1.0, grad)).to(DTYPE)  # 0 or NaN remain
    radius = tl.full((), eps, DTYPE)
    step = x_adv + tl.full((), alpha, DTYPE) * sign
    step = _min_or_nan(_max_or_nan(step, x - radius), x + radius)
    step = _min_or_nan(_max_or_nan(step, tl.zeros_like(step)), tl.full(step.shape, 1.0, DTYPE))
    tl.store(out_ptr + places, step, mask=mask)


@triton.jit(do_not_specialize=["B", "rows"])
def scale_gradients_kernel(
    adv_grad_ptr,  # (rows, K), rows = M * B
    nat_grad_ptr,
    loss_grad_ptr,
    adv_out_ptr,
    nat_out_ptr,
    rows,
    B,
    member_stride,
    sample_stride,
    K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Both gradients times the incoming gradient of their row's loss. Grid: cdiv(rows, BLOCK_ROWS)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    loss_grad = tl.load(
        loss_grad_ptr + (row // B) * member_stride + (row % B) * sample_stride, mask=row < rows, other=0.0
    ).to(DTYPE)[:, None]
    for start in range(0, K, BLOCK_K):
        classes = start + tl.arange(0, BLOCK_K)
        places = row[:, None] * K + classes[None, :]
        mask = (row < rows)[:, None] & (classes < K)[None, :]
        adv = tl.load(adv_grad_ptr + places, mask=mask, other=0.0).to(DTYPE)
        nat = tl.load(nat_grad_ptr + places, mask=mask, other=0.0).to(DTYPE)
        tl.store(adv_out_ptr + places, adv * loss_grad, mask=mask)
        tl.store(nat_out_ptr + places, nat * loss_grad, mask=mask)
