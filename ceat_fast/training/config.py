"""The typed settings of a training run; command line, YAML and help are derived from it.

A config file is YAML with the same tree (see configs/). What has kinds is given by class name and arguments:

    method: {class_path: CEAT, init_args: {lam: 1, mu: 5}}
    optimizer: {class_path: Adam, init_args: {lr: 0.001}}
    schedule: Cosine
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from importlib import import_module
from inspect import isabstract
from pathlib import Path
from typing import Any

import yaml

from ceat_fast.choices import require_choice
from ceat_fast.ensemble.execution import AUTO, Execution
from ceat_fast.methods import CEAT, Method
from ceat_fast.training.averaging import SWA, WeightAverage
from ceat_fast.training.checks import require, require_positive
from ceat_fast.training.optimizers import SGD, OptimizerConfig
from ceat_fast.training.refusals import readable
from ceat_fast.training.schedules import MultiStep, Schedule
from ceat_fast.training.settings import (
    AttackConfig,
    CheckpointConfig,
    DataConfig,
    ParallelConfig,
    ValidationConfig,
    WatchConfig,
    evaluation_attack,
)

PRECISIONS = ("fp32", "bf16", "fp16")
CAPTURES = ("auto", "on", "off")
_KINDS = (Method, OptimizerConfig, Schedule, WeightAverage)  # written with their class name


@dataclass
class TrainConfig:
    """Settings of a training run; defaults follow section 4.1 of the paper (docs/training.md: what it leaves open).

    Args:
        out: run folder, new or empty unless resume is true.
        method: training method and its settings.
        models: one model name per member, for example [resnet20, resnet26, resnet32].
        data: the data set.
        attack: the attack that makes the training inputs.
        eps_warmup_epochs: the radius and step size of that attack rise linearly, step by step, over so many epochs.
        evaluation: the attack that `ceat-fast evaluate` judges the run with.
        optimizer: SGD, Adam or AdamW, per member.
        schedule: MultiStep, Cosine or OneCycle.
        average: EMA or SWA keeps an average of the weights, which is then what is judged; none by default.
        validation: held-out images, judged while training.
        epochs: passes over the training images.
        batch_size: images per step, over all processes.
        precision: of the passes that are trained: "fp32", "bf16" or "fp16"; weights and losses stay fp32.
        seed: every random number of the run follows from it.
        device: "auto" (CUDA if there is one), "cpu", "cuda" or "cuda:1".
        backend: execution of the members: "auto", or "loop", "vmap", "streams" or "fused", some with options as in
            "loop+channels_last" (see `ceat_fast.Ensemble`).
        cuda_graph: on a GPU, replay the whole step, attack included, as one CUDA graph: "auto" (where the method and
            the other settings allow it), "on" (or refuse the run) or "off".
        checkpoint: when the state is saved.
        watch: what is done about a run that goes wrong.
        parallel: how several processes share the work.
        tensorboard: also write the metrics for TensorBoard, into the run folder.
        resume: continue the run in `out` from its last checkpoint; a new run starts if there is none.
    """

    out: str = "runs/train"
    method: Method = field(default_factory=CEAT)
    models: list[str] = field(default_factory=lambda: ["resnet20"] * 3)
    data: DataConfig = field(default_factory=DataConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    eps_warmup_epochs: int = 0
    evaluation: AttackConfig = field(default_factory=evaluation_attack)
    optimizer: OptimizerConfig = field(default_factory=SGD)
    schedule: Schedule = field(default_factory=MultiStep)
    average: WeightAverage | None = None
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    epochs: int = 120
    batch_size: int = 128
    precision: str = "fp32"
    seed: int = 0
    device: str = "auto"
    backend: str = "auto"
    cuda_graph: str = "auto"
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tensorboard: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        for name, path in (("out", self.out), ("data.root", self.data.root)):
            if not _is_unicode(path):
                raise ValueError(f"{name}={path!r} cannot be written to a config file: it is no valid text")
        require(len(self.models) > 0, "models", self.models, "one name per member, at least one")
        require_positive(self, "", "epochs")
        require(self.batch_size >= 2, "batch_size", self.batch_size, "at least 2, for BatchNorm's statistics")
        require(self.eps_warmup_epochs >= 0, "eps_warmup_epochs", self.eps_warmup_epochs, "at least 0")
        require(0 <= self.seed < 2**63, "seed", self.seed, "in [0, 2^63)")
        require_choice("precision", self.precision, PRECISIONS)
        require_choice("cuda_graph", self.cuda_graph, CAPTURES)
        if self.backend != AUTO:
            Execution.parse(self.backend)
        reached = {"eps_warmup_epochs": self.eps_warmup_epochs, "schedule.warmup_epochs": self.schedule.warmup_epochs}
        if isinstance(self.average, SWA):
            reached["average.start_epoch"] = self.average.start_epoch
        for name, epoch in reached.items():
            require(epoch <= self.epochs, name, epoch, f"at most epochs={self.epochs}")
        if self.watch.overfitting == "stop" and not self.validation.images:
            raise ValueError("watch.overfitting='stop' needs held-out images: set validation.images")


def _is_unicode(path: Any) -> bool:
    """Whether the file system's name is text: bytes that are not come as surrogates."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def config_parser(*, with_config_option: bool = False) -> Any:
    """jsonargparse's parser of the tree of `TrainConfig`."""
    from jsonargparse import ArgumentParser

    from ceat_fast.config_files import ConfigFileParser

    parser = (ConfigFileParser if with_config_option else ArgumentParser)(exit_on_error=False, allow_abbrev=False)
    if with_config_option:
        parser.add_argument("--config", action="config", help="YAML file; options after it override its values.")
    parser.add_class_arguments(TrainConfig)
    return parser


def build_config(namespace: Any) -> TrainConfig:
    """The validated config from a parsed namespace.

    Raises:
        ValueError: a value of another type or out of range.
    """
    _require_values(TrainConfig, namespace)
    try:
        values = config_parser().instantiate(namespace)
    except (TypeError, ValueError) as error:
        raise ValueError(_refused_attack(namespace) or str(error)) from error
    return TrainConfig(**{f.name: getattr(values, f.name) for f in fields(TrainConfig)})


def _require_values(kind: type[Any], values: Any, place: str = "") -> None:
    """Refuse null where a setting must have a value: jsonargparse takes it for all of them."""
    for setting in fields(kind):
        if setting.name not in values:
            continue
        value, name = values[setting.name], place + setting.name
        if value is None and "None" not in str(setting.type):
            raise ValueError(f"{name} must have a value, got null")
        if hasattr(value, "class_path"):
            module, _, own = value.class_path.rpartition(".")
            _require_values(getattr(import_module(module), own), value.get("init_args", {}), f"{name}.")
        elif hasattr(value, "__dict__") and setting.default_factory is not MISSING:
            _require_values(type(setting.default_factory()), value, f"{name}.")


def _refused_attack(namespace: Any) -> str:
    """What is wrong with one of the attacks, with the name of its section: they have the same settings; else ""."""
    for section in ("attack", "evaluation", "validation.attack"):
        try:
            AttackConfig(**vars(namespace[section]))
        except (TypeError, ValueError) as error:
            names_it = str(error).partition(" ")[0].partition("=")[0] in vars(namespace[section])
            return f"{section}{'.' if names_it else ': '}{error}"
    return ""


def load_config(path: str | os.PathLike[str]) -> TrainConfig:
    """Read and validate a YAML config file.

    Raises:
        ValueError: unknown keys, wrong types, values out of range; the message names the file.
    """
    from jsonargparse import ArgumentError

    from ceat_fast.config_files import require_settings

    if not Path(path).is_file():
        raise ValueError(f"config file {os.fspath(path)!r} does not exist")
    parser = config_parser()
    try:
        require_settings(path)
        return build_config(parser.parse_path(path))
    except (ArgumentError, ValueError) as error:
        text = readable(str(error), setting_names(), setting_kinds())
        raise ValueError(f"config file {os.fspath(path)!r}: {text}") from error


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """The tree as plain values, as `load_config` reads it."""
    tree: dict[str, Any] = _plain(config)
    return tree


def config_to_yaml(config: TrainConfig) -> str:
    """The text of a config file that `load_config` reads back to an equal config."""
    text: str = yaml.safe_dump(config_to_dict(config), sort_keys=False)
    return text


def setting_kinds() -> dict[str, list[type]]:
    """Setting -> the classes that it can be, for settings that have kinds."""
    bases = {"method": Method, "optimizer": OptimizerConfig, "schedule": Schedule, "average": WeightAverage}
    return {name: [kind for kind in _subclasses(base) if not isabstract(kind)] for name, base in bases.items()}


def setting_names() -> set[str]:
    """What a config can name: settings with their dots, those of every kind included."""
    own = {f.name for f in fields(TrainConfig)}
    tree = {action.dest for action in config_parser()._actions if action.dest.split(".")[0] in own}
    of_kinds = {f"{name}.{f.name}" for name, kinds in setting_kinds().items() for kind in kinds for f in fields(kind)}
    return {name for name in tree if not name.endswith(".help")} | of_kinds


def _subclasses(kind: type[Any]) -> list[type[Any]]:
    found = [kind]
    for subclass in kind.__subclasses__():
        found += _subclasses(subclass)
    return found


def differences(a: TrainConfig, b: TrainConfig, ignore: Sequence[str] = ()) -> list[str]:
    """Dotted names of the settings in which two configs differ, apart from those to ignore and what is below them."""

    def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in tree.items():
            flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return flat

    left, right = flatten(config_to_dict(a)), flatten(config_to_dict(b))
    names = sorted(left.keys() | right.keys())
    ignored = tuple(f"{name}." for name in ignore)
    return [n for n in names if not f"{n}.".startswith(ignored) and left.get(n) != right.get(n)]


def _plain(value: Any) -> Any:
    if not is_dataclass(value):
        return list(value) if isinstance(value, tuple) else value
    tree = {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, _KINDS):
        kind = type(value)
        return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": tree}
    return tree
