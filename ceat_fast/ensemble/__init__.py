"""Ensembles whose members run in one batched pass, and the frozen state in which attacks see a model."""

from __future__ import annotations

from ceat_fast.ensemble.ensemble import AVERAGES, Ensemble, is_ensemble
from ceat_fast.ensemble.execution import Execution, Tuned
from ceat_fast.ensemble.frozen import PRECISIONS, frozen, resolve_precision, unfolded
from ceat_fast.ensemble.tuning import tune

__all__ = [
    "AVERAGES",
    "PRECISIONS",
    "Ensemble",
    "Execution",
    "Tuned",
    "frozen",
    "is_ensemble",
    "resolve_precision",
    "tune",
    "unfolded",
]
