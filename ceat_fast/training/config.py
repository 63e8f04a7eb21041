"""The typed settings of a training run; command line, YAML and help are derived from it.

A config file is YAML with the same tree (see configs/). The method is given by class name and arguments:

    method: {class_path: CEAT, init_args: {lam: 1, mu: 5}}
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from ceat_fast.attacks import PGD
from ceat_fast.choices import require_choice
from ceat_fast.data import AUGMENTATIONS, DATASETS
from ceat_fast.methods import CEAT, Method


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def _require_positive(owner: object, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        _require(math.isfinite(value) and value > 0, prefix + name, value, "positive and finite")


@dataclass
class DataConfig:
    """Which data set.

    Args:
        name: name of the data set.
        root: folder of its files; the library's default if not given.
        augment: "auto" (what suits the data set), "none", "shift", "crop" or "crop_flip".
        train_images: use only the first so many training images, for quick tries.
    """

    name: str = "cifar10"
    root: str | None = None
    augment: str = "auto"
    train_images: int | None = None

    def __post_init__(self) -> None:
        require_choice("data set", self.name, DATASETS)
        require_choice("augmentation", self.augment, ("auto", *AUGMENTATIONS))
        if self.train_images is not None:
            _require_positive(self, "data.", "train_images")


@dataclass
class AttackConfig:
    """An Linf PGD attack on images in [0, 1].

    Args:
        eps: radius, a number or a fraction such as "8/255".
        alpha: step size, a number or a fraction.
        steps: gradient steps.
        restarts: random starts, of which the worst counts.
        random_start: start at a uniformly random point of the ball.
    """

    eps: float | str = 0.031
    alpha: float | str = 0.007
    steps: int = 10
    restarts: int = 1
    random_start: bool = True

    def __post_init__(self) -> None:
        PGD(**vars(self))  # refuses what is out of range


@dataclass
class OptimizerConfig:
    """SGD, one optimizer per member.

    Args:
        lr: learning rate after warm-up and before the first milestone.
        momentum: momentum, in [0, 1).
        weight_decay: L2 penalty.
        nesterov: Nesterov momentum.
        milestones: epochs at which the learning rate is multiplied by gamma.
        gamma: that factor.
        warmup_epochs: the learning rate rises linearly over so many epochs.
        grad_clip: upper bound of the gradient norm of each member; none by default.
    """

    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    nesterov: bool = False
    milestones: list[int] = field(default_factory=lambda: [75, 95])
    gamma: float = 0.1
    warmup_epochs: int = 0
    grad_clip: float | None = None

    def __post_init__(self) -> None:
        _require_positive(self, "optimizer.", "lr", "gamma")
        _require(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "in [0, 1)")
        _require(0 <= self.weight_decay < math.inf, "optimizer.weight_decay", self.weight_decay, "finite and >= 0")
        _require(not self.nesterov or self.momentum > 0, "optimizer.nesterov", True, "false where momentum is 0")
        ordered = all(0 < a < b for a, b in zip(self.milestones, self.milestones[1:], strict=False))
        _require(ordered, "optimizer.milestones", self.milestones, "epochs in rising order")
        _require(self.warmup_epochs >= 0, "optimizer.warmup_epochs", self.warmup_epochs, ">= 0")
        if self.grad_clip is not None:
            _require_positive(self, "optimizer.", "grad_clip")

    def learning_rate(self, epoch: int) -> float:
        """Learning rate of the epoch (counted from 0)."""
        warmup = min(1.0, (epoch + 1) / (self.warmup_epochs + 1))
        return self.lr * warmup * self.gamma ** sum(epoch >= milestone for milestone in self.milestones)


@dataclass
class TrainConfig:
    """Settings of a training run; the defaults are the paper's for CIFAR-10 (section 4.1).

    Args:
        out: run folder, new or empty unless resume is true.
        method: training method and its settings.
        models: one model name per member, for example [resnet20, resnet26, resnet32].
        data: the data set.
        attack: the attack that makes the training inputs.
        evaluation: the attack that `ceat-fast evaluate` judges the run with.
        optimizer: optimizer and learning rate schedule, per member.
        epochs: passes over the training images.
        batch_size: images per step.
        seed: every random number of the run follows from it.
        device: "auto" (CUDA if there is one), "cpu", "cuda" or "cuda:1".
        backend: execution of the members: "auto", "vmap" or "loop".
        checkpoint_every: epochs between checkpoints; the last epoch always has one.
        resume: continue the run in `out` from its last checkpoint.
    """

    out: str = "runs/train"
    method: Method = field(default_factory=CEAT)
    models: list[str] = field(default_factory=lambda: ["resnet20"] * 3)
    data: DataConfig = field(default_factory=DataConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    evaluation: AttackConfig = field(default_factory=lambda: AttackConfig(steps=20))
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    epochs: int = 120
    batch_size: int = 128
    seed: int = 0
    device: str = "auto"
    backend: str = "auto"
    checkpoint_every: int = 1
    resume: bool = False

    def __post_init__(self) -> None:
        _require(len(self.models) > 0, "models", self.models, "one name per member, at least one")
        _require_positive(self, "", "epochs", "checkpoint_every")
        _require(self.batch_size >= 2, "batch_size", self.batch_size, "at least 2, for BatchNorm's statistics")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "in [0, 2^63)")


def config_parser(*, with_config_option: bool = False) -> Any:
    """jsonargparse's parser of the tree of `TrainConfig`."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    if with_config_option:
        parser.add_argument("--config", action="config", help="YAML file; options after it override its values.")
    parser.add_class_arguments(TrainConfig)
    return parser


def build_config(namespace: Any) -> TrainConfig:
    """The validated config from a parsed namespace."""
    values = config_parser().instantiate(namespace)
    return TrainConfig(**{f.name: getattr(values, f.name) for f in fields(TrainConfig)})


def load_config(path: str | os.PathLike[str]) -> TrainConfig:
    """Read and validate a YAML config file.

    Raises:
        ValueError: unknown keys, wrong types, values out of range; the message names the file.
    """
    from jsonargparse import ArgumentError

    if not Path(path).is_file():
        raise ValueError(f"config file {os.fspath(path)!r} does not exist")
    parser = config_parser()
    try:
        return build_config(parser.parse_path(path))
    except (ArgumentError, ValueError) as error:
        raise ValueError(f"config file {os.fspath(path)!r}: {error}") from error


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """The tree as plain values, as `load_config` reads it."""
    tree = asdict(config)
    method = type(config.method)
    tree["method"] = {"class_path": f"{method.__module__}.{method.__qualname__}", "init_args": tree["method"]}
    return tree


def config_to_yaml(config: TrainConfig) -> str:
    """The text of a config file that `load_config` reads back to an equal config."""
    text: str = yaml.safe_dump(config_to_dict(config), sort_keys=False)
    return text


def differences(a: TrainConfig, b: TrainConfig, ignore: Sequence[str] = ()) -> list[str]:
    """Dotted names of the settings in which two configs differ, apart from the top-level ones to ignore."""

    def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in tree.items():
            flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return flat

    left, right = flatten(config_to_dict(a)), flatten(config_to_dict(b))
    names = sorted(left.keys() | right.keys())
    return [n for n in names if n.split(".")[0] not in ignore and left.get(n, None) != right.get(n, None)]
