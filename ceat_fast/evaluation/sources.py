"""What can be judged: a run, a checkpoint or weights file, or a model that a function of the user's returns."""

from __future__ import annotations

import inspect
import json
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

from ceat_fast.choices import require_choice
from ceat_fast.data import Dataset, load_dataset
from ceat_fast.ensemble import Ensemble
from ceat_fast.evaluation.fingerprint import digest_model
from ceat_fast.imports import import_function
from ceat_fast.models import build_model
from ceat_fast.training import AttackConfig, Run
from ceat_fast.training.checkpoint import AVERAGE, WEIGHTS, load_weights
from ceat_fast.training.run import EVALUATION, KINDS, build_ensemble
from ceat_fast.training.settings import evaluation_attack

_MEMBER = "members."
_OPTIONS = {"models": "a weights file", "checkpoint": "a run folder"}  # what an option is for


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

    def __post_init__(self) -> None:
        require_choice("checkpoint", self.checkpoint, KINDS)


class Source(ABC):
    """Something to judge.

    Raises:
        ValueError: an option that this kind of source has no use for.
    """

    kind: str  # for errors
    uses: frozenset[str] = frozenset()  # which of `_OPTIONS` matter

    def __init__(self, options: SourceOptions) -> None:
        self.options = options
        unused = SourceOptions()
        for name, purpose in _OPTIONS.items():
            value = getattr(options, name)
            if name not in self.uses and value != getattr(unused, name):
                raise ValueError(f"{name} is for {purpose}, not for {self.kind}: got {name}={value!r}")

    @property
    def attack(self) -> AttackConfig:
        """Budget of the attacks where the user gives none: the run's, or the paper's PGD-20."""
        return evaluation_attack()

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
        """(folder of the journal, file of the result).

        Raises:
            ValueError: the result of another model lies there, or a run.
        """
        folder = self.folder if out is None else Path(out)
        require_no_run(folder)
        path = folder / EVALUATION
        if path.is_file() and (there := _judged_weights(path)) != (here := digest_model(model)):
            raise ValueError(
                f"{str(path)!r} is of another model (weights: {there} there, {here} here); choose another folder "
                "with out, or remove that file"
            )
        return folder / "journal", path

    @property
    def _data(self) -> tuple[str | None, str | None]:
        return self.options.data.name, self.options.data.root


class RunSource(Source):
    """A run folder."""

    kind = "a run folder"
    uses = frozenset({"checkpoint"})

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

    kind = "a checkpoint or a weights file in a run folder"
    uses = frozenset()

    def __init__(self, path: Path, run: Run, options: SourceOptions) -> None:
        super().__init__(run, options)
        self.path = path

    @property
    def about(self) -> dict[str, Any]:
        return {**super().about, "name": f"{self.config.method.label}, {self._name}", "model": str(self.path)}

    @property
    def folder(self) -> Path:
        return self.run.folder / "evaluation" / self._name

    def load(self, dataset: Dataset) -> nn.Module:
        ensemble = build_ensemble(self.config, dataset)
        what = f"the models of the run in {str(self.run.folder)!r}; models names those of another file"
        return _with_weights(ensemble, self.path, what)

    def places(self, model: nn.Module, out: str | os.PathLike[str] | None) -> tuple[Path, Path]:
        return Source.places(self, model, out)

    @property
    def _name(self) -> str:
        """That of the checkpoint, whose files have the same names in every one."""
        if self.path.name not in (WEIGHTS, AVERAGE):
            return self.path.stem
        checkpoint = self.path.resolve().parent
        judged = AVERAGE if (checkpoint / AVERAGE).is_file() else WEIGHTS  # what stands for the checkpoint
        return checkpoint.name if self.path.name == judged else f"{checkpoint.name}-{self.path.stem}"


class WeightsSource(Source):
    """A weights file without a run: a state dict of an `Ensemble`, or of one model."""

    kind = "a weights file"
    uses = frozenset({"models"})

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
        names = self.options.models
        if not names:
            raise ValueError(
                f"models must name the architectures in {str(self.path)!r}, one per member: it is in no run folder"
            )
        members = [build_model(name, dataset.num_classes, dataset.in_channels) for name in names]
        is_ensemble = all(name.startswith(_MEMBER) for name in _read_weights(self.path))
        model = Ensemble(members) if is_ensemble or len(members) > 1 else members[0]
        return _with_weights(model, self.path, f"models={names}")


class FunctionSource(Source):
    """A function `module:function` that returns a model, importable from the working directory or sys.path."""

    kind = "a module:function"

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
        function = import_function("model", self.name)
        try:
            inspect.signature(function).bind()
        except TypeError as error:
            raise ValueError(f"{self.name!r} must be callable without arguments: {error}") from error
        model = function()
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


def require_no_run(folder: Path, own: Path | None = None) -> None:
    """Raise ValueError where results would mix with those of a run, other than the one in `own`."""
    if Run(folder).config_path.is_file() and (own is None or folder.resolve() != own.resolve()):
        raise ValueError(f"out={str(folder)!r} is a run folder; choose another folder, in it or elsewhere")


def _judged_weights(path: Path) -> str | None:
    """The fingerprint of the model in an evaluation.json; None if it has none."""
    try:
        return str(json.loads(path.read_text())["about"]["fingerprint"]["weights"])
    except (KeyError, TypeError, ValueError):
        return None


def _with_weights(model: nn.Module, path: Path, what: str) -> nn.Module:
    """The model with the weights of a file, in eval mode; ValueError where they are not those of `what`."""
    try:
        model.load_state_dict(_read_weights(path))
    except RuntimeError as error:
        raise ValueError(f"{str(path)!r} does not fit {what}: {error}") from error
    return model.eval()


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
