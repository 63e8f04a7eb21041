"""The ops on Triton: GPU kernels that need no compiler at install time.

Importing this file registers the ops with torch but does not import triton; the first launch does. On a CPU the
kernels run in Triton's interpreter, for tests, if TRITON_INTERPRET=1 was set before this file was imported.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ceat_fast.ops.reference import REDUCTIONS, CeatSettings, compute_dtype, reduce_batch
from ceat_fast.ops.schema import define_ops, gradient_dtype

MAX_MEMBERS = 128  # the disparity compares all pairs of members in registers

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_MAX_TILE = 8192  # logits of each tensor in one program
_MIN_TILE = 256
_FLAT_BLOCK = 1024

define_ops("triton")


def missing(device_type: str) -> str | None:
    """None if the ops run on this device, else the reason in one line."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device_type == "cpu":
        return None if _INTERPRETED else "triton runs on CPU tensors only with TRITON_INTERPRET=1 set before the import"
    if device_type != "cuda":
        return f"triton kernels take CUDA tensors, not {device_type} tensors"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if torch.cuda.get_device_capability()[0] < 8:
        return "the triton kernels need compute capability 8.0 or newer"
    return None


def ceat_loss(
    adv: Tensor, nat: Tensor, target: Tensor, settings: CeatSettings, need_grad: bool, need_parts: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eq. 22: (loss, adv_grad, nat_grad, parts), see `ceat_fast.ops`."""
    out: tuple[Tensor, Tensor, Tensor, Tensor]
    out = torch.ops.ceat_fast.ceat_loss_triton(adv, nat, target, *settings, need_grad, need_parts)
    return out


def ensemble_cross_entropy(logits: Tensor, target: Tensor, reduction: int, need_grad: bool) -> tuple[Tensor, Tensor]:
    """Cross-entropy of eq. 1: (loss, grad), see `ceat_fast.ops`."""
    out: tuple[Tensor, Tensor] = torch.ops.ceat_fast.ensemble_cross_entropy_triton(logits, target, reduction, need_grad)
    return out


def pgd_step(x_adv: Tensor, grad: Tensor, x: Tensor, alpha: float, eps: float) -> Tensor:
    """One signed step, projected to the Linf ball around x and to [0, 1]; NaN in any input stays NaN."""
    out: Tensor = torch.ops.ceat_fast.pgd_step_triton(x_adv, grad, x, alpha, eps)
    return out


def scale_gradients(adv_grad: Tensor, nat_grad: Tensor, loss_grad: Tensor) -> tuple[Tensor, Tensor]:
    """Both (M, B, K) gradients times loss_grad, (M,) or (M, B), in their own dtype; the product is in fp32."""
    out: tuple[Tensor, Tensor] = torch.ops.ceat_fast.scale_gradients_triton(adv_grad, nat_grad, loss_grad)
    return out


class _Tile(NamedTuple):
    """Launch sizes of one program; powers of two."""

    members: int
    samples: int
    classes: int

    @classmethod
    def of(cls, members: int, classes: int) -> _Tile:
        """All members and, if registers hold them, all classes; then samples until every thread has work."""
        padded_members, block_classes = _power_of_2(members), _power_of_2(classes)
        if padded_members * block_classes > _MAX_TILE:
            block_classes = _MAX_TILE // 2 // padded_members  # half: the loop over tiles takes registers of its own
        return cls(padded_members, max(1, _MIN_TILE // (padded_members * block_classes)), block_classes)

    @property
    def num_warps(self) -> int:
        """8 values of the largest tensor per thread, more where 512 threads do not suffice."""
        values = self.members * self.samples * max(self.members, self.classes)
        return min(16, max(1, values // 256))

    def constants(self, members: int, classes: int) -> dict[str, int]:
        return {
            "M": members,
            "K": classes,
            "PADDED_M": self.members,
            "BLOCK_B": self.samples,
            "BLOCK_K": self.classes,
            "num_warps": self.num_warps,
        }


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _kernels() -> Any:
    from ceat_fast.ops import triton_kernels

    return triton_kernels


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A `with` block in which kernels are launched on the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _with_dense_rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def _check_members(members: int) -> None:
    if members > MAX_MEMBERS:
        raise ValueError(f"impl='triton' takes at most {MAX_MEMBERS} members, got {members}")


def _new_gradient(logits: Tensor, needed: bool) -> Tensor:
    return logits.new_empty(logits.shape if needed else (0,), dtype=gradient_dtype(logits.dtype))


def _new_ceat_outputs(adv: Tensor, nat: Tensor, need_grad: bool, need_parts: bool) -> tuple[Tensor, ...]:
    members, batch, _ = adv.shape
    dtype = compute_dtype(adv.dtype)
    losses = adv.new_empty((members, batch), dtype=dtype)
    parts = adv.new_empty((7, members, batch) if need_parts else (0,), dtype=dtype)
    return losses, _new_gradient(adv, need_grad), _new_gradient(nat, need_grad), parts


def _ceat_loss(
    adv: Tensor,
    nat: Tensor,
    target: Tensor,
    ce_coefficient: float,
    nat_coefficient: float,
    adv_coefficient: float,
    nat_exponent: float,
    adv_exponent: float,
    max_weight: float,
    pair_reduction: int,
    reduction: int,
    detach_nat: bool,
    need_grad: bool,
    need_parts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    members, batch, classes = adv.shape
    _check_members(members)
    adv, nat = _with_dense_rows(adv), _with_dense_rows(nat)
    losses, adv_grad, nat_grad, parts = _new_ceat_outputs(adv, nat, need_grad, need_parts)
    tile = _Tile.of(members, classes)
    with on_device_of(adv):
        _kernels().ceat_loss_kernel[(_ceil_div(batch, tile.samples),)](
            adv,
            nat,
            target,
            losses,
            parts,
            adv_grad,
            nat_grad,
            batch,
            adv.stride(0),
            adv.stride(1),
            nat.stride(0),
            nat.stride(1),
            target.stride(0),
            ce_coefficient,
            nat_coefficient,
            adv_coefficient,
            nat_exponent,
            adv_exponent,
            max_weight,
            PAIR_REDUCTION=pair_reduction,
            MEAN=REDUCTIONS[reduction] == "mean",
            DETACH_NAT=detach_nat,
            NEED_GRAD=need_grad,
            NEED_PARTS=need_parts,
            **tile.constants(members, classes),
        )
    return reduce_batch(losses, reduction), adv_grad, nat_grad, parts


def _ensemble_cross_entropy(logits: Tensor, target: Tensor, reduction: int, need_grad: bool) -> tuple[Tensor, Tensor]:
    members, batch, classes = logits.shape
    _check_members(members)
    logits = _with_dense_rows(logits)
    losses = logits.new_empty(batch, dtype=compute_dtype(logits.dtype))
    grad = _new_gradient(logits, need_grad)
    tile = _Tile.of(members, classes)
    with on_device_of(logits):
        _kernels().ensemble_cross_entropy_kernel[(_ceil_div(batch, tile.samples),)](
            logits,
            target,
            losses,
            grad,
            batch,
            logits.stride(0),
            logits.stride(1),
            target.stride(0),
            MEAN=REDUCTIONS[reduction] == "mean",
            NEED_GRAD=need_grad,
            **tile.constants(members, classes),
        )
    return reduce_batch(losses, reduction), grad


def _in_layout_of(out: Tensor, tensor: Tensor) -> Tensor:
    if tensor.stride() == out.stride():
        return tensor
    return torch.empty_like(out, dtype=tensor.dtype).copy_(tensor)


def _pgd_step(x_adv: Tensor, grad: Tensor, x: Tensor, alpha: float, eps: float) -> Tensor:
    out = torch.empty_like(x)  # dense, so one flat index serves all four
    size = out.numel()
    with on_device_of(out):
        _kernels().pgd_step_kernel[(_ceil_div(size, _FLAT_BLOCK),)](
            *(_in_layout_of(out, tensor) for tensor in (x_adv, grad, x)), out, size, alpha, eps, BLOCK=_FLAT_BLOCK
        )
    return out


def _scale_gradients(adv_grad: Tensor, nat_grad: Tensor, loss_grad: Tensor) -> tuple[Tensor, Tensor]:
    members, batch, classes = adv_grad.shape
    adv_grad, nat_grad = adv_grad.contiguous(), nat_grad.contiguous()
    adv_out, nat_out = torch.empty_like(adv_grad), torch.empty_like(nat_grad)
    kernels = _kernels()
    block_classes = min(_power_of_2(classes), _FLAT_BLOCK)
    block_rows = _FLAT_BLOCK // block_classes
    with on_device_of(adv_grad):
        kernels.scale_gradients_kernel[(_ceil_div(members * batch, block_rows),)](
            adv_grad,
            nat_grad,
            loss_grad,
            adv_out,
            nat_out,
            members * batch,
            batch,
            loss_grad.stride(0),
            loss_grad.stride(1) if loss_grad.dim() == 2 else 0,
            K=classes,
            BLOCK_ROWS=block_rows,
            BLOCK_K=block_classes,
            DTYPE=kernels.tl.float64 if adv_grad.dtype == torch.float64 else kernels.tl.float32,
        )
    return adv_out, nat_out


for _op, _implementation in (
    ("ceat_loss", _ceat_loss),
    ("ensemble_cross_entropy", _ensemble_cross_entropy),
    ("pgd_step", _pgd_step),
    ("scale_gradients", _scale_gradients),
):
    for _device in ("CUDA", "CPU") if _INTERPRETED else ("CUDA",):
        torch.library.impl(f"ceat_fast::{_op}_triton", _device)(_implementation)
