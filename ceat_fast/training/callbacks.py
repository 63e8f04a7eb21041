"""Callbacks: code of your own that sees a run while it trains.

class Print(Callback):
    def on_epoch(self, trainer, record):
        print(record["epoch"], record["loss"])

Trainer(config, callbacks=[Print()]).fit()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ceat_fast.methods import StepOutput

if TYPE_CHECKING:
    from ceat_fast.training.trainer import Trainer


class Callback:
    """Override what is needed; an exception that a callback raises ends the training. With several processes each one
    calls its own; `trainer.layout.is_main` tells the first."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of this session, also after a resume."""

    def on_step(self, trainer: Trainer, output: StepOutput) -> None:
        """After an optimizer step. Reading `output` waits for the device."""

    def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """After an epoch, before its record is written: entries that are added to it go into metrics.jsonl."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last epoch, or when the training ends early for any reason."""
