"""Training: typed settings, the loop, run folders and checkpoints."""

from __future__ import annotations

from ceat_fast.training.callbacks import Callback
from ceat_fast.training.checkpoint import CheckpointError
from ceat_fast.training.config import (
    EMA,
    SGD,
    SWA,
    Adam,
    AdamW,
    AttackConfig,
    CheckpointConfig,
    Cosine,
    DataConfig,
    MultiStep,
    OneCycle,
    OptimizerConfig,
    ParallelConfig,
    Schedule,
    TrainConfig,
    ValidationConfig,
    WatchConfig,
    WeightAverage,
    load_config,
)
from ceat_fast.training.interrupts import TrainingInterrupted
from ceat_fast.training.run import Run
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
