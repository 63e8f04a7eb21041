"""A run folder: config.yaml, environment.json, metrics.jsonl, checkpoints/. Nothing is overwritten silently."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
LOCK = ".lock"
KINDS = {"last": STEP, "best": BEST}


class Run:
    """Paths and records of one run folder."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.config_path = self.folder / "config.yaml"
        self.metrics_path = self.folder / "metrics.jsonl"
        self.environment_path = self.folder / "environment.json"
        self.ensemble_path = self.folder / "ensemble.json"
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

    def require_usable(self, config: TrainConfig) -> None:
        """Refuse a folder that is neither new nor that of a run to resume with `config`; changes nothing.

        Raises:
            FileExistsError: the folder is not empty and `config.resume` is false, or holds something else than a run.
            ValueError: the run to resume was started with other settings.
        """
        if self._is_empty():
            return
        if not config.resume:
            raise FileExistsError(
                f"out={config.out!r} exists and is not empty; continue that run with --resume true, "
                "or choose another folder with --out"
            )
        if not self.config_path.is_file():
            raise FileExistsError(f"out={config.out!r} holds files but no run; choose another folder with --out")
        changed = differences(self.config, config, ignore=FREE_TO_CHANGE)
        if changed:
            raise ValueError(
                f"cannot resume {config.out!r} with other settings than it was started with: {', '.join(changed)}; "
                "give the same, or choose another folder with --out"
            )

    def begin(self, config: TrainConfig, warn: Callable[[str], object], average: str = "prob") -> None:
        """Write down the settings and the machine of a session; for who has the lock and nothing left to refuse.

        Args:
            config: the settings.
            warn: is told of a damaged file.
            average: that of the ensemble, which no setting has.
        """
        for path in (self.config_path, self.environment_path, self.metrics_path):
            remove_temporaries(self.folder, path.name)  # not those of others: an evaluation does not take the lock
        write_atomic(self.config_path, config_to_yaml(config).encode())  # first, since it makes the folder a run
        if average == "prob":
            self.ensemble_path.unlink(missing_ok=True)
        else:
            write_json(self.ensemble_path, {"average": average})
        self.checkpoints.mkdir(exist_ok=True)
        self._record_environment(warn)

    @property
    def config(self) -> TrainConfig:
        return load_config(self.config_path)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One record per finished epoch.

        Raises:
            ValueError: the file is damaged; names the line.
        """
        if not self.metrics_path.exists():
            return []
        # What follows the last line end was cut off when the machine went down.
        lines = self.metrics_path.read_bytes().split(b"\n")[:-1]
        return [self._record(number, line) for number, line in enumerate(lines, start=1)]

    def _record(self, number: int, line: bytes) -> dict[str, Any]:
        record = None
        with suppress(ValueError):
            record = json.loads(line, parse_constant=_refuse_constant)
        if not isinstance(record, dict) or not isinstance(record.get("epoch"), int):
            raise ValueError(f"{self.metrics_path}: line {number} is not the record of an epoch; remove it")
        return record

    def add_metrics(self, record: dict[str, Any]) -> None:
        line = json.dumps({name: _as_json(name, value) for name, value in record.items()})
        with open(self.metrics_path, "a") as file:
            file.write(line + "\n")
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
            ValueError: an unknown name, no such checkpoint yet, a damaged one, or one of other members than the
                config's, which a Trainer was given.
        """
        require_choice("checkpoint", checkpoint, KINDS)
        found = checkpoints(self.checkpoints, KINDS[checkpoint])
        if not found:
            hint = "" if checkpoint == "last" else " (only runs with validation.images keep one)"
            raise ValueError(f"run {os.fspath(self.folder)!r} has no {checkpoint} checkpoint yet{hint}")
        weights = load_weights(found[0])
        ensemble = build_ensemble(self.config, dataset)
        if self.ensemble_path.is_file():
            ensemble.average = json.loads(self.ensemble_path.read_bytes())["average"]
        try:
            ensemble.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(
                f"{os.fspath(found[0])!r} holds other members than models={self.config.models}: the Trainer was given "
                "an ensemble; load the weights into one like it (ceat_fast.training.checkpoint.load_weights)"
            ) from error
        return ensemble.to(resolve_device(device)).eval()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from training in this folder, which is made if it is not there; the lock ends with the
        process, however that ends.

        Raises:
            OSError: another one is training here.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if os.name != "posix":
            yield
            return
        import fcntl

        with open(self.folder / LOCK, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise OSError(f"another process is training in {os.fspath(self.folder)!r}") from error
            yield

    def _is_empty(self) -> bool:
        """Whether there is nothing but what a session leaves that ended before it made the folder a run."""
        unfinished = f".{self.config_path.name}.tmp-"
        return not self.folder.exists() or all(
            path.name == LOCK or path.name.startswith(unfinished) for path in self.folder.iterdir()
        )

    def _record_environment(self, warn: Callable[[str], object]) -> None:
        """Append this session's machine: a run may be resumed on another one."""
        sessions: Any = []
        if self.environment_path.exists():
            try:
                sessions = json.loads(self.environment_path.read_bytes())
            except ValueError:
                sessions = None
        if not isinstance(sessions, list):
            warn(f"{self.environment_path} is damaged, and begun anew")
            sessions = []
        write_json(self.environment_path, [*sessions, describe_environment()])


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _as_json(name: str, value: Any) -> Any:
    """A value of a record as JSON can hold it: numbers of torch and NumPy become Python's."""
    value = value.item() if getattr(value, "ndim", None) == 0 else value
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the record of an epoch must hold what JSON can, got {name}={value!r}") from error
    return value


def build_ensemble(config: TrainConfig, dataset: Dataset) -> Ensemble:
    """Freshly initialised members; member m depends on the seed and m only."""
    members = []
    for number, name in enumerate(config.models):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(config.seed, "init", number))
            members.append(build_model(name, dataset.num_classes, dataset.in_channels))
    return Ensemble(members, backend=config.backend)
