"""Ensembles whose members run in one batched pass, and the frozen state in which attacks see a model."""

from __future__ import annotations

from ceat_fast.ensemble.ensemble import AVERAGES, BACKENDS, Ensemble
from ceat_fast.ensemble.frozen import frozen

__all__ = ["AVERAGES", "BACKENDS", "Ensemble", "frozen"]
