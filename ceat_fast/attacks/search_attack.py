"""What APGD, FAB, Square and AutoAttack have in common: settings and the call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from ceat_fast.attacks.budget import Budget, parse_budget
from ceat_fast.attacks.geometry import NORM_ORDERS
from ceat_fast.attacks.result import AttackResult, Observer
from ceat_fast.attacks.session import session
from ceat_fast.attacks.worklist import Search
from ceat_fast.checks import require_ints
from ceat_fast.choices import require_choice

PRECISIONS = ("fp32", "mixed")


@dataclass(frozen=True)
class JudgedAttack(ABC):
    """`attack(model, x, y) -> x_adv`, with a verdict on every sample from `attack.run(model, x, y)`.

    Args:
        eps: radius of the ball, a number, a Fraction or text such as "8/255"; in [0, 1] for norm "Linf".
        norm: "Linf" or "L2".
        seed: keys the noise by (seed, attack, run, sample index).
        precision: "fp32"; or "mixed": the model is searched in the precision that is fastest on its device, and what
            is found, like the best point of each search that finds nothing, is judged in fp32.
        batch_size: searches at a time; results do not depend on it beyond the rounding of the model's own arithmetic.
            Default: 250, but 1,024 on a CUDA device.

    Raises:
        ValueError, TypeError: an argument outside the range above; names it, its value and what is allowed.
    """

    eps: Budget = "8/255"
    norm: str = "Linf"
    seed: int = field(default=0, kw_only=True)
    precision: str = field(default="fp32", kw_only=True)
    batch_size: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        require_choice("norm", self.norm, NORM_ORDERS)
        require_choice("precision", self.precision, PRECISIONS)
        if self.norm == "Linf" and self.radius > 1:
            raise ValueError(f"eps must be in [0, 1], got {self.eps!r}")
        require_ints(self, seed=None)
        if self.batch_size is not None:
            require_ints(self, batch_size=1)

    @cached_property
    def radius(self) -> float:
        """eps as a number."""
        return parse_budget("eps", self.eps)

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor | None = None, *, eps: Tensor | None = None
    ) -> Tensor:
        """Perturb x so that the model errs on y: `run(...).x_adv`."""
        return self.run(model, x, y, index, eps=eps).x_adv

    @abstractmethod
    def run(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        index: Tensor | None = None,
        *,
        eps: Tensor | None = None,
        observer: Observer | None = None,
    ) -> AttackResult:
        """Attack the samples that the model classifies correctly.

        Args:
            model: an `Ensemble`, or any module that maps x to logits (B, K); in eval mode. Its parameters, their
                gradients and flags, and its buffers are left as they are.
            x: (B, ...) fp32 or fp64 in [0, 1].
            y: (B,) int64 labels in [0, K).
            index: (B,) int64 sample indices that key the noise; default 0 to B-1.
            eps: (B,) radii, one per sample, in place of the attack's.
            observer: is called as samples are done with, and about once a second; see `Observer`.

        Raises:
            ValueError: input outside these ranges, a model in train mode, one that returns NaN, or one with too few
                classes for the attack.
        """


@dataclass(frozen=True)
class SearchAttack(JudgedAttack):
    """A single attack."""

    @property
    @abstractmethod
    def name(self) -> str:
        """As in AutoAttack; keys the noise."""

    @abstractmethod
    def search(self, view: nn.Module, slack: float, classes: int) -> Search[Any]:
        """The search that the attack makes on a frozen model with so many classes."""

    def run(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        index: Tensor | None = None,
        *,
        eps: Tensor | None = None,
        observer: Observer | None = None,
    ) -> AttackResult:
        with session(self, model, x, y, index, eps, observer) as current:
            current.attack(self)
        current.warn()
        return current.result
