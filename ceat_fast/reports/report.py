"""One HTML page about evaluated runs, or other evaluations."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from ceat_fast.files import PathLike, write_atomic
from ceat_fast.reports import page, sections, training_figures
from ceat_fast.reports.canvas import Picture
from ceat_fast.reports.evaluated import Evaluated, open_evaluated
from ceat_fast.reports.exports import write_files
from ceat_fast.training.config import config_to_yaml


def write_report(
    folders: Sequence[PathLike], out: PathLike, *, files: PathLike | None = None, replace: bool = False
) -> Path:
    """Write one HTML page: accuracies, sanity checks, curves, transfer, classes, hardest images, costs, settings.

    Args:
        folders: folders with an evaluation.json: runs, or other folders that `ceat-fast evaluate` wrote. What else lies
            there (training metrics, transfer results) is shown too.
        out: the HTML file.
        files: folder for the same as JSON, CSV and PNG files (`write_files`).
        replace: overwrite `out`, and files in `files`, if they exist.

    Raises:
        ValueError: no folders, or one that is not evaluated yet.
        FileExistsError: `out` exists, or `files` is not empty, and `replace` is false.
    """
    out = require_free(out, replace)
    evaluated = open_evaluated(folders)
    text = page.page(
        "Robustness of " + ", ".join(one.label for one in evaluated),
        sections.summary(evaluated),
        sections.accuracies(evaluated),
        sections.sanity(evaluated),
        sections.curves(evaluated),
        *(sections.transfer(one) for one in evaluated),
        *(sections.classes(one) for one in evaluated),
        *(sections.examples(one) for one in evaluated),
        sections.cost(evaluated),
        training(evaluated),
        settings(evaluated),
    )
    if files is not None:
        write_files(evaluated, files, replace=replace)
    write_atomic(out, text.encode())
    return out


def require_free(out: PathLike, replace: bool = False) -> Path:
    """The path of a file to write; makes its folder.

    Raises:
        FileExistsError: it exists and may not be replaced.
    """
    path = Path(out)
    if path.exists() and not replace:
        raise FileExistsError(f"out={os.fspath(out)!r} exists; choose another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def training(evaluated: Sequence[Evaluated]) -> str:
    """Curves over the epochs, for runs that recorded any; empty without."""
    records = {one.label: one.run.metrics for one in evaluated if one.run is not None and one.run.metrics}
    if not records:
        return ""
    names = ", ".join(records)
    parts = [_pictures(training_figures.training_curves(records), f"Line chart over the epochs for {names}")]
    note = "The losses of different methods have different terms; cross-entropy and accuracy can be compared."
    parts.append(page.paragraph(note, "soft"))
    if maps := training_figures.disparity_maps(records):
        note = "How far apart the peers' true-class probabilities are. 0: they agree; 1: one is sure, one is wrong."
        parts += [page.subsection("Disparity of the peers"), _pictures(maps, "Heat map"), page.paragraph(note, "soft")]
    if weights := training_figures.weight_curves(records):
        note = "The exponential weights of the calibrated distances, mean and largest of each epoch."
        parts += [page.subsection("Weights"), _pictures(weights, "Line chart"), page.paragraph(note, "soft")]
    return page.section("Training", *parts)


def settings(evaluated: Sequence[Evaluated]) -> str:
    """Everything that the numbers depend on, folded."""
    parts = []
    for one in evaluated:
        about = {"about": one.result.about, "attacks": {n: one.result.settings(n) for n in one.result.attacks}}
        parts.append(page.details(f"Evaluation of {one.label}", json.dumps(about, indent=2)))
        environment = {"evaluation": one.result.environment}
        if one.run is not None:
            metrics = one.run.metrics
            seconds = sum(record["seconds"] for record in metrics)
            parts.append(page.paragraph(f"{one.label}: {len(metrics)} epochs in {seconds:,.0f} s of training."))
            parts.append(page.details(f"Settings of {one.label}", config_to_yaml(one.run.config)))
            environment["training"] = json.loads(one.run.environment_path.read_text())
        parts.append(page.details(f"Versions and hardware of {one.label}", json.dumps(environment, indent=2)))
    return page.section("Settings", *parts)


def _pictures(pictures: dict[str, Picture], alt: str) -> str:
    return page.row(*(page.figure(picture, f"{alt}: {title}.") for title, picture in pictures.items()))
