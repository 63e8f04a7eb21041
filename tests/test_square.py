"""Square: its schedule and patterns, optimum on a linear model, the authors' success rate, and queries."""

from __future__ import annotations

import math

import pytest
import torch
from attack_models import Counting, correct_batch, first_run, linear, small_net

from ceat_fast.attacks import Square
from ceat_fast.attacks.square import bumps


def test_share_of_the_image_halves_as_published():
    attack = Square()
    shares = [attack.share(query) for query in (0, 10, 11, 51, 201, 501, 1001, 2001, 4001, 4999)]
    assert shares == [0.8, 0.8, 0.4, 0.2, 0.1, 0.05, 0.025, 0.0125, 0.00625, 0.00625]
    rescaled = Square(queries=100, rescale_schedule=True)
    assert [rescaled.share(query) for query in (0, 1, 2, 99)] == [0.8, 0.2, 0.2, 0.8 / 512]  # queries 0, 100, 200, 9900


@pytest.mark.parametrize(
    ("norm", "expected"),
    # sqrt(p * 64): 7.2, 5.1, 3.6, 2.5, 1.8; L2 makes sides odd and at least 3, and no larger than the image.
    [("Linf", [0, 7, 5, 4, 3, 2, 1]), ("L2", [0, 7, 5, 5, 3, 3, 3])],
)
def test_sides_of_the_squares(norm, expected):
    search = Square(0.1, norm).search(small_net(), 0.0, 10)
    sides = search._schedule(8, 8)
    assert [int(sides[step]) for step in (0, 1, 12, 52, 202, 502, 1002)] == expected
    assert len(sides) == search.steps == 5001


def test_pattern_of_two_bumps_by_hand():
    """Upper 1x3 rectangle: 1 + 1/4 in the middle, 1/4 beside. Lower 2x3: the middle row of distance 0 is its second."""
    upper = torch.tensor([[0.25, 1.25, 0.25]])
    lower = torch.tensor([[0.25, 0.25, 0.25], [0.25, 1.25, 0.25]])
    expected = torch.cat([upper / upper.norm(), -lower / lower.norm()]) / math.sqrt(2)
    assert torch.allclose(bumps(3), expected)
    assert bumps(1).tolist() == [[-1.0]]


def test_every_proposal_has_noise_of_its_own() -> None:
    search = Square(0.1).search(small_net(), 0.0, 10)
    rows = search.begin(first_run(torch.rand(1, 1, 6, 6), torch.tensor([0]), 0.1, torch.zeros(1, 10)))
    assert len({search._noise(rows, torch.tensor([step]))[0, 0].item() for step in range(200)}) == 200


@pytest.mark.parametrize("side", [2, 4, 7, 32])
def test_pattern_is_that_of_the_authors_code(side):
    authors = pytest.importorskip("pyautoattack.square")
    theirs = authors.SquareAttack(None, norm="L2", eps=1.0, device="cpu").eta(side)
    assert torch.allclose(theirs, bumps(side), atol=1e-6) or torch.allclose(theirs, bumps(side).T, atol=1e-6)


def test_linear_model_ends_in_the_best_corner():
    weights = [[0.0] * 8, [2.0, -1, 3, 1, -2, 1, -1, -4]]
    x = torch.full((1, 2, 2, 2), 0.5, dtype=torch.float64)
    x[0, 0, 0, 0] = 0.95
    result = Square(0.125, queries=300).run(linear(weights, [9.0, 0]), x, torch.tensor([0]))
    expected = [1.0, 0.375, 0.625, 0.625, 0.375, 0.625, 0.375, 0.375]
    assert result.x_adv.flatten().tolist() == expected


def test_l2_fills_the_ball_and_raises_the_margin():
    model = small_net(channels=3)
    x, y = correct_batch(model, 8, channels=3)
    x = 0.3 + 0.4 * x  # far from the walls, which would shorten the perturbation
    with torch.no_grad():
        y = model(x).argmax(1)
    start = Square(0.05, "L2", queries=1).run(model, x, y)
    end = Square(0.05, "L2", queries=200).run(model, x, y)
    robust = ~(start.fooled | end.fooled)
    assert robust.sum() >= 4
    assert torch.allclose(end.norm[robust], torch.tensor(0.05).double())
    assert (end.margin[robust] > start.margin[robust]).all()


def test_an_l2_proposal_leaves_alone_what_is_outside_of_its_windows() -> None:
    """The first window takes the norm that is free, all channels together, so that nothing else has to be scaled."""
    search = Square(1.0, "L2", queries=5).search(small_net(channels=3), 0.0, 10)
    x = torch.full((1, 3, 12, 12), 0.5, dtype=torch.float64)
    rows = search.begin(first_run(x, torch.tensor([0]), 1.0, torch.zeros(1, 10)))
    rows.best = x + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    corners = torch.tensor([[0.0, 0.0, 0.99, 0.99, 0.2, 0.2, 0.8, 0.2]]).double()  # windows at both ends
    new = search.propose(rows, torch.tensor([3]), corners)
    outside = torch.ones(12, 12, dtype=torch.bool)
    outside[:3, :3] = outside[9:, 9:] = False
    assert torch.allclose(new[..., outside], rows.best[..., outside])
    assert (new - x).norm().item() == pytest.approx(1.0)


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.04), ("L2", 0.2)])
def test_fools_as_many_as_the_authors_code(norm, eps):
    """Ours draws a square for each image and reaches the last row and column, so it may be a little stronger."""
    authors = pytest.importorskip("pyautoattack.square")
    model = small_net(dtype=torch.float32)
    x, y = correct_batch(model, 100)
    ours = Square(eps, norm, queries=200).run(model, x, y).fooled.float().mean().item()
    theirs = authors.SquareAttack(model, norm=norm, eps=eps, n_queries=200, resc_schedule=False, device="cpu")
    with torch.no_grad():
        rate = (model(theirs.perturb(x, y)).argmax(1) != y).float().mean().item()
    assert 0.05 < rate < 0.95
    assert rate - 0.04 <= ours <= rate + 0.12


def test_queries_of_a_surviving_sample():
    """The clean image, the start and 5,000 proposals, less those that repeat what is there."""
    model = Counting(small_net())
    x, y = correct_batch(model.model, 2)
    result = Square(1e-6).run(model, x, y)
    assert not result.fooled.any()
    assert model.passes.backwards == 0
    assert model.passes.forwards == int(result.forwards.sum())
    # A proposal of a single pixel, from query 501 on, repeats its value half the time.
    assert all(2000 < count <= 5002 for count in result.forwards.tolist())


def test_a_proposal_that_changes_nothing_is_not_evaluated():
    """One pixel of one channel has two states, and a proposal of the present one is no news."""
    model = Counting(linear([[0.0], [1.0]], [9.0, 0]))
    x = torch.full((8, 1, 1, 1), 0.5, dtype=torch.float64)
    result = Square(0.1, queries=20).run(model, x, torch.zeros(8, dtype=torch.int64))
    assert result.x_adv.flatten().tolist() == [0.6] * 8
    # The clean image, the start, and the half of 20 proposals that has the other sign: 12 of 22.
    assert 9 <= result.forwards.double().mean().item() <= 15
    assert model.passes.forwards == int(result.forwards.sum())


def test_refuses_what_is_no_image():
    with pytest.raises(ValueError, match=r"needs images \(B, C, H, W\), got \(1, 4\)"):
        Square(0.1)(linear([[0.0] * 4, [-1.0] * 4]), torch.rand(1, 4, dtype=torch.float64), torch.tensor([0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": 0}, "queries must be at least 1"),
        ({"queries": 65001}, "queries must be at most 65000"),
        ({"p_init": 0.0}, r"p_init must be in \(0, 1\]"),
        ({"p_init": 1.1}, r"p_init must be in \(0, 1\]"),
        ({"restarts": 0}, "restarts must be at least 1"),
    ],
)
def test_refuses_settings(options, message):
    with pytest.raises(ValueError, match=message):
        Square(**options)
