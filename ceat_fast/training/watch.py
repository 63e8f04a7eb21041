"""Signs that a run goes wrong, looked for at the end of each epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ceat_fast.training.settings import WatchConfig

Record = dict[str, Any]


class TrainingStoppedError(RuntimeError):
    """The run went wrong and was stopped; the message says how, and which checkpoint is left."""


class NonFiniteLossError(TrainingStoppedError):
    """A member's loss or weight became NaN or infinite."""


class Watch:
    """Judges the records of the epochs so far.

    Args:
        config: what to do about what is found.
        chance: share of the most frequent class among the training images.
        warn: is told of what "warn" finds; once for each kind.
    """

    def __init__(self, config: WatchConfig, chance: float, warn: Callable[[str], object]) -> None:
        self._config, self._chance, self._warn = config, chance, warn
        self._warned: set[str] = set()

    def look(self, records: Sequence[Record], kept: str) -> None:
        """Look at all records up to now; `kept` says which checkpoint is left.

        Raises:
            TrainingStoppedError: something is found that the settings stop for.
        """
        checks = (
            ("collapse", self._config.collapse, collapse(records, self._chance, self._config.patience)),
            ("overfitting", self._config.overfitting, catastrophic_overfitting(records, self._config.drop)),
        )
        for kind, reaction, finding in checks:
            if finding is None or reaction == "off":
                continue
            if reaction == "stop":
                raise TrainingStoppedError(f"{finding}; {kept}")
            if kind not in self._warned:
                self._warned.add(kind)
                self._warn(f"{finding} (watch.{kind}=stop would end the run)")


def collapse(records: Sequence[Record], chance: float, patience: int) -> str | None:
    """Which member was right no more often than `chance` in each of the last `patience` epochs.

    The accuracy is that on clean images, held out or, without such, trained on; where a method has no clean pass it is
    that on the adversarial ones.
    """
    recent = [accuracies for record in records[-patience:] if (accuracies := _member_accuracies(record)) is not None]
    if len(recent) < patience:
        return None
    for member, values in enumerate(zip(*recent, strict=True)):
        if max(values) <= chance + 1e-6:
            return (
                f"member {member} has collapsed: accuracy {values[-1]:.1%} in epoch {records[-1]['epoch']}, and no "
                f"more than the {chance:.1%} of the most frequent class for {patience} epochs; a lower optimizer.lr, "
                "optimizer.grad_clip or the method's max_weight prevent it"
            )
    return None


def catastrophic_overfitting(records: Sequence[Record], drop: float) -> str | None:
    """Whether the last robust accuracy on held-out images is `drop` below its best, at a lower training loss."""
    judged = [record for record in records if "val_adv_accuracy" in record]
    if len(judged) < 2:
        return None
    best, last = max(judged[:-1], key=lambda record: float(record["val_adv_accuracy"])), judged[-1]
    if best["val_adv_accuracy"] - last["val_adv_accuracy"] < drop or last["loss"] >= best["loss"]:
        return None
    return (
        f"catastrophic overfitting: robust accuracy on held-out images fell from {best['val_adv_accuracy']:.1%} in "
        f"epoch {best['epoch']} to {last['val_adv_accuracy']:.1%} in epoch {last['epoch']} while the loss fell from "
        f"{best['loss']:.3f} to {last['loss']:.3f}; more attack.steps or a smaller attack.alpha prevent it"
    )


def _member_accuracies(record: Record) -> list[float] | None:
    names = ("val_nat_accuracy_members", "train_nat_accuracy_members", "train_adv_accuracy_members")
    return next((record[name] for name in names if name in record), None)
