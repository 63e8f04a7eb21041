"""What an evaluation found: a verdict per subject, attack and sample, and everything that it depends on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ceat_fast.attacks.result import CLEAN
from ceat_fast.environment import describe_environment
from ceat_fast.evaluation.examples import Examples
from ceat_fast.files import PathLike, write_json

OK, FLAG, NOT_RUN = "ok", "flag", "not run"


@dataclass
class Score:
    """How one subject classifies the samples under one attack.

    Attributes:
        subject: "ensemble", "member 0" and so on, or "model".
        attack: "clean" or the name given to the attack.
        correct: (N,) bool, one verdict per sample.
        prediction: (N,) int64, the class answered on the attacked input.
        margin: (N,) fp32, the label's logit minus the largest other one; negative where it is misclassified.
        norm: (N,) fp32, distance of the attacked input from the clean one in the attack's norm.
    """

    subject: str
    attack: str
    correct: Tensor
    prediction: Tensor
    margin: Tensor
    norm: Tensor

    @property
    def accuracy(self) -> float:
        return int(self.correct.sum()) / len(self.correct)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy."""
        return wilson_interval(int(self.correct.sum()), len(self.correct))


@dataclass(frozen=True)
class Check:
    """One line of the sanity report.

    Attributes:
        name: what was checked, for example "zero gradients".
        outcome: "ok"; "flag": the accuracies are weaker evidence than they look; or "not run".
        finding: what was measured, or why nothing was.
        advice: what to do about a flag.
    """

    name: str
    outcome: str
    finding: str
    advice: str = ""


@dataclass
class EvaluationResult:
    """Scores and everything that they depend on.

    Attributes:
        scores: one per subject and attack, in the order of the columns.
        attacks: name -> {"settings"; "seconds", summed over processes; "passes", forward and backward per image and
            subject, or None; "flags", the attack's own remarks; "found_by", per subject how many samples each part of
            the attack misled}.
        labels: (N,) int64, the true classes of the judged samples.
        checks: the sanity report.
        about: what was judged: model, data and their fingerprints.
        environment: versions and hardware.
        examples: the samples on which the first attack succeeds most clearly; not part of `to_dict`.
    """

    scores: list[Score]
    attacks: dict[str, dict[str, Any]]
    labels: Tensor
    checks: list[Check] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=describe_environment)
    examples: Examples | None = None

    def score(self, subject: str, attack: str = CLEAN) -> Score:
        """The score of that subject under that attack; KeyError if it was not judged."""
        for score in self.scores:
            if (score.subject, score.attack) == (subject, attack):
                return score
        raise KeyError(f"no score of {subject!r} under {attack!r}")

    @property
    def subjects(self) -> list[str]:
        return list(dict.fromkeys(score.subject for score in self.scores))

    @property
    def main_subject(self) -> str:
        """The ensemble, or the model if it is none."""
        return self.subjects[0]

    @property
    def flags(self) -> list[Check]:
        """The checks that weaken the result."""
        return [check for check in self.checks if check.outcome == FLAG]

    def settings(self, attack: str) -> dict[str, Any]:
        """The settings of the attack of that name; empty for the clean images."""
        settings: dict[str, Any] = self.attacks[attack]["settings"]
        return settings

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; verdicts are one character per sample, the other numbers are separated by blanks."""
        scores = [
            {
                "subject": score.subject,
                "attack": score.attack,
                "correct": int(score.correct.sum()),
                "total": len(score.correct),
                "accuracy": score.accuracy,
                "interval_95": list(score.interval),
                "verdicts": join_flags(score.correct),
                "predictions": _join(score.prediction.tolist()),
                "margins": _join(f"{value:.5g}" for value in score.margin.tolist()),
                "norms": _join(f"{value:.5g}" for value in score.norm.tolist()),
            }
            for score in self.scores
        ]
        return {
            "about": self.about,
            "scores": scores,
            "attacks": self.attacks,
            "checks": [asdict(check) for check in self.checks],
            "labels": _join(self.labels.tolist()),
            "environment": self.environment,
        }

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> EvaluationResult:
        """The inverse of `to_dict`, up to the digits that it keeps."""
        scores = [
            Score(
                s["subject"],
                s["attack"],
                split_flags(s["verdicts"]),
                _split(s["predictions"], torch.int64),
                _split(s["margins"], torch.float32),
                _split(s["norms"], torch.float32),
            )
            for s in tree["scores"]
        ]
        for name in ("attacks", "about", "environment"):
            if not isinstance(tree[name], dict):
                raise TypeError(f"{name} is {tree[name]!r}")
        checks = [Check(**check) for check in tree["checks"]]
        labels = _split(tree["labels"], torch.int64)
        return cls(scores, tree["attacks"], labels, checks, tree["about"], tree["environment"])

    @classmethod
    def load(cls, path: PathLike) -> EvaluationResult:
        """Read what `save` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        path = Path(path)
        try:
            result = cls.from_dict(json.loads(path.read_text()))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{str(path)!r} is no evaluation of this version ({error}); evaluate again") from error
        if (examples := _examples_path(path)).is_file():
            result.examples = Examples.load(examples)
        return result

    def save(self, path: PathLike) -> None:
        """Write `to_dict` as JSON and the examples beside it (NAME.examples.safetensors), each atomically."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _examples_path(path).unlink(missing_ok=True)
        write_json(path, self.to_dict())
        if self.examples is not None:
            self.examples.save(_examples_path(path))


def _examples_path(path: Path) -> Path:
    return path.with_suffix(".examples.safetensors")


def wilson_interval(correct: int, total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a proportion; z of the default is that of 95 %."""
    share, spread = correct / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / total / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def join_flags(flags: Tensor) -> str:
    """One character, 0 or 1, for each of the flags (N,)."""
    return "".join("01"[flag] for flag in flags.tolist())


def split_flags(text: str) -> Tensor:
    """The inverse of `join_flags`."""
    return torch.tensor([character == "1" for character in text], dtype=torch.bool)


def _join(values: Any) -> str:
    return " ".join(map(str, values))


def _split(text: str, dtype: torch.dtype) -> Tensor:
    values: Sequence[float] = [float(value) for value in text.split()]
    return torch.tensor(values, dtype=torch.float64).to(dtype)
