"""Chains of 3x3 convolutions of all members in one launch: a stage of a residual network on a GPU, in bf16.

The images of a thread block stay in shared memory through all links (csrc/cuda/chain.cuh). What the links leave for the
gradient is one bit for each ReLU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ceat_fast.ops.convolution import MemberWeights, taps_of

MAX_LINKS = 48
_THREADS = {16: 128, 32: 128, 64: 384}  # of a thread block, by channels, as in csrc/cuda/chain.cu
_TAPS = 9
_NARROW = 8  # columns of an image that is one task wide

torch.library.define(
    "ceat_fast::member_chain_native",
    "(Tensor x, Tensor weights, Tensor bias, Tensor? residual, int residuals, int relus, bool masked, int images) "
    "-> (Tensor, Tensor)",
)
torch.library.define(
    "ceat_fast::member_chain_gradient_native",
    "(Tensor grad, Tensor weights, Tensor masks, Tensor? gate, int residuals, int relus, int images) "
    "-> (Tensor, Tensor)",
)


def _fake(
    x: Tensor, weights: Tensor, bias: Tensor, residual: Any, residuals: int, relus: int, masked: bool, images: int
) -> tuple[Tensor, Tensor]:
    members, samples, height, width, channels = x.shape
    size = members, samples, weights.shape[0], _tasks(height, width, channels), 32
    dtype = torch.int32 if width == _NARROW else torch.int64
    return torch.empty_like(x), x.new_empty(size if masked else (0,), dtype=dtype)


def _fake_gradient(
    grad: Tensor, weights: Tensor, masks: Tensor, gate: Any, residuals: int, relus: int, images: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(grad), torch.empty_like(grad) if residuals & 1 else grad.new_empty(0)


torch.library.register_fake("ceat_fast::member_chain_native", _fake)
torch.library.register_fake("ceat_fast::member_chain_gradient_native", _fake_gradient)


@dataclass(frozen=True)
class Link:
    """One convolution of a chain.

    Attributes:
        weights: of stride 1, with as many filters as channels.
        residual: whether something is added: the input of the link before, or a tensor from outside for the first.
        relu: whether a ReLU follows.
    """

    weights: MemberWeights
    residual: bool
    relu: bool


class Chain:
    """Convolutions one behind the other, each on the output of the one before.

    Args:
        links: 1 to MAX_LINKS of them, of the same members and channels; see `can_be_link`.

    Who changes their weights in place calls `refresh` before the next run.
    """

    def __init__(self, links: Sequence[Link]) -> None:
        self.links = list(links)
        self._residuals = sum(link.residual << number for number, link in enumerate(links))
        self._relus = sum(link.relu << number for number, link in enumerate(links))
        self.refresh()

    def refresh(self) -> None:
        """Take over weights that were changed in place."""
        self.read_from(*self.layouts([(link.weights.weights, link.weights.bias) for link in self.links]))

    def layouts(self, stored: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """What the kernels read of links with these weights (M, C, 3, 3, C) and biases: forward, backward, biases."""
        matrices = [taps_of(weights) for weights, _ in stored]
        return [
            torch.stack([_by_lane(taps) for taps in matrices]),
            torch.stack([_by_lane(taps.transpose(2, 3)) for taps in matrices]),
            torch.stack([bias for _, bias in stored]),
        ]

    def read_from(self, forward: Tensor, backward: Tensor, bias: Tensor) -> None:
        """Take these layouts from now on, which somebody else keeps up to date."""
        self._forward, self._backward, self._bias = forward, backward, bias

    def run(self, x: Tensor, residual: Tensor | None, *, masked: bool) -> tuple[Tensor, Tensor]:
        """-> (output (M, B, H, W, C), masks for `input_gradient` or, without `masked`, nothing).

        Args:
            x: (M, B, H, W, C), contiguous.
            residual: what the first link adds, like x, if it has a residual.
        """
        output: tuple[Tensor, Tensor] = torch.ops.ceat_fast.member_chain_native(
            x, self._forward, self._bias, residual, self._residuals, self._relus, masked, self._images(x)
        )
        return output

    def input_gradient(self, grad: Tensor, masks: Tensor, gate: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """-> (the gradient for x where `gate` is positive, that for the first link's residual or nothing).

        Args:
            grad: of the output, like it.
            masks: from the run in question.
            gate: x where it came out of a ReLU: the first result is then the gradient before that ReLU.
        """
        output: tuple[Tensor, Tensor] = torch.ops.ceat_fast.member_chain_gradient_native(
            grad, self._backward, masks, gate, self._residuals, self._relus, self._images(grad)
        )
        return output

    def _images(self, x: Tensor) -> int:
        """How many images a thread block takes: enough tasks for its warps, but blocks for all multiprocessors."""
        members, samples, height, width, channels = x.shape
        tasks = _tasks(height, width, channels)
        warps = _THREADS[channels] // 32
        room = (_shared_memory(x.device) - _bytes(height, width, channels, 0)) // _image_bytes(height, width, channels)
        share = -(-members * samples // _multiprocessors(x.device))
        return max(1, min(warps // tasks, room, share))


def can_be_link(weights: MemberWeights, height: int, width: int) -> bool:
    """Whether a convolution of images of that size can be a link."""
    channels = weights.channels
    return (
        weights.kernel == "cuda"
        and (weights.stride, weights.point, weights.filters) == (1, False, channels)
        and height % 8 == 0
        and (width == _NARROW or width % 16 == 0)
        and _bytes(height, width, channels, 1) <= _shared_memory(weights.bias.device)
    )


def _tasks(height: int, width: int, channels: int) -> int:
    return height // 8 * max(1, width // 16) * (channels // 16)


def _image_bytes(height: int, width: int, channels: int) -> int:
    return 2 * height * width * channels * 2


def _bytes(height: int, width: int, channels: int, images: int) -> int:
    """Shared memory of a thread block, as in csrc/cuda/chain.h."""
    return 2 * _TAPS * channels**2 * 2 + 16 + images * _image_bytes(height, width, channels)


def _shared_memory(device: torch.device) -> int:
    """What a thread block can have."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _by_lane(taps: Tensor) -> Tensor:
    """Matrices (M, 9, C, F) in the order in which the kernel's lanes hold them; a view."""
    members, count, channels, filters = taps.shape
    # c = 16 step + 8 half + 2 t + parity, f = 8 tile + g, lane = 4 g + t
    split = taps.reshape(members, count, channels // 16, 2, 4, 2, filters // 8, 8)
    return split.permute(0, 1, 2, 6, 7, 4, 3, 5)
