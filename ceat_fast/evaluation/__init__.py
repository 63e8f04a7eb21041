"""Judging: clean and adversarial accuracy of a model, or of an ensemble and each of its members."""

from __future__ import annotations

from ceat_fast.attacks.result import CLEAN
from ceat_fast.evaluation.adversarials import load_adversarials
from ceat_fast.evaluation.examples import Examples
from ceat_fast.evaluation.journal import JournalMismatchError
from ceat_fast.evaluation.result import Check, EvaluationResult, Score, wilson_interval
from ceat_fast.evaluation.runs import evaluate_run
from ceat_fast.evaluation.session import evaluate
from ceat_fast.evaluation.transfer import black_box, surrogate_attacks, transferability
from ceat_fast.evaluation.transfer_result import BlackBoxResult, TransferMatrix
from ceat_fast.evaluation.transfer_runs import TransferConfig, transfer_run

__all__ = [
    "CLEAN",
    "BlackBoxResult",
    "Check",
    "EvaluationResult",
    "Examples",
    "JournalMismatchError",
    "Score",
    "TransferConfig",
    "TransferMatrix",
    "black_box",
    "evaluate",
    "evaluate_run",
    "load_adversarials",
    "surrogate_attacks",
    "transfer_run",
    "transferability",
    "wilson_interval",
]
