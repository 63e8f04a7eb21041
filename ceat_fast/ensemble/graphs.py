"""Forward and backward of a frozen ensemble as CUDA graphs: a network's few hundred launches become two."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, cast

import torch
from torch import Tensor

# Each captured shape keeps its activations; attacks use a few batch sizes at a time.
_MOST_SHAPES = 8

Call = Callable[[Tensor], Tensor]


class GraphedCalls:
    """Captured versions of calls x -> y whose other tensors stay where they are, by shape and a key."""

    def __init__(self) -> None:
        self._calls: OrderedDict[Hashable, Call] = OrderedDict()

    def __call__(self, key: Hashable, call: Call, x: Tensor) -> Tensor:
        """`call(x)`, captured at the first use of the key with this shape, type and device; `x` requires a gradient."""
        place = key, x.shape, x.stride(), x.dtype, x.device
        if place not in self._calls:
            sample = x.detach().clone().requires_grad_()
            self._calls[place] = cast(Call, torch.cuda.make_graphed_callables(call, (sample,)))
            if len(self._calls) > _MOST_SHAPES:
                self._calls.popitem(last=False)
        self._calls.move_to_end(place)
        # The graph's own buffers are overwritten by its next replay.
        return self._calls[place](_OwnGradient.apply(x)).clone()


class _OwnGradient(torch.autograd.Function):
    """The identity, whose gradient is a copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clone()
