"""What reports are about: folders with an evaluation, and what else lies there."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ceat_fast.evaluation import BlackBoxResult, EvaluationResult, TransferMatrix
from ceat_fast.evaluation.transfer_runs import BLACK_BOX, MATRIX
from ceat_fast.files import PathLike
from ceat_fast.training import Run
from ceat_fast.training.run import EVALUATION


@dataclass
class Evaluated:
    """An evaluation with its surroundings.

    Attributes:
        label: what tables call it.
        folder: where it lies.
        result: the evaluation.
        run: the run it belongs to, if the folder is one.
        transfer, black_box: results of `ceat-fast transfer`, if there are any.
    """

    label: str
    folder: Path
    result: EvaluationResult
    run: Run | None = None
    transfer: TransferMatrix | None = None
    black_box: BlackBoxResult | None = None


def open_evaluated(folders: Sequence[PathLike]) -> list[Evaluated]:
    """Read the evaluations in these folders; labels that occur twice get the folder's name.

    Raises:
        ValueError: no folders, or one without an evaluation.
    """
    if not folders:
        raise ValueError("folders must name at least one folder with an evaluation")
    found = [_open(Path(folder)) for folder in folders]
    labels = [one.label for one in found]
    for one in found:
        if labels.count(one.label) > 1:
            one.label = f"{one.label} in {one.folder}"
    return found


def _open(folder: Path) -> Evaluated:
    path = folder / EVALUATION
    if not path.is_file():
        command = f"ceat-fast evaluate {shlex.quote(str(folder))}"
        raise ValueError(f"{str(folder)!r} holds no {path.name}: it must be evaluated first: {command}")
    result = EvaluationResult.load(path)
    run = Run(folder) if Run(folder).config_path.is_file() else None
    transfer = TransferMatrix.load(folder / MATRIX) if (folder / MATRIX).is_file() else None
    black_box = BlackBoxResult.load(folder / BLACK_BOX) if (folder / BLACK_BOX).is_file() else None
    return Evaluated(str(result.about.get("name", folder.name)), folder, result, run, transfer, black_box)
