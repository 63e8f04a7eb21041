"""What attacks read from a model: padding that changes nothing, and a cross-entropy that keeps its gradient."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from attack_models import correct_batch, small_net
from torch.nn import functional as F

from ceat_fast.attacks.outputs import answers, cross_entropy, gradient, outputs, padded_outputs, padded_size
from ceat_fast.ensemble import Ensemble


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
