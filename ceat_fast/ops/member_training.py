"""BatchNorm in train mode and weight gradients of all members in a few launches, on a GPU.

Tensors are (M, B, H, W, C), contiguous, in fp32 or bf16, C of the kernels' widths; parameters and sums are fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ceat_fast.ops import triton_backend

_PROGRAMS = 264  # two for each multiprocessor of a large GPU
_ELEMENTS = 4096  # of a tile
_MOST_PARTS = 64
_PIXELS = {16: 128, 128: 32}  # of a tile of the weight gradient, by channels


class Norm(NamedTuple):
    """Parameters and running statistics of one BatchNorm of all members, (M, C) each, and its settings."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    momentum: float
    eps: float


class NormGradients(NamedTuple):
    """Gradients for the input, the residual (if there is one), weight and bias."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor


def normalise(y: Tensor, norm: Norm, residual: Tensor | None, *, relu: bool) -> tuple[Tensor, Tensor]:
    """BatchNorm by the statistics of the batch, plus residual, then perhaps ReLU; moves the running statistics.

    Returns:
        (output, what `norm_gradients` needs).
    """
    grid, sizes, partial = _plan(y)
    kernels = _kernels()
    channels = y.shape[-1]
    _launch(kernels.statistics_kernel, grid, [y, partial], *sizes, C=channels, BLOCK=_ELEMENTS // channels)
    out, saved = torch.empty_like(y), partial.new_empty(y.shape[0], 2, channels)
    skip = y if residual is None else residual
    _launch(
        kernels.normalise_kernel,
        grid,
        [y, partial, norm.weight, norm.bias, skip, out, saved, norm.running_mean, norm.running_var],
        *sizes,
        partial.shape[1],
        norm.momentum,
        norm.eps,
        C=channels,
        PARTS=_MOST_PARTS,
        BLOCK=_ELEMENTS // channels,
        HAS_RESIDUAL=residual is not None,
        RELU=relu,
    )
    return out, saved


def norm_gradients(
    grad: Tensor, out: Tensor, y: Tensor, saved: Tensor, weight: Tensor, *, residual: bool, relu: bool
) -> NormGradients:
    """The gradients of `normalise(y, ...)` -> (out, saved); `residual` if it had one."""
    grid, sizes, partial = _plan(y)
    kernels = _kernels()
    channels = y.shape[-1]
    constants = {"C": channels, "BLOCK": _ELEMENTS // channels, "RELU": relu}
    _launch(kernels.gradient_sums_kernel, grid, [grad, out, y, saved, partial], *sizes, **constants)
    # Without a ReLU the residual's gradient is the output's.
    is_new = residual and relu
    result = NormGradients(
        torch.empty_like(y),
        torch.empty_like(y) if is_new else grad if residual else None,
        torch.empty_like(weight),
        torch.empty_like(weight),
    )
    other = result.residual if is_new and result.residual is not None else y
    _launch(
        kernels.norm_gradient_kernel,
        grid,
        [grad, out, y, saved, partial, weight, result.x, other, result.weight, result.bias],
        *sizes,
        partial.shape[1],
        PARTS=_MOST_PARTS,
        HAS_RESIDUAL=is_new,
        **constants,
    )
    return result


def weight_gradient(x: Tensor, grad: Tensor, stride: int, *, point: bool, channels: int) -> Tensor:
    """dL/dW, (M, F, channels, 3, 3) or with `point` (M, F, channels, 1, 1), of a convolution of x.

    Args:
        x: (M, B, H, W, C).
        grad: of the convolution's output, (M, B, ceil(H / stride), ceil(W / stride), F).
        stride: 1 or 2; the padding is that of "same".
        point: a 1x1 convolution instead of a 3x3 one.
        channels: of x that matter.
    """
    members, samples, height, width, width_in = x.shape
    out_height, out_width, filters = grad.shape[2:]
    taps, rows = (1, 1) if point else (9, 3)
    block = _PIXELS.get(width_in, 64)
    pixels = samples * out_height * out_width
    # Wide layers leave large partial sums behind, so that they get fewer parts.
    share = max(1, 64 // max(width_in, filters)) * _PROGRAMS // 2 // (rows * members)
    chunk = block * -(-pixels // (block * max(1, share)))
    partial = x.new_empty(members, -(-pixels // chunk), taps, width_in, filters, dtype=torch.float32)
    _launch(
        _kernels().weight_gradient_kernel,
        (partial.shape[1], rows, members),
        [x, grad, partial],
        samples,
        height,
        width,
        out_height,
        out_width,
        chunk,
        C=width_in,
        F=filters,
        STRIDE=stride,
        POINT=point,
        BLOCK=block,
        num_warps=8 if width_in * filters >= 4096 else 4,
    )
    result = partial.new_empty(members, filters, channels, taps)
    torch.sum(partial[:, :, :, :channels].permute(0, 4, 3, 2, 1), 4, out=result)
    return result.view(members, filters, channels, *((1, 1) if point else (3, 3)))


def _plan(y: Tensor) -> tuple[tuple[int, int], tuple[int, int], Tensor]:
    """Programs of a launch, (rows, rows of a program), and room for two sums of each program."""
    members, channels = y.shape[0], y.shape[-1]
    rows = y[0].numel() // channels
    block = _ELEMENTS // channels
    parts = max(1, min(_MOST_PARTS, _PROGRAMS // members, -(-rows // block)))
    chunk = block * -(-rows // (block * parts))
    parts = max(1, -(-rows // chunk)) if rows else 1
    return (parts, members), (rows, chunk), y.new_empty(members, parts, 2, channels, dtype=torch.float32)


def _kernels() -> Any:
    return import_module("ceat_fast.ops.training_kernels")


def _launch(kernel: Any, grid: tuple[int, ...], tensors: Sequence[Tensor], *numbers: float, **constants: Any) -> None:
    with triton_backend.on_device_of(tensors[0]):
        kernel[grid](*tensors, *numbers, **constants)
