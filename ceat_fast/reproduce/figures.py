"""A reproduction as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ceat_fast.reports.canvas import COLOURS, Picture, picture
from ceat_fast.reproduce.outcome import BlockResult, Reproduction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(result: Reproduction) -> Picture:
    """Curves over the epochs or over the setting of a sensitivity figure, otherwise points per row and column."""
    if result.experiment.per_epoch:
        return _epochs(result)
    return _sensitivity(result) if result.experiment.axis is not None else _points(result)


def _points(result: Reproduction) -> Picture:
    """A panel per column, a line per row: our mean with its 95 % interval, and the paper's number."""
    from matplotlib.figure import Figure

    found = {name for block in result.blocks for row in block.rows for name in row.numbers if row.numbers[name]}
    columns = [name for name in result.experiment.columns if name in found] or list(result.experiment.columns)
    height = sum(len(block.rows) for block in result.blocks) * 0.24 + 0.7 * len(result.blocks) + 0.4
    figure = Figure(figsize=(1.6 + 1.5 * len(columns), height), layout="constrained")
    panels = figure.subplots(len(result.blocks), len(columns), squeeze=False, sharey="row")
    for row, block in zip(panels, result.blocks, strict=True):
        for axis, column in zip(row, columns, strict=True):
            _panel(axis, block, column)
        row[0].set_yticks(range(len(block.rows)), [r.row.name for r in block.rows], fontsize=8)
        row[0].invert_yaxis()
        row[0].set_ylabel(block.title, fontsize=8)
    handles = dict(zip(*reversed(panels[0][0].get_legend_handles_labels()), strict=True))
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return picture(figure)


def _panel(axis: Axes, block: BlockResult, column: str) -> None:
    for place, row in enumerate(block.rows):
        summary, paper = row.summary(column), row.row.paper.get(column)
        if summary is not None:
            axis.errorbar(
                summary.mean, place, xerr=summary.half_width, fmt="o", ms=4, color=COLOURS[0], label="ours (95 %)"
            )
        if paper is not None:
            axis.plot(paper, place, "d", ms=5, mfc="none", color=COLOURS[1], label="paper")
    axis.set_title(f"{column} (%)", fontsize=9)
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def _sensitivity(result: Reproduction) -> Picture:
    """A panel per block: accuracy over the setting, a curve per column with 95 % intervals."""
    figure, panels = _panels(result)
    setting = str(result.experiment.axis)
    for axis, block in zip(panels, result.blocks, strict=True):
        for column, colour in zip(result.experiment.columns, COLOURS, strict=False):
            places = [(float(getattr(row.row.method, setting)), row.summary(column)) for row in block.rows]
            known = [(x, summary) for x, summary in places if summary is not None]
            if known:
                x = [value for value, _ in known]
                widths: Sequence[float] = [summary.half_width or 0.0 for _, summary in known]
                means = [summary.mean for _, summary in known]
                axis.errorbar(x, means, yerr=widths, marker="o", ms=4, capsize=2, color=colour, label=column)
        axis.set(xlabel=setting, ylabel="accuracy in %")
        axis.legend(fontsize=8, frameon=False)
    return picture(figure)


def _epochs(result: Reproduction) -> Picture:
    """A panel per block: robust accuracy on held-out images over the epochs, the mean over the seeds of every row."""
    figure, panels = _panels(result)
    for axis, block in zip(panels, result.blocks, strict=True):
        for row, colour in zip(block.rows, COLOURS * len(block.rows), strict=False):
            curves = list(row.curves.values())
            if curves:
                mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
                axis.plot(range(1, len(mean) + 1), mean, color=colour, label=row.row.name)
        axis.set(xlabel="epoch", ylabel="robust accuracy, held out, in %")
        axis.legend(fontsize=8, frameon=False)
    return picture(figure)


def _panels(result: Reproduction) -> tuple[Figure, Sequence[Axes]]:
    """A figure with a panel per block, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * len(result.blocks), 3.4), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, len(result.blocks), squeeze=False)[0]
    for axis, block in zip(panels, result.blocks, strict=True):
        axis.set_title(block.title, fontsize=9)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, panels
