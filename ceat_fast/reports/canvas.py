"""matplotlib figures as PNG bytes. It is imported on use and never touches a display."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart with any colour vision
_DPI = 150
_PIXELS_PER_INCH = 96


class Picture(NamedTuple):
    """A PNG and the width in CSS pixels that it is meant for."""

    png: bytes
    width: int


def canvas(width: float = 4.4, height: float = 3.1) -> tuple[Figure, Axes]:
    """A figure with one panel; sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9)
    return figure, axis


def legend(figure: Figure, axis: Axes) -> None:
    """Name the lines below the panel, where the names hide none of them; the figure grows by as much."""
    lines, names = axis.get_legend_handles_labels()
    columns = 2 if max(map(len, names)) <= 24 else 1
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(names) // columns))
    figure.legend(lines, names, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def whole_epochs(axis: Axes) -> None:
    """Label the horizontal axis with epochs, which have no fractions."""
    from matplotlib.ticker import MaxNLocator

    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def picture(figure: Figure) -> Picture:
    """The finished figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return Picture(buffer.getvalue(), round(figure.get_figwidth() * _PIXELS_PER_INCH))
