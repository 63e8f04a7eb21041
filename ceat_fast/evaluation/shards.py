"""Sharing an evaluation among the processes that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from torch import distributed

_LONGEST_WAIT = timedelta(days=14)  # the slowest process may have hours of AutoAttack left


@dataclass(frozen=True)
class Shard:
    """This process, number `rank` of `count`."""

    rank: int = 0
    count: int = 1

    def batches(self, samples: int, batch_size: int) -> Iterator[range]:
        """This process's share of the batches [0, batch_size), [batch_size, 2 * batch_size), ..."""
        for first in range(self.rank * batch_size, samples, self.count * batch_size):
            yield range(first, min(first + batch_size, samples))

    def wait_for_all(self) -> None:
        """Return when every process has come here."""
        if self.count == 1:
            return
        # A group of its own: the user's may belong to a GPU, and give up waiting after minutes.
        group = distributed.new_group(backend="gloo", timeout=_LONGEST_WAIT)
        assert isinstance(group, distributed.ProcessGroup)
        distributed.barrier(group)


def is_main_process() -> bool:
    """Whether this process is the one that writes results and talks."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def current_shard() -> Iterator[Shard]:
    """The share of this process: all, unless torchrun (or an initialised `torch.distributed`) says otherwise."""
    if distributed.is_available() and distributed.is_initialized():
        yield Shard(distributed.get_rank(), distributed.get_world_size())
        return
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Shard()
        return
    distributed.init_process_group("gloo", timeout=_LONGEST_WAIT)
    try:
        yield Shard(distributed.get_rank(), count)
    finally:
        distributed.destroy_process_group()
