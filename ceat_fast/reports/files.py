"""The report as files that other programs read: JSON, CSV and PNG, and cards in RobustBench's form."""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ceat_fast.attacks.budget import parse_budget
from ceat_fast.evaluation import CLEAN, EvaluationResult
from ceat_fast.files import PathLike, write_atomic, write_json
from ceat_fast.reports import sections
from ceat_fast.reports.evaluated import Evaluated

_SCORES = ("method", "subject", "attack", "correct", "total", "accuracy", "low_95", "high_95")
_SAMPLES = ("method", "subject", "attack", "sample", "label", "correct", "prediction", "margin", "norm")


def write_files(evaluated: Sequence[Evaluated], folder: PathLike, *, replace: bool = False) -> list[Path]:
    """Write scores.csv, samples.csv, evaluations.json, the charts as PNG, and a card-NAME.json per evaluation.

    Raises:
        FileExistsError: the folder holds something and `replace` is false.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not replace:
        raise FileExistsError(f"files={os.fspath(folder)!r} exists and is not empty; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    contents: dict[str, bytes] = {
        "scores.csv": _csv(_SCORES, _score_rows(evaluated)),
        "samples.csv": _csv(_SAMPLES, _sample_rows(evaluated)),
    }
    contents |= {f"{name}.png": picture.png for name, picture in sections.curve_pictures(evaluated).items()}
    trees: dict[str, Any] = {"evaluations.json": {one.label: one.result.to_dict() for one in evaluated}}
    for one in evaluated:
        name = re.sub(r"[^\w.=-]+", "-", one.label).strip("-")
        contents[f"classes-{name}.png"] = sections.class_picture(one.result).png
        if one.transfer is not None:
            contents[f"transfer-{name}.png"] = sections.transfer_picture(one).png
        trees[f"card-{name}.json"] = robustbench_card(one.result)
    for file, data in contents.items():
        write_atomic(folder / file, data)
    for file, tree in trees.items():
        write_json(folder / file, tree)
    return [folder / file for file in (*contents, *trees)]


def robustbench_card(result: EvaluationResult) -> dict[str, Any]:
    """The facts about the main subject under the keys of RobustBench's model cards; what only its author knows is null.

    "autoattack_acc" is given for the standard version of AutoAttack in fp32 alone.
    """
    subject = result.main_subject
    standard = [name for name in result.attacks if _is_standard(result.settings(name))]
    attack = standard[0] if standard else next((name for name in result.attacks if name != CLEAN), None)
    settings = result.settings(attack) if attack else {}
    eps = settings.get("eps_as_given")
    accuracy = _percent(result, subject, standard[0]) if standard else None
    members = sum(name.startswith("member") for name in result.subjects) or 1
    architectures = result.about.get("architectures") or []
    return {
        "link": None,
        "name": result.about.get("name"),
        "authors": None,
        "additional_data": None,
        "number_forward_passes": max(members, len(architectures), 1),
        "dataset": result.about.get("dataset"),
        "venue": None,
        "architecture": " + ".join(architectures) or None,
        "eps": None if eps is None else _eps_text(eps),
        "clean_acc": _percent(result, subject, CLEAN),
        "reported": None,
        "autoattack_acc": accuracy,
        "footnote": f"{len(result.labels)} test images, {settings.get('norm', 'Linf')}",
        "unreliable": bool(result.flags),
    }


def _is_standard(settings: dict[str, Any]) -> bool:
    wanted = {"attack": "AutoAttack", "version": "standard", "precision": "fp32", "backend": "native"}
    return all(settings.get(name) == value for name, value in wanted.items())


def _percent(result: EvaluationResult, subject: str, attack: str) -> str:
    return f"{100 * result.score(subject, attack).accuracy:.2f}"


def _eps_text(eps: str) -> str:
    """A multiple of 1/255 in that form, as RobustBench writes it."""
    units = 255 * parse_budget("eps", eps)
    return f"{round(units)}/255" if math.isclose(units, round(units)) else eps


def _score_rows(evaluated: Sequence[Evaluated]) -> Iterator[tuple[Any, ...]]:
    for one in evaluated:
        for score in one.result.scores:
            low, high = score.interval
            counts = (int(score.correct.sum()), len(score.correct), score.accuracy, low, high)
            yield (one.label, score.subject, score.attack, *counts)


def _sample_rows(evaluated: Sequence[Evaluated]) -> Iterator[tuple[Any, ...]]:
    for one in evaluated:
        labels = one.result.labels.tolist()
        for score in one.result.scores:
            columns = (score.correct.int(), score.prediction, score.margin, score.norm)
            for sample, values in enumerate(zip(labels, *(column.tolist() for column in columns), strict=True)):
                yield (one.label, score.subject, score.attack, sample, *values)


def _csv(header: Sequence[str], rows: Iterator[tuple[Any, ...]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode()
