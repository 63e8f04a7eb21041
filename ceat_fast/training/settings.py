"""Parts of the settings tree that hold values and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field

from ceat_fast.attacks import PGD
from ceat_fast.choices import require_choice
from ceat_fast.data import AUGMENTATIONS, require_dataset_name
from ceat_fast.training.checks import require, require_positive

REACTIONS = ("stop", "warn", "off")


@dataclass
class DataConfig:
    """Which data set.

    Args:
        name: cifar10, cifar100, svhn, digits, or "module:function" of your own, called with the folder.
        root: folder of its files; the library's default if not given.
        augment: "auto" (what suits the data set), "none", "shift", "crop" or "crop_flip".
        train_images: use only the first so many training images, for quick tries.
    """

    name: str = "cifar10"
    root: str | None = None
    augment: str = "auto"
    train_images: int | None = None

    def __post_init__(self) -> None:
        require_dataset_name(self.name)
        require_choice("augmentation", self.augment, ("auto", *AUGMENTATIONS))
        require_positive(self, "data.", "train_images")


@dataclass
class AttackConfig:
    """An Linf PGD attack on images in [0, 1].

    Args:
        eps: radius, a number or a fraction such as "8/255".
        alpha: step size, a number or a fraction.
        steps: gradient steps.
        restarts: random starts, of which the worst counts.
        random_start: start at a uniformly random point of the ball.
        precision: what the search computes in: "fp32", "bf16", "fp16" or "auto" (bf16 where the device is made for it).
    """

    eps: float | str = 0.031
    alpha: float | str = 0.007
    steps: int = 10
    restarts: int = 1
    random_start: bool = True
    precision: str = "fp32"

    def __post_init__(self) -> None:
        PGD(**vars(self))  # refuses what is out of range


def evaluation_attack() -> AttackConfig:
    """The budget that the paper judges with (section 4.1)."""
    return AttackConfig(eps=0.031, alpha=0.007, steps=20)


@dataclass
class ValidationConfig:
    """Training images that are held out and judged while training, clean and under PGD.

    Args:
        images: how many to hold out, the same ones for every seed; none by default. With them, the checkpoint with the
            highest robust accuracy is kept as the best one.
        attack: the attack on the ensemble.
        every: epochs between two judgements; the last epoch always has one.
    """

    images: int = 0
    attack: AttackConfig = field(default_factory=AttackConfig)
    every: int = 1

    def __post_init__(self) -> None:
        require(self.images >= 0, "validation.images", self.images, "at least 0")
        require_positive(self, "validation.", "every")


@dataclass
class CheckpointConfig:
    """When the state of the run is saved; it also is after the last epoch and on SIGTERM or Ctrl-C.

    Args:
        every: epochs between two checkpoints.
        every_steps: save also after so many optimizer steps, for epochs that take long.
        keep: how many of the newest to keep, at least 1; with 2 a damaged one costs only the time since the one before.
    """

    every: int = 1
    every_steps: int | None = None
    keep: int = 2

    def __post_init__(self) -> None:
        require_positive(self, "checkpoint.", "every", "every_steps", "keep")


@dataclass
class WatchConfig:
    """What is done about a run that goes wrong: "stop", "warn" or "off". NaN losses and weights always stop it.

    Args:
        collapse: a member that for `patience` epochs is right no more often than always naming the most frequent class.
        overfitting: catastrophic overfitting, seen on held-out images: robust accuracy falls by `drop` below its best
            while the training loss is lower than it was then.
        patience: epochs.
        drop: fall of the robust accuracy, in (0, 1).
    """

    collapse: str = "warn"
    overfitting: str = "warn"
    patience: int = 3
    drop: float = 0.1

    def __post_init__(self) -> None:
        require_choice("watch.collapse", self.collapse, REACTIONS)
        require_choice("watch.overfitting", self.overfitting, REACTIONS)
        require_positive(self, "watch.", "patience")
        require(0 < self.drop < 1, "watch.drop", self.drop, "in (0, 1)")


@dataclass
class ParallelConfig:
    """How the processes that torchrun started share the work (docs/scaling.md).

    Args:
        members: over how many processes the members are spread. The others split each batch: N processes are N/members
            groups of this size.
        sync_batchnorm: BatchNorm normalises by the statistics of the whole batch, as one process does. Without it each
            process uses those of its own part.
    """

    members: int = 1
    sync_batchnorm: bool = True

    def __post_init__(self) -> None:
        require_positive(self, "parallel.", "members")
