"""The figures of the report, each as PNG bytes. matplotlib is imported on use and never touches a display."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = Sequence[Mapping[str, Any]]  # metrics.jsonl
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart with any colour vision


class Examples(NamedTuple):
    """Some test images, what the attack made of them, and what the ensemble says."""

    clean: Tensor  # (N, C, H, W) in [0, 1]
    adversarial: Tensor  # (N, C, H, W)
    labels: Tensor  # (N,)
    clean_predictions: Tensor  # (N,)
    adversarial_predictions: Tensor  # (N,)


def training_curves(runs: Mapping[str, Records]) -> bytes:
    """Loss, adversarial cross-entropy and adversarial training accuracy over the epochs."""
    panels = {
        "loss": "loss (mean over members)",
        "ce": "cross-entropy, adversarial",
        "train_adv_accuracy": "training accuracy, adversarial",
    }
    figure, axes = _panels(1, len(panels))
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        _lines(axis, {label: [record.get(key) for record in records] for label, records in runs.items()}, title)
    axes[0].legend(fontsize=8)
    return _png(figure)


def weight_curves(runs: Mapping[str, Records]) -> bytes | None:
    """Mean and largest weight over the epochs, log scale; None if no run has weights."""
    runs = {label: records for label, records in runs.items() if "adv_weight" in records[0]}
    if not runs:
        return None
    figure, axes = _panels(1, 2)
    for axis, (key, title) in zip(
        axes, {"nat_weight": "clean weight", "adv_weight": "adversarial weight"}.items(), strict=True
    ):
        curves = {f"{label}, mean": [record[key] for record in records] for label, records in runs.items()}
        curves |= {f"{label}, largest": [record[key + "_max"] for record in records] for label, records in runs.items()}
        _lines(axis, curves, title)
        largest = max(max(curve) for curve in curves.values())
        axis.set_yscale("log")
        axis.set_ylim(0.9, max(10.0, 1.5 * largest))
        axis.yaxis.set_major_formatter("{x:g}")
    axes[0].legend(fontsize=8, loc="upper left")
    return _png(figure)


def disparity_maps(runs: Mapping[str, Records]) -> bytes:
    """Histogram of the disparity (vertical) over the epochs (horizontal), as share of the samples, log colours."""
    from matplotlib.colors import LogNorm

    names = {"adv_disparity_histogram": "adversarial", "nat_disparity_histogram": "clean"}
    maps = [
        (f"{label}, {title}", numpy.array([record[key] for record in records], dtype=float))
        for label, records in runs.items()
        for key, title in names.items()
        if key in records[0]
    ]
    figure, axes = _panels(1, len(maps))
    for axis, (title, counts) in zip(axes, maps, strict=True):
        share = counts / counts.sum(1, keepdims=True)
        image = axis.imshow(
            share.T,
            origin="lower",
            aspect="auto",
            extent=(0.5, len(counts) + 0.5, 0, 1),
            norm=LogNorm(1e-5, 1),
            cmap="viridis",
        )
        axis.set_facecolor("black")
        axis.set(title=title, xlabel="epoch", ylabel="disparity of the peers")
    figure.colorbar(image, ax=axes, label="share of samples")
    return _png(figure)


def adversarial_examples(examples: Examples, magnify: float) -> bytes:
    """Rows: clean, adversarial, perturbation around grey, `magnify` times as strong; predictions above."""
    count = len(examples.labels)
    figure, axes = _panels(3, count, width=1.1, height=1.25)
    perturbation = (0.5 + magnify * (examples.adversarial - examples.clean)).clamp(0, 1)
    for column in range(count):
        label = int(examples.labels[column])
        predictions = (examples.clean_predictions[column], examples.adversarial_predictions[column])
        images = (examples.clean[column], examples.adversarial[column], perturbation[column])
        for row, image in enumerate(images):
            axis = axes[row * count + column]
            _image(axis, image)
            if row < 2:
                wrong = int(predictions[row]) != label
                axis.set_title(f"{label} → {int(predictions[row])}", fontsize=9, color="#d55e00" if wrong else "black")
    for row, title in enumerate(("clean", "adversarial", f"difference x{magnify:.1f}")):
        axes[row * count].set_ylabel(title, fontsize=8)
    return _png(figure)


def _panels(rows: int, columns: int, width: float = 3.4, height: float = 2.9) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns + 0.6, height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _lines(axis: Axes, curves: Mapping[str, Sequence[float | None]], title: str) -> None:
    for (label, values), colour in zip(curves.items(), COLOURS * len(curves), strict=False):
        points = [(epoch, value) for epoch, value in enumerate(values, start=1) if value is not None]
        axis.plot(*zip(*points, strict=True), label=label, color=colour, marker="." if len(points) < 3 else None)
    axis.set(title=title, xlabel="epoch")
    axis.grid(alpha=0.3)


def _image(axis: Axes, image: Tensor) -> None:
    pixels = image.permute(1, 2, 0).numpy()
    axis.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=1)
    axis.set_xticks([])
    axis.set_yticks([])


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
