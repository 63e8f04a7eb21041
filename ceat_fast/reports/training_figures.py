"""The figures about training, from the records in metrics.jsonl."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from ceat_fast.files import write_atomic
from ceat_fast.reports.canvas import COLOURS, Picture, canvas, legend, picture, whole_epochs
from ceat_fast.training import Run

FOLDER = "figures"

Records = Sequence[Mapping[str, Any]]
_CURVES = {
    "loss": "loss (mean over members)",
    "ce": "cross-entropy, adversarial",
    "train_adv_accuracy": "training accuracy, adversarial",
    "val_adv_accuracy": "held-out accuracy, adversarial",
}


def write_training_figures(run: Run) -> list[Path]:
    """Write the figures of a run as PNG files into its folder `figures`, over earlier ones.

    Losses, accuracies, weights and a map of each disparity over the epochs, as far as the run recorded them; nothing
    before its first epoch ends.
    """
    if not run.metrics:
        return []
    records = {run.config.method.label: run.metrics}
    maps = {title.rpartition(", ")[2] + " disparity": shown for title, shown in disparity_maps(records).items()}
    folder = run.folder / FOLDER
    folder.mkdir(exist_ok=True)
    written = []
    for title, shown in (training_curves(records) | weight_curves(records) | maps).items():
        written.append(folder / (re.sub(r"\W+", "-", title).strip("-") + ".png"))
        write_atomic(written[-1], shown.png)
    return written


def training_curves(runs: Mapping[str, Records]) -> dict[str, Picture]:
    """Title -> lines over the epochs, for what the runs recorded."""
    shown = {}
    for key, title in _CURVES.items():
        curves = {label: [record.get(key) for record in records] for label, records in runs.items()}
        if any(value is not None for curve in curves.values() for value in curve):
            shown[title] = _lines(curves, title)
    return shown


def weight_curves(runs: Mapping[str, Records]) -> dict[str, Picture]:
    """Title -> mean (solid) and largest (dashed) weight over the epochs, log scale; empty if no run has weights."""
    shown = {}
    for key, title in {"nat_weight": "clean weight", "adv_weight": "adversarial weight"}.items():
        having = {label: records for label, records in runs.items() if key in records[0]}
        if having:
            shown[title] = _weights(having, key, title)
    return shown


def disparity_maps(runs: Mapping[str, Records]) -> dict[str, Picture]:
    """Title -> histogram of the disparity (vertical) over the epochs (horizontal), as share of the samples."""
    names = {"adv_disparity_histogram": "adversarial", "nat_disparity_histogram": "clean"}
    return {
        f"{label}, {title}": _histogram_map([record[key] for record in records], f"{label}, {title}")
        for label, records in runs.items()
        for key, title in names.items()
        if key in records[0]
    }


def _lines(curves: Mapping[str, Sequence[float | None]], title: str) -> Picture:
    figure, axis = canvas()
    for (label, values), colour in zip(curves.items(), COLOURS * len(curves), strict=False):
        points = [(epoch, value) for epoch, value in enumerate(values, start=1) if value is not None]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, color=colour, marker="." if len(points) < 3 else None)
    axis.set_title(title, fontsize=10)
    whole_epochs(axis)
    axis.grid(alpha=0.3)
    legend(figure, axis)
    return picture(figure)


def _weights(runs: Mapping[str, Records], key: str, title: str) -> Picture:
    figure, axis = canvas()
    largest = 1.0
    for (label, records), colour in zip(runs.items(), COLOURS * len(runs), strict=False):
        epochs = range(1, len(records) + 1)
        axis.plot(epochs, [record[key] for record in records], color=colour, label=f"{label}, mean")
        top = [record[f"{key}_max"] for record in records]
        axis.plot(epochs, top, color=colour, ls="--", label=f"{label}, largest")
        largest = max(largest, *top)
    axis.set_yscale("log")
    axis.set_ylim(0.9, max(10.0, 1.5 * largest))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_title(title, fontsize=10)
    whole_epochs(axis)
    axis.grid(alpha=0.3)
    legend(figure, axis)
    return picture(figure)


def _histogram_map(histograms: Sequence[Sequence[float]], title: str) -> Picture:
    from matplotlib.colors import LogNorm

    counts = numpy.array(histograms, dtype=float)
    share = counts / counts.sum(1, keepdims=True)
    figure, axis = canvas()
    image = axis.imshow(
        share.T,
        origin="lower",
        aspect="auto",
        extent=(0.5, len(counts) + 0.5, 0, 1),
        norm=LogNorm(1e-5, 1),
        cmap="viridis",
    )
    axis.set_facecolor("black")
    axis.set_title(title, fontsize=10)
    axis.set_ylabel("disparity of the peers")
    whole_epochs(axis)
    figure.colorbar(image, ax=axis, label="share of samples")
    return picture(figure)
