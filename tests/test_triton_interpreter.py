"""The Triton ops against the float64 reference: compiled where there is a GPU, else in Triton's interpreter.

The interpreter must be chosen before triton is imported. Without a GPU one test therefore runs this file again in a
child process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ceat_fast.ops import reference
from ceat_fast.ops import triton_backend as ops
from ceat_fast.ops.reference import CeatSettings

# The branch of a tl.where that is not taken may divide by zero; numpy says so, a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = not INTERPRETED and ops.missing("cuda") is None
DEVICE = "cuda" if COMPILED else "cpu"
BF16_STEP = 2**-7  # the interpreter truncates to bf16 where the GPU rounds
PAPER = CeatSettings(1.0, 1.0, 5.0, 1.0, 5.0, float("inf"), 0, 1, False)


def on_kernels(test: Callable[..., None]) -> Callable[..., None] | None:
    """Collect the test only in a process that can run the kernels."""
    return test if INTERPRETED or COMPILED else None


@pytest.mark.skipif(INTERPRETED or COMPILED, reason="the kernels are tested in this very process")
@pytest.mark.skipif(ops.missing("cuda") == "triton is not installed", reason="triton is not installed")
def test_in_the_interpreter():
    parent_only = "in_the_interpreter or leaves_triton_alone"
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"not ({parent_only})", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    assert " passed" in child.stdout
    assert "skipped" not in child.stdout, child.stdout


def make_logits(members: int, batch: int, classes: int, dtype: torch.dtype, scale: float = 2.0, seed: int = 0):
    generator = torch.Generator().manual_seed(1000 * members + 10 * classes + batch + seed)
    adv, nat = (torch.randn(2, members, batch, classes, generator=generator) * scale).to(dtype).to(DEVICE)
    return adv, nat, torch.randint(classes, (batch,), generator=generator).to(DEVICE)


def truth(adv: Tensor, nat: Tensor, target: Tensor, settings: CeatSettings):
    """(loss, adv_grad, nat_grad, parts) in float64 by autograd through the reference."""
    adv, nat = (logits.double().clone().requires_grad_() for logits in (adv, nat))
    loss, parts = reference.ceat_loss(adv, nat, target, settings)
    loss.sum().backward()
    return loss.detach(), adv.grad, nat.grad, torch.stack(parts)


def assert_near(actual: Tensor, expected: Tensor, relative: float):
    """Within `relative` of each entry, or of the largest one for entries that come from cancelling terms."""
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected, rtol=relative, atol=relative * scale, equal_nan=True)


def tolerance(dtype: torch.dtype) -> float:
    return 1e-13 if dtype == torch.float64 else 2e-6


def assert_meets_truth(adv: Tensor, nat: Tensor, target: Tensor, settings: CeatSettings):
    actual = ops.ceat_loss(adv, nat, target, settings, True, True)
    expected = truth(adv, nat, target, settings)
    computed = reference.compute_dtype(adv.dtype)
    grad_dtype = torch.bfloat16 if adv.dtype == torch.bfloat16 else computed
    assert [out.dtype for out in actual] == [computed, grad_dtype, grad_dtype, computed]
    assert all(out.is_contiguous() for out in actual)
    for out, right in zip(actual, expected, strict=True):
        assert_near(out, right, BF16_STEP if out.dtype == torch.bfloat16 else tolerance(adv.dtype))


@on_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("members", "batch", "classes", "pair_reduction"),
    [
        (1, 5, 10, 0),  # no peers; one program holds more samples than there are
        (2, 1, 2, 1),  # no pair of peers, the fewest classes
        (3, 5, 10, 0),  # the paper's case, a batch that does not fill its last program
        (3, 1, 100, 2),
        (5, 5, 3, 1),  # members and classes that are no powers of two
        (5, 1, 10, 0),
        (16, 1, 10, 2),
        (16, 1, 600, 0),  # several tiles of classes
        (3, 1, 2500, 1),
    ],
)
def test_value_gradients_and_parts(members, batch, classes, pair_reduction, dtype):
    adv, nat, target = make_logits(members, batch, classes, dtype)
    settings = PAPER._replace(adv_coefficient=1.7, adv_exponent=0.6, pair_reduction=pair_reduction)
    assert_meets_truth(adv, nat, target, settings)


@on_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("members", "batch", "classes"), [(3, 5, 10), (16, 1, 600)])
def test_half_precision_is_rounded_once(members, batch, classes, dtype):
    assert_meets_truth(*make_logits(members, batch, classes, dtype), PAPER)


@on_kernels
@pytest.mark.parametrize(
    "change",
    [
        {"detach_nat": True},
        {"ce_coefficient": 0.0},
        {"max_weight": 1.25},
        {"reduction": 0},
        {"reduction": 2},
    ],
    ids=str,
)
def test_each_setting(change):
    assert_meets_truth(*make_logits(4, 3, 7, torch.float32, scale=4.0), PAPER._replace(**change))


@on_kernels
def test_weights_that_overflow_before_the_cap():
    adv = torch.tensor([[[0.0, 4.0]], [[0.0, 0.0]], [[4.0, 0.0]]], device=DEVICE)
    settings = PAPER._replace(nat_exponent=1000.0, adv_exponent=1000.0, max_weight=3.0)
    target = torch.zeros(1, dtype=torch.long, device=DEVICE)
    weights = ops.ceat_loss(adv, adv.flip(0), target, settings, False, True)[3][5:]
    assert weights.tolist() == [[[3.0], [3.0], [3.0]]] * 2


@on_kernels
def test_outputs_that_nobody_needs_are_empty():
    adv, nat, target = make_logits(3, 2, 4, torch.float32)
    whole = ops.ceat_loss(adv, nat, target, PAPER, True, True)
    bare = ops.ceat_loss(adv, nat, target, PAPER, False, False)
    torch.testing.assert_close(bare[0], whole[0])  # the sums are made in another order on a GPU
    assert [out.shape for out in bare[1:]] == [(0,), (0,), (0,)]


@on_kernels
def test_views_equal_their_contiguous_copies():
    adv, nat, target = make_logits(3, 5, 8, torch.float32)
    expected = ops.ceat_loss(adv, nat, target, PAPER, True, True)
    members_last = adv.transpose(0, 1).contiguous().transpose(0, 1)
    offset = torch.full((3, 6, 11), float("nan"), device=DEVICE)[:, 1:, 3:]
    offset.copy_(nat)
    every_second_class = torch.full((3, 5, 16), float("nan"), device=DEVICE)[..., ::2]
    every_second_class.copy_(nat)
    every_third_label = torch.full((15,), -1, device=DEVICE)[::3]
    every_third_label.copy_(target)
    for view in (offset, every_second_class):
        actual = ops.ceat_loss(members_last, view, every_third_label, PAPER, True, True)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@on_kernels
@pytest.mark.parametrize("gap", [30.0, 55.0, 80.0])
def test_confident_rows_keep_their_digits(gap):
    adv, nat, target = make_logits(3, 2, 10, torch.float32, scale=0.5)
    labels = target[None, :, None].expand(3, -1, -1)
    adv.scatter_(2, labels, gap)
    nat.scatter_(2, labels, gap + 4.0)
    loss, adv_grad, nat_grad, parts = ops.ceat_loss(adv, nat, target, PAPER, True, True)

    # To first order in e, which float64 autograd would lose at p_y - 1: p_k = e_k, p_y = 1, all weights are 1.
    def expand(logits):
        e = (logits.double() - logits.double().gather(2, labels)).exp().scatter(2, labels, 0.0)
        return e, e.sum(2, keepdim=True)

    def close_rows(grad):  # a gradient through softmax sums to zero over the classes
        return grad.scatter(2, labels, -grad.sum(2, keepdim=True)) / 2

    (adv_e, adv_other), (nat_e, nat_other) = expand(adv), expand(nat)
    torch.testing.assert_close(parts[0].double(), adv_other.squeeze(2), rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.double(), adv_other.mean((1, 2)), rtol=1e-5, atol=0)
    torch.testing.assert_close(adv_grad.double(), close_rows(adv_e), rtol=1e-5, atol=0)
    if gap == 30.0:  # quadratic in e: beyond the range of fp32 for the larger gaps
        shift = adv_e - nat_e + adv_other - nat_other
        expected = close_rows(2 * nat_e * (nat_e + nat_other - PAPER.adv_coefficient * shift))
        torch.testing.assert_close(nat_grad.double(), expected, rtol=1e-5, atol=0)


@on_kernels
def test_common_offset_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    # On this grid the sum with 10,000 is exact in fp32.
    adv, nat = (torch.randint(-200, 200, (2, 3, 2, 10), generator=generator) / 64).to(DEVICE)
    target = torch.tensor([3, 9], device=DEVICE)
    plain = ops.ceat_loss(adv, nat, target, PAPER, True, True)
    shifted = ops.ceat_loss(adv + 1e4, nat - 1e4, target, PAPER, True, True)
    assert all(torch.equal(a, b) for a, b in zip(plain, shifted, strict=True))


@on_kernels
@pytest.mark.parametrize("label", [-1, 7, -(2**62), 2**62])
def test_label_out_of_range_poisons_only_its_own_row(label):
    settings = PAPER._replace(reduction=0)
    adv, nat, target = make_logits(3, 3, 7, torch.float32)
    right = ops.ceat_loss(adv, nat, target, settings, True, True)
    right_entropy, right_grad = ops.ensemble_cross_entropy(adv, target, 0, True)
    target[1] = label
    loss, adv_grad, nat_grad, parts = ops.ceat_loss(adv, nat, target, settings, True, True)
    entropy, grad = ops.ensemble_cross_entropy(adv, target, 0, True)
    assert loss[:, 1].isnan().all()
    assert parts[:, :, 1].isnan().all()
    assert entropy[1].isnan()
    for gradient in (adv_grad, nat_grad, grad):
        assert gradient[:, 1].eq(0).all()
    actual = (loss, adv_grad, nat_grad, *parts, right_entropy[None], grad)
    expected = (*right[:3], *right[3], entropy[None], right_grad)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a[:, [0, 2]], b[:, [0, 2]])


@on_kernels
def test_nan_logits_reach_the_peers_and_no_other_sample():
    adv, nat, target = make_logits(4, 2, 5, torch.float32)
    nat[2, 0, 1] = float("nan")
    loss = ops.ceat_loss(adv, nat, target, PAPER._replace(reduction=0), False, False)[0]
    assert loss[:, 0].isnan().all()
    assert loss[:, 1].isfinite().all()


@on_kernels
def test_classes_at_minus_infinity_have_probability_zero():
    adv, nat, target = make_logits(3, 1, 2500, torch.float32)
    adv[..., :2048] = nat[..., :2048] = float("-inf")  # fills the first tiles
    target[:] = 2400
    assert_meets_truth(adv, nat, target, PAPER)


@on_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("members", "batch", "classes", "reduction"),
    [(1, 5, 3, 0), (3, 5, 10, 1), (16, 1, 600, 2)],  # alone; the usual case; several tiles
)
def test_ensemble_cross_entropy(members, batch, classes, reduction, dtype):
    logits, _, target = make_logits(members, batch, classes, dtype)
    leaf = logits.double().clone().requires_grad_()
    expected = reference.ensemble_cross_entropy(leaf, target, reduction)
    expected.sum().backward()
    loss, grad = ops.ensemble_cross_entropy(logits, target, reduction, True)
    assert grad.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    assert_near(loss, expected.detach(), tolerance(dtype))
    assert_near(grad, leaf.grad, BF16_STEP if dtype == torch.bfloat16 else tolerance(dtype))
    loss_alone, no_grad = ops.ensemble_cross_entropy(logits, target, reduction, False)
    assert torch.equal(loss_alone, loss)
    assert no_grad.shape == (0,)


@on_kernels
def test_ensemble_cross_entropy_of_a_label_that_all_members_rule_out():
    logits, _, target = make_logits(3, 2, 5, torch.float32)
    logits[:, 0, target[0]] = float("-inf")
    loss, grad = ops.ensemble_cross_entropy(logits, target, 0, True)
    assert loss.isposinf().tolist() == [True, False]
    onehot = torch.nn.functional.one_hot(target[0], 5)
    assert_near(grad[:, 0], (logits[:, 0].double().softmax(-1) - onehot) / 3, tolerance(torch.float32))


@on_kernels
def test_ensemble_cross_entropy_of_confident_and_of_hopeless_rows():
    logits = torch.zeros(2, 2, 2, device=DEVICE)
    logits[:, 0, 0] = torch.tensor([40.0, 41.0])
    logits[:, 1, 0] = torch.tensor([200.0, 320.0])
    loss, grad = ops.ensemble_cross_entropy(logits, torch.tensor([0, 1], device=DEVICE), 0, True)
    q = torch.tensor([40.0, 41.0], dtype=torch.float64).neg().exp()
    right_loss = torch.tensor([q.mean().item(), 200.0 + 0.6931471805599453], dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(loss.double(), right_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad[:, 0, 1].double().cpu(), q / 2, rtol=1e-5, atol=0)
    # The member that is less wrong takes the whole gradient; exp(-200) itself is 0 in fp32.
    assert grad[:, 1].tolist() == [[1.0, -1.0], [0.0, 0.0]]


@on_kernels
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pgd_step_equals_the_reference_bit_by_bit(dtype, grad_dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 19, 23, generator=generator, dtype=dtype).to(DEVICE)  # does not fill the last program
    x_adv = (x + 0.02 * torch.randn(x.shape, generator=generator, dtype=dtype).to(DEVICE)).clamp(0, 1)
    grad = torch.randn(x.shape, generator=generator).to(grad_dtype).to(DEVICE)
    grad[0, 0] = 0.0
    expected = reference.pgd_step(x_adv, grad, x, 2 / 255, 8 / 255)
    assert torch.equal(ops.pgd_step(x_adv, grad, x, 2 / 255, 8 / 255), expected)
    channels_last = grad.contiguous(memory_format=torch.channels_last)
    sliced = torch.zeros(2, 3, 19, 30, dtype=dtype, device=DEVICE)[..., 5:28].copy_(x)
    assert torch.equal(ops.pgd_step(x_adv, channels_last, sliced, 2 / 255, 8 / 255), expected)
    strided = ops.pgd_step(x_adv, grad, x.contiguous(memory_format=torch.channels_last), 2 / 255, 8 / 255)
    assert torch.equal(strided, expected)
    assert strided.is_contiguous(memory_format=torch.channels_last)


@on_kernels
def test_pgd_step_keeps_nan():
    x, x_adv, grad = (torch.full((4,), 0.5, device=DEVICE) for _ in range(3))
    for i, tensor in enumerate((x, x_adv, grad)):
        tensor[i] = float("nan")
    out = ops.pgd_step(x_adv, grad, x, 0.25, 0.125)
    assert out[:3].isnan().all()
    assert out[3] == 0.625


@on_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [3, 1500])
def test_scale_gradients(dtype, classes):
    adv, nat, _ = make_logits(3, 2, classes, dtype)
    for loss_grad in (
        torch.tensor([2.0, -0.5, 3.0]),
        torch.tensor(0.75).expand(3),  # what `.sum().backward()` sends
        torch.arange(6.0).view(2, 3).t(),
    ):
        incoming = loss_grad.to(DEVICE)
        wide = incoming.view(3, -1, 1).to(reference.compute_dtype(dtype))
        actual = ops.scale_gradients(adv, nat, incoming)
        for out, grad in zip(actual, (adv, nat), strict=True):
            assert out.dtype == dtype
            assert_near(out, (grad * wide).double(), BF16_STEP if dtype == torch.bfloat16 else 0.0)


@on_kernels
def test_ops_keep_the_promises_that_torch_relies_on():
    adv, nat, target = make_logits(3, 2, 4, torch.float16)
    namespace = torch.ops.ceat_fast
    torch.library.opcheck(namespace.ceat_loss_triton, (adv, nat, target, *PAPER, True, True))
    torch.library.opcheck(namespace.ceat_loss_triton, (adv, nat, target, *PAPER._replace(reduction=0), False, False))
    torch.library.opcheck(namespace.ensemble_cross_entropy_triton, (adv, target, 1, True))
    torch.library.opcheck(namespace.ensemble_cross_entropy_triton, (adv, target, 0, False))
    x = torch.rand(2, 3, 4, 4, device=DEVICE).contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(namespace.pgd_step_triton, (x, torch.ones_like(x), x.contiguous(), 0.1, 0.2))
    torch.library.opcheck(namespace.scale_gradients_triton, (adv, nat, torch.ones(3, device=DEVICE)))


@on_kernels
def test_compiles_without_graph_breaks():
    adv, nat, target = make_logits(3, 2, 4, torch.float32)

    def losses(adv: Tensor, nat: Tensor) -> Tensor:
        return ops.ceat_loss(adv * 2, nat, target, PAPER, True, False)[1] + 1

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(adv, nat), losses(adv, nat))


def test_too_many_members_are_refused():
    with pytest.raises(ValueError, match="at most 128 members, got 129"):
        ops._ceat_loss(*make_logits(129, 1, 2, torch.float32), *PAPER, True, False)
    with pytest.raises(ValueError, match="at most 128 members, got 129"):
        ops._ensemble_cross_entropy(torch.zeros(129, 1, 2), torch.zeros(1, dtype=torch.long), 1, True)


def test_missing_says_what_is_missing(monkeypatch):
    assert ops.missing("meta") in ("triton kernels take CUDA tensors, not meta tensors", "triton is not installed")
    monkeypatch.setattr(ops, "_INTERPRETED", False)
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: object())
    assert "TRITON_INTERPRET=1" in ops.missing("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ops.missing("cuda") == "torch finds no CUDA device"
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: None)
    assert ops.missing("cuda") == "triton is not installed"


def test_importing_the_backend_leaves_triton_alone():
    code = "import sys, torch; before = 'triton' in sys.modules; import ceat_fast.ops.triton_backend; "
    code += "assert before or 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
