"""Memory that one pass after the other writes to, on a CPU.

malloc gives what a pass frees back to the system, which fills as many pages with zeros for the next pass.
On a GPU torch's own allocator keeps what is freed.
"""

from __future__ import annotations

from collections import defaultdict
from threading import Lock

import torch
from torch import Tensor

# How many tensors use a storage; torch's own graphs of memory rely on it as well.
_uses = getattr(torch._C, "_storage_Use_Count", None)
_USES_OF_A_FREE_ONE = 2  # by the tensor that is kept, and by the object beside it

_Kind = tuple[torch.dtype, tuple[int, ...]]


class Buffers:
    """Tensors (M, B, ...) of shapes that come again, each lent until nobody else refers to its memory."""

    def __init__(self) -> None:
        # With each tensor its storage as an object, which would be made anew to ask for its uses.
        self._kept: defaultdict[_Kind, list[tuple[Tensor, torch.UntypedStorage]]] = defaultdict(list)
        self._samples = 0
        self._lock = Lock()
        self._is_open = True

    def take(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """An uninitialised contiguous tensor of that shape, of the type and device of `like`."""
        if _uses is None or not self._is_open:
            return like.new_empty(shape)
        with self._lock:
            if shape[1] != self._samples:  # another batch size: nothing fits any more
                self._kept.clear()
                self._samples = shape[1]
            kept = self._kept[like.dtype, shape]
            for tensor, storage in kept:
                if _uses(storage._cdata) == _USES_OF_A_FREE_ONE:
                    return tensor.view(shape)
            tensor = like.new_empty(shape)
            kept.append((tensor, tensor.untyped_storage()))
            return tensor.view(shape)

    def close(self) -> None:
        """Let go of everything, and keep nothing until `open`."""
        self._is_open = False
        self._kept.clear()

    def open(self) -> None:
        """Keep what is lent from now on."""
        self._is_open = True
