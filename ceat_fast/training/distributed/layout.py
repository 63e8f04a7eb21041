"""Who computes what: a mesh of processes, one axis over the parts of a batch and one over the members."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from ceat_fast.ensemble import Ensemble
from ceat_fast.environment import resolve_device
from ceat_fast.training.distributed.members import SpreadEnsemble

TIMEOUT = timedelta(minutes=10)  # of a collective whose partner is gone without a trace


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Join the processes that torchrun started, within a `with` block; alone, nothing happens.

    GPUs talk by nccl, CPUs by gloo.
    """
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield
        return
    local = local_device(device)
    if local.type == "cuda":
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if local.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def local_device(name: str) -> torch.device:
    """The device of this process: on a GPU machine each process has its own."""
    device = resolve_device(name)
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


class Layout:
    """The place of this process. Alone, every exchange returns what it was given.

    Args:
        device: of this process.
        count: number of members, M.
        member_ranks: over how many processes the members are spread.

    Attributes:
        data_rank, data_ranks: which part of a batch, of how many.
        member_rank, member_ranks: which part of the members, of how many.
        members: indices of the members that this process holds; sizes of the parts differ by one at most.

    Raises:
        ValueError: the processes cannot be arranged like this.
    """

    def __init__(self, device: torch.device, count: int, member_ranks: int = 1) -> None:
        self.device, self.count, self.member_ranks = device, count, member_ranks
        self.rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if world % member_ranks:
            raise ValueError(f"parallel.members={member_ranks} must divide the number of processes, {world}")
        if member_ranks > count:
            raise ValueError(f"parallel.members={member_ranks} needs at least as many members, got {count}")
        self.data_ranks = world // member_ranks
        self.data_rank, self.member_rank = divmod(self.rank, member_ranks)
        self.members = split(count, member_ranks)[self.member_rank]
        self.data_group: dist.ProcessGroup | None = None
        self.member_group: dist.ProcessGroup | None = None
        if world > 1:
            mesh = init_device_mesh(device.type, (self.data_ranks, member_ranks), mesh_dim_names=("data", "members"))
            self.data_group, self.member_group = mesh.get_group("data"), mesh.get_group("members")

    def require_batches(self, images: int, batch_size: int) -> None:
        """Refuse batches that are too small to give every process a part.

        Raises:
            ValueError: says which.
        """
        smallest = images % batch_size or min(images, batch_size)
        if smallest < self.data_ranks:
            raise ValueError(
                f"batch_size={batch_size} cuts {images} training images into batches of which one has {smallest}, "
                f"too few for {self.data_ranks} processes; change batch_size or data.train_images"
            )

    def own(self, whole: Ensemble) -> Ensemble:
        """The ensemble of the members that this process holds."""
        own = whole
        if self.member_ranks > 1:
            own = Ensemble([whole.members[m] for m in self.members], backend=whole.backend, average=whole.average)
        return own

    def spread(self, own: Ensemble) -> Ensemble:
        """The ensemble of all members around this process's."""
        if self.member_group is None or self.member_ranks == 1:
            return own
        return SpreadEnsemble(own, self.members, self.count, self.member_group)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """What the main process does in the `with` block is done before the others go on; its error is theirs too."""
        failure: BaseException | None = None
        try:
            yield
        except Exception as error:
            failure = error
        first = self.from_main(failure)
        if failure is not None or first is not None:
            raise failure or first

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and shows the progress."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.data_ranks == self.member_ranks == 1

    def part(self, tensor: Tensor) -> Tensor:
        """This process's part of a batch; parts differ by one sample at most."""
        return tensor.tensor_split(self.data_ranks)[self.data_rank] if self.data_ranks > 1 else tensor

    def data_sum(self, tensor: Tensor) -> Tensor:
        """The sum over the parts of the batch."""
        return self._reduced(tensor, dist.ReduceOp.SUM) if self.data_ranks > 1 else tensor

    def data_maximum(self, tensor: Tensor) -> Tensor:
        """The maximum over the parts of the batch."""
        return self._reduced(tensor, dist.ReduceOp.MAX) if self.data_ranks > 1 else tensor

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add up the gradients of the parts of the batch, in one message."""
        if self.data_ranks == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        total = self.data_sum(torch.cat([gradient.flatten() for gradient in gradients]))
        sizes = [gradient.numel() for gradient in gradients]
        torch._foreach_copy_(
            gradients, [part.view_as(g) for part, g in zip(torch.split(total, sizes), gradients, strict=True)]
        )

    def largest(self, *numbers: int) -> list[int]:
        """The largest of the processes' numbers, one by one, for all of them to act alike."""
        if self.is_alone:
            return list(numbers)
        tensor = torch.tensor(numbers, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return [int(number) for number in tensor.tolist()]

    def from_main(self, value: Any) -> Any:
        """What the main process gives, a plain value."""
        if self.is_alone:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def gather_members(self, values: Any) -> list[Any] | None:
        """On the main process: what the processes give that hold the first part of the batch, by members; else None."""
        if self.member_ranks == 1:
            return [values] if self.is_main else None
        if self.data_rank > 0:
            return None
        gathered = [None] * self.member_ranks if self.is_main else None
        dist.gather_object(values, gathered, dst=0, group=self.member_group)
        return gathered

    def broadcast(self, module: nn.Module) -> None:
        """Give all processes the tensors of the main one, for models that were not built from the seed."""
        if not self.is_alone:
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor.data, src=0)

    def _reduced(self, tensor: Tensor, operation: Any) -> Tensor:
        result = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(result, operation, group=self.data_group)
        return result


def split(count: int, parts: int) -> list[list[int]]:
    """0 to count-1 in consecutive parts whose sizes differ by one at most, the larger ones first."""
    indices = torch.arange(count).tensor_split(parts)
    return [part.tolist() for part in indices]
