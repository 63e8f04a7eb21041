"""What passes for the same result in another precision."""

from __future__ import annotations

import pytest
import torch

from ceat_fast.ensemble.proof import is_as_close

EXACT = torch.linspace(-1.0, 1.0, 11)
ERROR = torch.linspace(1.0, -1.0, 11).roll(3) * 0.01
INF, NAN = float("inf"), float("nan")


def with_value(tensor: torch.Tensor, value: float) -> torch.Tensor:
    return torch.cat([tensor, torch.tensor([value])])


def test_the_error_of_the_precision_is_the_measure() -> None:
    assert is_as_close([EXACT + 1.9 * ERROR], [EXACT + ERROR], [EXACT], 0.0)
    assert not is_as_close([EXACT + 2.1 * ERROR], [EXACT + ERROR], [EXACT], 0.0)
    assert is_as_close([EXACT + 2.1 * ERROR], [EXACT + ERROR], [EXACT], 0.1)
    assert is_as_close([EXACT.bfloat16()], [EXACT.bfloat16()], [EXACT], 0.0)


def test_nothing_is_as_close_as_nothing() -> None:
    """A gradient of zeros lies at a distance of one, which no error of the precision excuses."""
    assert not is_as_close([torch.zeros(11)], [EXACT * 0.5], [EXACT], 0.3)
    assert not is_as_close([-EXACT], [EXACT * 0.5], [EXACT], 0.3)


@pytest.mark.parametrize(
    ("ours", "plain", "exact", "same"),
    [
        (-INF, -INF, -INF, True),  # a class that is ruled out
        (0.0, -INF, -INF, False),
        (INF, -INF, -INF, False),
        (NAN, 0.5, 0.5, False),
        (INF, 0.5, 0.5, False),
        (0.5, NAN, NAN, True),  # what was NaN is nobody's business
        (NAN, NAN, 0.5, True),
        (0.5, INF, 0.5, True),  # an overflow of the precision that ours does not have
    ],
)
def test_infinities_and_nan(ours: float, plain: float, exact: float, same: bool) -> None:
    triple = with_value(EXACT, ours), with_value(EXACT, plain), with_value(EXACT, exact)
    assert is_as_close(*([tensor] for tensor in triple), 0.0) == same
    wrong = with_value(EXACT.roll(1), ours)
    assert not is_as_close([wrong], [triple[1]], [triple[2]], 0.01)
