"""The losses by their definitions, targeted and untargeted, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from attack_models import linear
from torch import nn

from ceat_fast.attacks import PGD
from ceat_fast.attacks.objective import Objective, dlr, margin
from ceat_fast.ensemble import Ensemble

LOGITS = ((2.0, -1.0, 0.5, 1.5), (0.0, 3.0, -2.0, 1.0))
LABELS = torch.tensor([0, 2])
TARGETS = torch.tensor([3, 0])


class Table(nn.Module):
    """The logits of LOGITS plus the sum of x, which changes no loss, so that there is a gradient."""

    def forward(self, x):
        return torch.tensor(LOGITS, dtype=x.dtype) + x.sum(1, keepdim=True)


def log_prob(row):
    total = math.log(sum(math.exp(z) for z in row))
    return [z - total for z in row]


EXPECTED = {
    ("ce", False): [-log_prob(LOGITS[0])[0], -log_prob(LOGITS[1])[2]],
    ("ce", True): [log_prob(LOGITS[0])[3], log_prob(LOGITS[1])[0]],
    ("margin", False): [1.5 - 2.0, 3.0 + 2.0],
    ("margin", True): [1.5 - 2.0, 0.0 - 3.0],
    ("dlr", False): [(1.5 - 2.0) / (2.0 - 0.5), (3.0 + 2.0) / (3.0 - 0.0)],
    ("dlr", True): [(1.5 - 2.0) / (2.0 - (0.5 - 1.0) / 2), (0.0 + 2.0) / (3.0 - (0.0 - 2.0) / 2)],
}


@pytest.mark.parametrize(("loss", "targeted"), EXPECTED)
def test_losses_by_hand(loss, targeted):
    objective = Objective(Table(), LABELS, "ensemble", loss, target=TARGETS if targeted else None)
    x = torch.zeros(2, 3, dtype=torch.float64)
    judged = objective.judge(x)
    assert judged.losses.tolist() == pytest.approx(EXPECTED[loss, targeted], rel=1e-9)
    assert judged.success.tolist() == ([False, False] if targeted else [False, True])
    losses, gradient = objective.gradient(x)
    assert losses.tolist() == pytest.approx(EXPECTED[loss, targeted], rel=1e-9)
    assert gradient.abs().max().item() < 1e-12


def test_a_target_that_is_answered_is_a_success():
    assert Objective(Table(), LABELS, target=torch.tensor([1, 1])).judge(torch.zeros(2, 3)).success.tolist() == [
        False,
        True,
    ]


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("goal", ["ensemble", "members"])
def test_gradients_agree_with_finite_differences(loss, targeted, goal):
    torch.manual_seed(0)
    ens = Ensemble([nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)) for _ in range(2)]).double().eval()
    objective = Objective(ens, LABELS, goal, loss, target=TARGETS if targeted else None)
    x = torch.rand((2, 2, 3) if goal == "members" else (2, 3), dtype=torch.float64)
    _, gradient = objective.gradient(x)
    for entry in range(x.numel()):
        step = torch.zeros(x.numel(), dtype=torch.float64)
        step[entry] = 1e-6
        up, down = (objective.judge(x + sign * step.view_as(x)).losses.sum() for sign in (1, -1))
        assert gradient.flatten()[entry].item() == pytest.approx((up - down).item() / 2e-6, rel=1e-6, abs=1e-9)


def test_dlr_does_not_change_under_shift_and_scale():
    logits = torch.tensor(LOGITS, dtype=torch.float64)
    for target in (None, TARGETS):
        torch.testing.assert_close(dlr(1000 * logits - 7, LABELS, target), dlr(logits, LABELS, target))
        torch.testing.assert_close(dlr(logits.log_softmax(1), LABELS, target), dlr(logits, LABELS, target))


def test_margin_ends_to_rise_at_kappa():
    rows = Objective(Table(), LABELS, loss="margin", kappa=4.0).judge(torch.zeros(2, 3, dtype=torch.float64))
    assert rows.losses.tolist() == pytest.approx([-0.5, 4.0], rel=1e-12)


def test_some_of_the_samples_keep_the_margin_of_all() -> None:
    x, y = torch.full((2, 2), 0.5, dtype=torch.float64), torch.tensor([0, 0])
    every = Objective(linear([[0.0, 0], [3, 3]]), y, loss="margin", kappa=0.5)
    assert every.judge(x).losses.tolist() == [0.5, 0.5]
    assert every.select(torch.tensor([1])).judge(x[1:]).losses.tolist() == [0.5]


def test_margin_holds_for_logits_far_below_any_finite_mask():
    logits = torch.tensor([[-2e5, -3e5, -1e5]])
    assert margin(logits, torch.tensor([2])).tolist() == [-1e5]


def test_targeted_search_reaches_the_target():
    """Three classes along the three axes: the corner of the ball that favours the target."""
    model = nn.Linear(3, 3, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.eye(3))
    x = torch.tensor([[0.6, 0.5, 0.4]] * 2, dtype=torch.float64)
    y, target = torch.tensor([0, 0]), torch.tensor([1, 2])
    for loss in ("ce", "margin"):
        result = PGD(eps=0.125, alpha=0.125, steps=3, random_start=False, loss=loss)(model.eval(), x, y, target=target)
        # "margin" lowers only the runner-up; "ce" lowers every other class.
        assert result[0, 1].item() == 0.625
        assert result[1, 2].item() == 0.525
        assert result[:, 0].tolist() == [0.475, 0.475]
        assert model(result).argmax(1).tolist() == [1, 2]


def test_restarts_of_a_targeted_search_prefer_success():
    model = nn.Identity().eval()  # answers the largest of four entries
    x = torch.rand(60, 4, generator=torch.Generator().manual_seed(0))
    y = x.argmax(1)
    target = (y + 1) % 4
    hits = {
        restarts: PGD(0.3, 0.05, 0, restarts=restarts, seed=0)(model, x, y, target=target).argmax(1) == target
        for restarts in (1, 8)
    }
    assert bool((hits[8] >= hits[1]).all())
    assert hits[8].sum() > hits[1].sum()


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (torch.tensor([0, 0]), "target must differ from y, got the same class for 1 of 2 samples"),
        (torch.tensor([1, 4]), r"target must lie in \[0, 4\), got 4"),
        (torch.tensor([1, -1]), "target must not be negative, got -1"),
        (torch.tensor([1]), r"target must be int64 of shape \(2,\), got torch.int64 \(1,\)"),
    ],
)
def test_bad_targets_are_refused(target, text):
    with pytest.raises(ValueError, match=text):
        PGD(steps=1)(Table().eval(), torch.zeros(2, 3), LABELS, target=target)


def test_dlr_needs_enough_classes():
    x, y = torch.rand(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="loss='dlr' needs at least 3 classes where it is untargeted, got 2"):
        PGD(loss="dlr")(nn.Linear(3, 2).eval(), x, y)
    with pytest.raises(ValueError, match="loss='dlr' needs at least 4 classes where it is targeted, got 3"):
        PGD(loss="dlr")(nn.Linear(3, 3).eval(), x, y, target=1 - y)


def test_an_endless_gradient_is_an_error():
    """The root's slope at 0; a sign survives it, a unit vector does not."""

    class Root(nn.Module):
        def forward(self, x):
            return torch.cat([-x[:, :1].sqrt(), x[:, 1:]], dim=1)

    x, y = torch.tensor([[0.0, 0.5]]), torch.tensor([1])
    with pytest.raises(ValueError, match="the gradient of the model is NaN or infinite where precision is 'fp32'"):
        PGD(steps=1, random_start=False, norm="L2", loss="margin")(Root().eval(), x, y)
    assert PGD(0.1, 0.1, 1, random_start=False, loss="margin")(Root().eval(), x, y).tolist()[0] == pytest.approx(
        [0, 0.4]
    )
