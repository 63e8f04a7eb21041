"""The loss API on every backend: values, gradients, precision and refusals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import scalar_reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ceat_fast.loss import (
    CEATLoss,
    calibrated_distance,
    ceat_loss,
    disparity,
    ensemble_cross_entropy,
    ensemble_log_prob,
)

Backend = tuple[str, str]
HALF_TYPES = (torch.bfloat16, torch.float16)


def batch(
    members: int, samples: int, classes: int, dtype: torch.dtype = torch.float64, scale: float = 3.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    adv, nat = (
        (scale * torch.randn(members, samples, classes, generator=generator, dtype=torch.float64)).to(dtype)
        for _ in range(2)
    )
    return adv, nat, torch.randint(0, classes, (samples,), generator=generator)


def value_and_grads(loss: Callable[[Tensor, Tensor], Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
    inputs = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    value = loss(*inputs)
    return value.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(value.sum(), inputs))


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


# M: no peers (1, 2), the paper's 3, an even number, the most that is promised. K: smallest, odd, CIFAR-10, past the
# class count up to which CPU lanes hold samples, no multiple of a vector.
SHAPES = [(1, 3, 10), (2, 3, 10), (3, 1, 2), (3, 9, 10), (4, 2, 3), (5, 17, 33), (16, 2, 5), (3, 2, 101)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pair_reduction", ["max", "mean", "sum"])
def test_loss_and_gradients_equal_the_definition(
    backend: Backend, shape: tuple[int, int, int], pair_reduction: str
) -> None:
    impl, device = backend
    adv, nat, target = batch(*shape)
    options: dict[str, Any] = {"lam": 2.0, "mu": 3.0, "lam_exponent": 0.5, "mu_exponent": 0.7}
    options |= {"pair_reduction": pair_reduction}
    expected = scalar_reference.ceat_loss(adv, nat, target, **options)
    target = target.to(device)

    def loss(adv: Tensor, nat: Tensor) -> Tensor:
        return ceat_loss(adv, nat, target, **options, reduction="none", impl=impl)  # type: ignore[return-value]

    for actual, reference in zip(value_and_grads(loss, adv.to(device), nat.to(device)), expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"detach_nat": True}, {"max_weight": 1.5}, {"lam": 0.0}, {"mu": 0.0}], ids=str)
def test_options_equal_the_definition(backend: Backend, options: dict[str, Any]) -> None:
    impl, device = backend
    adv, nat, target = batch(3, 5, 7)
    options = {"lam": 1.0, "mu": 5.0} | options
    expected = scalar_reference.ceat_loss(adv, nat, target, **options)
    target = target.to(device)
    actual = value_and_grads(
        lambda a, n: ceat_loss(a, n, target, **options, reduction="none", impl=impl), adv.to(device), nat.to(device)
    )
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


def test_paper_formula_for_three_members() -> None:
    """Eq. 22 written out for model a with peers b and c."""
    p_adv = torch.tensor([[[0.7, 0.3]], [[0.6, 0.4]], [[0.1, 0.9]]], dtype=torch.float64)
    p_nat = torch.tensor([[[0.8, 0.2]], [[0.9, 0.1]], [[0.5, 0.5]]], dtype=torch.float64)
    loss = ceat_loss(p_adv.log(), p_nat.log(), torch.tensor([0]), lam=1.0, mu=5.0)
    nat = math.exp(1 * abs(0.9 - 0.5)) * (0.2**2 + 0.2**2)
    adv = math.exp(5 * abs(0.6 - 0.1)) * (0.1**2 + 0.1**2)
    assert loss[0].item() == pytest.approx(-math.log(0.7) + 1 * nat + 5 * adv, rel=1e-12)


def test_reductions_and_parts_agree(backend: Backend) -> None:
    impl, device = backend
    adv, nat, target = (t.to(device) for t in batch(4, 6, 5))
    per_sample, parts = ceat_loss(adv, nat, target, reduction="none", impl=impl, return_parts=True)
    rebuilt = parts.ce + 1.0 * parts.nat_weight * parts.nat + 5.0 * parts.adv_weight * parts.adv
    close(per_sample, rebuilt, 1e-13)
    close(parts.adv_weight, (5.0 * parts.adv_disparity).exp(), 1e-13)
    close(ceat_loss(adv, nat, target, impl=impl), per_sample.mean(1), 1e-13)
    close(ceat_loss(adv, nat, target, impl=impl, reduction="sum"), per_sample.sum(1), 1e-13)
    true_prob = nat.softmax(-1)[:, torch.arange(6), target]
    close(parts.nat_disparity, disparity(true_prob), 1e-13)
    assert not parts.ce.requires_grad


def test_mean_gradient_is_the_gradient_of_the_mean(backend: Backend) -> None:
    impl, device = backend
    adv, nat, target = (t.to(device) for t in batch(3, 8, 10))
    weights = torch.tensor([1.0, -2.0, 0.5], device=device, dtype=torch.float64)

    def mean(a: Tensor, n: Tensor) -> Tensor:
        return ceat_loss(a, n, target, impl=impl) * weights

    def manual(a: Tensor, n: Tensor) -> Tensor:
        return ceat_loss(a, n, target, impl="torch", reduction="none").mean(1) * weights

    for a, e in zip(value_and_grads(mean, adv, nat), value_and_grads(manual, adv, nat), strict=True):
        close(a, e, 1e-12)


def test_calibrated_distance_is_the_loss_without_cross_entropy(backend: Backend) -> None:
    impl, device = backend
    adv, nat, target = batch(3, 4, 6)
    expected = scalar_reference.ceat_loss(adv, nat, target, lam=5.0, mu=1.0, ce_coefficient=0.0)
    target = target.to(device)
    actual = value_and_grads(
        lambda a, n: calibrated_distance(a, n, target, lam=5.0, mu=1.0, reduction="none", impl=impl),
        adv.to(device),
        nat.to(device),
    )
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


def test_distance_mean_divides_by_the_classes() -> None:
    adv, nat, target = batch(3, 4, 8)
    by_sum = calibrated_distance(adv, nat, target, lam=2.0, mu=3.0)
    by_mean = calibrated_distance(adv, nat, target, lam=2.0, mu=3.0, distance_reduction="mean")
    close(by_mean * 8, by_sum, 1e-13)


def test_weights_carry_no_gradient(backend: Backend) -> None:
    """Member 0's loss moves with no logits but its own, although its weights are made of the peers'."""
    impl, device = backend
    adv, nat, target = (t.to(device).requires_grad_(t.is_floating_point()) for t in batch(3, 4, 5))
    adv_grad, nat_grad = torch.autograd.grad(ceat_loss(adv, nat, target, impl=impl)[0], (adv, nat))
    assert adv_grad[0].abs().sum() > 0
    assert nat_grad[0].abs().sum() > 0
    assert adv_grad[1:].count_nonzero() == 0
    assert nat_grad[1:].count_nonzero() == 0


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 3, 40)], ids=str)
def test_gradcheck(backend: Backend, shape: tuple[int, int, int]) -> None:
    impl, device = backend
    adv, nat, target = (t.to(device).requires_grad_(t.is_floating_point()) for t in batch(*shape, scale=1.0))
    # With exponents of zero the weights are constants for the numerical derivative too.
    options = {"lam": 2.0, "mu": 3.0, "lam_exponent": 0.0, "mu_exponent": 0.0, "impl": impl}
    for reduction in ("none", "mean", "sum"):
        assert torch.autograd.gradcheck(
            lambda a, n, r=reduction: ceat_loss(a, n, target, reduction=r, **options), (adv, nat)
        )
        assert torch.autograd.gradcheck(
            lambda a, r=reduction: ensemble_cross_entropy(a, target, reduction=r, impl=impl), (adv,)
        )


def one_rounding(expected: Tensor, weight: float, coefficient: float) -> float:
    """What rounding once does: to the result, or to the two probabilities in D, which the exponential amplifies."""
    return max(float(expected.abs().max()), (1 + 2 * coefficient) * coefficient * weight)


# (1, 5) and (5, 1) are the paper's settings. B = 64 lets plain torch meet its own worst rows.
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES], ids=str)
@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize(("lam", "mu"), [(1.0, 5.0), (5.0, 1.0)])
def test_no_worse_than_torch_plus_one_rounding(
    backend: Backend, dtype: torch.dtype, scale: float, classes: int, lam: float, mu: float
) -> None:
    impl, device = backend
    adv, nat, target = (t.to(device) for t in batch(3, 64, classes, dtype, scale))
    options = {"lam": lam, "mu": mu}

    def run(impl: str, *leaves: Tensor) -> tuple[Tensor, ...]:
        return value_and_grads(lambda a, n: ceat_loss(a, n, target, **options, reduction="none", impl=impl), *leaves)

    truth = run("torch", adv.double(), nat.double())
    _, parts = ceat_loss(adv.double(), nat.double(), target, **options, impl="torch", return_parts=True)
    weights = ((float(parts.nat_weight.max()), lam), (float(parts.adv_weight.max()), mu))
    plain, ours = run("torch", adv, nat), run(impl, adv, nat)
    for expected, reference, actual in zip(truth, plain, ours, strict=True):
        assert actual.dtype == reference.dtype
        rounding = torch.finfo(actual.dtype).eps * max(one_rounding(expected, *pair) for pair in weights)
        error, torch_error = ((value - expected).abs().max().item() for value in (actual, reference))
        assert error <= torch_error + rounding


def test_confident_rows_keep_their_gradient_digits(backend: Backend) -> None:
    """p_y - 1 is 1e-9 to 1e-30 here: fp32 that subtracts gets zero."""
    impl, device = backend
    gaps = torch.tensor([20.0, 40.0, 60.0])
    adv = torch.zeros(3, 3, 4)
    adv[..., 1] = gaps
    nat = adv + torch.tensor([0.0, 0.5, 0.25, -0.5])
    target = torch.ones(3, dtype=torch.int64)
    expected = scalar_reference.ceat_loss(adv, nat, target, lam=1.0, mu=5.0)
    target = target.to(device)
    if impl == "torch":
        pytest.skip("the specification is the plain formula, which loses these digits in fp32")
    actual = value_and_grads(
        lambda a, n: ceat_loss(a, n, target, reduction="none", impl=impl), adv.to(device), nat.to(device)
    )
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=2e-6, atol=1e-37)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF_TYPES], ids=str)
def test_common_offset_changes_nothing(backend: Backend, dtype: torch.dtype) -> None:
    """Multiples of 4 stay exact in every dtype beside an offset of 512."""
    impl, device = backend
    adv, nat, target = (t.to(device) for t in batch(3, 16, 10))
    adv, nat = ((4 * t.round().clamp(-4, 4)).to(dtype) for t in (adv, nat))

    def loss(a: Tensor, n: Tensor) -> Tensor:
        return ceat_loss(a, n, target, impl=impl, reduction="none")

    for a, e in zip(value_and_grads(loss, adv + 512, nat - 512), value_and_grads(loss, adv, nat), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES], ids=str)
def test_views_equal_contiguous_inputs(backend: Backend, dtype: torch.dtype) -> None:
    """(B, M, K) transposed, an offset slice, and rows that are not dense."""
    impl, device = backend
    adv, nat, target = (t.to(device) for t in batch(3, 9, 10, dtype))
    expected = ceat_loss(adv, nat, target, impl=impl, reduction="none")
    views = [
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: torch.cat([t[:, :1], t, t], 1)[:, 1:10],
        lambda t: torch.stack([t, t], -1)[..., 1],
    ]
    for view in views:
        assert torch.equal(ceat_loss(view(adv), view(nat), target, impl=impl, reduction="none"), expected)
    strided_target = torch.stack([target, target], 1)[:, 0]
    assert torch.equal(ceat_loss(adv, nat, strided_target, impl=impl, reduction="none"), expected)


def test_lists_of_members_train_each_member(backend: Backend) -> None:
    impl, device = backend
    adv, nat, target = (t.to(device) for t in batch(3, 5, 4))
    members = [z.clone().requires_grad_() for z in adv]
    loss = ceat_loss(members, list(nat), target, impl=impl)
    close(loss, ceat_loss(adv, nat, target, impl=impl), 1e-13)
    loss.sum().backward()
    assert all(z.grad is not None and z.grad.abs().sum() > 0 for z in members)


@pytest.mark.parametrize("samples", [1, 7, 8, 9, 1000])
def test_samples_do_not_depend_on_their_batch(backend: Backend, samples: int) -> None:
    """Around the SIMD width, and enough for several threads."""
    impl, device = backend
    adv, nat, target = (t.to(device) for t in batch(3, samples, 10, torch.float32))
    whole = ceat_loss(adv, nat, target, impl=impl, reduction="none")
    pieces = [
        ceat_loss(adv[:, b : b + 1], nat[:, b : b + 1], target[b : b + 1], impl=impl, reduction="none")
        for b in range(0, samples, max(1, samples // 5))
    ]
    torch.testing.assert_close(whole[:, :: max(1, samples // 5)], torch.cat(pieces, 1), rtol=1e-6, atol=1e-6)


def test_repeatable_to_the_last_bit(backend: Backend) -> None:
    impl, device = backend
    adv, nat, target = (t.to(device) for t in batch(3, 1000, 100, torch.float32))
    first, second = (value_and_grads(lambda a, n: ceat_loss(a, n, target, impl=impl), adv, nat) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_empty_batch_gives_zeros(backend: Backend) -> None:
    impl, device = backend
    adv, nat, target = (t.to(device).requires_grad_(t.is_floating_point()) for t in batch(3, 0, 10))
    loss, parts = ceat_loss(adv, nat, target, impl=impl, return_parts=True)
    assert torch.equal(loss.detach().cpu(), torch.zeros(3, dtype=torch.float64))
    assert parts.ce.shape == (3, 0)
    loss.sum().backward()
    assert adv.grad is not None
    assert adv.grad.shape == (3, 0, 10)
    assert ceat_loss(adv, nat, target, impl=impl, reduction="none").shape == (3, 0)
    assert ensemble_cross_entropy(adv, target, impl=impl).item() == 0
    assert ensemble_cross_entropy(adv, target, impl=impl, reduction="none").shape == (0,)


def test_many_classes_and_members(backend: Backend) -> None:
    """The promised corner: M = 16 and K = 10,000."""
    impl, device = backend
    adv, nat, target = (t.to(device) for t in batch(16, 2, 10_000, torch.float32))
    ours = value_and_grads(lambda a, n: ceat_loss(a, n, target, impl=impl), adv, nat)
    truth = value_and_grads(lambda a, n: ceat_loss(a, n, target, impl="torch"), adv.double(), nat.double())
    for a, e in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5 * float(e.abs().max()))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite_logits_give_nan_in_their_sample_alone(backend: Backend, bad: float) -> None:
    impl, device = backend
    adv, nat, target = (t.to(device) for t in batch(3, 4, 5))
    adv[0, 1, 2] = bad
    loss = ceat_loss(adv, nat, target, impl=impl, reduction="none")
    assert loss[:, 1].isnan().all()  # the other members too: it is one of their peers
    assert loss[:, [0, 2, 3]].isfinite().all()


def test_impossible_classes_are_exact(backend: Backend) -> None:
    """A logit of -inf is a class with probability zero."""
    impl, device = backend
    adv, nat, target = (t.to(device) for t in batch(3, 4, 5))
    without = ceat_loss(adv, nat, target, impl=impl, reduction="none")
    pad = torch.full((3, 4, 2), -math.inf, device=device, dtype=adv.dtype)
    padded = ceat_loss(torch.cat([adv, pad], -1), torch.cat([nat, pad], -1), target, impl=impl, reduction="none")
    close(padded, without, 1e-14)


class TestEnsemble:
    @pytest.mark.parametrize("shape", [(1, 3, 4), (3, 9, 10), (16, 2, 40)], ids=str)
    def test_equals_the_definition(self, backend: Backend, shape: tuple[int, int, int]) -> None:
        impl, device = backend
        logits, _, target = batch(*shape)
        expected = scalar_reference.ensemble_cross_entropy(logits, target)
        target = target.to(device)
        actual = value_and_grads(
            lambda z: ensemble_cross_entropy(z, target, reduction="none", impl=impl), logits.to(device)
        )
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)

    def test_is_the_loss_of_the_log_mean_probability(self) -> None:
        logits, _, target = batch(3, 6, 5)
        close(ensemble_log_prob(logits), logits.softmax(-1).mean(0).log(), 1e-12)
        close(ensemble_cross_entropy(logits, target), F.nll_loss(ensemble_log_prob(logits), target), 1e-12)

    @pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES], ids=str)
    def test_stays_finite_where_all_members_are_wrong(self, backend: Backend, dtype: torch.dtype) -> None:
        """Probabilities of 1e-87 have no logarithm in fp32, but their logarithms have a mean."""
        impl, device = backend
        logits = torch.zeros(3, 1, 4, dtype=dtype, device=device)
        logits[..., 1] = 200.0
        loss, grad = value_and_grads(
            lambda z: ensemble_cross_entropy(z, torch.tensor([0], device=device), impl=impl), logits
        )
        assert loss.item() == pytest.approx(200.0, rel=1e-6)
        torch.testing.assert_close(grad[:, 0].float(), torch.tensor([[-1 / 3, 1 / 3, 0, 0]] * 3), rtol=1e-2, atol=1e-6)

    def test_a_label_that_all_members_rule_out(self, backend: Backend) -> None:
        """The loss is infinite; its gradient is what it tends to, where the members share it."""
        impl, device = backend
        if impl == "torch":
            pytest.skip("the specification has the difference of two infinities there")
        logits, _, target = (t.to(device) for t in batch(3, 4, 5))
        logits[:, 1].scatter_(1, target[1].expand(3, 1), -math.inf)
        logits.requires_grad_()
        loss = ensemble_cross_entropy(logits, target, reduction="none", impl=impl)
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        assert loss.isposinf().tolist() == [False, True, False, False]
        expected = (logits[:, 1].detach().softmax(-1) - torch.nn.functional.one_hot(target[1], 5)) / 3
        torch.testing.assert_close(grad[:, 1], expected)

    def test_confident_loss_keeps_its_digits(self, backend: Backend) -> None:
        impl, device = backend
        if impl == "torch":
            pytest.skip("the specification is the plain formula, which loses these digits in fp32")
        logits = torch.zeros(2, 1, 3, device=device)
        logits[..., 0] = 20.0
        loss = ensemble_cross_entropy(logits, torch.tensor([0], device=device), impl=impl)
        assert loss.item() == pytest.approx(2 * math.exp(-20.0), rel=1e-6)


class TestDisparity:
    def test_literal_values(self) -> None:
        h = torch.tensor([[0.9], [0.5], [0.1], [0.4]])
        assert disparity(h, "max").flatten().tolist() == pytest.approx([0.4, 0.8, 0.5, 0.8])
        assert disparity(h, "sum").flatten().tolist() == pytest.approx([0.8, 1.6, 1.0, 1.6])
        assert disparity(h, "mean").flatten().tolist() == pytest.approx([0.8 / 3, 1.6 / 3, 1.0 / 3, 1.6 / 3])

    def test_needs_two_peers(self) -> None:
        assert disparity(torch.rand(2, 3)).tolist() == [[0, 0, 0], [0, 0, 0]]

    @given(st.lists(st.floats(0, 1), min_size=3, max_size=8), st.randoms(use_true_random=False))
    @settings(max_examples=50, deadline=None)
    def test_follows_its_members(self, probabilities: list[float], random: Any) -> None:
        """Permuting the members permutes D, and the spread bounds the mean."""
        h = torch.tensor(probabilities, dtype=torch.float64).unsqueeze(1)
        order = list(range(len(probabilities)))
        random.shuffle(order)
        for reduction in ("max", "mean", "sum"):
            torch.testing.assert_close(disparity(h[order], reduction), disparity(h, reduction)[order])
        assert (disparity(h, "mean") <= disparity(h, "max") + 1e-12).all()
        assert (disparity(h, "max") <= 1).all()


class TestRefusals:
    """Each bad argument is named, with its value and what is allowed, on every backend alike."""

    @staticmethod
    def call(impl: str, device: str, **changes: Any) -> Any:
        adv, nat, target = (t.to(device) for t in batch(3, 4, 5, torch.float32))
        arguments = {"adv_logits": adv, "nat_logits": nat, "target": target, "impl": impl} | changes
        return ceat_loss(**arguments)

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"lam": -1.0}, ValueError, r"lam must be finite and at least 0, got -1\.0"),
            ({"mu": math.nan}, ValueError, "mu must be finite"),
            ({"mu": "5"}, TypeError, "mu must be a number, got '5'"),
            ({"lam_exponent": -0.1}, ValueError, "lam_exponent"),
            ({"mu_exponent": math.inf}, ValueError, "mu_exponent"),
            ({"max_weight": 0.5}, ValueError, r"max_weight must be at least 1.*0\.5"),
            ({"pair_reduction": "maximum"}, ValueError, "pair_reduction 'maximum'.*'max'"),
            ({"distance_reduction": "avg"}, ValueError, "distance_reduction 'avg'.*'sum', 'mean'"),
            ({"reduction": "men"}, ValueError, "reduction 'men'.*did you mean 'mean'"),
            ({"impl": "cuda"}, ValueError, "impl 'cuda'.*'native', 'triton', 'torch'"),
            ({"mu": 100.0}, ValueError, "mu=100.*overflow fp32.*max_weight"),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else None,
    )
    def test_settings(self, backend: Backend, changes: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            self.call(**{"impl": backend[0]} | changes, device=backend[1])

    def test_shapes_and_types(self, backend: Backend) -> None:
        impl, device = backend
        adv, _, target = (t.to(device) for t in batch(3, 4, 5, torch.float32))
        cases: list[tuple[dict[str, Any], type[Exception], str]] = [
            ({"adv_logits": adv[0]}, ValueError, r"adv_logits must have shape \(M, B, K\), got \(4, 5\)"),
            ({"nat_logits": adv[:, :3]}, ValueError, r"same shape, got \(3, 4, 5\) and \(3, 3, 5\)"),
            ({"nat_logits": adv.double()}, TypeError, "same dtype"),
            ({"adv_logits": adv.long()}, TypeError, "adv_logits must be float32.*int64"),
            ({"adv_logits": adv[..., :1], "nat_logits": adv[..., :1]}, ValueError, "K >= 2"),
            ({"adv_logits": []}, ValueError, "at least one member"),
            ({"adv_logits": [adv[0], adv[1, :2]]}, ValueError, "agree in shape"),
            ({"adv_logits": "logits"}, TypeError, "sequence of M tensors"),
            ({"target": target.float()}, TypeError, "target must be an int64 tensor.*float32"),
            ({"target": target.int()}, TypeError, "int64"),
            ({"target": target[:3]}, ValueError, r"target must have shape \(B,\) = \(4,\), got \(3,\)"),
            ({"target": [0, 1, 2, 3]}, TypeError, "target must be an int64 tensor"),
        ]
        for changes, error, message in cases:
            with pytest.raises(error, match=message):
                self.call(impl, device, **changes)

    @pytest.mark.parametrize("label", [-1, 5, 2**40])
    def test_labels_out_of_range(self, backend: Backend, label: int) -> None:
        impl, device = backend
        adv, nat, target = (t.to(device) for t in batch(3, 4, 5, torch.float32))
        target[2] = label
        if device == "cpu":
            with pytest.raises(ValueError, match=rf"labels in \[0, 5\), got {label} at index 2"):
                ceat_loss(adv, nat, target, impl=impl)
            with pytest.raises(ValueError, match=rf"labels in \[0, 5\), got {label} at index 2"):
                ensemble_cross_entropy(adv, target, impl=impl)
        elif impl != "torch":
            loss, adv_grad, nat_grad = value_and_grads(
                lambda a, n: ceat_loss(a, n, target, reduction="none", impl=impl), adv, nat
            )
            assert loss[:, 2].isnan().all()
            assert loss[:, [0, 1, 3]].isfinite().all()
            assert adv_grad[:, 2].count_nonzero() == 0
            assert nat_grad[:, 2].count_nonzero() == 0

    @pytest.mark.parametrize(("members", "refused"), [(3, False), (16, True)])
    def test_sum_of_many_pairs_could_overflow(self, members: int, refused: bool) -> None:
        adv, nat, target = batch(members, 2, 3)
        arguments: dict[str, Any] = {"mu": 5.0, "pair_reduction": "sum"}
        if not refused:
            assert ceat_loss(adv, nat, target, **arguments).isfinite().all()
            return
        with pytest.raises(ValueError, match=r"mu=5.*M=16.*exp\(280\).*pair_reduction=\"max\""):
            ceat_loss(adv, nat, target, **arguments)
        assert ceat_loss(adv, nat, target, **arguments, max_weight=100.0).isfinite().all()

    def test_largest_allowed_weight_is_finite(self) -> None:
        """Two peers as far apart as can be, at the limit of what is accepted."""
        adv = torch.tensor([[[0.0, 0.0]], [[90.0, -90.0]], [[-90.0, 90.0]]])
        loss = ceat_loss(adv, adv.flip(-1), torch.tensor([0]), lam=0.0, mu=70.0)
        assert loss.isfinite().all()
        assert loss[0] == 0 + F.cross_entropy(adv[0], torch.tensor([0]))

    def test_module_refuses_at_construction(self) -> None:
        with pytest.raises(ValueError, match="lam must be finite"):
            CEATLoss(lam=-1)
        with pytest.raises(ValueError, match="did you mean 'native'"):
            CEATLoss(impl="natve")


def test_module_equals_the_function() -> None:
    adv, nat, target = batch(3, 4, 5)
    options: dict[str, Any] = {"lam": 5.0, "mu": 1.0, "detach_nat": True, "max_weight": 20.0, "reduction": "sum"}
    module = CEATLoss(**options)
    assert torch.equal(module(adv, nat, target), ceat_loss(adv, nat, target, **options))
    assert "lam=5.0" in repr(module)
    loss, parts = CEATLoss(return_parts=True)(adv, nat, target)
    assert parts.adv_weight.shape == (3, 4)
    assert torch.equal(loss, ceat_loss(adv, nat, target))


def test_double_backward_raises(backend: Backend) -> None:
    impl, device = backend
    if impl == "torch":
        pytest.skip("plain torch is twice differentiable")
    adv, nat, target = (t.to(device) for t in batch(3, 4, 5))
    adv.requires_grad_()
    for loss in (ceat_loss(adv, nat, target, impl=impl).sum(), ensemble_cross_entropy(adv, target, impl=impl)):
        scale = torch.ones((), dtype=loss.dtype, device=device, requires_grad=True)
        for scaled in (loss, loss * scale):  # also where the gradient that comes in is a constant
            (grad,) = torch.autograd.grad(scaled, adv, create_graph=True, retain_graph=True)
            assert grad.requires_grad
            for again in (
                lambda grad=grad: grad.sum().backward(retain_graph=True),
                lambda grad=grad, scaled=scaled: torch.autograd.grad(scaled + grad.square().sum(), adv),
            ):
                with pytest.raises(RuntimeError, match="can be differentiated once"):
                    again()


def test_derivatives_of_derivatives_in_torch_func(backend: Backend) -> None:
    impl, device = backend
    _, nat, target = (t.to(device) for t in batch(3, 4, 5, dtype=torch.float64))
    weight, direction = torch.randn(2, 5, 5, dtype=torch.float64, device=device)

    def loss(weight: Tensor, impl: str) -> Tensor:
        logits = (nat @ weight).tanh()
        return ceat_loss(logits, nat, target, impl=impl).sum() + ensemble_cross_entropy(logits, target, impl=impl)

    def derivatives(impl: str) -> list[Tensor]:
        grad = torch.func.grad(lambda weight: loss(weight, impl))
        squared = torch.func.grad(lambda weight: grad(weight).square().sum())(weight)
        return [squared, *torch.func.jvp(grad, (weight,), (direction,))]

    torch.testing.assert_close(derivatives(impl), derivatives("torch"), rtol=1e-9, atol=1e-12)

    def in_a_graph(impl: str) -> Tensor:
        leaf = weight.clone().requires_grad_()
        (grad,) = torch.autograd.grad(torch.func.grad(lambda weight: loss(weight, impl))(leaf).square().sum(), leaf)
        return grad

    torch.testing.assert_close(in_a_graph(impl), in_a_graph("torch"), rtol=1e-9, atol=1e-12)


def test_vmap_over_batches_with_labels_of_their_own(backend: Backend) -> None:
    impl, device = backend
    batches = [batch(3, 4, 5, seed=seed) for seed in range(2)]
    adv, nat, target = (torch.stack(tensors).to(device) for tensors in zip(*batches, strict=True))
    losses = torch.vmap(lambda a, n, t: ceat_loss(a, n, t, impl=impl))(adv, nat, target)
    torch.testing.assert_close(
        losses, torch.stack([ceat_loss(*rows, impl=impl) for rows in zip(adv, nat, target, strict=True)])
    )
    gradient = torch.func.grad(lambda a, n, t: ceat_loss(a, n, t, impl=impl).sum())
    torch.testing.assert_close(
        torch.vmap(gradient)(adv, nat, target),
        torch.stack([gradient(*rows) for rows in zip(adv, nat, target, strict=True)]),
    )


def test_backward_twice_with_a_kept_graph(backend: Backend) -> None:
    """The saved gradient must survive the first backward, and what the caller does to its result."""
    impl, device = backend
    adv, nat, target = (t.to(device) for t in batch(3, 4, 5))
    adv.requires_grad_()
    loss = ceat_loss(adv, nat, target, impl=impl).sum()
    loss.backward(retain_graph=True)
    assert adv.grad is not None
    first = adv.grad.clone()
    adv.grad.mul_(7)
    adv.grad = None
    loss.backward()
    assert torch.equal(adv.grad, first)


@pytest.mark.parametrize(("members", "reduction"), list(itertools.product((1, 2), ("max", "mean", "sum"))))
def test_without_peers_the_weights_are_one(backend: Backend, members: int, reduction: str) -> None:
    impl, device = backend
    adv, nat, target = (t.to(device) for t in batch(members, 4, 5))
    _, parts = ceat_loss(adv, nat, target, pair_reduction=reduction, impl=impl, return_parts=True)
    assert torch.equal(parts.adv_weight, torch.ones_like(parts.adv_weight))
    assert torch.equal(parts.nat_disparity, torch.zeros_like(parts.nat_disparity))
