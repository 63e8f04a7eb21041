"""The sets that a perturbation must stay in: the Linf or L2 ball around an input, cut by [0, 1].

x' = P(x + alpha * s(d))     Linf: s(d) = sign(d); L2: s(d) = d / |d|_2.  P: nearest point of the ball, then of [0, 1]

The clamp to [0, 1] after the projection keeps the point in the ball, since the centre lies in [0, 1] too.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from ceat_fast.ops import dispatch, reference

NORMS = ("Linf", "L2")
LEAST = torch.finfo(torch.float32).tiny  # what is divided by is at least this
Uniform = Callable[[int], Tensor]  # n -> (B, n) numbers in [0, 1)


class Ball(ABC):
    """Balls around a batch of inputs.

    Args:
        center: (B, ...) or (M, B, ...), in [0, 1].
        radius: of all balls, or (B,), one for each.
        sample_dims: how many of the last dimensions of `center` belong to one sample.
    """

    def __init__(self, center: Tensor, radius: float | Tensor, sample_dims: int) -> None:
        self.center = center
        self.radius = radius
        self.sample_dims = sample_dims

    @abstractmethod
    def step(self, x: Tensor, direction: Tensor, alpha: float) -> Tensor:
        """The point that a step of length alpha along `direction` leads to; NaN in a direction stays NaN."""

    @abstractmethod
    def random_point(self, uniform: Uniform) -> Tensor:
        """A uniformly random point of each ball, clamped to [0, 1], for a centre (B, ...)."""

    def select(self, samples: Tensor) -> Ball:
        """The balls of some of the samples: (n,) int64 indices."""
        radius = self.radius.index_select(0, samples) if isinstance(self.radius, Tensor) else self.radius
        return type(self)(self.center.index_select(-1 - self.sample_dims, samples), radius, self.sample_dims)

    def repeat(self, count: int) -> Ball:
        """The same balls `count` times over, for a centre (count, B, ...)."""
        center = self.center.repeat(count, *[1] * self.center.dim())
        return type(self)(center, self.radius, self.sample_dims)

    @property
    def _dims(self) -> tuple[int, ...]:
        return tuple(range(-self.sample_dims, 0))

    @property
    def _radii(self) -> float | Tensor:
        """The radius in a shape that broadcasts over the centre."""
        return per_sample(self.radius, self.sample_dims) if isinstance(self.radius, Tensor) else self.radius


class LinfBall(Ball):
    """Every entry is at most the radius away."""

    def step(self, x: Tensor, direction: Tensor, alpha: float) -> Tensor:
        if isinstance(self.radius, Tensor):
            return reference.pgd_step(x, direction, self.center, alpha, self._radii)
        return dispatch.pgd_step(x, direction, self.center, alpha, self.radius)

    def random_point(self, uniform: Uniform) -> Tensor:
        noise = uniform(math.prod(self.center.shape[1:])).view_as(self.center)
        return (self.center + (2 * noise - 1) * self._radii).clamp(0, 1)


class L2Ball(Ball):
    """The root of the summed squares is at most the radius."""

    def step(self, x: Tensor, direction: Tensor, alpha: float) -> Tensor:
        return self._project(x + alpha * unit_l2(direction.to(x.dtype), self._dims) - self.center)

    def random_point(self, uniform: Uniform) -> Tensor:
        """A Gaussian direction at the distance radius * u^(1/n), of which the volume inside is the share u."""
        size = math.prod(self.center.shape[1:])
        pairs = (size + 1) // 2
        noise = uniform(2 * pairs + 1)
        # Box and Muller; 1 - u is above 0.
        length = (-2 * (1 - noise[:, :pairs]).log()).sqrt()
        angle = 2 * math.pi * noise[:, pairs : 2 * pairs]
        normal = torch.cat([length * angle.cos(), length * angle.sin()], dim=1)[:, :size].reshape(self.center.shape)
        share = per_sample(noise[:, -1] ** (1 / max(size, 1)), self.sample_dims)
        return self._project(unit_l2(normal, self._dims) * share * self._radii)

    def _project(self, delta: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(delta, dim=self._dims, keepdim=True)
        return (self.center + delta * (self._radii / norm.clamp(min=LEAST)).clamp(max=1)).clamp(0, 1)


_BALLS: dict[str, type[Ball]] = {"Linf": LinfBall, "L2": L2Ball}


def ball(norm: str, center: Tensor, radius: float | Tensor, sample_dims: int) -> Ball:
    """The `Ball` of a norm of `NORMS`."""
    return _BALLS[norm](center, radius, sample_dims)


def per_sample(values: Tensor, sample_dims: int) -> Tensor:
    """(..., B) -> (..., B, 1, ..., 1), to broadcast over samples of so many dimensions."""
    return values.reshape(*values.shape, *[1] * sample_dims)


def unit_l2(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """tensor / |tensor|_2 over dims; 0 where it is 0.

    Divided by the largest entry first: the squares of a confident model's gradient underflow.
    """
    scaled = tensor / tensor.abs().amax(dims, keepdim=True).clamp(min=LEAST)
    norm: Tensor = torch.linalg.vector_norm(scaled, dim=dims, keepdim=True)
    return scaled / norm.clamp(min=LEAST)
