"""The runs that test_distributed.py starts with torchrun.

torchrun --nproc-per-node 2 tests/distributed_training.py FOLDER SCENARIO ...
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_training import At, train
from torch import Tensor, nn

from ceat_fast.cli import main as command_line
from ceat_fast.ensemble import Ensemble
from ceat_fast.methods import CEAT, EAT, StepOutput
from ceat_fast.training import (
    EMA,
    SGD,
    AttackConfig,
    Callback,
    CheckpointConfig,
    DataConfig,
    MultiStep,
    ParallelConfig,
    TrainConfig,
    Trainer,
    TrainingInterrupted,
    ValidationConfig,
)
from ceat_fast.training import trainer as pacing
from ceat_fast.training.config import config_to_yaml
from ceat_fast.training.distributed import process_group

STEPS = 20


class Small(nn.Module):
    """Two convolutions with BatchNorm: statistics over samples and positions, and a ReLU between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, width, 3, stride=2, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return self.fc(self.bn2(self.conv2(x)).relu().mean((2, 3)))


def small(num_classes: int, in_channels: int) -> nn.Module:
    return Small(6)


def other(num_classes: int, in_channels: int) -> nn.Module:
    return Small(5)


def given_ensemble(seed: int, average: str) -> Ensemble:
    torch.manual_seed(seed)
    return Ensemble([Small(4), Small(5), Small(4)], backend="loop", average=average)


def config(folder: Path, **changes: Any) -> TrainConfig:
    """20 steps, each of them one epoch, so that the records hold the losses of the steps."""
    settings: dict[str, Any] = {
        "out": str(folder),
        "method": CEAT(lam=1.0, mu=2.0, impl="torch"),
        "models": ["distributed_training:small", "distributed_training:other", "distributed_training:small"],
        "data": DataConfig("digits", train_images=61, augment="shift"),
        "attack": AttackConfig(eps=0.1, alpha=0.04, steps=3),
        "validation": ValidationConfig(images=16, attack=AttackConfig(eps=0.1, alpha=0.05, steps=2), every=10),
        "optimizer": SGD(lr=0.05, grad_clip=2.0),
        "schedule": MultiStep(milestones=[]),
        "average": EMA(decay=0.8),
        "checkpoint": CheckpointConfig(every=10),
        "epochs": STEPS,
        "batch_size": 45,
        "device": "cpu",
        "backend": "loop",
    }
    return TrainConfig(**(settings | changes))


class CountMessages(Callback):
    """Writes how many all-reduces of how many bytes came between the second and the third step, by process. (After the
    first one the processes agree on how often they read, which here is not to depend on how slow the machine is.)"""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        original = dist.all_reduce

        def counted(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
            self.sizes.append(tensor.numel() * tensor.element_size())
            return original(tensor, *arguments, **options)

        dist.all_reduce = counted

    def on_start(self, trainer: Trainer) -> None:
        self.pace, pacing.READ_SECONDS = pacing.READ_SECONDS, 1e6

    def on_end(self, trainer: Trainer) -> None:
        pacing.READ_SECONDS = self.pace

    def on_step(self, trainer: Trainer, output: StepOutput) -> None:
        if trainer.steps_done == 3:
            path = trainer.run.folder / f"messages-{os.environ['RANK']}.json"
            path.write_text(json.dumps({"messages": len(self.sizes), "bytes": sum(self.sizes)}))
        self.sizes.clear()


SCENARIOS: dict[str, dict[str, Any]] = {
    "data": {},
    "data_vmap": {"models": ["distributed_training:small"] * 3, "backend": "vmap", "epochs": 5},
    "data_local_statistics": {"parallel": ParallelConfig(sync_batchnorm=False), "epochs": 2},
    "members": {"parallel": ParallelConfig(members=2)},
    "members_eat": {"parallel": ParallelConfig(members=2), "method": EAT(), "epochs": 5},
    "members_filtered": {
        "parallel": ParallelConfig(members=2),
        "method": CEAT(samples="consistent", impl="torch"),
        "epochs": 5,
    },
    "members_bf16": {"parallel": ParallelConfig(members=2), "precision": "bf16", "epochs": 5},
    "own_data": {"epochs": 3},
    "own_members": {"epochs": 3, "parallel": ParallelConfig(members=2)},
    "own_members_logit": {"epochs": 3, "parallel": ParallelConfig(members=2)},
    "interrupted": {"parallel": ParallelConfig(members=2)},
    "failing": {},
    "killed": {},
    "counted_data": {"epochs": 1, "batch_size": 16, "data": DataConfig("digits", train_images=80)},
    "counted_members": {
        "epochs": 1,
        "batch_size": 16,
        "data": DataConfig("digits", train_images=80),
        "parallel": ParallelConfig(members=2),
    },
    "mesh": {"parallel": ParallelConfig(members=2), "epochs": 5},
}


AVERAGES = {"own_data": "prob", "own_members": "prob", "own_members_logit": "logit"}


def main(folder: str, *names: str) -> None:
    torch.set_num_threads(1)
    second = os.environ["RANK"] == "1"
    with process_group("cpu"):
        for name in names:
            settings = config(Path(folder) / name, **SCENARIOS[name])
            if name == "failing":
                print("all others have ended", flush=True)
                train(settings, callbacks=[At(3, lambda: sys.exit("the second process fails") if second else None)])
            elif name == "killed":
                train(settings, callbacks=[At(3, lambda: os.kill(os.getpid(), signal.SIGKILL) if second else None)])
            elif name == "mesh":
                path = Path(folder) / f"mesh-{os.environ['RANK']}.yaml"
                path.write_text(config_to_yaml(settings))
                assert command_line(["train", "--config", str(path)]) == 0
            elif name.startswith("own"):
                train(settings, ensemble=given_ensemble(int(os.environ["RANK"]), AVERAGES[name]))
            elif name.startswith("counted"):
                train(settings, callbacks=[CountMessages()])
            elif name == "interrupted":
                try:
                    train(settings, callbacks=[At(7, lambda: os.kill(os.getpid(), signal.SIGTERM) if second else None)])
                except TrainingInterrupted as interruption:
                    print(f"process {os.environ['RANK']} ends with {interruption.exit_code}", flush=True)
            else:
                train(settings)


if __name__ == "__main__":
    main(*sys.argv[1:])
