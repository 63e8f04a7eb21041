"""SIGTERM and Ctrl-C as requests that the training loop answers between two steps: it saves, then ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class TrainingInterrupted(KeyboardInterrupt):
    """A signal ended the training after a checkpoint was saved.

    Attributes:
        exit_code: 128 plus the number of the signal: 143 for SIGTERM, 130 for Ctrl-C.
    """

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(signal_number, message)  # both, since pickle calls the class with them
        self.exit_code = 128 + signal_number

    def __str__(self) -> str:
        return str(self.args[1])


@contextmanager
def answering(numbers: Iterable[int], handler: Any) -> Iterator[None]:
    """These signals go to `handler` within the `with` block. Python delivers signals to the main thread; in another one
    nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            # None stands for a handler that was not set by Python, which cannot put it back.
            signal.signal(number, signal.SIG_DFL if previous is None else previous)


class Interrupts:
    """Within the `with` block, `requested` is the number of the first such signal, or 0. A second Ctrl-C interrupts at
    once."""

    def __init__(self) -> None:
        self.requested = 0
        self._answering = answering(SIGNALS, self._request)

    def __enter__(self) -> Interrupts:
        self._answering.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._answering.__exit__(*error)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = self.requested or number
