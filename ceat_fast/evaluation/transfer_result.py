"""What transfer tests found, sample by sample."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ceat_fast.attacks.result import CLEAN
from ceat_fast.environment import describe_environment
from ceat_fast.evaluation.result import join_flags, split_flags, wilson_interval
from ceat_fast.files import PathLike, write_json

ALL = "all"  # the row of samples that withstand everything
Result = TypeVar("Result", bound="_Stored")


class _Stored(ABC):
    """A result that is kept as JSON."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""

    @classmethod
    @abstractmethod
    def from_dict(cls: type[Result], tree: Mapping[str, Any]) -> Result:
        """The inverse of `to_dict`."""

    def save(self, path: PathLike) -> None:
        """Write `to_dict` as JSON, atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls: type[Result], path: PathLike) -> Result:
        """Read what `save` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{str(path)!r} is no {cls.__name__} of this version: {error!r}") from error


@dataclass
class TransferMatrix(_Stored):
    """Who is misled by the adversarial inputs of whom, as in Fig. 3 of the paper.

    Attributes:
        sources: names of the S members that inputs were made against.
        targets: names of the T subjects that were shown them: the members, then "ensemble".
        fooled: (S, T, N) bool, whether some restart of the source's attack makes the target err.
        counted: (S, N) bool, the samples that count for a source under the protocol.
        samples: (N,) int64, the number of each sample in the data.
        protocol: "all_correct", "source_correct" or "all", see `transferability`.
        attack: the settings of the attack.
        seconds: wall-clock time.
        about: further facts, for example where the model came from.
        environment: versions and hardware.
    """

    sources: list[str]
    targets: list[str]
    fooled: Tensor
    counted: Tensor
    samples: Tensor
    protocol: str
    attack: dict[str, Any]
    seconds: float
    about: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=describe_environment)

    @property
    def rates(self) -> Tensor:
        """(S, T) fp64 in [0, 1]: the share of a source's counted samples on which the target errs."""
        successes = (self.fooled & self.counted[:, None]).sum(2).double()
        return successes / self.counted.sum(1, keepdim=True)

    def rate(self, source: str, target: str) -> float:
        """The entry of that row and column."""
        return self.rates[self.sources.index(source), self.targets.index(target)].item()

    @property
    def mean_transfer(self) -> float:
        """Mean of the entries from a member to another member; 0 for a single member."""
        members = len(self.sources)
        between = self.rates[:, :members] * (1 - torch.eye(members, dtype=torch.float64))
        return between.sum().item() / max(members * (members - 1), 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: rates, and flags as one character per sample."""
        return {
            "sources": self.sources,
            "targets": self.targets,
            "protocol": self.protocol,
            "attack": self.attack,
            "rates": self.rates.tolist(),
            "mean_transfer": self.mean_transfer,
            "fooled": [[join_flags(flags) for flags in row] for row in self.fooled],
            "counted": [join_flags(flags) for flags in self.counted],
            "samples": self.samples.tolist(),
            "seconds": self.seconds,
            "about": self.about,
            "environment": self.environment,
        }

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> TransferMatrix:
        """The inverse of `to_dict`."""
        return cls(
            tree["sources"],
            tree["targets"],
            torch.stack([torch.stack([split_flags(text) for text in row]) for row in tree["fooled"]]),
            torch.stack([split_flags(text) for text in tree["counted"]]),
            torch.tensor(tree["samples"], dtype=torch.int64),
            tree["protocol"],
            tree["attack"],
            tree["seconds"],
            tree["about"],
            tree["environment"],
        )


@dataclass
class BlackBoxResult(_Stored):
    """Accuracy on inputs made against surrogate models, as in Fig. 6 of the paper.

    Attributes:
        subjects: names of the S judged: "ensemble", "member 0" and so on, or "model".
        correct: (surrogate, attack) -> (S, N) bool, whether the subject is right on every restart's input.
        clean: (S, N) bool, the same on the images themselves.
        attacks: name -> the attack's settings.
        seconds: (surrogate, attack) -> wall-clock time.
        about: further facts, for example where the models came from.
        environment: versions and hardware.
    """

    subjects: list[str]
    correct: dict[tuple[str, str], Tensor]
    clean: Tensor
    attacks: dict[str, dict[str, Any]]
    seconds: dict[tuple[str, str], float]
    about: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=describe_environment)

    @property
    def worst(self) -> Tensor:
        """(S, N) bool, whether the subject is right on the inputs of all surrogates and attacks, sample by sample."""
        return torch.stack(list(self.correct.values())).all(0)

    def accuracies(self, subject: str) -> dict[str, float]:
        """Row -> accuracy: "clean", then "<surrogate> / <attack>" of each, then "all" for the worst of all."""
        number = self.subjects.index(subject)
        return {name: flags[number].double().mean().item() for name, flags in self._rows.items()}

    @property
    def _rows(self) -> dict[str, Tensor]:
        made = {f"{surrogate} / {attack}": flags for (surrogate, attack), flags in self.correct.items()}
        return {CLEAN: self.clean, **made, ALL: self.worst}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: accuracies with Wilson's 95 % interval, and verdicts as one character per sample."""
        samples = self.clean.shape[1]
        table = {
            subject: {
                name: {
                    "accuracy": flags[number].double().mean().item(),
                    "interval_95": list(wilson_interval(int(flags[number].sum()), samples)),
                }
                for name, flags in self._rows.items()
            }
            for number, subject in enumerate(self.subjects)
        }
        return {
            "subjects": self.subjects,
            "accuracies": table,
            "clean": [join_flags(flags) for flags in self.clean],
            "verdicts": [
                {
                    "surrogate": surrogate,
                    "attack": attack,
                    "seconds": self.seconds[surrogate, attack],
                    "correct": [join_flags(flags) for flags in rows],
                }
                for (surrogate, attack), rows in self.correct.items()
            ],
            "attacks": self.attacks,
            "about": self.about,
            "environment": self.environment,
        }

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> BlackBoxResult:
        """The inverse of `to_dict`."""
        keyed = {(entry["surrogate"], entry["attack"]): entry for entry in tree["verdicts"]}
        return cls(
            tree["subjects"],
            {key: torch.stack([split_flags(text) for text in entry["correct"]]) for key, entry in keyed.items()},
            torch.stack([split_flags(text) for text in tree["clean"]]),
            tree["attacks"],
            {key: entry["seconds"] for key, entry in keyed.items()},
            tree["about"],
            tree["environment"],
        )
