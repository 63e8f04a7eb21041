"""3x3 convolutions of all members in one launch, with what follows them, for attacks on frozen members.

cuDNN takes 86 us for the three convolutions of 16 channels that a batch of 128 CIFAR images needs on an H100, one after
the other, and its grouped convolution falls back to direct kernels. Two kernels stand in for it: a CUDA one in bf16 for
up to 64 channels (csrc/cuda/convolution.cu), and a Triton one for every other type and width.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ceat_fast.ops import native, triton_backend

WIDTHS = (16, 32, 64, 128)  # channels and filters: sides of the tiles that matrix units multiply
_NATIVE_WIDTHS = (16, 32, 64)
_TAPS = 9
_MIDDLE = 4
_BLOCK = {16: 128}  # output pixels of one Triton program, by channels
_STRIDE_1, _STRIDE_2, _TRANSPOSED_2 = range(3)  # how the CUDA kernel finds the taps of a pixel

SIGNATURE = (
    "(Tensor x, Tensor weights, Tensor? bias, Tensor? residual, Tensor? gate, int filters, int out_height, "
    "int out_width, int direction, bool point, bool flipped, bool relu) -> Tensor"
)


def _fake(x: Tensor, weights: Tensor, bias: Any, residual: Any, gate: Any, *numbers: int) -> Tensor:
    filters, height, width = numbers[:3]
    return x.new_empty(*x.shape[:2], height, width, filters)


torch.library.define("ceat_fast::member_convolution_native", SIGNATURE)
torch.library.register_fake("ceat_fast::member_convolution_native", _fake)
_convolve = torch.ops.ceat_fast.member_convolution_native.default


def missing(device_type: str) -> str | None:
    """None where one of the kernels runs for every type, else the reason in one line."""
    return triton_backend.missing(device_type)


class MemberWeights:
    """Weights and biases of one convolution of M members, as the kernels read them.

    Args:
        weights: (M, F, 3, 3, C), contiguous; F and C are of `WIDTHS`.
        bias: (M, F).
        stride: 1 or 2; the padding is 1.
        point: only the middle tap is not 0.

    Who changes them in place calls `refresh` before the next convolution.

    Raises:
        ValueError: shapes, widths or strides that the kernels cannot take.
    """

    def __init__(self, weights: Tensor, bias: Tensor, stride: int, point: bool = False) -> None:
        if weights.dim() != 5 or weights.shape[2:4] != (3, 3) or not weights.is_contiguous():
            raise ValueError(f"weights must be (M, F, 3, 3, C), contiguous, got {tuple(weights.shape)}")
        self.members, self.filters, _, _, self.channels = weights.shape
        if self.channels not in WIDTHS or self.filters not in WIDTHS:
            raise ValueError(f"channels and filters must be of {WIDTHS}, got {self.channels} and {self.filters}")
        if bias.shape != weights.shape[:2] or not bias.is_contiguous():
            raise ValueError(f"bias must be {tuple(weights.shape[:2])}, contiguous, got {tuple(bias.shape)}")
        if stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {stride}")
        self.bias, self.stride, self.point = bias, stride, point
        self.taps = weights.flatten(2, 3).permute(0, 2, 3, 1)  # (M, 9, C, F), a view
        narrow = self.channels in _NATIVE_WIDTHS and self.filters in _NATIVE_WIDTHS
        self._is_native = narrow and weights.dtype == torch.bfloat16 and native.missing(weights.device.type) is None
        self._is_native = self._is_native and weights.is_cuda
        self.refresh()

    def refresh(self) -> None:
        """Take over weights that were changed in place."""
        if self._is_native:
            taps = self.taps[:, _MIDDLE : _MIDDLE + 1] if self.point else self.taps
            self._forward, self._backward = pack(taps), pack(taps.transpose(2, 3))

    def convolve(self, x: Tensor, residual: Tensor | None = None, *, relu: bool) -> Tensor:
        """conv(x) + bias + residual, then perhaps ReLU: (M, B, H, W, C) -> (M, B, ceil(H / s), ceil(W / s), F).

        Inputs are contiguous and of the weights' type; sums are in fp32 and rounded once.
        """
        height, width = (-(-side // self.stride) for side in x.shape[2:4])
        _check(x, residual, (self.members, x.shape[1], height, width, self.filters), self.channels, self.bias.dtype)
        if self._is_native:
            direction = _STRIDE_1 if self.stride == 1 else _STRIDE_2
            sizes = self.filters, height, width, direction
            out: Tensor = _convolve(x, self._forward, self.bias, residual, None, *sizes, self.point, False, relu)
            return out
        out = x.new_empty(*x.shape[:2], height, width, self.filters)
        return _launch(x, self.taps, out, self.stride, bias=self.bias, residual=residual, relu=relu)

    def input_gradient(
        self, grad: Tensor, height: int, width: int, residual: Tensor | None = None, gate: Tensor | None = None
    ) -> Tensor:
        """The gradient for an input of that size, plus `residual`, where `gate` is positive: -> (M, B, H, W, C).

        Args:
            grad: of the output before ReLU, (M, B, ., ., F), contiguous.
            height, width: H and W of the input.
            residual: gradients that the input has from elsewhere.
            gate: the input itself where it came out of a ReLU: the result is then the gradient before that ReLU.
        """
        shape = self.members, grad.shape[1], height, width, self.channels
        _check(grad, residual, shape, self.filters, self.bias.dtype)
        if self._is_native:
            direction = _STRIDE_1 if self.stride == 1 else _TRANSPOSED_2
            sizes = self.channels, height, width, direction
            flipped = self.stride == 1
            out: Tensor = _convolve(grad, self._backward, None, residual, gate, *sizes, self.point, flipped, False)
            return out
        out = grad.new_empty(shape)
        taps = self.taps.transpose(2, 3)
        return _launch(grad, taps, out, self.stride, transposed=True, residual=residual, gate=gate)


def pack(taps: Tensor) -> Tensor:
    """Matrices (M, T, C, F) in the order in which the CUDA kernel's lanes hold them; see csrc/cuda/convolution.cu."""
    members, count, channels, filters = taps.shape
    # c = 32 group + 8 t + 4 step + place, without groups and steps where there are 16; f likewise.
    steps, tiles = min(channels // 16, 2), min(filters // 8, 4)
    digits = channels // (16 * steps), 4, steps, 4, filters // (8 * tiles), 4, tiles, 2
    split = taps.reshape(members, count, *digits)
    # (M, T, group, t, step, place, group', quad, tile, parity): the last four digits of a filter name a column.
    order = (0, 1, 2, 4, 6, 8, 7, 9, 3, 5)
    return split.permute(order).reshape(members, count, channels // 16, filters // 8, 32, 4).contiguous()


def _check(x: Tensor, residual: Tensor | None, shape: tuple[int, ...], channels: int, dtype: torch.dtype) -> None:
    if x.dim() != 5 or x.shape[0] != shape[0] or x.shape[4] != channels or not x.is_contiguous() or x.dtype != dtype:
        raise ValueError(
            f"x must be ({shape[0]}, B, H, W, {channels}), contiguous, {dtype}, got {tuple(x.shape)} {x.dtype}"
        )
    if residual is not None and (residual.shape != shape or residual.dtype != dtype or not residual.is_contiguous()):
        raise ValueError(f"residual must be {shape}, contiguous, {dtype}, got {tuple(residual.shape)} {residual.dtype}")


def _launch(
    x: Tensor,
    taps: Tensor,
    out: Tensor,
    stride: int,
    *,
    transposed: bool = False,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    members, samples, height, width, channels = x.shape
    pixels = samples * out.shape[2] * out.shape[3]
    if not pixels:
        return out
    block = _BLOCK.get(channels, 64)
    _kernel()[-(-pixels // block), members](
        x,
        taps,
        x if bias is None else bias,
        x if residual is None else residual,
        x if gate is None else gate,
        out,
        samples,
        height,
        width,
        out.shape[2],
        out.shape[3],
        *taps.stride(),
        CHANNELS=channels,
        FILTERS=out.shape[4],
        STRIDE=stride,
        TRANSPOSED=transposed,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_GATE=gate is not None,
        RELU=relu,
        BLOCK=block,
        num_warps=4,
    )
    return out


def _kernel() -> Any:
    return import_module("ceat_fast.ops.convolution_kernel").member_convolution_kernel
