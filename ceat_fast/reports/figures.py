"""The figures about evaluations."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ceat_fast.evaluation import CLEAN, EvaluationResult
from ceat_fast.evaluation.sanity import curve
from ceat_fast.reports.canvas import COLOURS, Picture, canvas, legend, picture


def accuracy_curves(results: Mapping[str, EvaluationResult], over: str) -> Picture | None:
    """Accuracy over "eps" or "steps", with 95 % intervals for ensembles; None if no result has such a curve.

    With a single result its members are shown too, thin and grey.
    """
    curves = {label: (result, curve(result, over)) for label, result in results.items() if curve(result, over)}
    if not curves:
        return None
    figure, axis = canvas()
    for (label, (result, names)), colour in zip(curves.items(), COLOURS * len(curves), strict=False):
        for subject in result.subjects[1:] if len(curves) == 1 else []:
            points = _points(result, names, subject, over)
            caption = "members" if subject == result.subjects[1] else None
            axis.plot([p[0] for p in points], [p[1] for p in points], color="#999", lw=0.9, label=caption)
        points = _points(result, names, result.main_subject, over)
        x, y, low, high = zip(*points, strict=True)
        axis.plot(x, y, color=colour, marker="o", ms=4, label=result.main_subject if len(curves) == 1 else label)
        axis.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
    first, names = next(iter(curves.values()))
    axis.set_ylim(0, 100)
    axis.set_ylabel("accuracy in %")
    axis.set_xlabel({"eps": f"eps ({first.settings(names[0]).get('norm', 'Linf')})", "steps": "steps of PGD"}[over])
    if over == "steps":
        axis.set_xscale("log")
        ticks = [first.settings(name)["steps"] for name in names]
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
    axis.grid(alpha=0.3)
    legend(figure, axis)
    return picture(figure)


def heat_map(
    values: Tensor, rows: Sequence[str], columns: Sequence[str], row_title: str, column_title: str, good_is_high: bool
) -> Picture:
    """A matrix (R, C) of percentages, its numbers written in; the darker, the worse.

    For example a transfer matrix: any plain tensor, with names for its rows and columns.

    Raises:
        ValueError: the names do not fit the matrix.
    """
    if values.shape != (len(rows), len(columns)):
        raise ValueError(f"a matrix of {tuple(values.shape)} needs as many names, got {len(rows)} and {len(columns)}")
    slanted = max(len(name) for name in columns) > 9
    width = 1.2 + 0.075 * max(len(name) for name in rows) + 0.66 * len(columns)
    figure, axis = canvas(width, 1.1 + 0.3 * slanted + 0.32 * len(rows))
    axis.imshow(values.numpy(), cmap="YlGnBu_r" if good_is_high else "YlOrRd", vmin=0, vmax=100, aspect="auto")
    dark = values < 50 if good_is_high else values > 60
    for row, column in itertools.product(range(len(rows)), range(len(columns))):
        ink = "white" if dark[row, column] else "black"
        text = f"{values[row, column].item():.1f}"
        axis.text(column, row, text, ha="center", va="center", fontsize=8.5, color=ink)
    turn: dict[str, Any] = {"rotation": 35, "ha": "right"} if slanted else {}
    axis.set_xticks(range(len(columns)), columns, fontsize=8.5, **turn)
    axis.set_yticks(range(len(rows)), rows, fontsize=8.5)
    axis.set(xlabel=column_title, ylabel=row_title)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return picture(figure)


def image_png(image: Tensor) -> bytes:
    """An image (C, H, W) in [0, 1], 1 or 3 channels, as PNG with one pixel per pixel."""
    from matplotlib.image import imsave

    pixels = image.clamp(0, 1).permute(1, 2, 0)
    pixels = pixels.expand(*pixels.shape[:2], 3)
    buffer = io.BytesIO()
    imsave(buffer, (pixels * 255).round().to(torch.uint8).contiguous().numpy(), format="png")
    return buffer.getvalue()


def perturbation(clean: Tensor, adversarial: Tensor, eps: float) -> Tensor:
    """The difference around grey: full contrast is eps."""
    return (0.5 + (adversarial - clean) / (2 * eps)).clamp(0, 1)


def _points(result: EvaluationResult, names: Sequence[str], subject: str, over: str) -> list[tuple[float, ...]]:
    """(x, accuracy, low, high) in percent, from the clean accuracy at eps 0 on."""
    scores = [(result.settings(name)[over], result.score(subject, name)) for name in names]
    if over == "eps":
        scores.insert(0, (0.0, result.score(subject, CLEAN)))
    return [(float(x), *(100 * value for value in (score.accuracy, *score.interval))) for x, score in scores]
