"""The state of a run, from the processes that hold it to a checkpoint and back.

A checkpoint does not depend on how the members and batches were spread: another number of processes can continue it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ceat_fast.ensemble import Ensemble, Execution, Tuned
from ceat_fast.files import remove_folder
from ceat_fast.training.averaging import AveragedEnsemble
from ceat_fast.training.checkpoint import (
    BEST,
    Checkpoint,
    checkpoint_step,
    checkpoints,
    load_checkpoint,
    save_checkpoint,
    usable_checkpoint,
)
from ceat_fast.training.distributed import Layout
from ceat_fast.training.metrics import EpochMetrics
from ceat_fast.training.step import Stepper

_PREFIX = "members."


@dataclass
class Position:
    """Batches done in the epoch (counted from 0), and the seconds that the epoch took so far, over all sessions."""

    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0


class StateKeeper:
    """Saves and restores what this process holds together with the others; the main process writes the files.

    Args:
        folder: of the checkpoints.
        layout: the place of this process.
        ensemble: its members.
        average: their average, if the run keeps one.
        stepper: has the optimizer and what else the steps carry.
    """

    def __init__(
        self, folder: Path, layout: Layout, ensemble: Ensemble, average: AveragedEnsemble | None, stepper: Stepper
    ) -> None:
        self.folder, self.layout, self.ensemble, self.average, self.stepper = folder, layout, ensemble, average, stepper

    @property
    def newest(self) -> str:
        """Which checkpoint there is, for messages."""
        kept = checkpoints(self.folder)
        return f"last checkpoint: {kept[0] if kept else 'none yet'}"

    def require_space(self, keep: int) -> None:
        """Refuse a disk that cannot hold the checkpoints to come: so many, and one more while it is written.

        Raises:
            OSError: says how much is free and how much is needed.
        """
        tensors = [*self.ensemble.parameters(), *self.ensemble.buffers()]
        copies = 1 + (self.average is not None) + self.stepper.config.optimizer.kept_per_weight
        own = copies * sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        whole = own * self.layout.count / len(self.layout.members)
        needed = whole * max(1, keep + 1 - len(checkpoints(self.folder)))
        free = shutil.disk_usage(self.folder if self.folder.exists() else self.folder.parent).free
        if free < needed:
            raise OSError(
                f"the disk of {self.folder} has {free / 1e6:,.1f} MB free, and the checkpoints need about "
                f"{needed / 1e6:,.1f} MB; make room, or choose another folder with out"
            )

    def save(self, step: int, position: Position, metrics: EpochMetrics, keep: int) -> Path | None:
        """Save everything after that many steps, and keep so many checkpoints; the path, on the main process."""
        state = {
            **vars(position),
            "metrics": metrics.combined(self.layout.data_sum, self.layout.data_maximum).state(),
            "optimizer": self._gathered(self.stepper.optimizer.state()),
            "averaged": self.average.count if self.average is not None else 0,
            "stepper": self.stepper.state(),
            # Another execution rounds in other ways.
            "execution": [str(way) for way in self.ensemble.tuned] if self.ensemble.tuned else None,
        }
        weights, average = self._weights()
        if weights is None:
            return None
        return save_checkpoint(self.folder, Checkpoint(step, weights, average, state), keep)

    def save_best(self, step: int) -> None:
        """Save the weights as the best ones."""
        weights, average = self._weights()
        if weights is not None:
            save_checkpoint(self.folder, Checkpoint(step, weights, average, None), 1, BEST)

    def best_step(self) -> int | None:
        """The number of steps after which the best weights were saved, if there are any."""
        kept = checkpoints(self.folder, BEST) if self.layout.is_main else []
        step: int | None = self.layout.from_main(checkpoint_step(kept[0]) if kept else None)
        return step

    def forget_best_after(self, step: int) -> None:
        """Drop best weights of later steps: no checkpoint holds those, so they are trained again."""
        for path in checkpoints(self.folder, BEST):
            if checkpoint_step(path) > step:
                remove_folder(path)

    def restore(self, metrics: EpochMetrics, warn: Callable[[str], object]) -> Position:
        """Continue from the newest usable checkpoint, or from the start where there is none; `warn` is told of damaged
        ones.

        Raises:
            CheckpointError: there are checkpoints, and none can be used.
        """
        found: Path | None = None
        with self.layout.main_first():
            if self.layout.is_main:
                found = usable_checkpoint(self.folder, warn)
        path = self.layout.from_main(found)
        if path is None:
            return Position()
        checkpoint = load_checkpoint(path, self.layout.device)
        assert checkpoint.state is not None
        state = checkpoint.state
        self._load(self.ensemble, checkpoint.weights)
        if self.average is not None and checkpoint.average is not None:
            self._load(self.average.ensemble, checkpoint.average)
            self.average.count = state["averaged"]
        self.stepper.optimizer.load_state([state["optimizer"][m] for m in self.layout.members])
        self.stepper.load_state(state["stepper"])
        if state["execution"] is not None:
            self.run_as(Tuned(*map(Execution.parse, state["execution"])))
        if self.layout.data_rank == 0:  # sums over the processes: one of them continues them
            metrics.load_state(state["metrics"])
        return Position(state["epoch"], state["batch"], state["seconds"])

    def run_as(self, tuned: Tuned) -> None:
        """Let the members, and their average, run in those executions where the backend is "auto"."""
        self.ensemble.tuned = tuned
        if self.average is not None:
            self.average.ensemble.tuned = tuned

    def has_finite_weights(self) -> bool:
        """Whether no weight in any process is NaN or infinite (reads the device)."""
        finite = torch.stack([parameter.isfinite().all() for parameter in self.ensemble.parameters()]).all()
        return self.layout.largest(int(not finite)) == [0]

    def _weights(self) -> tuple[dict[str, Tensor] | None, dict[str, Tensor] | None]:
        """On the main process the state_dict of the ensemble of all members and, where there is one, of its average."""
        average = self.average if self.average is not None and self.average.count else None
        return self._state_dict(self.ensemble), self._state_dict(average.ensemble) if average is not None else None

    def _state_dict(self, ensemble: Ensemble) -> dict[str, Tensor] | None:
        own = [{name: tensor.cpu() for name, tensor in member.state_dict().items()} for member in ensemble.members]
        members = self._gathered(own)
        if members is None:
            return None
        return {f"{_PREFIX}{m}.{name}": tensor for m, member in enumerate(members) for name, tensor in member.items()}

    def _load(self, ensemble: Ensemble, weights: Mapping[str, Tensor]) -> None:
        for m, member in zip(self.layout.members, ensemble.members, strict=True):
            prefix = f"{_PREFIX}{m}."
            member.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})

    def _gathered(self, own: Sequence[Any]) -> list[Any] | None:
        """On the main process one entry per member of the whole ensemble, from the processes' lists; else None."""
        parts = self.layout.gather_members(list(own))
        return None if parts is None else [entry for part in parts for entry in part]
