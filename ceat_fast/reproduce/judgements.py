"""What a training is judged by; each judgement is kept in the run's folder and read from there the next time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ceat_fast.data import load_dataset
from ceat_fast.evaluation import (
    BlackBoxResult,
    EvaluationResult,
    TransferConfig,
    TransferMatrix,
    black_box,
    evaluate_run,
    transfer_run,
    transfer_runs,
)
from ceat_fast.evaluation.fingerprint import describe_attack
from ceat_fast.evaluation.protocol import EvaluationConfig, columns
from ceat_fast.evaluation.transfer_result import ALL
from ceat_fast.training import Run, TrainConfig
from ceat_fast.training.checkpoint import checkpoints
from ceat_fast.training.run import EVALUATION

BLACK_BOX = "black box"
Result = TypeVar("Result")


class Judgement(ABC):
    """Numbers about a trained run."""

    @abstractmethod
    def judge(self, run: Run, config: TrainConfig) -> dict[str, float]:
        """Name -> share in [0, 1]."""


@dataclass(frozen=True)
class Attacked(Judgement):
    """Accuracy of the ensemble on test images, clean and attacked.

    Attributes:
        attacks: names as for `ceat-fast evaluate`.
        images: the first so many of the test images; all if None.
    """

    attacks: tuple[str, ...]
    images: int | None = None

    def judge(self, run: Run, config: TrainConfig) -> dict[str, float]:
        """By attack."""
        settings = EvaluationConfig(
            list(self.attacks), members=False, images=self.images, sanity_samples=0, device=config.device
        )
        count = "all" if self.images is None else str(self.images)
        folder = run.folder / f"judged-{'-'.join(self.attacks)}-{count}"
        wanted = {name: describe_attack(attack) for name, attack in columns(config.evaluation, settings).items()}

        def fits(result: EvaluationResult) -> bool:
            return all(name in result.attacks and result.settings(name) == wanted[name] for name in wanted)

        result = _stored(run, folder / EVALUATION, EvaluationResult.load, fits)
        result = result or evaluate_run(run, settings, attack=config.evaluation, out=folder)
        scores = {name: result.score(result.main_subject, name).correct for name in result.attacks}
        return {name: correct.double().mean().item() for name, correct in scores.items()}


@dataclass(frozen=True)
class Transferred(Judgement):
    """Success rates of attacks on each member, shown to every member: "1>2" was made against the first member.

    Attributes:
        config: how transfer is tested.
    """

    config: TransferConfig

    def judge(self, run: Run, config: TrainConfig) -> dict[str, float]:
        """By source and target, counted from 1."""
        wanted = describe_attack(self.config.attack())

        def fits(result: TransferMatrix) -> bool:
            return result.attack == wanted and result.protocol == self.config.protocol

        matrix = _stored(run, run.folder / transfer_runs.MATRIX, TransferMatrix.load, fits)
        matrix = matrix or transfer_run(run, config=replace(self.config, device=config.device))[0]
        members = range(len(matrix.sources))
        return {f"{s + 1}>{t + 1}": matrix.rates[s, t].item() for s in members for t in members}


@dataclass(frozen=True)
class BlackBox(Judgement):
    """Accuracy of the ensemble on inputs made against surrogates, in the worst case over all attacks on them.

    Attributes:
        surrogates: run folders, trained.
        config: how transfer is tested.
    """

    surrogates: tuple[Path, ...]
    config: TransferConfig

    def judge(self, run: Run, config: TrainConfig) -> dict[str, float]:
        """Under the name "black box"."""
        attacks = self.config.surrogate_attacks()
        wanted = {name: describe_attack(attack) for name, attack in attacks.items()}

        def fits(result: BlackBoxResult) -> bool:
            surrogates = {surrogate for surrogate, _ in result.correct}
            return result.attacks == wanted and surrogates == {str(folder) for folder in self.surrogates}

        path = run.folder / transfer_runs.BLACK_BOX
        result = _stored(run, path, BlackBoxResult.load, fits)
        if result is None:
            result = self._attack(run, config, attacks)
            result.save(path)
        return {BLACK_BOX: result.accuracies("ensemble")[ALL]}

    def _attack(self, run: Run, config: TrainConfig, attacks: dict[str, Any]) -> BlackBoxResult:
        dataset = load_dataset(config.data.name, config.data.root)
        images = dataset.test_images[: self.config.images].float() / dataset.scale
        labels = dataset.test_labels[: self.config.images]
        surrogates = {str(path): Run.open(path).load_ensemble(dataset, config.device) for path in self.surrogates}
        ensemble = run.load_ensemble(dataset, config.device)
        return black_box(ensemble, surrogates, images, labels, attacks, members=False)


def _stored(run: Run, path: Path, load: Callable[[Any], Result], fits: Callable[[Result], bool]) -> Result | None:
    """What `path` holds, if it is about the run's last checkpoint and fits."""
    if not path.is_file() or path.stat().st_mtime < checkpoints(run.checkpoints)[0].stat().st_mtime:
        return None
    result = load(path)
    return result if fits(result) else None
