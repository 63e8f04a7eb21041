"""Weights of all convolutions of all members in the layouts of the CUDA kernels, brought up to date by two kernels.

Dozens of small copies, each a launch, would take as long as a step of an attack.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ceat_fast.ensemble.member_layers import MemberConvolution
from ceat_fast.ops.chain import Chain


class Layouts:
    """Keeps what the kernels read of these convolutions and of chains of them up to date.

    The memory of it stays the same, since graphs know its address.
    """

    def __init__(self, layers: Sequence[MemberConvolution], chains: Sequence[Chain]) -> None:
        self._layers, self._chains = layers, chains
        sources = [[convolution.weight for convolution in layer.layers] for layer in layers]
        biases = [layer.biases() for layer in layers]
        tensors = list(itertools.chain.from_iterable(itertools.chain(sources, biases)))
        self._copies = Rearrangement(tensors, self._arrange)
        self._hand_out(self._copies.results)

    def refresh(self) -> None:
        """Take over weights that were changed in place."""
        self._copies.refresh()

    def _arrange(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        rest = iter(tensors)
        weights = [list(itertools.islice(rest, len(layer.layers))) for layer in self._layers]
        biases = [list(itertools.islice(rest, len(layer.biases()))) for layer in self._layers]
        stored = {
            id(layer.weights): layer.storage(w, b) for layer, w, b in zip(self._layers, weights, biases, strict=True)
        }
        results: list[Tensor] = []
        for layer in self._layers:
            results += layer.weights.layouts(*stored[id(layer.weights)])
        for chain in self._chains:
            results += chain.layouts([stored[id(link.weights)] for link in chain.links])
        return results

    def _hand_out(self, results: Sequence[Tensor]) -> None:
        rest = iter(results)
        for layer in self._layers:
            layer.weights.read_from(*itertools.islice(rest, 4))
        for chain in self._chains:
            chain.read_from(*itertools.islice(rest, 3))


class Rearrangement:
    """Tensors that hold elements of others, or zeros, in another order.

    Args:
        sources: of one type, on one device.
        arrange: makes the results of tensors with the sources' shapes, by moving elements and filling up with zeros
            alone. It is called once, with numbers.
        dtype: of the results; that of the sources if None.

    Attributes:
        results: what `arrange` makes of the sources, as of the last `refresh`.
    """

    def __init__(
        self,
        sources: Sequence[Tensor],
        arrange: Callable[[Sequence[Tensor]], Sequence[Tensor]],
        dtype: torch.dtype | None = None,
    ) -> None:
        self._sources = list(sources)
        sizes = [source.numel() for source in self._sources]
        numbers = torch.split(torch.arange(1, sum(sizes) + 1, dtype=torch.int32), sizes)
        arranged = arrange([part.view(source.shape) for part, source in zip(numbers, self._sources, strict=True)])
        like = self._sources[0].detach().new_empty(0, dtype=dtype or self._sources[0].dtype)
        self._index = torch.cat([part.flatten() for part in arranged]).to(like.device)
        self._zero = like.new_zeros(1)
        self._values = like.new_empty(len(self._index))
        parts = torch.split(self._values, [part.numel() for part in arranged])
        self.results = [values.view(part.shape) for values, part in zip(parts, arranged, strict=True)]
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the sources' present values."""
        flat = torch.cat([source.flatten() for source in self._sources])
        torch.index_select(torch.cat([self._zero, flat.to(self._zero.dtype)]), 0, self._index, out=self._values)
