"""Checkpoints: a folder with the weights (safetensors) and the optimizer state (a weights-only loadable file).

A checkpoint appears under its name only when complete, so the newest one is always usable; older ones are then removed.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ceat_fast.files import write_folder

WEIGHTS = "weights.safetensors"
STATE = "state.pt"
PREFIX = "epoch-"


class Checkpoint(NamedTuple):
    """The state after a number of finished epochs."""

    epochs: int
    weights: dict[str, Tensor]  # the ensemble's state_dict
    optimizers: list[dict[str, Any]]  # one state_dict per member


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write the checkpoint into `folder`, then remove the older ones; returns its path."""

    def fill(path: Path) -> None:
        # Members that run batched are views into shared storage, which safetensors refuses: copy.
        save_file({name: tensor.cpu().clone() for name, tensor in checkpoint.weights.items()}, path / WEIGHTS)
        torch.save({"epochs": checkpoint.epochs, "optimizers": checkpoint.optimizers}, path / STATE)
        for name in (WEIGHTS, STATE):
            with open(path / name, "rb") as file:
                os.fsync(file.fileno())

    path = folder / f"{PREFIX}{checkpoint.epochs:05d}"
    older = _checkpoints(folder)
    write_folder(path, fill)
    for old in older:
        shutil.rmtree(old)
    return path


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in `folder`, if there is one."""
    return max(_checkpoints(folder), default=None)


def load_weights(path: Path) -> dict[str, Tensor]:
    """The ensemble's state_dict of a checkpoint."""
    return load_file(path / WEIGHTS)


def load_checkpoint(path: Path, device: torch.device) -> Checkpoint:
    """Read a checkpoint; the optimizer state is loaded with weights_only=True."""
    state = torch.load(path / STATE, map_location=device, weights_only=True)
    return Checkpoint(state["epochs"], load_weights(path), state["optimizers"])


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(PREFIX + "*") if path.is_dir())
