"""Which classes a targeted attack aims at."""

from __future__ import annotations

import torch
from torch import Tensor


def likely_wrong(outputs: Tensor, label: Tensor, rank: Tensor) -> Tensor:
    """The wrong class of the given rank: (n, K) outputs, (n,) labels, (n,) int64 ranks, 0 the likeliest -> (n,)."""
    wrong = outputs.scatter(1, label[:, None], -torch.inf)
    order = wrong.sort(dim=1, descending=True, stable=True).indices
    return order.gather(1, rank[:, None]).squeeze(1)
