"""3x3 convolution with stride 1 on the CPU by Winograd's F(4x4, 3x3): a quarter of the multiplications.

It computes in fp32. Rounding errors are twice those of a direct convolution, less than 1e-6 of the outputs' scale
(`bench/suites/test_winograd.py` shows both).
The gradient for the input is the same kernel on turned filters; that for the weights is torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ceat_fast.ops import native

SIGNATURE = "(Tensor x, Tensor weight, Tensor? bias, bool transposed) -> Tensor"
CHANNEL_BLOCK = 16  # channels and filters come in multiples of this
LEAST_PIXELS = 256  # of the batch: below, transforming the filters takes longer than it saves


def fake_winograd_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    filters = weight.shape[1 if transposed else 0]
    shape = (x.shape[0], filters, *x.shape[2:])
    return x.new_empty(shape).to(memory_format=torch.channels_last)


torch.library.define("ceat_fast::winograd_convolution_native", SIGNATURE)
torch.library.register_fake("ceat_fast::winograd_convolution_native", fake_winograd_convolution)
_convolve = torch.ops.ceat_fast.winograd_convolution_native.default


def missing() -> str | None:
    """None where the kernel runs, else the reason in one line."""
    return native.missing("cpu")


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes images (B, C, H, W) and filters (F, C, 3, 3), and there are enough for it to pay."""
    if x.dim() != 4 or weight.dim() != 4 or weight.shape[2:] != (3, 3):
        return False
    if not (x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"):
        return False
    filters, channels = weight.shape[:2]
    blocks = channels == x.shape[1] and channels > 0 and channels % CHANNEL_BLOCK == 0 == filters % CHANNEL_BLOCK
    return blocks and x.shape[0] * x.shape[2] * x.shape[3] >= LEAST_PIXELS


def winograd_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.conv2d(x, weight, bias, padding=1)` for what `suits`, in the memory format of x; differentiable as often.

    Args:
        x: (B, C, H, W) fp32 on the CPU, best in channels_last.
        weight: (F, C, 3, 3); C and F are multiples of 16.
        bias: (F,) or None.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        output: Tensor = _WinogradConvolution.apply(x, weight, bias)
        return output
    return _run(x, weight, bias, False)


# G of the filter transform G g G^T (csrc/cpu/winograd.cpp), for points 0, 5/8, -5/8, 3/2, -3/2 and infinity.
_A, _B = 5 / 8, 3 / 2
_NA, _NB = 2 * _A**2 * (_A**2 - _B**2), 2 * _B**2 * (_B**2 - _A**2)
_G = (
    (1 / (_A * _B) ** 2, 0, 0),
    (1 / _NA, _A / _NA, _A**2 / _NA),
    (1 / _NA, -_A / _NA, _A**2 / _NA),
    (1 / _NB, _B / _NB, _B**2 / _NB),
    (1 / _NB, -_B / _NB, _B**2 / _NB),
    (0, 0, 1),
)


def filters_at_points(taps: Tensor) -> Tensor:
    """3x3 filters (M, 9, C, F) at the points of the transform: (M, 36, C, F)."""
    g = torch.tensor(_G, dtype=torch.float32, device=taps.device)
    with torch.autocast(taps.device.type, enabled=False):
        points = (torch.kron(g, g) @ taps.flatten(2).float()).to(taps.dtype)
    return points.view(*points.shape[:2], *taps.shape[2:])


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    images = x.contiguous(memory_format=torch.channels_last)
    output: Tensor = _convolve(images, weight, bias, transposed)
    return output if images is x else output.contiguous()


class _WinogradConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _run(x, weight, bias, False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        # Gradients of gradients are torch's.
        direct = (for_x and torch.is_grad_enabled(), for_weight, for_bias)
        grads: list[Tensor | None] = [None, None, None]
        if any(direct):
            shape = [weight.shape[0]] if for_bias else None
            padding, ones = [1, 1], [1, 1]
            grads = list(
                torch.ops.aten.convolution_backward(
                    grad, x, weight, shape, ones, padding, ones, False, [0, 0], 1, list(direct)
                )
            )
        if for_x and not direct[0]:
            grads[0] = _run(grad, weight, None, True)
        return tuple(grads)
