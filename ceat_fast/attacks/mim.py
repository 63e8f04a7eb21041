"""The momentum iterative method (Dong et al., 2018), and the same with diverse inputs (Xie et al., 2019).

g_0 = 0,  g_{t+1} = decay * g_t + dL/dx_t / mean|dL/dx_t|
x_{t+1} = P(x_t + alpha * s(g_{t+1}))      s: the sign for "Linf", the unit vector for "L2"
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ceat_fast.attacks.diversity import resize_and_pad
from ceat_fast.attacks.fixed_step import Direction, FixedStepAttack
from ceat_fast.attacks.noise import Noise
from ceat_fast.checks import require_number


@dataclass(frozen=True)
class MIM(FixedStepAttack):
    """Momentum iterative method: `attack(model, x, y) -> x_adv`.

    The settings of `FixedStepAttack`, by default without a random start as published; with one it is momentum PGD. And:

    Args:
        decay: share of the accumulated gradient that a step keeps, at least 0; 1 as published.
    """

    random_start: bool = False
    decay: float = 1.0

    name: ClassVar[str] = "MIM"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("decay", self.decay, 0)

    @property
    def _is_memoryless(self) -> bool:
        return self.decay == 0

    def _direction(self, sample_dims: int) -> Direction:
        return _Momentum(self.decay, sample_dims)


@dataclass(frozen=True)
class MDI2(MIM):
    """M-DI2: `MIM` whose model sees the images resized and padded at random, for attacks that transfer better.

    For images (B, C, H, W). In each step each image is, with a probability, shrunk to a random size (bilinear) and
    padded with zeros to its old one at a random place. The settings of `MIM`, and:

    Args:
        probability: of a changed image, in [0, 1].
        least_size: the smallest size as a share of the image's, in [0, 1]; the sizes from it on are equally likely.
    """

    probability: float = 0.5
    least_size: float = 0.9

    name: ClassVar[str] = "M-DI2"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("probability", self.probability, 0, 1)
        require_number("least_size", self.least_size, 0, 1)

    @property
    def _is_random(self) -> bool:
        return True

    @property
    def _is_memoryless(self) -> bool:
        return False

    def _transform(self, noise: Noise, step: int) -> Callable[[Tensor], Tensor]:
        uniform = noise.uniform(4, step)
        return lambda x: resize_and_pad(x, uniform, self.probability, self.least_size)


class _Momentum:
    """The accumulated gradient of one search."""

    def __init__(self, decay: float, sample_dims: int) -> None:
        self._decay = decay
        self._dims = tuple(range(-sample_dims, 0))
        self._sum: Tensor | None = None

    def __call__(self, gradient: Tensor) -> Tensor:
        size = gradient.abs().mean(self._dims, keepdim=True)
        # A gradient that is zero throughout adds nothing, instead of 0/0.
        scaled = gradient / size.clamp(min=torch.finfo(gradient.dtype).tiny)
        self._sum = scaled if self._sum is None else self._sum.mul_(self._decay).add_(scaled)
        return self._sum
