"""Clean and adversarial accuracy of a model, or of an ensemble and each of its members.

The ensemble's output (eq. 1) is judged on inputs made against the ensemble (eq. 3), every member on inputs made against
itself (eq. 2), all members in one batched pass. Verdicts are made in fp32.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ceat_fast.attacks import PGD
from ceat_fast.data import Dataset, load_dataset
from ceat_fast.ensemble import Ensemble
from ceat_fast.environment import describe_environment
from ceat_fast.files import PathLike, write_json
from ceat_fast.training.config import AttackConfig
from ceat_fast.training.run import Run

CLEAN = "clean"


@dataclass
class Score:
    """How many of the samples one subject classifies correctly under one attack.

    Attributes:
        subject: "ensemble", "member 0" and so on, or "model".
        attack: "clean" or the name given to the attack.
        correct: (N,) bool, one verdict per sample.
    """

    subject: str
    attack: str
    correct: Tensor

    @property
    def accuracy(self) -> float:
        return self.correct.float().mean().item()

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy."""
        return wilson_interval(int(self.correct.sum()), len(self.correct))


@dataclass
class EvaluationResult:
    """Scores and everything that they depend on."""

    scores: list[Score]
    attacks: dict[str, dict[str, Any]]  # name -> settings, seconds
    environment: dict[str, Any] = field(default_factory=describe_environment)

    def score(self, subject: str, attack: str = CLEAN) -> Score:
        """The score of that subject under that attack; KeyError if it was not judged."""
        for score in self.scores:
            if (score.subject, score.attack) == (subject, attack):
                return score
        raise KeyError(f"no score of {subject!r} under {attack!r}")

    @property
    def subjects(self) -> list[str]:
        return list(dict.fromkeys(score.subject for score in self.scores))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `verdicts` holds one character per sample, 1 where it is classified correctly."""
        scores = [
            {
                "subject": score.subject,
                "attack": score.attack,
                "correct": int(score.correct.sum()),
                "total": len(score.correct),
                "accuracy": score.accuracy,
                "interval_95": list(score.interval),
                "verdicts": "".join("01"[flag] for flag in score.correct.tolist()),
            }
            for score in self.scores
        ]
        return {"scores": scores, "attacks": self.attacks, "environment": self.environment}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> EvaluationResult:
        """The inverse of `to_dict`."""
        scores = [
            Score(s["subject"], s["attack"], torch.tensor([flag == "1" for flag in s["verdicts"]]))
            for s in tree["scores"]
        ]
        return cls(scores, tree["attacks"], tree["environment"])

    @classmethod
    def load(cls, path: PathLike) -> EvaluationResult:
        """Read what `save` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text()))

    def save(self, path: PathLike) -> None:
        """Write `to_dict` as JSON, atomically."""
        write_json(path, self.to_dict())


def wilson_interval(correct: int, total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a proportion; z of the default is that of 95 %."""
    share, spread = correct / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / total / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    attacks: Mapping[str, PGD] | None = None,
    *,
    members: bool = True,
    batch_size: int = 500,
) -> EvaluationResult:
    """Judge `model` on clean images and under each attack.

    Args:
        model: an `Ensemble`, or any module that maps images to logits; in eval mode.
        images: (N, C, H, W) floats in [0, 1].
        labels: (N,) int64 in [0, K).
        attacks: name -> attack on the whole model; default: the paper's PGD-20 (eps 0.031, alpha 0.007, section 4.1).
        members: judge each member of an `Ensemble` too, by the same attacks aimed at itself.
        batch_size: images per pass; the results do not depend on it, since attack noise is keyed by the sample.

    Raises:
        ValueError: NaN logits, images outside [0, 1], labels out of range, shapes that disagree, a model in train mode.
    """
    attacks = {"PGD-20": PGD(eps=0.031, alpha=0.007, steps=20, seed=0)} if attacks is None else dict(attacks)
    if CLEAN in attacks:
        raise ValueError(f"attacks: the name {CLEAN!r} is taken by the images without attack")
    columns: dict[str, PGD | None] = {CLEAN: None, **attacks}
    goals = ("ensemble", "members") if members and isinstance(model, Ensemble) else ("ensemble",)
    verdicts: dict[tuple[str, str], list[Tensor]] = {(name, goal): [] for name in columns for goal in goals}
    seconds = dict.fromkeys(columns, 0.0)
    device = next((p.device for p in model.parameters()), images.device)
    _require_judgeable(model, images, labels, batch_size, device)
    for first in range(0, len(images), batch_size):
        x = images[first : first + batch_size].to(device)
        y = labels[first : first + batch_size].to(device)
        index = torch.arange(first, first + len(x), device=device)
        for name, attack in columns.items():
            began = time.perf_counter()
            for goal in goals:
                verdicts[name, goal].append(_verdicts(model, attack, goal, x, y, index).cpu())
            seconds[name] += time.perf_counter() - began
    scores = []
    for (name, goal), flags in verdicts.items():
        for subject, correct in zip(_subjects(model, goal), torch.cat(flags, dim=1), strict=True):
            scores.append(Score(subject, name, correct))
    settings = {name: _describe(attack) | {"seconds": seconds[name]} for name, attack in columns.items()}
    return EvaluationResult(scores, settings)


def evaluate_run(
    run: Run,
    attack: AttackConfig | None = None,
    *,
    seed: int = 0,
    images: int | None = None,
    batch_size: int = 500,
    device: str = "auto",
    dataset: Dataset | None = None,
) -> EvaluationResult:
    """Judge the last checkpoint of a run on its test images, and write evaluation.json into its folder.

    Args:
        run: the run.
        attack: default: `evaluation` of the run's config.
        seed: of the attack noise.
        images: only the first so many test images.
        batch_size, device: how to compute.
        dataset: use this data instead of loading the run's.
    """
    config = run.config
    attack = attack or config.evaluation
    if images is not None and images < 1:
        raise ValueError(f"images must be at least 1, got {images}")
    dataset = dataset or load_dataset(config.data.name, config.data.root)
    ensemble = run.load_ensemble(dataset, device)
    x = dataset.test_images[:images].float() / dataset.scale
    attacks = {f"PGD-{attack.steps}": PGD(**vars(attack), seed=seed)}
    result = evaluate(ensemble, x, dataset.test_labels[:images], attacks, batch_size=batch_size)
    result.save(run.evaluation_path)
    return result


def _verdicts(model: nn.Module, attack: PGD | None, goal: str, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    """(S, B) bool: who of the subjects of that goal classifies which sample correctly."""
    if attack is not None:
        x = replace(attack, goal=goal)(model, x, y, index=index)
    with torch.no_grad():
        if goal == "members" and isinstance(model, Ensemble):
            logits = model.member_logits(x, per_member=attack is not None)
        else:
            logits = model(x).unsqueeze(0)
    broken = logits.isnan().any(-1).any(0)
    if broken.any():
        first = int(index[broken][0])
        raise ValueError(
            f"the model gives NaN logits for {int(broken.sum())} samples of a batch, the first is sample {first}"
        )
    correct: Tensor = logits.float().argmax(-1) == y
    return correct


def _subjects(model: nn.Module, goal: str) -> list[str]:
    if goal == "members" and isinstance(model, Ensemble):
        return [f"member {m}" for m in range(len(model.members))]
    return ["ensemble" if isinstance(model, Ensemble) else "model"]


def _describe(attack: PGD | None) -> dict[str, Any]:
    if attack is None:
        return {}
    return {
        "norm": "Linf",
        "eps": attack.radius,
        "eps_255": attack.radius * 255,
        "eps_as_given": str(attack.eps),
        "alpha": attack.step_size,
        "steps": attack.steps,
        "restarts": attack.restarts,
        "random_start": attack.random_start,
        "loss": attack.loss,
        "seed": attack.seed,
        "precision": "fp32",
    }


def _require_judgeable(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int, device: torch.device) -> None:
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(f"model is in train mode ({name or type(module).__name__}); call model.eval() first")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not images.is_floating_point() or images.ndim < 2:
        raise ValueError(f"images must be floats (N, ...), got {images.dtype} {tuple(images.shape)}")
    if len(images) == 0 or labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64, one for each of at least one image, got {labels.dtype} {tuple(labels.shape)} "
            f"for images {tuple(images.shape)}"
        )
    outside = ~((images >= 0) & (images <= 1)).flatten(1).all(1)
    if outside.any():
        raise ValueError(
            f"images must lie in [0, 1]; {int(outside.sum())} do not, the first is {int(outside.nonzero()[0])}"
        )
    with torch.no_grad():
        classes = model(images[:1].to(device)).shape[-1]
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"labels must lie in [0, {classes}); {int(wrong.sum())} do not, label {first} is {int(labels[first])}"
        )
