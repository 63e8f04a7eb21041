"""The metrics of a run for TensorBoard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ceat_fast.training.callbacks import Callback

if TYPE_CHECKING:
    from ceat_fast.training.trainer import Trainer

FOLDER = "tensorboard"


class TensorBoard(Callback):
    """Writes every number of an epoch's record, lists as one curve per entry, into the folder `tensorboard` of the run.

    Raises:
        ImportError: the package `tensorboard` is not installed.
    """

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError('tensorboard=true needs a package: pip install "ceat-fast[tensorboard]"') from error
        self._make_writer: Any = SummaryWriter
        self._writer: Any = None

    def on_start(self, trainer: Trainer) -> None:
        if trainer.layout.is_main:
            # Epochs after the checkpoint are trained again: their old points are hidden.
            first = trainer.position.epoch + 1
            self._writer = self._make_writer(str(trainer.run.folder / FOLDER), purge_step=first)

    def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        if self._writer is None:
            return
        for name, value in record.items():
            if isinstance(value, int | float) and name != "epoch":
                self._writer.add_scalar(name, value, record["epoch"])
            elif name.endswith("_members"):
                for member, entry in enumerate(value):
                    self._writer.add_scalar(f"{name}/{member}", entry, record["epoch"])

    def on_end(self, trainer: Trainer) -> None:
        if self._writer is not None:
            self._writer.close()
