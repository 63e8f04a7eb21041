"""Small members whose outputs can be computed by hand, for the tests of the methods."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy
import torch
from torch import Tensor, nn

from ceat_fast.ensemble import Ensemble
from ceat_fast.methods import Batch

CLASSES = 7  # ADP needs more wrong classes than members, and there are up to 5 members


class FixedLogits(nn.Module):
    """Logits looked up by the first value of the input: 0.0 is the clean batch, 1.0, 2.0 and so on are others."""

    def __init__(self, tables: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(tables)  # (inputs, B, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.table[round(x.flatten()[0].item())]


def fixed_ensemble(members: int, inputs: int, samples: int = 5, scale: float = 2.0) -> tuple[Ensemble, Batch]:
    """Members with random float64 logits on `inputs` batches; images of the first are zeros."""
    generator = torch.Generator().manual_seed(members)
    tables = scale * torch.randn(members, inputs, samples, CLASSES, generator=generator, dtype=torch.float64)
    ensemble = Ensemble([FixedLogits(table) for table in tables], backend="loop")
    labels = torch.arange(samples) % CLASSES
    return ensemble, Batch(torch.zeros(samples, 1, 2, 2), labels, torch.arange(samples))


def numbered(batch: Batch, number: int, members: int | None = None) -> Tensor:
    """The input batch with that number; one for each member if their number is given."""
    shape = batch.images.shape if members is None else (members, *batch.images.shape)
    return torch.full(shape, float(number))


def probabilities(ensemble: Ensemble, number: int) -> numpy.ndarray:
    """(M, B, K) softmax of the members' tables, computed with the standard library."""
    return numpy.array(
        [[softmax(row) for row in member.table[number].tolist()] for member in ensemble.members]  # type: ignore[index]
    )


def softmax(logits: Sequence[float]) -> list[float]:
    powers = [math.exp(z) for z in logits]
    return [power / sum(powers) for power in powers]


class Smooth(nn.Module):
    """tanh between two linear layers: twice differentiable, without state, so that finite differences apply."""

    def __init__(self, generator: torch.Generator, width: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(4, width, dtype=torch.float64)
        self.last = nn.Linear(width, CLASSES, dtype=torch.float64)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x.flatten(1))))


def smooth_ensemble(members: int, samples: int = 4) -> tuple[Ensemble, Batch]:
    generator = torch.Generator().manual_seed(10 + members)
    ensemble = Ensemble([Smooth(generator) for _ in range(members)], backend="loop")
    images = torch.rand(samples, 1, 2, 2, generator=generator, dtype=torch.float64)
    return ensemble, Batch(images, torch.arange(samples) % CLASSES, torch.arange(samples))


class Small(nn.Module):
    """Two convolutions with BatchNorm and a linear layer, for 8x8 images; `depth` adds convolutions."""

    def __init__(self, depth: int = 2, width: int = 4, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number in range(depth):
            layers += [nn.Conv2d(width if number else 1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
            layers += [nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width * 16, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.avg_pool2d(self.body(x), 2).flatten(1))


def small_ensemble(
    depths: Sequence[int] = (2, 2, 2), samples: int = 6, backend: str = "loop"
) -> tuple[Ensemble, Batch]:
    """Small members in train mode, and a batch of random images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(depths))
        ensemble = Ensemble([Small(depth) for depth in depths], backend=backend).train()
        images = torch.rand(samples, 1, 8, 8)
    return ensemble, Batch(images, torch.arange(samples) % 10, torch.arange(samples))


def unchanged_attack(
    model: nn.Module, x: Tensor, y: Tensor, index: Tensor | None = None, members: int | None = None
) -> Tensor:
    """An attack that finds nothing: x itself, one for each member if their number is given."""
    return x if members is None else x.expand(members, *x.shape).clone()
