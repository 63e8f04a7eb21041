"""Figures of throughput.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"author": "#9aa0a6", "eager": "#7baaf7", "compiled": "#4285f4", "ceat_fast": "#d9480f"}


def bar_figure(results: list[dict[str, Any]], path: Path) -> None:
    """Images per second of each way, one group of bars per precision."""
    figure, axis = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    labels, rates, colours = [], [], []
    for result in results:
        for name, rate in result["images_per_second"].items():
            labels.append(f"{name}\n{'fp32' if name == 'author' else result['setting']['precision']}")
            rates.append(rate)
            colours.append(COLOURS[name])
    bars = axis.bar(range(len(rates)), rates, color=colours)
    axis.bar_label(bars, fmt="{:,.0f}", padding=2)
    axis.set_xticks(range(len(labels)), labels)
    axis.set_ylabel("images per second")
    setting = results[0]["setting"]
    axis.set_title(f"M={setting['members']} {setting['model']}, B={setting['batch']}, PGD-{setting['steps']}")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def growth_figure(results: list[dict[str, Any]], path: Path) -> None:
    """Seconds and memory of a PGD attack over each quantity that was varied."""
    varied = list(dict.fromkeys(result["varied"] for result in results))
    size = (3.2 * len(varied), 5)
    figure, axes = plt.subplots(2, len(varied), figsize=size, layout="constrained", squeeze=False, sharex="col")
    for column, name in enumerate(varied):
        rows = [result for result in results if result["varied"] == name]
        x = [row["setting"][name] for row in rows]
        for way in ("author", "ceat_fast"):
            seconds = [row["seconds"][way]["median"] for row in rows]
            mebibytes = [row["peak_bytes"][way] / 2**20 for row in rows]
            for axis, values in zip(axes[:, column], (seconds, mebibytes), strict=True):
                axis.plot(x, values, "o-", color=COLOURS[way], label=way)
                axis.set_ylim(bottom=0)
                axis.spines[["top", "right"]].set_visible(False)
        axes[1][column].set_xlabel(name)
    axes[0][0].set_ylabel("seconds")
    axes[1][0].set_ylabel("MiB at the peak")
    axes[0][0].legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def loss_figure(results: list[dict[str, Any]], copy_rate: float, path: Path) -> None:
    """Bytes per second of the loss as a share of the copy rate, over the bytes that it has to move."""
    figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for dtype in dict.fromkeys(result["dtype"] for result in results):
        rows = sorted((result for result in results if result["dtype"] == dtype), key=lambda r: r["bytes"])
        shares = [100 * row["bytes_per_second"] / copy_rate for row in rows]
        axis.semilogx([row["bytes"] for row in rows], shares, "o-", label=dtype)
    axis.set_xlabel("bytes moved by the loss and its gradient")
    axis.set_ylabel("% of the copy rate")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
