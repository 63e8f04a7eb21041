"""SIGTERM and Ctrl-C as requests that the training loop answers between two steps: it saves, then ends."""

from __future__ import annotations

import signal
import threading
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


class Interrupts:
    """Within the `with` block, `requested` is the number of the first such signal, or 0. A second Ctrl-C interrupts at
    once. Python delivers signals to the main thread; in another one nothing is changed."""

    def __init__(self) -> None:
        self.requested = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._request) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = self.requested or number
