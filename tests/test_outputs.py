"""What attacks read from a model: padding that changes nothing, and a cross-entropy that keeps its gradient."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from attack_models import correct_batch, small_net
from torch import nn
from torch.nn import functional as F

from ceat_fast.attacks import APGD, PGD
from ceat_fast.attacks.outputs import answers, cross_entropy, gradient, outputs, padded_outputs, padded_size
from ceat_fast.ensemble import Ensemble
from ceat_fast.evaluation import evaluate


def test_sizes_are_few_and_add_at_most_half():
    sizes = [padded_size(count) for count in range(1, 2000)]
    assert sorted(set(sizes)) == [8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
    assert all(count <= size for count, size in enumerate(sizes, start=1))
    assert all(size <= 1.5 * count for count, size in enumerate(sizes, start=1) if count > 8)
    assert padded_size(0) == 0


@pytest.mark.parametrize("count", [1, 8, 13])
def test_padding_changes_neither_outputs_nor_gradients(count):
    ens = Ensemble([small_net(), small_net()]).eval()
    x, y = correct_batch(ens.members[0], count)
    x.requires_grad_()
    padded = padded_outputs(ens, x)
    assert torch.allclose(padded, outputs(ens, x), atol=1e-12)
    (expected,) = torch.autograd.grad(cross_entropy(outputs(ens, x), y).sum(), x)
    assert torch.allclose(torch.autograd.grad(cross_entropy(padded, y).sum(), x)[0], expected, atol=1e-12)
    assert not answers(ens, x).requires_grad


def test_cross_entropy_is_torchs():
    logits, label = torch.randn(50, 7, dtype=torch.float64), torch.randint(7, (50,))
    assert torch.allclose(cross_entropy(logits, label), F.cross_entropy(logits, label, reduction="none"))


def test_confident_rows_keep_their_gradient():
    """p_y is 1 in fp32, and a log-softmax would give class y no gradient; it is p_y - 1, about -2 e^-30."""
    logits = torch.tensor([[30.0, 0.0, 0.0]], requires_grad=True)
    cross_entropy(logits, torch.tensor([0])).sum().backward()
    assert logits.grad[0, 0].item() == pytest.approx(-2 * 9.357622968840175e-14, rel=1e-5)


def test_gradient_of_each_row_is_its_own():
    model = small_net()
    x, y = correct_batch(model, 5)
    _, losses, grad = gradient(model, x, partial(cross_entropy, label=y))
    _, alone, own = gradient(model, x[2:3], partial(cross_entropy, label=y[2:3]))
    assert torch.allclose(losses[2:3], alone)
    assert torch.allclose(grad[2:3], own)


class FirstMember(Ensemble):
    """A subclass with an output of its own."""

    def forward(self, x):
        return self.members[0](x)


def hooked(members):
    ensemble = Ensemble(members)
    ensemble.register_forward_pre_hook(lambda module, args: (1 - args[0],))
    return ensemble


def with_own_forward(members):
    ensemble = Ensemble(members)
    ensemble.forward = lambda x: Ensemble.forward(ensemble, 1 - x)
    return ensemble


class Wrapped(nn.Module):
    """The same function as a plain module."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        return self.call(x)


@pytest.mark.parametrize("make", [FirstMember, hooked, with_own_forward])
def test_what_an_ensemble_computes_by_itself_is_what_is_attacked_and_judged(make):
    torch.manual_seed(0)
    members = [small_net() for _ in range(2)]
    for member in members:
        nn.init.normal_(member[1].weight, std=0.5)
    ensemble = make(members).eval()
    plain = Wrapped(ensemble.__call__).eval()
    x, y = torch.rand(40, 1, 6, 6, dtype=torch.float64), torch.randint(10, (40,))
    for attack in (PGD(0.1, 0.03, 5, seed=0), APGD(0.1, steps=5, seed=0)):
        assert torch.equal(attack(ensemble, x, y), attack(plain, x, y))
    attacks = {"PGD": PGD(0.1, 0.03, 5, seed=0)}
    ours, right = (evaluate(model, x, y, attacks) for model in (ensemble, plain))
    for own, other in zip(ours.scores, right.scores, strict=True):
        assert (own.subject, own.attack) == (other.subject, other.attack)
        assert torch.equal(own.correct, other.correct)
    members_alone = PGD(0.1, 0.03, 5, goal="members", seed=0)
    assert torch.equal(members_alone(ensemble, x, y), members_alone(Ensemble(members).eval(), x, y))
