"""Whether one way of computing something is the same as another, up to what the precision explains."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def is_as_close(ours: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], slack: float) -> bool:
    """Whether `ours` lie at most twice as far from `exact` as `plain` do, and `slack`, relative to the norm of `exact`.

    `plain` are in the precision of `ours`, whose own error is the measure: gradients in bf16 can be a third away.
    """
    return _distance(ours, exact) <= 2 * _distance(plain, exact) + slack


def _distance(found: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Of all tensors together, relative. What is NaN in one of them does not count: it may be right."""
    differences = [(a.double() - b.double()).nan_to_num(0.0) for a, b in zip(found, right, strict=True)]
    norm = sum(float(b.double().nan_to_num(0.0).square().sum()) for b in right)
    return float((sum(float(d.square().sum()) for d in differences) / max(norm, 1e-30)) ** 0.5)
