"""What can be judged: a run, a checkpoint or weights file, or a model that a function of the user's returns."""

from __future__ import annotations

import os
import pickle
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ceat_fast.data import Dataset, load_dataset
from ceat_fast.ensemble import Ensemble
from ceat_fast.evaluation.fingerprint import digest_model
from ceat_fast.imports import import_function
from ceat_fast.models import build_model
from ceat_fast.training import AttackConfig, Run
from ceat_fast.training.checkpoint import WEIGHTS, load_weights
from ceat_fast.training.run import EVALUATION, build_ensemble

_MEMBER = "members."


@dataclass
class DataChoice:
    """Which data set.

    Args:
        name: name of the data set; that of the run if not given.
        root: folder of its files.
    """

    name: str | None = None
    root: str | None = None


@dataclass
class SourceOptions:
    """How to find what a model needs to be judged.

    Args:
        data: the data set with the test images.
        models: architectures, one per member, of a weights file that lies in no run folder.
        checkpoint: "last" of a run, or "best", that of the highest robust accuracy on held-out images.
    """

    data: DataChoice = field(default_factory=DataChoice)
    models: list[str] = field(default_factory=list)
    checkpoint: str = "last"


class Source(ABC):
    """Something to judge."""

    def __init__(self, options: SourceOptions) -> None:
        self.options = options

    @property
    def attack(self) -> AttackConfig:
        """Budget of the attacks where the user gives none: the run's, or the paper's PGD-20."""
        return AttackConfig(steps=20)

    @property
    @abstractmethod
    def about(self) -> dict[str, Any]:
        """Facts for the result; "name" is what tables call it."""

    @property
    @abstractmethod
    def folder(self) -> Path:
        """Where the result goes unless the user says."""

    @abstractmethod
    def load(self, dataset: Dataset) -> nn.Module:
        """The model, on the CPU."""

    def dataset(self) -> Dataset:
        """The data set.

        Raises:
            ValueError: the user has to name it.
        """
        name, root = self._data
        if name is None:
            raise ValueError("data.name must name a data set: nothing else says which the model is for")
        return load_dataset(name, root)

    def places(self, model: nn.Module, out: str | os.PathLike[str] | None) -> tuple[Path, Path]:
        """(folder of the journal, file of the result)."""
        folder = self.folder if out is None else Path(out)
        return folder / "journal", folder / EVALUATION

    @property
    def _data(self) -> tuple[str | None, str | None]:
        return self.options.data.name, self.options.data.root


class RunSource(Source):
    """A run folder."""

    def __init__(self, run: Run, options: SourceOptions | None = None) -> None:
        super().__init__(options or SourceOptions())
        self.run = run
        self.config = run.config

    @property
    def attack(self) -> AttackConfig:
        return self.config.evaluation

    @property
    def about(self) -> dict[str, Any]:
        settings = self.config
        return {"name": settings.method.label, "model": str(self.run.folder), "architectures": list(settings.models)}

    @property
    def folder(self) -> Path:
        return self.run.folder

    def load(self, dataset: Dataset) -> nn.Module:
        return self.run.load_ensemble(dataset, "cpu", self.options.checkpoint)

    def places(self, model: nn.Module, out: str | os.PathLike[str] | None) -> tuple[Path, Path]:
        if out is not None:
            return super().places(model, out)
        # A run that was trained further has other weights, and may be judged again.
        return self.run.folder / "evaluation" / digest_model(model), self.run.evaluation_path

    @property
    def _data(self) -> tuple[str | None, str | None]:
        name, root = super()._data
        return name or self.config.data.name, root or self.config.data.root


class CheckpointSource(RunSource):
    """A checkpoint or a weights file within a run folder."""

    def __init__(self, path: Path, run: Run, options: SourceOptions) -> None:
        super().__init__(run, options)
        self.path = path

    @property
    def about(self) -> dict[str, Any]:
        return {**super().about, "name": f"{self.config.method.label}, {self.path.stem}", "model": str(self.path)}

    @property
    def folder(self) -> Path:
        return self.run.folder / "evaluation" / self.path.stem

    def load(self, dataset: Dataset) -> nn.Module:
        ensemble = build_ensemble(self.config, dataset)
        ensemble.load_state_dict(_read_weights(self.path))
        return ensemble.eval()

    def places(self, model: nn.Module, out: str | os.PathLike[str] | None) -> tuple[Path, Path]:
        return Source.places(self, model, out)


class WeightsSource(Source):
    """A weights file without a run: a state dict of an `Ensemble`, or of one model."""

    def __init__(self, path: Path, options: SourceOptions) -> None:
        super().__init__(options)
        self.path = path

    @property
    def about(self) -> dict[str, Any]:
        return {"name": self.path.stem, "model": str(self.path), "architectures": list(self.options.models)}

    @property
    def folder(self) -> Path:
        return Path("evaluations") / self.path.stem

    def load(self, dataset: Dataset) -> nn.Module:
        weights = _read_weights(self.path)
        names = self.options.models
        if not names:
            raise ValueError(
                f"models must name the architectures in {str(self.path)!r}, one per member: it is in no run folder"
            )
        members = [build_model(name, dataset.num_classes, dataset.in_channels) for name in names]
        is_ensemble = all(name.startswith(_MEMBER) for name in weights)
        model = Ensemble(members) if is_ensemble or len(members) > 1 else members[0]
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"{str(self.path)!r} does not fit models={names}: {error}") from error
        return model.eval()


class FunctionSource(Source):
    """A function `module:function` that returns a model, importable from the working directory or sys.path."""

    def __init__(self, name: str, options: SourceOptions) -> None:
        super().__init__(options)
        self.name = name

    @property
    def about(self) -> dict[str, Any]:
        return {"name": self.name, "model": self.name}

    @property
    def folder(self) -> Path:
        return Path("evaluations") / re.sub(r"[^\w.-]", "-", self.name)

    def load(self, dataset: Dataset) -> nn.Module:
        model = import_function("model", self.name)()
        if not isinstance(model, nn.Module):
            raise ValueError(f"{self.name!r} must return an nn.Module, got {type(model).__name__}")
        return model.cpu().eval()


def find_source(text: str, options: SourceOptions) -> Source:
    """What `text` names: a run folder, a checkpoint folder, a weights file, or a "module:function".

    Raises:
        ValueError: none of these.
    """
    path = Path(text)
    if path.is_dir() and not _is_checkpoint(path):
        return RunSource(Run.open(path), options)
    if path.exists():
        run = next((Run(parent) for parent in path.resolve().parents if Run(parent).config_path.is_file()), None)
        return WeightsSource(path, options) if run is None or options.models else CheckpointSource(path, run, options)
    if ":" in text:
        return FunctionSource(text, options)
    raise ValueError(f"{text!r} is not a run folder, a checkpoint, a weights file or a module:function")


def _is_checkpoint(path: Path) -> bool:
    return (path / WEIGHTS).is_file()


def _read_weights(path: Path) -> Mapping[str, Tensor]:
    """The state dict of a checkpoint folder or weights file; nothing but tensors is unpickled."""
    if path.is_dir():
        return load_weights(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(f"{str(path)!r} is no file of tensors alone, or is damaged") from error
    if not isinstance(weights, Mapping) or not _all_tensors(list(weights.values())):
        raise ValueError(f"{str(path)!r} must hold a state dict, whose values are tensors, and nothing else")
    return weights


def _all_tensors(values: Sequence[Any]) -> bool:
    return len(values) > 0 and all(isinstance(value, Tensor) for value in values)
