"""Progress of a training run: a bar on a terminal, a line per epoch elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from ceat_fast.training.metrics import EpochMetrics


class TrainingProgress:
    """Shows epoch, images/s, time left, loss, adversarial training accuracy and the largest weight."""

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

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, epoch: int, share: float, losses: Tensor, metrics: EpochMetrics, images_per_second: float) -> None:
        """Show the state within an epoch (reads the device); `share` of its batches are done."""
        if not self._console.is_terminal:
            return
        weight = metrics.running_maximum("_weight")
        status = (
            f"epoch {epoch + 1}/{self._epochs}  {images_per_second:,.0f} images/s  loss {losses.mean().item():.3f}  "
            f"adversarial accuracy {metrics.running_accuracy():.1%}"
        )
        status += "" if weight is None else f"  largest weight {weight:.1f}"
        self._bar.update(self._task, completed=epoch + share, status=status)

    def finish_epoch(self, record: dict[str, Any]) -> None:
        """Where there is no bar: one line for the epoch."""
        if self._console.is_terminal:
            return
        weights = [value for name, value in record.items() if name.endswith("_weight_max")]
        line = (
            f"epoch {record['epoch']}/{self._epochs}  {record['images_per_second']:,.0f} images/s  "
            f"loss {record['loss']:.3f}  adversarial accuracy {record['train_adv_accuracy']:.1%}"
        )
        self._console.print(
            line + (f"  largest weight {max(weights):.1f}" if weights else ""), highlight=False, soft_wrap=True
        )
