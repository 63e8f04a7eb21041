"""L2 balls, radii per sample and random points, through the attacks that use them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ceat_fast.attacks import MIM, PGD
from ceat_fast.attacks.ball import ball, unit_l2
from ceat_fast.ensemble import Ensemble


def linear(*weights, dtype=torch.float64):
    """Logits W x of a last dimension of len(weights[0])."""
    model = nn.Linear(len(weights[0]), len(weights), bias=False, dtype=dtype)
    with torch.no_grad():
        model.weight.copy_(torch.tensor(weights, dtype=torch.float64))
    return model.eval()


@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_l2_pgd_on_a_linear_model_ends_at_eps_along_the_weights(loss):
    """Class 1's weights exceed class 0's by (3, 0, -4), of norm 5: the optimum is +-(0.6, 0, -0.8) * eps."""
    model = linear([0.0, 1.0, 2.0], [3.0, 1.0, -2.0])
    x = torch.full((2, 3), 0.5, dtype=torch.float64)
    attack = PGD(eps=0.25, alpha=0.1, steps=4, random_start=False, loss=loss, norm="L2")
    delta = attack(model, x, torch.tensor([0, 1])) - x
    expected = torch.tensor([[0.15, 0.0, -0.2], [-0.15, 0.0, 0.2]], dtype=torch.float64)
    torch.testing.assert_close(delta, expected, atol=1e-15, rtol=0)


def test_one_l2_step_has_the_length_alpha():
    model = linear([0.0, 0.0], [3.0, 4.0])
    x = torch.full((1, 2), 0.5, dtype=torch.float64)
    result = PGD(eps=2, alpha=0.125, steps=1, random_start=False, norm="L2")(model, x, torch.tensor([0]))
    torch.testing.assert_close(result - x, torch.tensor([[0.075, 0.1]], dtype=torch.float64), atol=1e-16, rtol=0)


def test_l2_search_converges_from_random_starts_too():
    """Each projected step shrinks what is across the weights, so that the angle to the optimum goes to zero."""
    model = linear([0.0] * 6, [1.0, -1.0, 2.0, 0.0, 0.5, -2.0])
    x = torch.full((20, 6), 0.5, dtype=torch.float64)
    attack = PGD(eps=0.3, alpha=0.3, steps=40, norm="L2", seed=1)
    delta = attack(model, x, torch.zeros(20, dtype=torch.int64)) - x
    weights = model.weight[1].detach()
    torch.testing.assert_close(delta, (0.3 * weights / weights.norm()).expand(20, -1), atol=1e-9, rtol=0)


def test_the_image_range_cuts_the_l2_ball():
    model = linear([0.0, 0.0], [1.0, 1.0])
    x = torch.tensor([[0.95, 0.5]], dtype=torch.float64)
    result = PGD(eps=0.2, alpha=0.2, steps=1, random_start=False, norm="L2")(model, x, torch.tensor([0]))
    torch.testing.assert_close(result, torch.tensor([[1.0, 0.5 + 0.2 * 0.5**0.5]], dtype=torch.float64))


def test_gradients_whose_squares_underflow_still_lead():
    """Entries of 1e-30: their squares are 0 in fp32."""
    model = linear([0.0, 0.0], [3e-30, 4e-30], dtype=torch.float32)
    x = torch.full((1, 2), 0.5)
    result = PGD(eps=0.25, alpha=0.25, steps=1, random_start=False, norm="L2", loss="margin")(
        model, x, torch.tensor([0])
    )
    torch.testing.assert_close(result, torch.tensor([[0.65, 0.7]]))
    assert unit_l2(torch.zeros(2, 3), (-1,)).tolist() == [[0, 0, 0], [0, 0, 0]]


@settings(max_examples=40, deadline=None)
@given(
    attack=st.sampled_from([PGD, MIM]),
    norm=st.sampled_from(["Linf", "L2"]),
    eps=st.floats(0, 1),
    alpha=st.floats(1e-3, 2),
    steps=st.integers(0, 3),
    goal=st.sampled_from(["ensemble", "members"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    own_radii=st.booleans(),
    seed=st.integers(0, 5),
)
def test_results_stay_in_the_ball_and_in_the_image_range(attack, norm, eps, alpha, steps, goal, dtype, own_radii, seed):
    torch.manual_seed(seed)
    ens = Ensemble([nn.Sequential(nn.Flatten(), nn.Linear(16, 3)) for _ in range(2)]).to(dtype).eval()
    x = torch.rand(6, 1, 4, 4, dtype=dtype)
    x[0], x[1] = 0, 1
    radii = torch.linspace(0, eps, 6, dtype=torch.float64)
    result = attack(eps, alpha, steps, random_start=True, goal=goal, seed=seed, norm=norm)(
        ens, x, torch.randint(3, (6,)), eps=radii if own_radii else None
    )
    assert result.shape == ((2, *x.shape) if goal == "members" else x.shape)
    delta = (result.double() - x.double()).flatten(-3)
    distance = delta.abs().amax(-1) if norm == "Linf" else delta.norm(dim=-1)
    # One rounding of x + delta in each of 16 entries, and one of the radius.
    assert bool((distance <= (radii if own_radii else eps) + 16 * torch.finfo(dtype).eps).all())
    assert result.min() >= 0
    assert result.max() <= 1


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("goal", ["ensemble", "members"])
def test_a_radius_per_sample_is_the_attack_with_that_radius(norm, goal):
    torch.manual_seed(0)
    members = [nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)) for _ in range(2)]
    ens = Ensemble(members).double().eval()
    x, y = torch.rand(4, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    radii = torch.tensor([0.0, 0.03, 0.1, 0.3])
    common = {"alpha": 0.04, "steps": 5, "restarts": 2, "seed": 3, "norm": norm, "goal": goal}
    result = PGD(eps=0.7, **common)(ens, x, y, eps=radii)
    for i, radius in enumerate(radii.tolist()):
        alone = PGD(eps=radius, **common)(ens, x[i : i + 1], y[i : i + 1], torch.tensor([i]))
        torch.testing.assert_close(result[..., i : i + 1, :, :, :], alone, atol=1e-12, rtol=0)
    assert torch.equal(result[..., 0, :, :, :], x[0].expand_as(result[..., 0, :, :, :]))


def test_random_points_fill_the_l2_ball_evenly():
    """In n dimensions (distance / radius)^n is uniform: mean 1/2, and a direction's mean square is 1/n."""
    count, size = 20000, 5
    center = torch.full((count, size), 0.5, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    points = ball("L2", center, 0.25, 1).random_point(
        lambda n: torch.rand(count, n, dtype=torch.float64, generator=generator)
    )
    delta = points - center
    distance = delta.norm(dim=1)
    share = (distance / 0.25) ** size
    assert share.max() <= 1 + 1e-12
    counts = torch.histc(share, 10, 0, 1)
    assert ((counts - 2000).square() / 2000).sum().item() < 34  # chi-square of 9 degrees, exceeded once in 10,000
    direction = delta / distance[:, None]
    assert direction.mean(0).abs().max().item() < 5 * (1 / size / count) ** 0.5
    covariance = direction.mT @ direction / count
    torch.testing.assert_close(covariance, torch.eye(size, dtype=torch.float64) / size, atol=0.01, rtol=0)


def test_random_starts_differ_by_sample_restart_and_attack():
    x = torch.full((3, 7), 0.5, dtype=torch.float64)
    y = torch.zeros(3, dtype=torch.int64)
    model = linear([0.0] * 7, [1.0] * 7)
    starts = [
        attack(eps=0.3, steps=0, random_start=True, seed=0, norm=norm)(model, x, y)
        for attack in (PGD, MIM)
        for norm in ("Linf", "L2")
    ]
    rows = torch.cat(starts)
    assert len(rows.unique(dim=0)) == 12


@pytest.mark.parametrize(
    ("radii", "text"),
    [
        (torch.tensor([0.1, -0.1]), "eps must be finite and not negative, got -0.1"),
        (torch.tensor([0.1, torch.nan]), "eps must be finite and not negative, got nan"),
        (torch.tensor([0.1]), r"eps must be floats of shape \(2,\), got torch.float32 \(1,\)"),
        (torch.tensor([1, 1]), r"eps must be floats of shape \(2,\), got torch.int64 \(2,\)"),
    ],
)
def test_bad_radii_are_refused(radii, text):
    x = torch.full((2, 2), 0.5, dtype=torch.float64)
    with pytest.raises(ValueError, match=text):
        PGD()(linear([0.0, 0.0], [1.0, 1.0]), x, torch.tensor([0, 0]), eps=radii)


def test_settings_of_the_norm():
    with pytest.raises(ValueError, match=r"unknown norm 'L3'"):
        PGD(norm="L3")
    assert PGD(eps=1.5, norm="L2").radius == 1.5
    with pytest.raises(ValueError, match=r"eps must be in \[0, 1\], got 1.5"):
        PGD(eps=1.5)
