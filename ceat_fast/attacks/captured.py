"""Whole searches as CUDA graphs: all steps of an attack on a frozen view are one launch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ceat_fast.ensemble import Ensemble
from ceat_fast.ensemble.graphs import beside, capture

_WARM_UPS = 2

# All steps of an attack, from inputs that lie on the device: (x, y, index, seed ()) -> x_adv.
Steps = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def can_capture(view: object, x: Tensor) -> bool:
    """Whether the members of a frozen view run by CUDA graphs, and a search on them is no part of a graph yet."""
    if not (isinstance(view, Ensemble) and view.is_view and x.is_cuda):
        return False
    return view.execution(x.device).graph and not torch.cuda.is_current_stream_capturing()


class CapturedSearch:
    """Makes the first searches as they are, then captures one and replays it; for inputs of one shape and one view.

    The view's weights may change in place in between: a graph reads them where they lie.
    """

    def __init__(self, search: Steps) -> None:
        self._search = search
        self._warm_ups = 0
        self._places: tuple[Tensor, ...] = ()
        self._replay: Callable[[], Tensor] | None = None

    def __call__(self, x: Tensor, y: Tensor, index: Tensor, seed: int) -> Tensor:
        """The search's x_adv."""
        if self._warm_ups < _WARM_UPS:
            self._warm_ups += 1
            key = torch.tensor(seed, device=x.device)
            return beside(lambda: self._search(x, y, index, key), x.device)
        if self._replay is None:
            self._places = (x.clone(), y.clone(), index.clone(), torch.tensor(seed, device=x.device))
            self._replay = capture(lambda: self._search(*self._places))
        for place, value in zip(self._places, (x, y, index), strict=False):
            place.copy_(value)
        self._places[-1].fill_(seed)
        return self._replay().clone()
