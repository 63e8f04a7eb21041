"""The layers of all members that a fused network consists of, and its convolutions as steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn import functional as F

from ceat_fast.ensemble.group import tied
from ceat_fast.ensemble.traced import by_member, images, rows_of
from ceat_fast.ops import convolution
from ceat_fast.ops.convolution import MemberWeights


class MemberConvolution:
    """A convolution of every member.

    A 1x1 convolution is a 3x3 one of whose taps only the middle one is not 0; channels are filled up with zeros to as
    many as a kernel takes. Unless the kernels are CUDA's, the members' own weights become views into storage of all.
    """

    def __init__(self, layers: Sequence[nn.Conv2d]) -> None:
        first = layers[0]
        self.layers, self.members, self.channels = layers, len(layers), first.in_channels
        padded = convolution.padded_channels(first.in_channels, first.weight.device.type)
        assert padded is not None
        self._padded_channels, self._point = padded, first.kernel_size == (1, 1)
        storage, bias = self.storage([layer.weight for layer in layers], self.biases())
        self.weights = MemberWeights(storage, bias, first.stride[0], self._point, inputs=first.in_channels)
        # For the CUDA kernels all layers' weights are laid out at once, from the members' own tensors.
        self.is_tied = self.weights.kernel != "cuda"
        if self.is_tied:
            for layer, weight, own_bias in zip(layers, storage, bias, strict=True):
                layer.weight.data = self._own(weight)
                if layer.bias is not None:
                    layer.bias.data = own_bias

    def biases(self) -> list[Tensor]:
        """The members' biases, if they have some."""
        return [layer.bias for layer in self.layers if layer.bias is not None]

    @torch.no_grad()
    def storage(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Weights (M, F, 3, 3, C) and biases (M, F) of all members, 0 where they have none."""
        filters = self.layers[0].out_channels
        storage = weights[0].new_zeros(self.members, filters, 3, 3, self._padded_channels)
        bias = weights[0].new_zeros(self.members, filters)
        for place, weight in zip(storage, weights, strict=True):
            self._own(place).copy_(weight)
        for place, own in zip(bias, biases, strict=False):
            place.copy_(own)
        return storage, bias

    def _own(self, weight: Tensor) -> Tensor:
        """The part of a member's storage (F, 3, 3, C) that its weights (F, ., ., .) are in."""
        middle = slice(1, 2) if self._point else slice(None)
        return weight[:, middle, middle, : self.channels].permute(0, 3, 1, 2)

    def __call__(self, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        """(M * B, C, H, W) -> (M * B, F, H', W'), both channels last.

        Raises:
            RuntimeError: x has not C channels.
        """
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise RuntimeError(f"a convolution expected {self.channels} channels, got an input {tuple(x.shape)}")
        skip = None if residual is None else rows_of(residual, self.members)
        return images(self.weights.convolve(self._filled(x, self.weights.channels_in), skip, relu=relu))

    def filled_rows(self, x: Tensor) -> Tensor:
        """(M * B, ., H, W) -> (M, B, H, W, C), filled up with zeros to the channels of the kernel."""
        return self._filled(x, self.weights.channels)

    def input_gradient(self, grad: Tensor, like: Tensor, residual: Tensor | None, gate: Tensor | None) -> Tensor:
        """See `MemberWeights.input_gradient`; `like` is the input."""
        others = [None if t is None else self._filled(t, self.weights.channels) for t in (residual, gate)]
        rows = self.weights.input_gradient(rows_of(grad, self.members), *like.shape[2:], *others)
        return images(rows) if rows.shape[-1] == self.channels else images(rows)[:, : self.channels]

    def _filled(self, x: Tensor, channels: int) -> Tensor:
        missing = channels - x.shape[1]
        return rows_of(F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x, self.members)


class MemberModule:
    """A module of every member: (M * B, ...) -> (M * B, ...)."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules

    def __call__(self, *inputs: Tensor) -> Tensor:
        rows = zip(self.modules, *(by_member(x, len(self.modules)) for x in inputs), strict=True)
        return torch.cat([module(*own) for module, *own in rows])


class VmappedModule(MemberModule):
    """The same in one call. The members' own tensors become views into storage of all."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__(modules)
        named = [named_tensors(module) for module in modules]
        self._stacks = {name: tied([tensors[name] for tensors in named]) for name in named[0]}

    def __call__(self, *inputs: Tensor) -> Tensor:
        return vmapped(self.modules, self._stacks, inputs)


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def vmapped(modules: Sequence[nn.Module], stacks: dict[str, Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """A module of every member with the tensors in these stacks (M, ...), in one call: (M * B, ...) -> (M * B, ...)."""

    def call(tensors: dict[str, Tensor], *own: Tensor) -> Any:
        return functional_call(modules[0], tensors, own)

    output: Tensor = torch.vmap(call)(stacks, *(by_member(x, len(modules)) for x in inputs))
    return output.flatten(0, 1)


@dataclass(frozen=True)
class Convolution:
    """A convolution of all members, perhaps with an addition and a ReLU."""

    output: fx.Node
    layer: MemberConvolution
    x: fx.Node
    residual: fx.Node | None
    relu: bool

    @property
    def inputs(self) -> list[fx.Node]:
        return [self.x] if self.residual is None else [self.x, self.residual]
