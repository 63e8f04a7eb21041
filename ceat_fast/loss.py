"""The CEAT loss (eq. 22 of "Learning from Peers: Collaborative Ensemble Adversarial Training") and its pieces.

For logits z_m of member m, p_m = softmax(z_m), h_m = p_m[y]; nat is the clean, adv the perturbed input:

    D_m = R over pairs {i < j, i != m, j != m} of |h_i - h_j|        in nat and in adv; 0 for M <= 2
    w_m = exp(exponent * D_m)                                       a constant: it holds only the peers' outputs
    L_m = CE(adv_m, y) + lam * w_nat_m * ||p_nat_m - onehot(y)||^2 + mu * w_adv_m * ||p_adv_m - p_nat_m||^2

Squared distances are summed over the classes. Whatever the dtype of the logits, arithmetic is in fp32 (fp64 for fp64)
with one rounding at the end. Losses are fp32 (fp64 for fp64 logits); gradients have the dtype of the logits.

A row with NaN, +inf or nothing but -inf logits gives NaN. A label outside [0, K) raises on the CPU; on CUDA, where
looking would stall the device, that sample's losses are NaN and its gradients zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ceat_fast.checks import require_number
from ceat_fast.choices import require_choice
from ceat_fast.ops import autograd, dispatch, reference
from ceat_fast.ops.reference import PAIR_REDUCTIONS, REDUCTIONS, CeatParts, CeatSettings, ensemble_log_prob

__all__ = [
    "CEATLoss",
    "CeatParts",
    "calibrated_distance",
    "ceat_loss",
    "disparity",
    "ensemble_cross_entropy",
    "ensemble_log_prob",
]

Logits = Tensor | Sequence[Tensor]

_DISTANCE_REDUCTIONS = ("sum", "mean")
_FLOAT_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
# exp(88.7) is the largest fp32 number; the rest is room for a squared distance and a sum over the batch.
_MAX_LOG_WEIGHT = 75.0


def ceat_loss(
    adv_logits: Logits,
    nat_logits: Logits,
    target: Tensor,
    *,
    lam: float = 1.0,
    mu: float = 5.0,
    lam_exponent: float | None = None,
    mu_exponent: float | None = None,
    pair_reduction: str = "max",
    distance_reduction: str = "sum",
    detach_nat: bool = False,
    max_weight: float | None = None,
    reduction: str = "mean",
    impl: str = "auto",
    return_parts: bool = False,
) -> Tensor | tuple[Tensor, CeatParts]:
    """Eq. 22 for every member; `ceat_loss(...).sum().backward()` trains all members.

    Args:
        adv_logits: logits on the adversarial input, (M, B, K), or M tensors (B, K).
        nat_logits: logits on the clean input, likewise.
        target: labels in [0, K), (B,) int64.
        lam: weight of the clean distance, >= 0. The paper uses (lam, mu) = (1, 5) and (5, 1).
        mu: weight of the adversarial distance, >= 0.
        lam_exponent, mu_exponent: factors of D in the exponentials, >= 0; lam and mu if None, as in the paper.
        pair_reduction: R above. "max" is the spread of the peers, so D is in [0, 1] for every M; "mean"; "sum".
        distance_reduction: "sum" over the classes, as in SCORE (the paper leaves it open), or "mean".
        detach_nat: let no gradient into the clean logits through the adversarial distance.
        max_weight: upper limit of the exponential weights, >= 1.
        reduction: over the batch: "mean", "sum" or "none".
        impl: "native", "triton", "torch", or "auto" for the first of them that runs on the device.
        return_parts: also return the pieces of the loss per member and sample, without gradient.

    Returns:
        (M,) losses, (M, B) for reduction "none"; with `return_parts`, (losses, CeatParts). An empty batch gives zeros.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: shapes that disagree, a label outside [0, K) (CPU), a setting out of range, or weights that could
            overflow fp32.
        RuntimeError: `impl` names a backend that cannot run here.
    """
    loss, parts = _ceat(
        adv_logits, nat_logits, target, 1.0, lam, mu, lam_exponent, mu_exponent, pair_reduction, distance_reduction,
        detach_nat, max_weight, reduction, impl, return_parts,
    )  # fmt: skip
    return (loss, parts) if parts is not None else loss


def calibrated_distance(
    adv_logits: Logits,
    nat_logits: Logits,
    target: Tensor,
    *,
    lam: float = 1.0,
    mu: float = 5.0,
    lam_exponent: float | None = None,
    mu_exponent: float | None = None,
    pair_reduction: str = "max",
    distance_reduction: str = "sum",
    detach_nat: bool = False,
    max_weight: float | None = None,
    reduction: str = "mean",
    impl: str = "auto",
    return_parts: bool = False,
) -> Tensor | tuple[Tensor, CeatParts]:
    """The calibrating distance regularisation alone: lam * L^D_nat + mu * L^D_adv (eq. 19 and 21), without eq. 6.

    Adds to the loss of any other ensemble method (the paper's Table 2). Arguments, result and errors as `ceat_loss`.
    """
    loss, parts = _ceat(
        adv_logits, nat_logits, target, 0.0, lam, mu, lam_exponent, mu_exponent, pair_reduction, distance_reduction,
        detach_nat, max_weight, reduction, impl, return_parts,
    )  # fmt: skip
    return (loss, parts) if parts is not None else loss


class CEATLoss(nn.Module):
    """`ceat_loss` as a module: settings at construction, `(adv_logits, nat_logits, target)` per call.

    >>> criterion = CEATLoss(lam=1.0, mu=5.0)
    >>> criterion(adv_logits, nat_logits, target).sum().backward()  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        lam: float = 1.0,
        mu: float = 5.0,
        lam_exponent: float | None = None,
        mu_exponent: float | None = None,
        pair_reduction: str = "max",
        distance_reduction: str = "sum",
        detach_nat: bool = False,
        max_weight: float | None = None,
        reduction: str = "mean",
        impl: str = "auto",
        return_parts: bool = False,
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {
            "lam": lam,
            "mu": mu,
            "lam_exponent": lam_exponent,
            "mu_exponent": mu_exponent,
            "pair_reduction": pair_reduction,
            "distance_reduction": distance_reduction,
            "detach_nat": detach_nat,
            "max_weight": max_weight,
            "reduction": reduction,
        }
        _make_settings(1.0, members=3, classes=2, **self.settings)  # refuse bad settings here, not at the first batch
        require_choice("impl", impl, ("auto", *dispatch.BACKENDS))
        self.impl, self.return_parts = impl, return_parts

    def forward(self, adv_logits: Logits, nat_logits: Logits, target: Tensor) -> Tensor | tuple[Tensor, CeatParts]:
        """(M,) or (M, B) losses, with the parts if asked for at construction; see `ceat_loss`."""
        loss, parts = _ceat(
            adv_logits, nat_logits, target, 1.0, **self.settings, impl=self.impl, need_parts=self.return_parts
        )
        return (loss, parts) if parts is not None else loss

    def extra_repr(self) -> str:
        """The settings, for print(module)."""
        shown = self.settings | {"impl": self.impl, "return_parts": self.return_parts}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


def disparity(true_prob: Tensor, pair_reduction: str = "max") -> Tensor:
    """Leave-one-out pairwise disparity D: what eq. 18 multiplies by mu.

    Args:
        true_prob: the members' probabilities of the true class, (M, B), float.
        pair_reduction: "max", "mean" or "sum" over the pairs of peers.

    Returns:
        (M, B): D_m from the other members; zeros for M <= 2.
    """
    require_choice("pair_reduction", pair_reduction, PAIR_REDUCTIONS)
    if true_prob.dim() != 2 or not true_prob.is_floating_point():
        raise ValueError(f"true_prob must be a float tensor (M, B), got {true_prob.dtype} {tuple(true_prob.shape)}")
    return reference.disparity(true_prob, pair_reduction)


def ensemble_cross_entropy(logits: Logits, target: Tensor, *, reduction: str = "mean", impl: str = "auto") -> Tensor:
    """Cross-entropy of the mean member probability (eq. 1), finite where log(mean(p)) is not.

    Args:
        logits: (M, B, K), or M tensors (B, K).
        target: labels in [0, K), (B,) int64.
        reduction: over the batch: "mean", "sum" or "none".
        impl: as in `ceat_loss`.

    Returns:
        A scalar, or (B,) for reduction "none". Its gradient is r_m (p_m - onehot) with r_m = p_m[y] / sum_j p_j[y].
        Errors as `ceat_loss`.
    """
    require_choice("reduction", reduction, REDUCTIONS)
    code = REDUCTIONS.index(reduction)
    logits = _stack("logits", logits)
    if not _fits(logits, logits.shape, target):
        _explain_misfit({"logits": logits}, target)
    if logits.shape[1] == 0:
        return _empty_batch(logits.sum((0, 2)), reduction)
    name = _backend_name(impl, logits.device.type)
    if name == "torch":
        _check_labels(target, logits.shape[2])
        return reference.ensemble_cross_entropy(logits, target, code)
    try:
        return autograd.ensemble_cross_entropy(name, logits, target, code)
    except RuntimeError:
        _check_labels(target, logits.shape[2])
        raise


def _ceat(
    adv_logits: Logits,
    nat_logits: Logits,
    target: Tensor,
    ce_coefficient: float,
    lam: float,
    mu: float,
    lam_exponent: float | None,
    mu_exponent: float | None,
    pair_reduction: str,
    distance_reduction: str,
    detach_nat: bool,
    max_weight: float | None,
    reduction: str,
    impl: str,
    need_parts: bool,
) -> tuple[Tensor, CeatParts | None]:
    adv, nat = _stack("adv_logits", adv_logits), _stack("nat_logits", nat_logits)
    shape = adv.shape
    if not (_fits(adv, shape, target) and nat.shape == shape and nat.dtype == adv.dtype and nat.device == adv.device):
        _explain_misfit({"adv_logits": adv, "nat_logits": nat}, target)
    members, samples, classes = shape
    make_settings = _make_settings if torch.compiler.is_compiling() else _cached_settings
    settings = make_settings(
        ce_coefficient, lam, mu, lam_exponent, mu_exponent, pair_reduction, distance_reduction, detach_nat, max_weight,
        reduction, members, classes,
    )  # fmt: skip
    name = _backend_name(impl, adv.device.type)
    if samples == 0:
        losses = (adv + nat).sum(2)
        return _empty_batch(losses, reduction), CeatParts(*[losses.detach()] * 7) if need_parts else None
    if name == "torch":
        _check_labels(target, classes)
        loss, terms = reference.ceat_loss(adv, nat, target, settings)
        return loss, terms if need_parts else None
    try:
        loss, parts = autograd.ceat_loss(name, adv, nat, target, settings, need_parts)
    except RuntimeError:
        # The kernel that found the bad label cannot raise a ValueError, and looking first would cost every call.
        _check_labels(target, classes)
        raise
    return loss, CeatParts(*parts) if parts is not None and need_parts else None


def _backend_name(impl: str, device_type: str) -> str:
    if torch.compiler.is_compiling():
        from ceat_fast.ops import tracing

        name: str = tracing.backend_name(impl, device_type)
        return name
    return dispatch.backend_name(impl, device_type)


def _make_settings(
    ce_coefficient: float,
    lam: float,
    mu: float,
    lam_exponent: float | None,
    mu_exponent: float | None,
    pair_reduction: str,
    distance_reduction: str,
    detach_nat: bool,
    max_weight: float | None,
    reduction: str,
    members: int,
    classes: int,
) -> CeatSettings:
    require_choice("pair_reduction", pair_reduction, PAIR_REDUCTIONS)
    require_choice("distance_reduction", distance_reduction, _DISTANCE_REDUCTIONS)
    require_choice("reduction", reduction, REDUCTIONS)
    nat_exponent = lam if lam_exponent is None else lam_exponent
    adv_exponent = mu if mu_exponent is None else mu_exponent
    for name, value in (("lam", lam), ("mu", mu), ("lam_exponent", nat_exponent), ("mu_exponent", adv_exponent)):
        require_number(name, value, 0)
    if max_weight is not None:
        require_number("max_weight", max_weight, 0)
    cap = math.inf if max_weight is None else float(max_weight)
    if cap < 1:
        raise ValueError(f"max_weight must be at least 1, the weight of a sample without disparity, got {max_weight!r}")
    for name, coefficient, exponent in (("lam", lam, nat_exponent), ("mu", mu, adv_exponent)):
        _check_overflow(name, coefficient, exponent, cap, pair_reduction, members)
    share = 1 / classes if distance_reduction == "mean" else 1.0
    return CeatSettings(
        ce_coefficient,
        lam * share,
        mu * share,
        float(nat_exponent),
        float(adv_exponent),
        cap,
        PAIR_REDUCTIONS.index(pair_reduction),
        REDUCTIONS.index(reduction),
        bool(detach_nat),
    )


_cached_settings = lru_cache(maxsize=256)(_make_settings)


def _check_overflow(
    name: str, coefficient: float, exponent: float, cap: float, pair_reduction: str, members: int
) -> None:
    # Half of the peers at 0 and half at 1 gives the largest sum of gaps.
    peers = members - 1
    largest = float((peers // 2) * (peers - peers // 2)) if pair_reduction == "sum" else 1.0
    log_weight = min(exponent * largest if peers >= 2 else 0.0, math.log(cap))
    if log_weight + math.log(max(coefficient, 1.0)) > _MAX_LOG_WEIGHT:
        raise ValueError(
            f"{name}={coefficient:g} with exponent {exponent:g}, pair_reduction={pair_reduction!r} and M={members} "
            f"allows weights up to {name} * exp({exponent * largest:g}), which overflow fp32. "
            f'Use pair_reduction="max" or "mean", a smaller {name} or {name}_exponent, or set max_weight.'
        )


def _stack(name: str, logits: Logits) -> Tensor:
    if isinstance(logits, Tensor):
        return logits
    if not isinstance(logits, Sequence) or not all(isinstance(z, Tensor) for z in logits):
        raise TypeError(
            f"{name} must be a tensor (M, B, K) or a sequence of M tensors (B, K), got {type(logits).__name__}"
        )
    if not logits:
        raise ValueError(f"{name} must hold at least one member, got an empty sequence")
    shapes, dtypes = {tuple(z.shape) for z in logits}, {z.dtype for z in logits}
    if len(shapes) > 1 or len(dtypes) > 1:
        raise ValueError(f"{name} must agree in shape and dtype, got {sorted(shapes)} and {sorted(map(str, dtypes))}")
    return torch.stack(list(logits))


def _fits(logits: Tensor, shape: torch.Size, target: Tensor) -> bool:
    """Whether logits and target can be computed with: everything that `_explain_misfit` explains, in one look."""
    return (
        len(shape) == 3
        and shape[0] >= 1
        and shape[2] >= 2
        and logits.dtype in _FLOAT_DTYPES
        and isinstance(target, Tensor)
        and target.dtype == torch.int64
        and target.shape == shape[1:2]
        and target.device == logits.device
    )


def _explain_misfit(named_logits: dict[str, Tensor], target: Tensor) -> NoReturn:
    """Raise the error that names what `_fits`, or the comparison of two logits, found wrong."""
    for name, logits in named_logits.items():
        if logits.dim() != 3:
            raise ValueError(f"{name} must have shape (M, B, K), got {tuple(logits.shape)}")
        if logits.dtype not in _FLOAT_DTYPES:
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {logits.dtype}")
        if logits.shape[0] < 1 or logits.shape[2] < 2:
            raise ValueError(
                f"{name} must have M >= 1 members and K >= 2 classes, got (M, B, K) = {tuple(logits.shape)}"
            )
    for what in ("shape", "dtype", "device"):
        values = [getattr(logits, what) for logits in named_logits.values()]
        if any(value != values[0] for value in values):
            names, found = " and ".join(named_logits), " and ".join(map(_plain, values))
            raise (TypeError if what == "dtype" else ValueError)(f"{names} must have the same {what}, got {found}")
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        kind = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"target must be an int64 tensor of class indices, got {kind}")
    if target.dim() != 1 or target.shape[0] != logits.shape[1]:
        raise ValueError(f"target must have shape (B,) = ({logits.shape[1]},), got {tuple(target.shape)}")
    raise ValueError(f"target must be on the device of the logits, {logits.device}, got {target.device}")


def _plain(value: object) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)


def _check_labels(target: Tensor, classes: int) -> None:
    """Refuse labels outside [0, classes) on the CPU; elsewhere, and in vmap, there is no looking."""
    if target.device.type != "cpu" or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    wrong = ((target < 0) | (target >= classes)).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(f"target must hold labels in [0, {classes}), got {int(target[at])} at index {at}")


def _empty_batch(losses: Tensor, reduction: str) -> Tensor:
    """Zeros of the right shape, attached to the graph: (..., 0) -> (...) unless reduction is "none"."""
    return losses if reduction == "none" else losses.sum(-1)
