"""Training: typed settings, the loop, run folders and checkpoints."""

from __future__ import annotations

from ceat_fast.training.config import AttackConfig, DataConfig, OptimizerConfig, TrainConfig, load_config
from ceat_fast.training.run import Run
from ceat_fast.training.trainer import NonFiniteLossError, Trainer

__all__ = [
    "AttackConfig",
    "DataConfig",
    "NonFiniteLossError",
    "OptimizerConfig",
    "Run",
    "TrainConfig",
    "Trainer",
    "load_config",
]
