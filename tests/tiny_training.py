"""A training run that takes a second, for the tests of the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from ceat_fast.methods import CEAT, StepOutput
from ceat_fast.training import (
    EMA,
    SGD,
    AttackConfig,
    Callback,
    CheckpointConfig,
    DataConfig,
    MultiStep,
    TrainConfig,
    Trainer,
    ValidationConfig,
)


class Tiny(nn.Module):
    """BatchNorm and a linear layer: enough for statistics, and fast. Dropout draws numbers of its own."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.dropout(self.norm(x).flatten(1)))


def tiny(num_classes: int, in_channels: int) -> nn.Module:
    assert (num_classes, in_channels) == (10, 1)
    return Tiny()


def tiny_dropout(num_classes: int, in_channels: int) -> nn.Module:
    return Tiny(dropout=0.2)


def tiny_config(out: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "out": str(out),
        "method": CEAT(impl="torch"),
        "models": ["tiny_training:tiny"] * 3,
        "data": DataConfig("digits", train_images=96),
        "attack": AttackConfig(eps=0.1, alpha=0.05, steps=2),
        "evaluation": AttackConfig(eps=0.1, alpha=0.05, steps=2),
        "optimizer": SGD(lr=0.05),
        "schedule": MultiStep(milestones=[2]),
        "epochs": 3,
        "batch_size": 40,  # 96 images: two full batches and a smaller one
        "device": "cpu",
        "backend": "loop",
    }
    return TrainConfig(**(settings | changes))


def everything_config(out: Path, **changes: Any) -> TrainConfig:
    """A run that keeps all the state there is: momentum, an average, the best weights, augmentation, dropout."""
    settings: dict[str, Any] = {
        "models": ["tiny_training:tiny_dropout"] * 3,
        "data": DataConfig("digits", augment="shift", train_images=112),
        "validation": ValidationConfig(images=16, attack=AttackConfig(eps=0.1, alpha=0.05, steps=2)),
        "average": EMA(decay=0.9),
        "checkpoint": CheckpointConfig(every_steps=2),
        "eps_warmup_epochs": 1,
        "batch_size": 20,  # 96 images: four full batches and a smaller one
    }
    return tiny_config(out, **(settings | changes))


def train(config: TrainConfig, **arguments: Any) -> Trainer:
    trainer = Trainer(config, console=Console(quiet=True), **arguments)
    trainer.fit()
    return trainer


def without_time(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in ("seconds", "images_per_second")} for record in records]


VALIDATED = ValidationConfig(images=32, attack=AttackConfig(eps=0.1, alpha=0.05, steps=2))


class At(Callback):
    """Calls a function after one step of the run."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step(self, trainer: Trainer, output: StepOutput) -> None:
        if trainer.steps_done == self.step:
            self.action()


class Judge(Callback):
    """Puts given robust accuracies in the place of the measured ones."""

    def __init__(self, *robust: float) -> None:
        self.robust = list(robust)

    def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        record["val_adv_accuracy"] = self.robust[record["epoch"] - 1]
        record["weights"] = trainer.judged.members[0].fc.weight.sum().item()
