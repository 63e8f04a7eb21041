"""What a training method is: how the inputs are perturbed, and one differentiable loss per member.

The trainer calls `perturb`, then `step`, both in train mode, and back-propagates the sum of the member losses. A method
is a dataclass: its fields are its settings, on the command line too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from ceat_fast.ensemble import Ensemble


class Attack(Protocol):
    """Searches adversarial inputs: (B, ...) images in [0, 1], (B,) labels -> (B, ...) or, per member, (M, B, ...).

    It sees the model in eval mode and leaves its modes, gradients and running statistics as they were.
    """

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor | None = None) -> Tensor: ...


class Batch(NamedTuple):
    """One training batch."""

    images: Tensor  # (B, C, H, W) in [0, 1]
    labels: Tensor  # (B,) int64
    indices: Tensor  # (B,) int64, position in the data set: the key of the attack noise


class StepOutput(NamedTuple):
    """What a method returns for one batch; everything but `losses` is without gradient and is only logged."""

    losses: Tensor  # (M,), member m's loss, averaged over the batch
    parts: Mapping[str, Tensor]  # name -> (M, B); names that end in "_disparity" also get a histogram
    adv_logits: Tensor  # (M, B, K)
    nat_logits: Tensor | None  # (M, B, K); None where the method needs no clean forward


class Method(ABC):
    """Base of all training methods."""

    goal: ClassVar[str] = "ensemble"  # whom the training attack is aimed at: "ensemble" (eq. 3) or "members" (eq. 2)

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of the dataclass by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    @property
    def label(self) -> str:
        """Name and numbers for tables and figures, for example "CEAT(lam=1, mu=5)"."""
        numbers = {name: value for name, value in self.settings.items() if type(value) in (int, float)}
        inner = ", ".join(f"{name}={value:g}" for name, value in numbers.items())
        return type(self).__name__ + (f"({inner})" if inner else "")

    def perturb(self, attack: Attack, ensemble: Ensemble, batch: Batch) -> Tensor:
        """Adversarial inputs for one batch; `attack` is the configured one, aimed at `goal`."""
        return attack(ensemble, batch.images, batch.labels, batch.indices)

    @abstractmethod
    def step(self, ensemble: Ensemble, adversarial: Tensor, batch: Batch) -> StepOutput:
        """Forward passes in train mode and the losses of one batch."""
