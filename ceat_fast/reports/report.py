"""One HTML page about evaluated runs, or other evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ceat_fast.files import PathLike, require_free, write_atomic
from ceat_fast.reports import page, sections
from ceat_fast.reports.evaluated import open_evaluated
from ceat_fast.reports.files import write_files


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
        sections.training(evaluated),
        sections.settings(evaluated),
    )
    if files is not None:
        write_files(evaluated, files, replace=replace)
    write_atomic(out, text.encode())
    return out
