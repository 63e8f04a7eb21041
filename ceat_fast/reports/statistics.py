"""What tables and figures show beside the scores themselves."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ceat_fast.evaluation import CLEAN, EvaluationResult, Score
from ceat_fast.evaluation.sanity import curve

WORST = "worst of these"


class PairedDifference(NamedTuple):
    """Two models on the same samples."""

    difference: float  # of the accuracies, second minus first
    gained: int  # samples that only the second has right
    lost: int  # samples that only the first has right
    p_value: float  # McNemar's exact two-sided test: would chance alone split gained and lost so unevenly?


def paired_difference(first: Score, second: Score) -> PairedDifference:
    """Compare two models sample by sample; they must have been judged on the same ones."""
    gained = int((second.correct & ~first.correct).sum())
    lost = int((first.correct & ~second.correct).sum())
    return PairedDifference(second.accuracy - first.accuracy, gained, lost, mcnemar(gained, lost))


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p-value: min(1, 2 P(X <= min(gained, lost))), X binomial of n = gained + lost and 1/2."""
    n = gained + lost
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(min(gained, lost) + 1)]
    tail = sum(math.exp(log - n * math.log(2)) for log in logs)
    return min(1.0, 2 * tail)


def main_columns(result: EvaluationResult) -> list[str]:
    """The columns of the table: all but the further points of a curve over eps or steps."""
    further = {name for over in ("eps", "steps") for name in _after_the_first(result, over)}
    return [name for name in result.attacks if name not in further]


def strongest(result: EvaluationResult) -> str | None:
    """The attack among the main columns that leaves the main subject least accuracy, of equal ones the last."""
    names = [name for name in reversed(main_columns(result)) if name != CLEAN]
    return min(names, key=lambda name: result.score(result.main_subject, name).accuracy, default=None)


def worst_case(result: EvaluationResult, subject: str) -> Score | None:
    """Right on the clean image and under every main column with the ball of the first attack; None for fewer than two.

    Prediction, margin and norm are those of the attack with the lowest margin.
    """
    attacks = [name for name in main_columns(result) if name != CLEAN]
    balls = {name: _ball(result, name) for name in attacks}
    names = [name for name in attacks if balls[name] == balls[attacks[0]]]
    if len(names) < 2:
        return None
    scores = [result.score(subject, name) for name in (CLEAN, *names)]
    lowest = torch.stack([score.margin for score in scores]).argmin(0, keepdim=True)

    def picked(values: list[Tensor]) -> Tensor:
        return torch.stack(values).gather(0, lowest)[0]

    correct = torch.stack([score.correct for score in scores]).all(0)
    prediction, margin, norm = (
        picked([getattr(score, name) for score in scores]) for name in ("prediction", "margin", "norm")
    )
    return Score(subject, WORST, correct, prediction, margin, norm)


def class_accuracies(score: Score, labels: Tensor) -> dict[int, tuple[int, int]]:
    """Class -> (right, samples), for the classes that occur."""
    return {
        label: (int(score.correct[labels == label].sum()), int((labels == label).sum()))
        for label in sorted(set(labels.tolist()))
    }


def _after_the_first(result: EvaluationResult, over: str) -> set[str]:
    names = curve(result, over)
    return {name for name in result.attacks if name in names} - {next((n for n in result.attacks if n in names), "")}


def _ball(result: EvaluationResult, name: str) -> tuple[str, float | None]:
    settings = result.settings(name)
    return settings.get("norm", "Linf"), settings.get("eps")
