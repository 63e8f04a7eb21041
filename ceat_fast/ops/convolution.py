"""3x3 convolutions of all members in one launch, with bias, residual and ReLU in their epilogue, for attacked members.

cuDNN's grouped convolution falls back to slow direct kernels at the widths of CIFAR networks, and a loop over the
members launches M times as many kernels. No execution uses this yet: it is to be measured first
(`pytest bench/suites -k member_convolution`).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

WIDTHS = (16, 32, 64, 128)  # channels and filters: sides of the tiles that matrix units multiply
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TAPS = 9
_BLOCK = 64  # output pixels of one program


def pack_weights(weight: Tensor) -> Tensor:
    """Weights of M convolutions (M, F, C, 3, 3) -> (M, 9, C, F), contiguous: one matrix per tap."""
    return weight.permute(0, 3, 4, 2, 1).flatten(1, 2).contiguous()


def member_convolution(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, *, stride: int = 1, relu: bool = True
) -> Tensor:
    """relu(conv(x) + bias + residual) of every member; differentiable once in x and residual, not in the weights.

    Args:
        x: (M, B, H, W, C), channels last, contiguous.
        weight: (M, 9, C, F) from `pack_weights`, of the type of x.
        bias: (M, F).
        residual: added before the ReLU, of the shape of the result, or None.
        stride: 1 or 2; the padding is 1.
        relu: whether to clip at 0.

    Returns:
        (M, B, ceil(H / stride), ceil(W / stride), F), of the type of x; sums are in fp32 and rounded once.

    Raises:
        ValueError: shapes, types, widths or strides that it cannot take, or a weight that requires a gradient.
    """
    _check(x, weight, bias, residual, stride)
    output: Tensor = _MemberConvolution.apply(x, weight, bias, residual, stride, relu)
    return output


def _check(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, stride: int) -> None:
    if x.dim() != 5 or x.dtype not in _DTYPES or not x.is_contiguous():
        raise ValueError(
            f"x must be (M, B, H, W, C), contiguous, float32, bfloat16 or float16, got {tuple(x.shape)} {x.dtype}"
        )
    members, _, _, _, channels = x.shape
    filters = weight.shape[-1]
    if channels not in WIDTHS or filters not in WIDTHS:
        raise ValueError(f"channels and filters must be of {WIDTHS}, got {channels} and {filters}")
    if weight.shape != (members, _TAPS, channels, filters) or weight.dtype != x.dtype:
        expected = (members, _TAPS, channels, filters)
        raise ValueError(f"weight must be {expected} {x.dtype}, got {tuple(weight.shape)} {weight.dtype}")
    if bias.shape != (members, filters):
        raise ValueError(f"bias must be {(members, filters)}, got {tuple(bias.shape)}")
    if stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, got {stride}")
    shape = _output_shape(x, filters, stride)
    if residual is not None and (residual.shape != shape or residual.dtype != x.dtype):
        raise ValueError(f"residual must be {shape} {x.dtype}, got {tuple(residual.shape)} {residual.dtype}")
    if weight.requires_grad or bias.requires_grad:
        raise ValueError("weight and bias must not require a gradient: this is for attacks on frozen members")


def _output_shape(x: Tensor, filters: int, stride: int) -> tuple[int, ...]:
    members, samples, height, width, _ = x.shape
    return members, samples, -(-height // stride), -(-width // stride), filters


class _MemberConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, stride: int, relu: bool
    ) -> Tensor:
        out = x.new_empty(_output_shape(x, weight.shape[-1], stride))
        residual = residual if residual is None else residual.contiguous()
        _launch(x, weight, out, stride, bias=bias.contiguous(), residual=residual, relu=relu)
        ctx.save_for_backward(weight, out if relu else None)
        ctx.stride, ctx.shape = stride, x.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, out = ctx.saved_tensors
        grad = grad.contiguous()
        x_grad = residual_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = grad.new_empty(ctx.shape)
            _launch(grad, weight.transpose(2, 3), x_grad, ctx.stride, transposed=True, gate=out)
        if ctx.needs_input_grad[3]:
            residual_grad = grad if out is None else torch.ops.aten.threshold_backward(grad, out, 0)
        return x_grad, None, None, residual_grad, None, None


def _launch(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    stride: int,
    *,
    transposed: bool = False,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> None:
    members, samples, height, width, channels = x.shape
    pixels = samples * out.shape[2] * out.shape[3]
    if not pixels:
        return
    _kernel()[-(-pixels // _BLOCK), members](
        x,
        x if gate is None else gate,
        weight,
        x if bias is None else bias,
        x if residual is None else residual,
        out,
        samples,
        height,
        width,
        out.shape[2],
        out.shape[3],
        *weight.stride(),
        CHANNELS=channels,
        FILTERS=out.shape[4],
        STRIDE=stride,
        TRANSPOSED=transposed,
        GATED=gate is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        RELU=relu,
        BLOCK=_BLOCK,
        num_warps=4,
    )


def _kernel() -> Any:
    return import_module("ceat_fast.ops.convolution_kernel").member_convolution_kernel
