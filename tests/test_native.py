"""The compiled ops as torch sees them: opcheck, compilation, transforms, instruction sets, other torch versions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from instruction_sets import run_with_isa
from torch import Tensor

from ceat_fast.loss import ceat_loss, ensemble_cross_entropy
from ceat_fast.ops import dispatch, native, reference
from ceat_fast.ops.reference import CeatSettings

DEVICES = [device for device in ("cpu", "cuda") if native.missing(device) is None]
if "cuda" in DEVICES and not torch.cuda.is_available():
    DEVICES.remove("cuda")

SETTINGS = CeatSettings(1.0, 1.0, 5.0, 1.0, 5.0, float("inf"), 0, 1, False)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def batch(device: str, members: int = 3, samples: int = 5, classes: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    adv, nat = torch.randn(2, members, samples, classes, device=device)
    return adv, nat, torch.randint(0, classes, (samples,), device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_opcheck(device: str, dtype: torch.dtype) -> None:
    adv, nat, target = batch(device)
    adv, nat = adv.to(dtype), nat.to(dtype)
    ops = torch.ops.ceat_fast
    for need_grad, need_parts in ((True, True), (False, False)):
        for reduction in (0, 1):
            settings = SETTINGS._replace(reduction=reduction)
            torch.library.opcheck(ops.ceat_loss_native, (adv, nat, target, *settings, need_grad, need_parts))
            torch.library.opcheck(ops.ensemble_cross_entropy_native, (adv, target, reduction, need_grad))
    grad_dtype = torch.float32 if dtype == torch.float16 else dtype
    loss_dtype = torch.promote_types(dtype, torch.float32)
    for loss_grad in (
        torch.rand(3, device=device, dtype=loss_dtype),
        torch.rand(3, 5, device=device, dtype=loss_dtype),
    ):
        torch.library.opcheck(ops.scale_gradients_native, (adv.to(grad_dtype), nat.to(grad_dtype), loss_grad))
    x = torch.rand(2, 3, 4, 4, device=device)
    torch.library.opcheck(ops.pgd_step_native, (x, (x - 0.5).to(dtype), x, 0.1, 0.2))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [0, 1, 7, 20_000])  # nothing, less than a vector, a tail, more than one thread
def test_pgd_step_is_the_specification_to_the_bit(
    device: str, x_dtype: torch.dtype, grad_dtype: torch.dtype, size: int
) -> None:
    torch.manual_seed(size)
    x = torch.rand(size, device=device, dtype=x_dtype)
    x_adv = (x + 0.1 * torch.randn_like(x)).clamp(0, 1)
    grad = torch.randn(size, device=device).to(grad_dtype)
    grad[::5] = 0
    expected = reference.pgd_step(x_adv, grad, x, 2 / 255, 8 / 255)
    assert torch.equal(native.pgd_step(x_adv, grad, x, 2 / 255, 8 / 255), expected)


def test_pgd_step_lets_nan_through(device: str) -> None:
    nan = float("nan")
    x = torch.tensor([0.5, nan, 0.5, 0.5], device=device)
    grad = torch.tensor([nan, 1.0, 1.0, -0.0], device=device)
    stepped = native.pgd_step(torch.full_like(x, 0.5), grad, x, 0.1, 0.05)
    assert stepped.isnan().tolist() == [True, True, False, False]
    assert stepped[2:].tolist() == pytest.approx([0.55, 0.5])


def test_pgd_step_keeps_the_memory_format(device: str) -> None:
    """channels_last stays channels_last; inputs of another layout are rearranged, not misread."""
    x = torch.rand(2, 3, 4, 5, device=device)
    x_adv, grad = torch.rand_like(x), torch.randn_like(x)
    expected = reference.pgd_step(x_adv, grad, x, 0.1, 0.2)
    last = {"memory_format": torch.channels_last}
    stepped = native.pgd_step(x_adv, grad.contiguous(**last), x.contiguous(**last), 0.1, 0.2)
    assert stepped.is_contiguous(**last)
    assert torch.equal(stepped, expected)
    assert torch.equal(native.pgd_step(x_adv[:, :, ::2], grad[:, :, ::2], x[:, :, ::2], 0.1, 0.2), expected[:, :, ::2])


@pytest.mark.parametrize("shape", [(3,), (3, 9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_scale_gradients(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    grads = torch.randn(2, 3, 9, 11, device=device).to(dtype)
    loss_grad = torch.randn(shape, device=device, dtype=torch.promote_types(dtype, torch.float32))
    scaled = native.scale_gradients(*grads, loss_grad)
    factor = loss_grad.reshape(*shape, *[1] * (3 - len(shape)))
    for out, grad in zip(scaled, grads, strict=True):
        assert out.dtype == dtype
        torch.testing.assert_close(out, (grad.to(torch.promote_types(dtype, torch.float32)) * factor).to(dtype))
    expanded = loss_grad.new_full((1,), 2.0).expand(3)
    assert torch.equal(native.scale_gradients(*grads, expanded)[0], grads[0] * 2)


def test_compiles_into_one_graph(device: str) -> None:
    adv, nat, target = batch(device)

    def total(adv: Tensor, nat: Tensor) -> Tensor:
        loss = ceat_loss(2.0 * adv, nat, target, lam=2.0, impl="native")
        return loss.sum() + ensemble_cross_entropy(adv, target, impl="native")

    def run(function: Any) -> list[Tensor]:
        leaves = [adv.clone().requires_grad_(), nat.clone().requires_grad_()]
        value = function(*leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    for compiled, eager in zip(run(torch.compile(total, fullgraph=True)), run(total), strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.skipif(torch.__version__ < "2.11", reason="torch 2.10 compiles no Function within torch.func.grad")
def test_compiled_transform_keeps_the_gradient(device: str) -> None:
    """torch 2.13 returns zeros from compile(func.grad(f)) where a Function acts directly on the input of f."""
    adv, nat, target = batch(device)

    def total(adv: Tensor) -> Tensor:
        return ceat_loss(adv * 1.0, nat, target, impl="native").sum()

    torch.testing.assert_close(torch.compile(torch.func.grad(total))(adv), torch.func.grad(total)(adv))


def test_func_grad_and_vmap(device: str) -> None:
    adv, nat, _ = batch(device)
    many = torch.randn(4, *adv.shape, device=device)
    targets = torch.randint(0, 4, (4, 5), device=device)

    def total(adv: Tensor, target: Tensor, impl: str) -> Tensor:
        return ceat_loss(adv, nat, target, impl=impl).sum() + ensemble_cross_entropy(adv, target, impl=impl)

    expected = torch.stack([torch.func.grad(total)(a, t, "torch") for a, t in zip(many, targets, strict=True)])
    values = torch.stack([total(a, t, "torch") for a, t in zip(many, targets, strict=True)])
    torch.testing.assert_close(torch.func.grad(total)(many[0], targets[0], "native"), expected[0])
    torch.testing.assert_close(torch.vmap(total, (0, 0, None))(many, targets, "native"), values)
    torch.testing.assert_close(torch.vmap(torch.func.grad(total), (0, 0, None))(many, targets, "native"), expected)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_vmap_over_one_argument(device: str, reduction: str) -> None:
    adv, nat, target = batch(device)
    many = torch.randn(4, *nat.shape, device=device)

    def loss(nat: Tensor) -> Tensor:
        value, parts = ceat_loss(adv, nat, target, impl="native", reduction=reduction, return_parts=True)
        return torch.stack([value.sum(), parts.nat_weight.sum()])

    torch.testing.assert_close(torch.vmap(loss)(many), torch.stack([loss(n) for n in many]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(device: str, dtype: torch.dtype) -> None:
    """Half-precision logits of an autocast model give fp32 losses and half-precision gradients."""
    _, _, target = batch(device)
    layer = torch.nn.Linear(6, 4, device=device)
    x = torch.randn(3, 5, 6, device=device)
    with torch.autocast(device, dtype=dtype):
        logits = layer(x)
        loss = ceat_loss(logits, logits.flip(0), target, impl="native")
    assert logits.dtype == dtype
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.isfinite().all()


def test_fp16_gradients_survive_a_loss_scale(device: str) -> None:
    """1e-6 / 1024 is zero in fp16; multiplied by the loss scale first, it is not."""
    logits = torch.zeros(1, 1024, 2, device=device, dtype=torch.float16)
    logits[..., 0] = 13.8
    leaf = logits.clone().requires_grad_()
    target = torch.zeros(1024, dtype=torch.int64, device=device)
    loss = ceat_loss(leaf, logits, target, lam=0.0, mu=0.0, impl="native")
    (loss.sum() * 65536.0).backward()
    exact = torch.sigmoid(-logits[0, 0, 0].double()) / 1024 * 65536
    assert leaf.grad is not None
    assert leaf.grad[0, 0, 1].item() == pytest.approx(exact.item(), rel=1e-3)


def test_threads_do_not_change_a_bit() -> None:
    adv, nat, target = batch("cpu", 3, 700, 100)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(native.ceat_loss(adv, nat, target, SETTINGS, True, True))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


RESULTS_OF_ISA = """
import sys, torch
from ceat_fast.ops import native
from test_native import SETTINGS, batch
assert native.cpu_isa() == sys.argv[1], native.cpu_isa()
results = []
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for classes in (10, 75):
        adv, nat, target = batch("cpu", 4, 21, classes)
        results += native.ceat_loss(adv.to(dtype), nat.to(dtype), target, SETTINGS, True, True)
        results += native.ensemble_cross_entropy(adv.to(dtype), target, 0, True)
torch.save(results, sys.argv[2])
"""


def test_instruction_sets_agree(tmp_path: Any) -> None:
    """The portable kernels, which any CPU can run, against the ones chosen here."""
    chosen = native.cpu_isa()
    assert chosen is not None
    results = {}
    for isa in {"portable", chosen}:
        out = tmp_path / f"{isa}.pt"
        run_with_isa(isa, RESULTS_OF_ISA, isa, str(out))
        results[isa] = torch.load(out, weights_only=True)
    for portable, vectorised in zip(results["portable"], results[chosen], strict=True):
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[portable.dtype]
        torch.testing.assert_close(portable, vectorised, rtol=tolerance, atol=tolerance)


def test_named_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    adv, nat, target = batch("cpu")
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setitem(native._MISSING, "cpu", "not built: no C++ compiler found")
    with pytest.raises(RuntimeError, match="impl='native' cannot run on 'cpu': not built: no C\\+\\+ compiler"):
        ceat_loss(adv, nat, target, impl="native")
    assert ceat_loss(adv, nat, target, impl="auto").isfinite().all()
    assert dispatch.backend_name("auto", "cpu") == "torch"


def test_native_op_refuses_what_python_did_not_check() -> None:
    adv, nat, target = batch("cpu")
    for arguments in (
        (adv, nat[:, :2], target),
        (adv, nat.double(), target),
        (adv, nat, target[:2]),
        (adv, nat, target.int()),
        (adv[0], nat[0], target),
        (adv, nat, target + 4),
    ):
        with pytest.raises(RuntimeError):
            native.ceat_loss(*arguments, SETTINGS, True, False)
