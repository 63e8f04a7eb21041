"""3x3 and 1x1 convolutions of all members in one call, with what follows them, for attacks on frozen members.

cuDNN takes 86 us for the three convolutions of 16 channels that a batch of 128 CIFAR images needs on an H100, one after
the other, and its grouped convolution falls back to direct kernels. Three kernels stand in for libraries:

* "cuda": in bf16, up to 64 channels (csrc/cuda/convolution.cu);
* "triton": on a GPU, every other type and up to 128 channels;
* "cpu": in fp32 and bf16, Winograd's F(4x4, 3x3) for stride 1, the definition for all else (csrc/cpu).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ceat_fast.ops import native, triton_backend
from ceat_fast.ops.buffers import Buffers
from ceat_fast.ops.winograd import CHANNEL_BLOCK, filters_at_points

WIDTHS = (16, 32, 64, 128)  # channels and filters on a GPU: sides of the tiles that matrix units multiply
_CUDA_WIDTHS = (16, 32, 64)
_CPU_TYPES = (torch.float32, torch.bfloat16)
_TAPS = 9
_MIDDLE = 4
_BLOCK = {16: 128}  # output pixels of one Triton program, by channels
_STRIDE_1, _STRIDE_2, _TRANSPOSED_2 = range(3)  # how the native kernels find the taps of a pixel

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

torch.library.define(
    "ceat_fast::member_convolution_into_native",
    "(Tensor(a!) out, Tensor x, Tensor weights, Tensor? bias, Tensor? residual, Tensor? gate, int direction, "
    "bool point, bool flipped, bool relu) -> ()",
)
torch.library.register_fake("ceat_fast::member_convolution_into_native", lambda *_: None)
_convolve_into = torch.ops.ceat_fast.member_convolution_into_native.default


def missing(device_type: str, dtype: torch.dtype) -> str | None:
    """None where one of the kernels runs for this type, else the reason in one line."""
    if device_type != "cpu":
        has_none = f"the kernels for GPUs are for types of at most 4 bytes, not for {dtype}"
        return has_none if dtype == torch.float64 else triton_backend.missing(device_type)
    if dtype not in _CPU_TYPES:
        return f"the kernels for the CPU are for torch.float32 and torch.bfloat16, not for {dtype}"
    return native.missing("cpu")


def padded_channels(channels: int, device_type: str) -> int | None:
    """Channels of the narrowest kernel that takes so many; None if all are narrower."""
    if device_type == "cpu":
        return -(-channels // CHANNEL_BLOCK) * CHANNEL_BLOCK
    return next((count for count in WIDTHS if count >= channels), None)


class MemberWeights:
    """Weights and biases of one convolution of M members, as the kernels read them.

    Args:
        weights: (M, F, 3, 3, C), contiguous; F and C are as many as a kernel takes, see `padded_channels`.
        bias: (M, F).
        stride: 1 or 2; the padding is 1.
        point: only the middle tap is not 0.
        inputs: weights are 0 for all channels from this one on; x then need not have them where `channels_in` says so.
        kernel: "cuda", "triton" or "cpu"; by default the fastest for such weights.

    Who changes them in place calls `refresh` before the next convolution.

    Attributes:
        channels_in: channels that `convolve` wants of x: C, but on a CPU those that matter, an even number in bf16.
        buffers: where results are written on a CPU.

    Raises:
        ValueError: shapes, widths or strides that the kernels cannot take.
    """

    def __init__(
        self,
        weights: Tensor,
        bias: Tensor,
        stride: int,
        point: bool = False,
        *,
        inputs: int | None = None,
        kernel: str | None = None,
    ) -> None:
        if weights.dim() != 5 or weights.shape[2:4] != (3, 3) or not weights.is_contiguous():
            raise ValueError(f"weights must be (M, F, 3, 3, C), contiguous, got {tuple(weights.shape)}")
        self.members, self.filters, _, _, self.channels = weights.shape
        self.kernel = kernel or _fastest(weights)
        device_type = "cpu" if self.kernel == "cpu" else "cuda"
        if any(padded_channels(count, device_type) != count for count in (self.channels, self.filters)):
            allowed = f"multiples of {CHANNEL_BLOCK}" if device_type == "cpu" else f"of {WIDTHS}"
            raise ValueError(f"channels and filters must be {allowed}, got {self.channels} and {self.filters}")
        if bias.shape != weights.shape[:2] or not bias.is_contiguous():
            raise ValueError(f"bias must be {tuple(weights.shape[:2])}, contiguous, got {tuple(bias.shape)}")
        if stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {stride}")
        self.bias, self.stride, self.point = bias, stride, point
        self.buffers = Buffers()
        self.buffers.close()
        self.channels_in = self.channels
        if self.kernel == "cpu":
            per_word = _channels_per_word(weights)
            self.channels_in = -(-(inputs or self.channels) // per_word) * per_word
        self.weights, self.taps = weights, taps_of(weights)
        self.refresh()

    def refresh(self) -> None:
        """Take over weights that were changed in place."""
        if self.kernel != "triton":
            self._forward, self._backward = self._packed_both(self.taps)

    def layouts(self, weights: Tensor, bias: Tensor) -> list[Tensor]:
        """Such weights and biases, and what the CUDA kernel reads of them."""
        return [weights, bias, *(self._packed_both(taps_of(weights)) if self.kernel == "cuda" else ())]

    def read_from(self, weights: Tensor, bias: Tensor, *packed: Tensor) -> None:
        """Take these layouts from now on, which somebody else keeps up to date."""
        self.weights, self.taps, self.bias = weights, taps_of(weights), bias
        if packed:
            self._forward, self._backward = packed

    def release(self) -> None:
        """Drop the packed weights on a CPU, until `refresh`. On a GPU, graphs know their address."""
        if self.kernel == "cpu":
            del self._forward, self._backward

    def _packed_both(self, taps: Tensor) -> tuple[Tensor, Tensor]:
        return self._packed(taps[:, :, : self.channels_in]), self._packed(taps.transpose(2, 3), turned=True)

    def _packed(self, taps: Tensor, *, turned: bool = False) -> Tensor:
        """Matrices (M, 9, ., .) as the native kernel reads them; `turned` if for the gradient."""
        if self.point:
            taps = taps[:, _MIDDLE : _MIDDLE + 1]
        if self.kernel == "cuda":
            return pack(taps)
        if self.stride == 1 and not self.point and taps.shape[2] % CHANNEL_BLOCK == 0:
            taps = filters_at_points(taps.flip(1) if turned else taps)
        members, count, channels, filters = taps.shape
        word = _channels_per_word(taps)
        blocks = taps.reshape(members, count, channels // word, word, filters // CHANNEL_BLOCK, CHANNEL_BLOCK)
        return blocks.permute(0, 4, 1, 2, 5, 3).contiguous()

    def convolve(self, x: Tensor, residual: Tensor | None = None, *, relu: bool) -> Tensor:
        """conv(x) + bias + residual, then perhaps ReLU: (M, B, H, W, C) -> (M, B, ceil(H / s), ceil(W / s), F).

        x has `channels_in` channels. Inputs are contiguous and of the weights' type; sums are in fp32 and rounded once.
        """
        height, width = (-(-side // self.stride) for side in x.shape[2:4])
        shape = self.members, x.shape[1], height, width, self.filters
        _check("x", x, residual, shape, self.channels_in, self.bias.dtype)
        direction = _STRIDE_1 if self.stride == 1 else _STRIDE_2
        if self.kernel == "cpu":
            out = self.buffers.take(x, shape)
            _convolve_into(out, x, self._forward, self.bias, residual, None, direction, self.point, False, relu)
            return out
        if self.kernel == "cuda":
            sizes = self.filters, height, width, direction
            found: Tensor = _convolve(x, self._forward, self.bias, residual, None, *sizes, self.point, False, relu)
            return found
        out = x.new_empty(shape)
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
        _check("grad", grad, residual, shape, self.filters, self.bias.dtype)
        direction = _STRIDE_1 if self.stride == 1 else _TRANSPOSED_2
        if self.kernel == "cpu":
            out = self.buffers.take(grad, shape)
            _convolve_into(out, grad, self._backward, None, residual, gate, direction, self.point, False, False)
            return out
        if self.kernel == "cuda":
            sizes = self.channels, height, width, direction
            flipped = self.stride == 1
            found: Tensor = _convolve(grad, self._backward, None, residual, gate, *sizes, self.point, flipped, False)
            return found
        out = grad.new_empty(shape)
        taps = self.taps.transpose(2, 3)
        return _launch(grad, taps, out, self.stride, transposed=True, residual=residual, gate=gate)


def _fastest(weights: Tensor) -> str:
    if weights.device.type == "cpu":
        return "cpu"
    narrow = weights.shape[4] in _CUDA_WIDTHS and weights.shape[1] in _CUDA_WIDTHS
    bf16 = weights.is_cuda and weights.dtype == torch.bfloat16
    return "cuda" if narrow and bf16 and native.missing("cuda") is None else "triton"


def _channels_per_word(tensor: Tensor) -> int:
    """Of the 4 bytes in which the CPU's kernels read channels."""
    return 4 // tensor.element_size()


def taps_of(weights: Tensor) -> Tensor:
    """(M, F, 3, 3, C) -> matrices (M, 9, C, F), a view."""
    return weights.flatten(2, 3).permute(0, 2, 3, 1)


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


def _check(
    name: str, x: Tensor, residual: Tensor | None, shape: tuple[int, ...], channels: int, dtype: torch.dtype
) -> None:
    if x.dim() != 5 or x.shape[0] != shape[0] or x.shape[4] != channels or not x.is_contiguous() or x.dtype != dtype:
        raise ValueError(
            f"{name} must be ({shape[0]}, B, H, W, {channels}), contiguous, {dtype}, got {tuple(x.shape)} {x.dtype}"
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
    with triton_backend.on_device_of(x):
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
