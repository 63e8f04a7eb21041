"""A run folder: config.yaml, environment.json, metrics.jsonl, checkpoints/. Nothing is overwritten silently."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ceat_fast.choices import require_choice
from ceat_fast.data import Dataset
from ceat_fast.ensemble import Ensemble
from ceat_fast.environment import describe_environment, resolve_device
from ceat_fast.files import remove_temporaries, write_atomic, write_json
from ceat_fast.models import build_model
from ceat_fast.training.checkpoint import BEST, STEP, checkpoints, load_weights
from ceat_fast.training.config import TrainConfig, config_to_yaml, differences, load_config
from ceat_fast.training.seeds import stream_seed

FREE_TO_CHANGE = (
    "out", "resume", "epochs", "device", "backend", "cuda_graph", "checkpoint", "watch", "parallel", "tensorboard",
    "evaluation", "data.root",
)  # fmt: skip
EVALUATION = "evaluation.json"
KINDS = {"last": STEP, "best": BEST}


class Run:
    """Paths and records of one run folder."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.config_path = self.folder / "config.yaml"
        self.metrics_path = self.folder / "metrics.jsonl"
        self.environment_path = self.folder / "environment.json"
        self.evaluation_path = self.folder / EVALUATION
        self.checkpoints = self.folder / "checkpoints"

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Run:
        """An existing run.

        Raises:
            ValueError: there is none in that folder.
        """
        run = cls(folder)
        if not run.config_path.is_file():
            raise ValueError(f"{os.fspath(folder)!r} is not a run folder: it has no {run.config_path.name}")
        return run

    @classmethod
    def start(cls, config: TrainConfig) -> Run:
        """Create the folder of a new run, or reopen that of a run to resume.

        Raises:
            FileExistsError: the folder is not empty and `config.resume` is false, or holds something else than a run.
            ValueError: the run to resume was started with other settings.
        """
        run = cls(config.out)
        if run.folder.exists() and any(run.folder.iterdir()):
            if not config.resume:
                raise FileExistsError(
                    f"out={config.out!r} exists and is not empty; continue that run with --resume true, "
                    "or choose another folder with --out"
                )
            remove_temporaries(run.folder)
            if any(run.folder.iterdir()):
                run._require_same_settings(config)
        run.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(run.config_path, config_to_yaml(config).encode())  # first, since it makes the folder a run
        run.checkpoints.mkdir(exist_ok=True)
        run._record_environment()
        return run

    @property
    def config(self) -> TrainConfig:
        return load_config(self.config_path)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One record per finished epoch."""
        if not self.metrics_path.exists():
            return []
        # What follows the last line end was cut off when the machine went down.
        lines = self.metrics_path.read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def add_metrics(self, record: dict[str, Any]) -> None:
        with open(self.metrics_path, "a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def forget_metrics_after(self, epochs: int) -> None:
        """Drop the records of epochs that were finished but not saved in a checkpoint: they are trained again."""
        kept = [json.dumps(record, allow_nan=False) + "\n" for record in self.metrics if record["epoch"] <= epochs]
        write_atomic(self.metrics_path, "".join(kept).encode())

    def load_ensemble(self, dataset: Dataset, device: str = "auto", checkpoint: str = "last") -> Ensemble:
        """The ensemble of a checkpoint, in eval mode; the averaged weights where the run keeps an average.

        Args:
            dataset: gives the number of classes and channels.
            device: where to put it.
            checkpoint: "last", or "best" for that of the highest robust accuracy on held-out images.

        Raises:
            ValueError: an unknown name, no such checkpoint yet, or a damaged one.
        """
        require_choice("checkpoint", checkpoint, KINDS)
        found = checkpoints(self.checkpoints, KINDS[checkpoint])
        if not found:
            hint = "" if checkpoint == "last" else " (only runs with validation.images keep one)"
            raise ValueError(f"run {os.fspath(self.folder)!r} has no {checkpoint} checkpoint yet{hint}")
        weights = load_weights(found[0])
        ensemble = build_ensemble(self.config, dataset)
        ensemble.load_state_dict(weights)
        return ensemble.to(resolve_device(device)).eval()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from training in this folder; the lock ends with the process, however that ends.

        Raises:
            OSError: another one is training here.
        """
        if os.name != "posix":
            yield
            return
        import fcntl

        with open(self.folder / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise OSError(f"another process is training in {os.fspath(self.folder)!r}") from error
            yield

    def _require_same_settings(self, config: TrainConfig) -> None:
        if not self.config_path.is_file():
            raise FileExistsError(f"out={config.out!r} holds files but no run; choose another folder with --out")
        changed = differences(self.config, config, ignore=FREE_TO_CHANGE)
        if changed:
            raise ValueError(
                f"cannot resume {config.out!r} with other settings than it was started with: {', '.join(changed)}; "
                "give the same, or choose another folder with --out"
            )

    def _record_environment(self) -> None:
        """Append this session's machine: a run may be resumed on another one."""
        sessions = json.loads(self.environment_path.read_text()) if self.environment_path.exists() else []
        write_json(self.environment_path, [*sessions, describe_environment()])


def build_ensemble(config: TrainConfig, dataset: Dataset) -> Ensemble:
    """Freshly initialised members; member m depends on the seed and m only."""
    members = []
    for number, name in enumerate(config.models):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(config.seed, "init", number))
            members.append(build_model(name, dataset.num_classes, dataset.in_channels))
    return Ensemble(members, backend=config.backend)
