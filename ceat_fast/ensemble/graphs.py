"""CUDA graphs: of the forward and backward of a frozen ensemble, and of anything else that stays on the device."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

# Each captured shape keeps its activations; attacks use a few batch sizes at a time.
_MOST_SHAPES = 8

Call = Callable[[Tensor], Tensor]
Result = TypeVar("Result")


def capture(call: Callable[[], Result]) -> Callable[[], Result]:
    """A replay of `call`, which is captured but not made; its result lies where the next replay writes again.

    Raises:
        RuntimeError: it waits for the device, or works on memory that a graph cannot use.
    """
    graph = torch.cuda.CUDAGraph()
    with _pool() as pool, torch.cuda.graph(graph, pool=pool):
        result = call()

    def replay(owner: object = call) -> Result:  # what the call works on must live as long as the graph
        graph.replay()
        return result

    return replay


@contextmanager
def _pool() -> Iterator[Any]:
    """A memory pool for a capture. After one that fails, torch stays on the capture's stream and in its pool."""
    stream, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
    try:
        yield pool
    except BaseException:
        torch.cuda.set_stream(stream)
        with suppress(RuntimeError, AttributeError):  # later versions of torch have left the pool by themselves
            torch._C._cuda_endAllocateToPool(stream.device_index, pool)
        raise


def beside(call: Callable[[], Result], device: torch.device) -> Result:
    """The result of `call`, made on a stream of its own as a capture will be, in order with the present stream.

    What a call allocates once and keeps is then no tie to the present stream, which a capture could not wait for.
    """
    if device.type != "cuda":
        return call()
    present, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(present)
    with torch.cuda.stream(stream):
        result = call()
    present.wait_stream(stream)
    return result


class Captures:
    """What was captured of a module, by key; the one that was not used for the longest time is dropped."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Result]) -> Result:
        """What `make` gave when that key was asked for first."""
        if key not in self._kept:
            self._kept[key] = make()
            if len(self._kept) > _MOST_SHAPES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        kept: Result = self._kept[key]
        return kept


class GraphedCalls:
    """Captured versions of calls x -> y whose other tensors stay where they are, by shape and a key."""

    def __init__(self) -> None:
        self._calls = Captures()

    def __call__(self, key: Hashable, call: Call, x: Tensor) -> Tensor:
        """`call(x)`, captured at the first use of the key with this shape, type and device; `x` requires a gradient."""

        def make() -> Call:
            sample = x.detach().clone().requires_grad_()
            with _pool() as pool:
                return cast(Call, torch.cuda.make_graphed_callables(call, (sample,), pool=pool))

        graphed = self._calls.get((key, x.shape, x.stride(), x.dtype, x.device), make)
        # The graph's own buffers are overwritten by its next replay.
        return graphed(_OwnGradient.apply(x)).clone()


class _OwnGradient(torch.autograd.Function):
    """The identity, whose gradient is a copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clone()
