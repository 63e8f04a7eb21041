"""Averages of the weights along the way, which are often more robust than the last ones.

average <- average + share * (weights - average), from the first weights on. The running statistics of BatchNorm are
averaged in the same way, so the average needs no further pass over the data; integers are copied.
"""

from __future__ import annotations

import copy
import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ceat_fast.ensemble import Ensemble
from ceat_fast.training.checks import require


@dataclass
class WeightAverage(ABC):
    """Base of the averages."""

    @abstractmethod
    def due(self, step: int, steps_per_epoch: int) -> bool:
        """Whether the weights after optimizer step `step`, counted from 0, enter the average."""

    @abstractmethod
    def share(self, count: int) -> float:
        """The share of new weights where `count` >= 1 have entered before."""


@dataclass
class EMA(WeightAverage):
    """Exponential moving average over the steps: average = decay * average + (1 - decay) * weights.

    Args:
        decay: in (0, 1).
    """

    decay: float = 0.999

    def __post_init__(self) -> None:
        require(0 < self.decay < 1, "average.decay", self.decay, "in (0, 1)")

    def due(self, step: int, steps_per_epoch: int) -> bool:
        return True

    def share(self, count: int) -> float:
        return 1 - self.decay


@dataclass
class SWA(WeightAverage):
    """Stochastic weight averaging: the mean of the weights at the end of each epoch from `start_epoch` on.

    Args:
        start_epoch: the first epoch that counts, counted from 1.
    """

    start_epoch: int = 76

    def __post_init__(self) -> None:
        require(self.start_epoch >= 1, "average.start_epoch", self.start_epoch, "at least 1")

    def due(self, step: int, steps_per_epoch: int) -> bool:
        epoch, batch = divmod(step, steps_per_epoch)
        return batch == steps_per_epoch - 1 and epoch + 1 >= self.start_epoch

    def share(self, count: int) -> float:
        return 1 / (count + 1)


class AveragedEnsemble:
    """A copy of the ensemble, in eval mode, that holds the average; `count` weights have entered it."""

    def __init__(self, config: WeightAverage, ensemble: Ensemble) -> None:
        self.config = config
        self.ensemble = copy.deepcopy(ensemble).eval().requires_grad_(False)
        self.count = 0

    @torch.no_grad()
    def update(self, ensemble: Ensemble, step: int, steps_per_epoch: int) -> None:
        """Let the weights after optimizer step `step` enter, if they are due."""
        if not self.config.due(step, steps_per_epoch):
            return
        share = self.config.share(self.count) if self.count else 1.0
        pairs = list(zip(_tensors(self.ensemble), _tensors(ensemble), strict=True))
        numbers = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([mean for mean, _ in numbers], [new for _, new in numbers], share)
        for mean, new in pairs:
            if not mean.is_floating_point():
                mean.copy_(new)
        self.count += 1


def _tensors(module: nn.Module) -> itertools.chain[Tensor]:
    return itertools.chain(module.parameters(), module.buffers())
