"""Progress of an evaluation: a bar per attack on a terminal, a line per attack elsewhere."""

from __future__ import annotations

import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 60.0
_SECONDS_OF_SPEED = 600.0  # the parts of a long attack differ in speed


class EvaluationProgress:
    """Shows of each attack: images done, robust accuracy so far, images/s and the time left. console None: nothing."""

    def __init__(self, console: Console | None, samples: int) -> None:
        self._console = console or Console(quiet=True)
        self._samples = samples
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            speed_estimate_period=_SECONDS_OF_SPEED,
            disable=not self._console.is_terminal or self._console.quiet,
        )
        self._task = TaskID(0)

    def __enter__(self) -> EvaluationProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def begin(self, attack: str) -> None:
        """A new attack starts."""
        self._attack = attack
        self._seen = self._correct = self._computed = 0
        self._began = self._last_line = time.monotonic()
        self._task = self._bars.add_task(attack, total=self._samples, status="")

    def advance(self, samples: int, correct: int, computed: bool) -> None:
        """So many more samples are judged, of which the first subject has so many right."""
        self._seen += samples
        self._correct += correct
        self._computed += samples * computed
        self._show(self._status())

    def tell(self, samples: int, part: str, misled: float, done: float) -> None:
        """Within a batch of so many: what a long attack does, how much it has misled, and how much is done."""
        before = f"{self._status()}  " if self._seen else ""
        self._show(f"{before}{part}: {misled:.1%} of this batch misled", samples * done)

    def end(self) -> None:
        """The attack is through with this process's share."""
        self._line(self._status())

    def _show(self, status: str, more: float = 0.0) -> None:
        """`more` images, in terms of work, are done than were judged: the time left follows from that."""
        self._bars.update(self._task, completed=self._seen + more, status=status)
        if time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            left = self._bars.tasks[self._task].time_remaining
            self._line(status if left is None else f"{status}  {timedelta(seconds=round(left))} left")

    def _line(self, status: str) -> None:
        if not self._console.is_terminal:
            text = f"{self._attack}: {self._seen}/{self._samples} images  {status}"
            self._console.print(text, highlight=False, soft_wrap=True)

    def _status(self) -> str:
        accuracy = self._correct / max(self._seen, 1)
        speed = self._computed / max(time.monotonic() - self._began, 1e-9)
        return f"accuracy {accuracy:.1%}  " + (f"{speed:,.3g} images/s" if self._computed else "from the journal")
