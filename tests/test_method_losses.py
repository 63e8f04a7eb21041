"""ADP, SCORE and MART against their formulas in NumPy and plain Python, sample by sample."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from method_models import CLASSES, FixedLogits, fixed_ensemble, numbered, probabilities

from ceat_fast.ensemble import Ensemble
from ceat_fast.methods import ADP, MART, SCORE, Batch, Method
from ceat_fast.methods.adp import diversity

CLEAN, ADVERSARIAL = 0, 1
MEMBERS = [2, 3, 5]


def mean_cross_entropy(rows: numpy.ndarray, labels: list[int]) -> float:
    return -sum(math.log(row[y]) for row, y in zip(rows, labels, strict=True)) / len(labels)


def entropy_and_log_det(p: numpy.ndarray, labels: list[int]) -> list[tuple[float, float]]:
    """Per sample, from the (M, B, K) probabilities: entropy of their mean, log-determinant of the Gram matrix."""
    result = []
    for i, y in enumerate(labels):
        mean = p[:, i].mean(0)
        wrong = numpy.delete(p[:, i], y, axis=1)
        wrong = wrong / numpy.sqrt((wrong**2).sum(1, keepdims=True))
        det = numpy.linalg.det(wrong @ wrong.T + 1e-6 * numpy.eye(len(p)))
        result.append((-(mean * numpy.log(mean)).sum(), math.log(det)))
    return result


@pytest.mark.parametrize("members", MEMBERS)
@pytest.mark.parametrize("everywhere", [False, True])
def test_adp(members: int, everywhere: bool) -> None:
    ensemble, batch = fixed_ensemble(members, 2)
    labels = batch.labels.tolist()
    method = ADP(alpha=2.0, beta=0.5, diversify_adversarial=everywhere)
    losses = method.step(ensemble, numbered(batch, ADVERSARIAL), batch).losses
    clean, adversarial = probabilities(ensemble, CLEAN), probabilities(ensemble, ADVERSARIAL)
    terms = entropy_and_log_det(clean, labels) + (entropy_and_log_det(adversarial, labels) if everywhere else [])
    shared = sum(2.0 * entropy + 0.5 * log_det for entropy, log_det in terms) / len(labels)
    for m in range(members):
        ce = mean_cross_entropy(clean[m], labels) + mean_cross_entropy(adversarial[m], labels)
        assert losses[m].item() == pytest.approx(ce - shared / members, abs=1e-10)


@pytest.mark.parametrize("method", [ADP(), SCORE(), MART()], ids=lambda method: type(method).__name__)
def test_gradients_match_finite_differences(method: Method) -> None:
    ensemble, batch = fixed_ensemble(3, 2)
    tables = [member.table for member in ensemble.members]
    adversarial = numbered(batch, ADVERSARIAL, 3 if method.goal == "members" else None)

    def total(*values: torch.Tensor) -> torch.Tensor:
        for member, value in zip(ensemble.members, values, strict=True):
            del member.table
            member.table = value
        return method.step(ensemble, adversarial, batch).losses.sum()

    for member, table in zip(ensemble.members, tables, strict=True):
        del member._parameters["table"]
        member.table = table
    assert torch.autograd.gradcheck(total, [table.detach().requires_grad_() for table in tables])


def test_adp_keeps_value_and_gradient_where_members_are_confident() -> None:
    """Wrong-class probabilities of e^-120 underflow in fp32; normalising them afterwards gives 0/0."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, CLASSES, generator=generator)
    labels = torch.tensor([0, 1, 2, 3])
    logits[:, torch.arange(4), labels] += 120.0
    logits.requires_grad_()
    _, log_det = diversity(logits, labels)
    exact = entropy_and_log_det(
        logits.detach().double().softmax(-1).clamp_min(1e-300).numpy(), labels.tolist()
    )  # float64 holds e^-120
    assert log_det.tolist() == pytest.approx([value for _, value in exact], abs=1e-4)
    (gradient,) = torch.autograd.grad(log_det.sum(), logits)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 1


def test_adp_survives_members_that_agree_exactly() -> None:
    logits = torch.randn(1, 4, CLASSES, generator=torch.Generator().manual_seed(0)).repeat(3, 1, 1).requires_grad_()
    _, log_det = diversity(logits, torch.tensor([0, 1, 2, 3]))
    # Eigenvalues of a matrix of ones plus the offset: 3 + 1e-6, 1e-6, 1e-6.
    assert log_det.tolist() == pytest.approx([math.log(3 * 1e-12)] * 4, rel=1e-5)
    assert torch.autograd.grad(log_det.sum(), logits)[0].isfinite().all()


def test_adp_refuses_more_members_than_wrong_classes() -> None:
    with pytest.raises(ValueError, match="no more members than wrong classes, got 3 members and 3 classes"):
        diversity(torch.zeros(3, 2, 3), torch.tensor([0, 1]))


@pytest.mark.parametrize("members", [1, *MEMBERS])
@pytest.mark.parametrize("clip", [0.0, 0.4])
def test_score(members: int, clip: float) -> None:
    ensemble, batch = fixed_ensemble(members, 2)
    losses = SCORE(beta=3.0, clip=clip).step(ensemble, numbered(batch, ADVERSARIAL, members), batch).losses
    clean, adversarial = probabilities(ensemble, CLEAN), probabilities(ensemble, ADVERSARIAL)
    for m in range(members):
        total = 0.0
        for i, y in enumerate(batch.labels.tolist()):
            nat = sum((p - (k == y)) ** 2 for k, p in enumerate(clean[m][i]))
            adv = sum((p - q) ** 2 for p, q in zip(adversarial[m][i], clean[m][i], strict=True))
            total += nat + 3.0 * max(adv - clip, 0.0)
        assert losses[m].item() == pytest.approx(total / len(batch.labels), abs=1e-12)


@pytest.mark.parametrize("members", [1, *MEMBERS])
def test_mart(members: int) -> None:
    ensemble, batch = fixed_ensemble(members, 2)
    losses = MART(beta=5.0).step(ensemble, numbered(batch, ADVERSARIAL, members), batch).losses
    clean, adversarial = probabilities(ensemble, CLEAN), probabilities(ensemble, ADVERSARIAL)
    for m in range(members):
        total = 0.0
        for i, y in enumerate(batch.labels.tolist()):
            p, q = clean[m][i], adversarial[m][i]
            runner_up = max(value for k, value in enumerate(q) if k != y)
            divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            total += -math.log(q[y]) - math.log(1 - runner_up) + 5.0 * divergence * (1 - p[y])
        assert losses[m].item() == pytest.approx(total / len(batch.labels), abs=1e-12)


def test_mart_keeps_the_margin_of_a_confidently_wrong_sample() -> None:
    """1 - p of a runner-up with p = 1 - 2e-18 is 0 in float64, and an offset on it would hide the slope."""
    tables = torch.tensor([[[0.0, 40.0, -2.0]], [[0.0, 40.0, -2.0]]], dtype=torch.float64)
    ensemble = Ensemble([FixedLogits(tables)], backend="loop")
    batch = Batch(torch.zeros(1, 1, 2, 2), torch.tensor([0]), torch.tensor([0]))
    output = MART(beta=0.0).step(ensemble, numbered(batch, ADVERSARIAL, 1), batch)
    # -log p_0 = 40 and -log(p_0 + p_2) = 40 - log(1 + e^-2), each up to e^-40
    assert output.losses.item() == pytest.approx(80 - math.log1p(math.exp(-2)), abs=1e-12)
