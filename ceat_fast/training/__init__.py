"""Training: typed settings, the loop, run folders and checkpoints."""

from __future__ import annotations

from ceat_fast.training.averaging import EMA, SWA, WeightAverage
from ceat_fast.training.callbacks import Callback
from ceat_fast.training.checkpoint import CheckpointError
from ceat_fast.training.config import TrainConfig, load_config
from ceat_fast.training.interrupts import TrainingInterrupted
from ceat_fast.training.optimizers import SGD, Adam, AdamW, OptimizerConfig
from ceat_fast.training.run import Run
from ceat_fast.training.schedules import Cosine, MultiStep, OneCycle, Schedule
from ceat_fast.training.settings import (
    AttackConfig,
    CheckpointConfig,
    DataConfig,
    ParallelConfig,
    ValidationConfig,
    WatchConfig,
)
from ceat_fast.training.trainer import Trainer
from ceat_fast.training.watch import NonFiniteLossError, TrainingStoppedError

__all__ = [
    "EMA",
    "SGD",
    "SWA",
    "Adam",
    "AdamW",
    "AttackConfig",
    "Callback",
    "CheckpointConfig",
    "CheckpointError",
    "Cosine",
    "DataConfig",
    "MultiStep",
    "NonFiniteLossError",
    "OneCycle",
    "OptimizerConfig",
    "ParallelConfig",
    "Run",
    "Schedule",
    "TrainConfig",
    "Trainer",
    "TrainingInterrupted",
    "TrainingStoppedError",
    "ValidationConfig",
    "WatchConfig",
    "WeightAverage",
    "load_config",
]
