"""The ball around each row and its boundary, in Linf and L2, for rows with radii of their own.

All tensors of points are (n, ...), radii eps are (n,).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ceat_fast.attacks.ball import LEAST, per_sample, unit_l2
from ceat_fast.attacks.noise import keyed_uniform

NORM_ORDERS = {"Linf": math.inf, "L2": 2.0}
DUAL_ORDERS = {"Linf": 1.0, "L2": 2.0}


def length(delta: Tensor, order: float) -> Tensor:
    """The norm of each row: (n, ...) -> (n,)."""
    norm: Tensor = torch.linalg.vector_norm(delta.flatten(1), order, dim=1)
    return norm


def project(points: Tensor, center: Tensor, eps: Tensor, norm: str) -> Tensor:
    """The nearest point of the ball, then of [0, 1]; that is still in the ball, since the centre lies in [0, 1]."""
    radius = per_sample(eps, points.dim() - 1)
    if norm == "Linf":
        return points.clamp(center - radius, center + radius).clamp(0, 1)
    delta = points - center
    distance = per_sample(length(delta, 2.0), points.dim() - 1)
    return (center + delta * (radius / distance.clamp(min=LEAST)).clamp(max=1)).clamp(0, 1)


def steepest(grad: Tensor, norm: str) -> Tensor:
    """The direction of length 1 along which a linear function with that gradient rises most; 0 where it is 0."""
    return grad.sign() if norm == "Linf" else unit_l2(grad, tuple(range(1, grad.dim())))


def random_direction(key: Tensor, purpose: tuple[int, ...], like: Tensor, norm: str) -> Tensor:
    """Random directions of length 1: (n,) int64 noise keys -> a tensor like `like`, (n, ...).

    Linf: a uniform point of the cube, stretched to its surface. L2: a uniform point of the sphere.
    """
    shape = like.shape[1:]
    if norm == "Linf":
        cube = 2 * keyed_uniform(key, shape, purpose, like.dtype) - 1
        return cube / per_sample(length(cube, math.inf), len(shape)).clamp(min=LEAST)
    # Box and Muller; 1 - u is above 0.
    radial, angular = keyed_uniform(key, (2, *shape), purpose, like.dtype).unbind(1)
    normal = (-2 * (1 - radial).log()).sqrt() * (2 * math.pi * angular).cos()
    return unit_l2(normal, tuple(range(1, like.dim())))
