"""Learning-rate schedules in closed form: the factor of a step depends on its number alone.

So a resumed run needs no scheduler state. The formulas are those of `torch.optim.lr_scheduler`, step by step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from ceat_fast.training.checks import require, require_positive


def warmup_factor(step: int, steps: float) -> float:
    """Linear rise over `steps` steps: 1/(steps+1) at step 0, 1 from step `steps` on."""
    return min(1.0, (step + 1) / (steps + 1))


@dataclass
class Schedule(ABC):
    """Base of the schedules.

    Args:
        warmup_epochs: the learning rate rises linearly, step by step, over so many epochs.
    """

    warmup_epochs: int = 0

    def __post_init__(self) -> None:
        require(self.warmup_epochs >= 0, "schedule.warmup_epochs", self.warmup_epochs, "at least 0")

    def factor(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        """What multiplies the learning rate in a step, counted from 0 over the whole run."""
        return warmup_factor(step, self.warmup_epochs * steps_per_epoch) * self._factor(step, steps_per_epoch, epochs)

    @abstractmethod
    def _factor(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        """The factor without the warm-up."""


@dataclass
class MultiStep(Schedule):
    """Steps down, the paper's schedule.

    Args:
        warmup_epochs: the learning rate rises linearly, step by step, over so many epochs.
        milestones: epochs at which the learning rate is multiplied by gamma.
        gamma: that factor.
    """

    milestones: list[int] = field(default_factory=lambda: [75, 95])
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        ordered = all(a < b for a, b in zip([0, *self.milestones], self.milestones, strict=False))
        require(ordered, "schedule.milestones", self.milestones, "epochs above 0 in rising order")
        require_positive(self, "schedule.", "gamma")

    def _factor(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        return math.pow(self.gamma, sum(step // steps_per_epoch >= milestone for milestone in self.milestones))


@dataclass
class Cosine(Schedule):
    """Half a cosine from 1 to `final` over the whole run.

    Args:
        warmup_epochs: the learning rate rises linearly, step by step, over so many epochs.
        final: the factor after the last step, in [0, 1].
    """

    final: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.final <= 1, "schedule.final", self.final, "in [0, 1]")

    def _factor(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        return _anneal(1.0, self.final, step / (steps_per_epoch * epochs))


@dataclass
class OneCycle(Schedule):
    """Up from 1/div to 1, then down to 1/(div * final_div), each by half a cosine; momentum stays as it is.

    Args:
        warmup_epochs: must stay 0, the cycle has its own rise.
        rise: share of the steps that go up, in (0, 1).
        div: peak over start, at least 1.
        final_div: start over end, at least 1.
    """

    rise: float = 0.3
    div: float = 25.0
    final_div: float = 1e4

    def __post_init__(self) -> None:
        require(self.warmup_epochs == 0, "schedule.warmup_epochs", self.warmup_epochs, "0 for OneCycle, which rises")
        require(0 < self.rise < 1, "schedule.rise", self.rise, "in (0, 1)")
        require(1 <= self.div < math.inf, "schedule.div", self.div, "finite and at least 1")
        require(1 <= self.final_div < math.inf, "schedule.final_div", self.final_div, "finite and at least 1")

    def _factor(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        last = steps_per_epoch * epochs - 1
        peak = self.rise * (last + 1) - 1
        if step <= peak:
            return _anneal(1 / self.div, 1.0, step / peak if peak > 0 else 1.0)
        return _anneal(1.0, 1 / (self.div * self.final_div), (step - peak) / (last - peak) if last > peak else 1.0)


def _anneal(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
