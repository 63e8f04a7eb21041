"""Whether one way of computing something is the same as another, up to what the precision explains."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

_FAR = 0.8  # another result, however far `plain` is: what is zero everywhere lies at 1


def is_as_close(ours: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], slack: float) -> bool:
    """Whether `ours` lie at most twice as far from `exact` as `plain` do, and `slack`, relative to the norm of `exact`.

    `plain` are in the precision of `ours`, whose own error is the measure: gradients in bf16 can be a third away. Where
    `plain` and `exact` are finite, `ours` must be, and where both are the same infinity, `ours` must be that.
    """
    triples = [(a.double(), b.double(), c.double()) for a, b, c in zip(ours, plain, exact, strict=True)]
    for found, same_precision, right in triples:
        finite = same_precision.isfinite() & right.isfinite()
        infinite = right.isinf() & (same_precision == right)
        if (finite & ~found.isfinite()).any() or (infinite & (found != right)).any():
            return False
    return _distance(triples, 0) <= min(2 * _distance(triples, 1) + slack, _FAR)


def _distance(triples: Sequence[tuple[Tensor, Tensor, Tensor]], which: int) -> float:
    """Of the first or second of each triple from the third, relative, over all elements that are finite in all."""
    difference = norm = 0.0
    for triple in triples:
        counted = triple[0].isfinite() & triple[1].isfinite() & triple[2].isfinite()
        difference += float((triple[which] - triple[2])[counted].square().sum())
        norm += float(triple[2][counted].square().sum())
    return float((difference / max(norm, 1e-30)) ** 0.5)
