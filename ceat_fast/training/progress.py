"""Progress of a training run: a bar on a terminal, a line per epoch elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class TrainingProgress:
    """Shows epoch, images/s, loss and its parts, disparity, largest weight, accuracies, and the time left."""

    def __init__(self, console: Console, title: str, epochs: int) -> None:
        self._console, self._epochs = console, epochs
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=epochs, status="")

    @property
    def wants_updates(self) -> bool:
        """Whether `update` shows anything: only then are its numbers worth waiting for the device."""
        return self._console.is_terminal

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, epoch: int, share: float, images_per_second: float, numbers: Mapping[str, float]) -> None:
        """Show the state within an epoch, `share` of whose batches are done."""
        status = f"epoch {epoch + 1}/{self._epochs}  {images_per_second:,.0f} images/s  {_text(numbers)}"
        self._bar.update(self._task, completed=epoch + share, status=status)

    def finish_epoch(self, record: Mapping[str, Any]) -> None:
        """Where there is no bar: one line for the epoch."""
        if self._console.is_terminal:
            return
        line = (
            f"epoch {record['epoch']}/{self._epochs}  {record['images_per_second']:,.0f} images/s  "
            f"{_text(summary(record))}"
        )
        self._console.print(line, highlight=False, soft_wrap=True)


def summary(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record that tell at a glance how a run is going, under readable names."""
    names = {
        "loss": "loss",
        "ce": "ce",
        "nat": "nat",
        "adv": "adv",
        "adv_disparity": "disparity",
        "train_adv_accuracy": "adversarial accuracy",
        "val_nat_accuracy": "held out: clean",
        "val_adv_accuracy": "robust",
    }
    shown = {text: record[name] for name, text in names.items() if name in record}
    weights = [value for name, value in record.items() if name.endswith("_weight_max")]
    return shown | ({"largest weight": max(weights)} if weights else {})


def _text(numbers: Mapping[str, float]) -> str:
    def number(name: str, value: float) -> str:
        if name.endswith(("accuracy", "clean", "robust")):
            return f"{value:.1%}"
        return f"{value:.1f}" if name == "largest weight" else f"{value:.3f}"

    return "  ".join(f"{name} {number(name, value)}" for name, value in numbers.items())
