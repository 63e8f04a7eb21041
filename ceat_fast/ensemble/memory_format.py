"""Runs modules on images in channels_last, and as they came where a forward cannot do with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ceat_fast.ensemble.convolutions import is_traced

Result = TypeVar("Result")


class ChannelsLast:
    """Calls on images in channels_last, until one fails on them that succeeds without: a forward with `view`, say."""

    def __init__(self) -> None:
        self._proved: set[tuple[Any, ...]] = set()
        self._refused = False

    def run(
        self, call: Callable[[Sequence[Tensor]], Result], inputs: Sequence[Tensor], root: nn.Module, own: bool = False
    ) -> Result:
        """The call on the inputs.

        Args:
            root: what the call runs. Its buffers, and torch's generators, are as before when the call begins anew.
            own: whether its weights may be rearranged, which would bring channels_last back.
        """
        arranged = inputs if self._refused else [channels_last(x) for x in inputs]
        if self._refused or is_traced():  # what is traced is not tried
            return call(arranged)
        key = root.training, *(x.shape[1:] for x in inputs)
        if key in self._proved:
            return call(arranged)
        before, generators = [buffer.clone() for buffer in root.buffers()], _generators(inputs)
        try:
            result = call(arranged)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            with torch.no_grad():
                for buffer, value in zip(root.buffers(), before, strict=True):
                    buffer.copy_(value)
            for generator, state in generators:
                generator.set_state(state)
            if own:
                root.to(memory_format=torch.contiguous_format)
            result = call(inputs)  # raises by itself where the fault is another one
            self._refused = True
            return result
        self._proved.add(key)
        return result


def channels_last(x: Tensor) -> Tensor:
    """`x` in that memory format; what is no image batch, or inside torch.vmap, stays as it is."""
    if x.dim() != 4 or torch._C._are_functorch_transforms_active():
        return x
    return x.contiguous(memory_format=torch.channels_last)


def _generators(inputs: Sequence[Tensor]) -> list[tuple[torch.Generator, Tensor]]:
    """Those that a call may draw from, with their states."""
    used = [torch.default_generator]
    used += [torch.cuda.default_generators[x.device.index] for x in inputs[:1] if x.is_cuda]
    return [(generator, generator.get_state()) for generator in used]
