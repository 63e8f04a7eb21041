"""What the processes of a training send each other in one optimizer step, by formula (docs/scaling.md).

    python bench/wire.py

The formulas are tested against the messages of two real processes (tests/test_distributed.py). Every message is an
all-reduce; a ring moves 2 (n - 1) / n times its size out of each of its n processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from ceat_fast.models import resnet20

FLOAT = 4  # bytes


@dataclass(frozen=True)
class Setting:
    """One training: D x R processes, D parts of the batch and R parts of the members."""

    data_ranks: int
    member_ranks: int
    members: int  # M
    batch: int  # images in the part of one process, b
    pixels: int  # numbers in an image
    classes: int  # K
    attack_steps: int
    channels: tuple[int, ...]  # of every BatchNorm of a member
    parameters: int  # of a member
    forwards: int = 2  # passes that are trained: 2 for CEAT, 1 for EAT
    parts: int = 7  # numbers per member and sample that the method logs
    batched: bool = True  # members of a process run batched: their statistics share a message

    @property
    def local_members(self) -> int:
        """Members of the process that has most."""
        return -(-self.members // self.member_ranks)


class Traffic(NamedTuple):
    """All-reduces of one kind in one step."""

    what: str
    ranks: int  # processes that take part
    messages: int
    size: int  # bytes, of all messages together


def traffic(s: Setting) -> list[Traffic]:
    """What one process takes part in during a step."""
    found = []
    if s.data_ranks > 1:
        copies = 1 if s.batched else s.local_members
        layers, channels = len(s.channels), sum(s.channels)
        statistics = s.forwards * s.local_members * 2 * (2 * channels + layers) * FLOAT
        found.append(Traffic("weight gradients", s.data_ranks, 1, s.local_members * s.parameters * FLOAT))
        found.append(Traffic("BatchNorm sums", s.data_ranks, s.forwards * copies * 4 * layers, statistics))
    if s.member_ranks > 1:
        probabilities = s.members * s.batch * FLOAT
        passes = s.attack_steps + s.forwards
        found.append(Traffic("true-class probabilities", s.member_ranks, passes, passes * probabilities))
        gradients = s.attack_steps * s.batch * s.pixels * FLOAT
        found.append(Traffic("input gradients", s.member_ranks, s.attack_steps, gradients))
        logged = s.members * (1 + s.batch * (s.parts + s.forwards * s.classes)) * FLOAT
        found.append(Traffic("what is logged", s.member_ranks, 1, logged))
    return found


def sent(item: Traffic) -> float:
    """Bytes that a ring moves out of each process."""
    return 2 * (item.ranks - 1) / item.ranks * item.size


def paper(data_ranks: int, member_ranks: int, members: int) -> Setting:
    """ResNet-20 on CIFAR-10, CEAT with PGD-10, 128 images per part of the batch."""
    model = resnet20()
    channels = tuple(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    parameters = sum(p.numel() for p in model.parameters())
    return Setting(data_ranks, member_ranks, members, 128, 3 * 32 * 32, 10, 10, channels, parameters)


def main() -> None:
    print("ResNet-20, CIFAR-10, CEAT, PGD-10, 128 images per part of the batch, members batched; MB = 10^6 bytes\n")
    print("| processes | D x R | members | what | messages | MB | MB out of each process |")
    print("|---|---|---|---|---|---|---|")
    for data_ranks, member_ranks, members in ((8, 1, 3), (1, 8, 8), (64, 1, 3), (8, 8, 8)):
        setting = paper(data_ranks, member_ranks, members)
        head = f"{data_ranks * member_ranks} | {data_ranks} x {member_ranks} | {members}"
        for item in traffic(setting):
            print(f"| {head} | {item.what} | {item.messages} | {item.size / 1e6:.3f} | {sent(item) / 1e6:.3f} |")


if __name__ == "__main__":
    main()
