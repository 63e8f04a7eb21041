"""CW against a loop written out in plain Python, on log-probabilities as an ensemble gives them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ceat_fast.attacks import CW, PGD
from ceat_fast.ensemble import Ensemble

# Two members on inputs of 2 entries, 3 classes: z = W x.
WEIGHTS = (
    ((1.0, 0.0), (0.0, 1.0), (-1.0, 0.5)),
    ((2.0, -1.0), (0.5, 0.5), (0.0, 2.0)),
)
MASK = 1e4  # of public code, at the true class


def ensemble():
    members = [nn.Linear(2, 3, bias=False, dtype=torch.float64) for _ in WEIGHTS]
    with torch.no_grad():
        for member, weight in zip(members, WEIGHTS, strict=True):
            member.weight.copy_(torch.tensor(weight))
    return Ensemble(members).eval()


def log_probs(x):
    """log of the mean softmax, and its derivative by both entries of x, in Python floats."""
    mean, slope = [0.0] * 3, [[0.0] * 2 for _ in range(3)]
    for weight in WEIGHTS:
        z = [row[0] * x[0] + row[1] * x[1] for row in weight]
        total = sum(math.exp(v) for v in z)
        p = [math.exp(v) / total for v in z]
        for k in range(3):
            mean[k] += p[k] / 2
            for i in range(2):
                slope[k][i] += p[k] * (weight[k][i] - sum(p[j] * weight[j][i] for j in range(3))) / 2
    return [math.log(m) for m in mean], [[s / m for s in row] for m, row in zip(mean, slope, strict=True)]


def cw_by_hand(x, label, eps, alpha, steps, kappa):
    """Ascent on -max(z_y - max_k(z_k - 1e4 [k = y]) + kappa, 0)."""
    x_adv = list(x)
    for _ in range(steps):
        z, slope = log_probs(x_adv)
        masked = [v - MASK * (k == label) for k, v in enumerate(z)]
        rival = masked.index(max(masked))
        active = z[label] - masked[rival] + kappa > 0
        gradient = [(slope[rival][i] - slope[label][i]) * active for i in range(2)]
        x_adv = [v + alpha * ((g > 0) - (g < 0)) for v, g in zip(x_adv, gradient, strict=True)]
        x_adv = [min(max(v, c - eps, 0.0), c + eps, 1.0) for v, c in zip(x_adv, x, strict=True)]
    return x_adv


@pytest.mark.parametrize("kappa", [0.0, 0.1, 50.0])
def test_cw_step_by_step(kappa):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(12, 2, dtype=torch.float64, generator=generator)
    y = torch.arange(12) % 3
    for steps in (1, 3, 8):
        result = CW(eps=0.3, alpha=0.07, steps=steps, random_start=False, kappa=kappa)(ensemble(), x, y)
        expected = [
            cw_by_hand(row, label, 0.3, 0.07, steps, kappa) for row, label in zip(x.tolist(), y.tolist(), strict=True)
        ]
        torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


def test_with_a_slack_that_is_never_used_up_it_is_pgd_on_the_margin():
    x, y = torch.rand(6, 2, dtype=torch.float64), torch.arange(6) % 3
    settings = {"eps": 0.2, "alpha": 0.05, "steps": 6, "random_start": False}
    assert torch.equal(CW(**settings)(ensemble(), x, y), PGD(loss="margin", **settings)(ensemble(), x, y))


def test_a_sample_beyond_kappa_stays():
    """Of class 1 against label 0 by a margin above 0.1: no gradient is left."""
    x, y = torch.tensor([[0.1, 0.8]], dtype=torch.float64), torch.tensor([0])
    log_prob = ensemble()(x)
    assert (log_prob[0, 1:].max() - log_prob[0, 0]).item() > 0.1
    assert torch.equal(CW(steps=3, random_start=False, kappa=0.1)(ensemble(), x, y), x)
    assert not torch.equal(CW(steps=3, random_start=False)(ensemble(), x, y), x)


def test_confident_log_probabilities_have_a_gradient():
    """With a mask of 0 the loss of this sample would be constant beyond the hinge's slack of 0.1."""
    confident = Ensemble([nn.Linear(2, 3, bias=False, dtype=torch.float64) for _ in range(2)])
    with torch.no_grad():
        for member in confident.members:
            member.weight.copy_(torch.tensor([[0.0, 0.0], [8.0, 4.0], [0.0, -9.0]]))
    x, y = torch.tensor([[0.9, 0.2]], dtype=torch.float64), torch.tensor([1])
    assert confident.eval()(x).exp()[0, 1].item() > 0.99
    result = CW(eps=0.25, alpha=0.25, steps=1, random_start=False, kappa=0.1)(confident, x, y)
    assert result.tolist()[0] == pytest.approx([0.65, 0.0])


def test_the_loss_is_not_a_choice():
    assert CW().loss == "margin"
    assert CW().kappa == 50
    with pytest.raises(TypeError, match="loss"):
        CW(loss="ce")
    with pytest.raises(ValueError, match="kappa must be finite and at least 0, got -1"):
        CW(kappa=-1)
