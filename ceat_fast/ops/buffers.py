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


class Buffers:
    """Tensors (M, B, ...) of shapes that come again, each lent until nobody else refers to its memory."""

    def __init__(self) -> None:
        self._kept: defaultdict[tuple[int, ...], list[Tensor]] = defaultdict(list)
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
            kept = self._kept[shape]
            free = next((tensor for tensor in kept if _is_free(tensor)), None)
            if free is None:
                free = like.new_empty(shape)
                kept.append(free)
            return free.view(shape)

    def close(self) -> None:
        """Let go of everything, and keep nothing until `open`."""
        self._is_open = False
        self._kept.clear()

    def open(self) -> None:
        """Keep what is lent from now on."""
        self._is_open = True


def _is_free(tensor: Tensor) -> bool:
    # One use is the tensor's own, one the storage object's that is asked here.
    return bool(_uses(tensor.untyped_storage()._cdata) == 2)  # type: ignore[misc]
