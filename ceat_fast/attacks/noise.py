"""Uniform noise keyed by seed and sample index, the same on every device and for every batch size and order.

Generator: splitmix64 (Steele, Lea and Flood, 2014). Its n-th output from state s is mix(s + n * GAMMA), so all numbers
of all samples are computed at once in 64-bit integers, whose arithmetic wraps alike everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The int64 with the bits of `value` modulo 2**64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_FACTOR_1 = _signed(0xBF58476D1CE4E5B9)
_FACTOR_2 = _signed(0x94D049BB133111EB)


def name_key(name: str) -> int:
    """A name as a part of a key."""
    return int.from_bytes(name.encode(), "big")


def _mix(state: Tensor) -> Tensor:
    """The output function of splitmix64 on int64; `&` clears the sign bits that an arithmetic shift brings in."""
    state = (state ^ ((state >> 30) & ((1 << 34) - 1))) * _FACTOR_1
    state = (state ^ ((state >> 27) & ((1 << 37) - 1))) * _FACTOR_2
    return state ^ ((state >> 31) & ((1 << 33) - 1))


def keyed_uniform(index: Tensor, shape: Sequence[int], key: Sequence[int | Tensor], dtype: torch.dtype) -> Tensor:
    """Uniform numbers in [0, 1), multiples of 2**-24: (B,) int64 sample indices -> (B, *shape).

    Each sample's numbers depend on `key` (integers such as seed, attack and restart, or int64 tensors () on the device)
    and on its index alone.
    """
    state = torch.zeros((), dtype=torch.int64, device=index.device)
    for part in key:
        state = _mix((state ^ (part if isinstance(part, Tensor) else _signed(part))) + _GAMMA)
    sample = _mix((state ^ index) + _GAMMA)
    counter = torch.arange(1, math.prod(shape) + 1, device=index.device)
    bits = _mix(sample[:, None] + counter * _GAMMA)
    return ((bits >> 40) & ((1 << 24) - 1)).to(dtype).mul_(2.0**-24).view(len(index), *shape)


class Noise:
    """The random numbers of one attack call on B samples with R restarts.

    With a seed they are keyed by (seed, attack, restart, what for, sample index); else torch's generator of the device
    draws them.

    Args:
        seed: any int, an int64 tensor () on the device, or None.
        attack: the attack's name: keeps the numbers of attacks with the same seed apart.
        index: (B,) int64 sample indices; default 0 to B-1.
        restarts: R.
        like: a tensor (B, ...) of the dtype and device wanted.
    """

    def __init__(
        self, seed: int | Tensor | None, attack: str, index: Tensor | None, restarts: int, like: Tensor
    ) -> None:
        self._seed = seed
        self._attack = name_key(attack)
        self._index = torch.arange(len(like), device=like.device) if index is None else index.to(like.device)
        self._restarts = restarts
        self._like = like

    def uniform(self, count: int, *purpose: int) -> Tensor:
        """(R * B, count) numbers in [0, 1), restart by restart; `purpose` keeps uses within the attack apart."""
        if self._seed is None:
            shape = (self._restarts * len(self._index), count)
            return torch.rand(shape, dtype=self._like.dtype, device=self._like.device)
        keys = ((self._seed, self._attack, restart, *purpose) for restart in range(self._restarts))
        return torch.cat([keyed_uniform(self._index, (count,), key, self._like.dtype) for key in keys])
