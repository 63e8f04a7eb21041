"""GAL and TRS, whose losses hold input gradients: against NumPy formulas and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy
import pytest
import torch
from method_models import CLASSES, small_ensemble, smooth_ensemble
from torch import Tensor, nn

from ceat_fast.ensemble import Ensemble
from ceat_fast.methods import GAL, TRS, Batch, Epoch, Method
from ceat_fast.methods.terms import cosines, input_gradients
from ceat_fast.methods.trs import search_steep

MEMBERS = [2, 3, 5]


def by_hand(member: nn.Module, x: Tensor, labels: Tensor) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Cross-entropies (B,) and their gradients with respect to x (B, D), for last(tanh(first(x)))."""
    w1, b1, w2, b2 = (parameter.detach().numpy() for parameter in member.parameters())
    hidden = numpy.tanh(x.flatten(1).numpy() @ w1.T + b1)
    z = hidden @ w2.T + b2
    p = numpy.exp(z) / numpy.exp(z).sum(1, keepdims=True)
    onehot = numpy.eye(CLASSES)[labels.numpy()]
    gradient = (((p - onehot) @ w2) * (1 - hidden**2)) @ w1
    return -numpy.log((p * onehot).sum(1)), gradient


def by_hand_all(ensemble: Ensemble, x: Tensor, labels: Tensor) -> tuple[numpy.ndarray, numpy.ndarray]:
    pairs = [by_hand(member, x, labels) for member in ensemble.members]
    return numpy.stack([ce for ce, _ in pairs]), numpy.stack([g for _, g in pairs])


def cosine(a: numpy.ndarray, b: numpy.ndarray) -> float:
    return float(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b))


@pytest.mark.parametrize("members", MEMBERS)
def test_gal(members: int) -> None:
    ensemble, batch = smooth_ensemble(members)
    adversarial = batch.images + 0.1
    losses = GAL(lam=0.5, noise_std=0.0).step(ensemble, adversarial, batch).losses
    nat, g = by_hand_all(ensemble, batch.images, batch.labels)
    adv, _ = by_hand_all(ensemble, adversarial, batch.labels)
    coherence = 0.0
    for i in range(len(batch.labels)):
        pairs = [math.exp(cosine(g[a, i], g[b, i])) for a in range(members) for b in range(a + 1, members)]
        coherence += math.log(sum(pairs)) / len(batch.labels)
    for m in range(members):
        expected = (nat[m].mean() + adv[m].mean() + 0.5 * coherence) / members
        assert losses[m].item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("members", MEMBERS)
def test_trs(members: int) -> None:
    ensemble, batch = smooth_ensemble(members)
    adversarial, near = batch.images + 0.1, batch.images - 0.05
    losses = TRS(similarity=3.0, smoothness=0.2).step(ensemble, torch.stack([adversarial, near]), batch).losses
    nat, g = by_hand_all(ensemble, batch.images, batch.labels)
    adv, _ = by_hand_all(ensemble, adversarial, batch.labels)
    _, steep = by_hand_all(ensemble, near, batch.labels)
    pairs = [(a, b) for a in range(members) for b in range(a + 1, members)]
    samples = range(len(batch.labels))
    similarity = sum(abs(cosine(g[a, i], g[b, i])) for a, b in pairs for i in samples) / len(pairs) / len(samples)
    for m in range(members):
        norm = (steep[m] ** 2).sum(1).mean()
        expected = nat[m].mean() + adv[m].mean() + 3.0 * similarity / members + 0.2 * 2 / members * norm
        assert losses[m].item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("members", MEMBERS)
@pytest.mark.parametrize(
    ("method", "stacked"), [(GAL(lam=2.0, noise_std=0.0), False), (TRS(3.0, 0.5), True)], ids=["GAL", "TRS"]
)
def test_gradients_through_the_input_gradients_match_finite_differences(
    method: Method, stacked: bool, members: int
) -> None:
    ensemble, batch = smooth_ensemble(members)
    inputs = torch.stack([batch.images + 0.1, batch.images - 0.05]) if stacked else batch.images + 0.1

    def total() -> Tensor:
        return method.step(ensemble, inputs, batch).losses.sum()

    parameters = list(ensemble.parameters())
    gradients = torch.autograd.grad(total(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        for position in (0, parameter.numel() - 1):  # one number of the first and the last row of each tensor
            slope = central_difference(total, parameter, position)
            assert gradient.flatten()[position].item() == pytest.approx(slope, rel=1e-6, abs=1e-8)


def central_difference(function: Callable[[], Tensor], parameter: Tensor, position: int, step: float = 1e-5) -> float:
    values = []
    number = parameter.data.view(-1)[position]
    centre = number.item()
    for sign in (1, -1):
        number.fill_(centre + sign * step)
        values.append(function().item())
    number.fill_(centre)
    return (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize("backend", ["loop", "vmap"])
def test_batched_members_have_the_same_second_derivatives(backend: str) -> None:
    results = []
    for execution in ("loop", backend):
        ensemble, batch = small_ensemble(backend=execution)
        losses = GAL(lam=1.0, noise_std=0.0).step(ensemble, batch.images + 0.1, batch).losses
        results.append((losses, *torch.autograd.grad(losses.sum(), [m.head.weight for m in ensemble.members])))
    for expected, value in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-4)


def test_the_cosine_does_not_depend_on_the_length_of_a_gradient() -> None:
    """A floor under the norms, such as 1e-8, would make the cosines of confident samples vanish."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(3, 2, 1, 4, 4, generator=generator)
    expected = cosines(gradients)
    torch.testing.assert_close(cosines(gradients * torch.tensor([1e-12, 1e-25, 1e10]).view(3, 1, 1, 1, 1)), expected)


def test_gradients_of_zeros_have_cosine_zero_and_no_nan() -> None:
    gradients = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    gradients[0, 1] = 0.0
    gradients.requires_grad_()
    values = cosines(gradients)
    assert values[0, 1] == values[1, 1] == 0  # the pairs with member 0 of sample 1
    assert values[2, 1] != 0
    (slope,) = torch.autograd.grad(values.sum(), gradients)
    assert slope.isfinite().all()


def test_trs_does_not_depend_on_the_batch_size() -> None:
    ensemble, batch = smooth_ensemble(3)
    twice = Batch(batch.images.repeat(2, 1, 1, 1), batch.labels.repeat(2), torch.arange(8))
    near = batch.images - 0.05
    method = TRS(similarity=1.0, smoothness=1.0)
    once = method.step(ensemble, torch.stack([near, near]), batch).losses
    both = method.step(ensemble, torch.stack([near.repeat(2, 1, 1, 1)] * 2), twice).losses
    torch.testing.assert_close(once, both)


def test_trs_searches_long_gradients_in_the_second_half_within_delta() -> None:
    ensemble, batch = smooth_ensemble(3, samples=6)
    method = TRS(first_delta=0.02, last_delta=0.05)
    method.begin_epoch(Epoch(number=0, total=3, samples=6, seed=0))
    adversarial, near = method.perturb(lambda model, x, y, index=None: x + 0.5, ensemble, batch)
    assert torch.equal(adversarial, batch.images + 0.5)
    assert torch.equal(near[:3], batch.images[:3])
    moved = (near[3:] - batch.images[3:]).abs()
    assert 0.019 < moved.max() <= 0.02 + 1e-12

    def squared(x: Tensor) -> Tensor:
        return input_gradients(ensemble, x, batch.labels)[1].square().flatten(2).sum((0, 2))

    assert (squared(near)[3:] > squared(batch.images)[3:]).all()


def test_trs_radius_grows_linearly_over_the_epochs() -> None:
    ensemble, batch = smooth_ensemble(2, samples=2)
    method = TRS(first_delta=0.01, last_delta=0.03, inner_steps=9)
    for number, delta in enumerate([0.01, 0.02, 0.03]):
        method.begin_epoch(Epoch(number, total=3, samples=2, seed=0))
        moved = method.perturb(lambda model, x, y, index=None: x, ensemble, batch)[1, 1] - batch.images[1]
        assert moved.abs().max().item() == pytest.approx(delta, rel=1e-5)


def test_the_steps_of_the_search_for_long_gradients_are_a_third_of_delta() -> None:
    ensemble, batch = smooth_ensemble(2)
    images = batch.images.clamp(0.2, 0.8)
    moved = (search_steep(ensemble, images, batch.labels, delta=0.03, steps=1) - images).abs()
    assert moved.flatten().tolist() == pytest.approx([0.01] * images.numel(), rel=1e-6)


def test_the_inner_search_leaves_the_members_as_they_were() -> None:
    ensemble, batch = small_ensemble()
    before = {name: tensor.clone() for name, tensor in ensemble.state_dict().items()}
    search_steep(ensemble, batch.images, batch.labels, delta=0.02, steps=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ensemble.state_dict().items())
    assert all(module.training for module in ensemble.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in ensemble.parameters())


def test_second_derivatives_do_without_executions_that_have_none() -> None:
    found = []
    for backend in ("loop", "loop+compile"):
        ensemble, batch = small_ensemble(backend=backend)
        _, gradients = input_gradients(ensemble, batch.images, batch.labels)
        slopes = torch.autograd.grad(gradients.square().sum(), ensemble.members[0].head.weight)
        found.append((*slopes, search_steep(ensemble, batch.images, batch.labels, delta=0.02, steps=2)))
    for expected, value in zip(*found, strict=True):
        torch.testing.assert_close(value, expected)


def test_gal_adds_noise_to_a_share_of_the_clean_images() -> None:
    images = torch.full((400, 1, 4, 4), 0.5)
    torch.manual_seed(0)
    noisy = GAL(noise_std=0.1, noise_probability=0.25)._noisy(images)
    changed = (noisy != images).flatten(1).any(1)
    assert 70 <= changed.sum() <= 130  # 100 expected, standard deviation 8.7
    assert (noisy - images)[changed].std().item() == pytest.approx(0.1, rel=0.05)
    assert GAL(noise_std=0.0)._noisy(images) is images
    loud = GAL(noise_std=1.0, noise_probability=1.0)._noisy(images)
    assert (loud.min(), loud.max()) == (0, 1)
