"""Long searches that stop where they run into a cycle: the same bits as the full search, with fewer model calls."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ceat_fast.attacks import CW, MIM, PGD
from ceat_fast.attacks.ball import ball
from ceat_fast.attacks.cycles import walk_to_cycles
from ceat_fast.attacks.objective import Objective
from ceat_fast.ensemble import Ensemble


class RowByRow(nn.Module):
    """A small net without matrix products, so that a row's bits do not depend on the batch around it.

    `rows` counts what all copies of all of them were given.
    """

    rows = 0

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Parameter(3 * torch.randn(6, 5, generator=generator).to(dtype))
        self.second = nn.Parameter(torch.randn(3, 6, generator=generator).to(dtype))

    def forward(self, x):
        RowByRow.rows += len(x)
        hidden = ((x[:, None] - 0.5) * self.first).sum(2).sin()
        return (hidden[:, None] * self.second).sum(2)


def full_search(objective, around, alpha, x, steps):
    iterates = [x]
    for _ in range(steps):
        x = around.step(x, objective.gradient(x)[1], alpha)
        iterates.append(x)
    return iterates


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("goal", ["ensemble", "members"])
def test_the_last_iterate_has_the_bits_of_the_full_search(norm, dtype, goal):
    """Every number of steps, so that the end falls anywhere in a cycle; unit vectors rarely make one, hence fewer."""
    ens = Ensemble([RowByRow(seed, dtype) for seed in (1, 2)], backend="loop").eval()
    center = torch.rand(12, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = torch.arange(12) % 3
    objective = Objective(ens, y, goal)
    radius = torch.linspace(0.05, 0.3, 12, dtype=dtype) if norm == "Linf" else 0.3
    around = ball(norm, center, radius, 1)
    if goal == "members":
        around = around.repeat(2)
    iterates = full_search(objective, around, 0.06, around.center, 90)
    for steps in range(1, 91) if norm == "Linf" else (1, 40, 90):
        last, losses = walk_to_cycles(objective, around, 0.06, around.center, steps)
        assert torch.equal(last, iterates[steps])
        assert losses.shape == (24 if goal == "members" else 12,)
        assert bool(losses.isfinite().all())
    repeats = sum(torch.equal(iterates[90], iterates[90 - period]) for period in range(1, 13))
    assert repeats >= (norm == "Linf")  # the search does run into cycles


def test_long_searches_compute_less():
    model = RowByRow(1).eval()
    x, y = torch.rand(40, 5, dtype=torch.float64), torch.arange(40) % 3
    attack = PGD(eps=0.1, alpha=0.025, steps=1000, seed=0)
    RowByRow.rows = 0
    result = attack(model, x, y)
    assert RowByRow.rows < 40 * 1000 / 10
    RowByRow.rows = 0
    assert torch.equal(attack.perturb(model, x, y), result)
    assert RowByRow.rows == 40 * 1000


def test_restarts_and_targets_take_the_same_way():
    model = RowByRow(1).eval()
    x, y = torch.rand(20, 5, dtype=torch.float64), torch.arange(20) % 3
    for attack in (CW(0.1, 0.03, 77, restarts=3, seed=0), PGD(0.1, 0.03, 77, restarts=3, seed=0)):
        assert torch.equal(attack(model, x, y), attack.perturb(model, x, y))
    attack, target, radii = PGD(0.1, 0.03, 77, seed=0), (y + 1) % 3, torch.linspace(0, 0.2, 20)
    found, full = (search(model, x, y, target=target, eps=radii) for search in (attack, attack.perturb))
    assert torch.equal(found, full)


def test_short_searches_and_momentum_compute_every_step():
    model = RowByRow(1).eval()
    x, y = torch.rand(4, 5, dtype=torch.float64), torch.arange(4) % 3
    for attack, steps in ((PGD(steps=50, seed=0), 50), (MIM(steps=60), 60)):
        RowByRow.rows = 0
        attack(model, x, y)
        assert RowByRow.rows == 4 * steps


class Noisy(RowByRow):
    """A defence that draws a random number in each pass: an iterate that returns means nothing."""

    def forward(self, x):
        return super().forward(x + 0.3 * torch.randn_like(x))


def test_a_model_that_draws_random_numbers_is_searched_in_full():
    model = Noisy(1).eval()
    x, y = torch.rand(4, 5, dtype=torch.float64), torch.arange(4) % 3
    attack = PGD(eps=0.02, alpha=0.02, steps=200, random_start=False)
    RowByRow.rows = 0
    torch.manual_seed(0)
    result = attack(model, x, y)
    assert RowByRow.rows == 4 * 200
    torch.manual_seed(0)
    assert torch.equal(attack.perturb(model, x, y), result)


def test_minus_zero_is_not_zero():
    from ceat_fast.attacks.cycles import _same_bits

    a = torch.tensor([[0.0, 1.0], [0.0, 1.0], [torch.nan, 1.0]])
    b = torch.tensor([[0.0, 1.0], [-0.0, 1.0], [torch.nan, 1.0]])
    assert _same_bits(a, b, 0).tolist() == [True, False, True]


def test_nan_is_found_in_long_searches_too():
    model = RowByRow(1).eval()
    with torch.no_grad():
        model.second[0, 0] = torch.nan
    x = torch.rand(4, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match="NaN logits on 4 of 4"):
        PGD(steps=60)(model, x, torch.zeros(4, dtype=torch.int64))


def test_an_empty_batch():
    x = torch.rand(0, 5, dtype=torch.float64)
    assert PGD(steps=60)(RowByRow(1).eval(), x, torch.zeros(0, dtype=torch.int64)).shape == (0, 5)
