"""Square Attack (Andriushchenko, Croce, Flammarion and Hein, "Square Attack: a query-efficient black-box adversarial
attack via random search", ECCV 2020): squares of random place and sign, kept where they raise the margin.

In query i a square covers about the share p_i of the image; p_i halves after 10, 50, 200, 500, 1000, 2000, 4000, 6000
and 8000 queries. Its side is the rounded root of p_i H W, from 1 to the shorter side of the image.

Linf: the start is x + eps * stripes, vertical, each with a random sign per channel. A proposal sets a square to
x + eps * sign, with a random sign per channel. Everything is clamped to [0, 1].

L2: the start puts a pattern of two opposite bumps, with a random sign per channel, on each tile of a grid of squares
with a fifth of the image's side. A proposal moves mass: what the perturbation has in a second window goes, and the norm
that becomes free, with what of eps is unused, goes to the first window, into its own perturbation plus such a pattern.
Sides are odd and at least 3. The perturbation is scaled to norm eps before the clamp to [0, 1].
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ceat_fast.attacks.ball import per_sample, unit_l2
from ceat_fast.attacks.noise import keyed_uniform, name_key
from ceat_fast.attacks.outputs import answers
from ceat_fast.attacks.search_attack import SearchAttack
from ceat_fast.attacks.worklist import Passes, Rows, Search, Start, fresh
from ceat_fast.checks import require_ints, require_number

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_MOST_QUERIES = 65_000
_SCHEDULED_QUERIES = 10_000
_BLOCK = 64  # steps whose random numbers are drawn together
_START = (1 << 16) - 1  # the noise key of the start, beyond those of all queries


@dataclass(frozen=True)
class Square(SearchAttack):
    """Square Attack on images: `attack(model, x, y) -> x_adv`, x of shape (B, C, H, W).

    Args (those of `SearchAttack` come first):
        queries: proposals per restart, from 1 to 65,000; the start is evaluated besides.
        p_init: share of the image that the first squares cover, in (0, 1].
        restarts: searches with random numbers of their own, at least 1.
        rescale_schedule: stretch the halvings of p, which are those for 10,000 queries, to `queries`.
    """

    queries: int = 5000
    p_init: float = 0.8
    restarts: int = 1
    rescale_schedule: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_ints(self, queries=1, restarts=1)
        if self.queries > _MOST_QUERIES:
            raise ValueError(f"queries must be at most {_MOST_QUERIES}, got {self.queries}")
        require_number("p_init", self.p_init, 0, 1, above=True)

    @property
    def name(self) -> str:
        return "square"

    def search(self, view: nn.Module, slack: float, classes: int) -> Search[SquareRows]:
        return (LinfSquareSearch if self.norm == "Linf" else L2SquareSearch)(self, view, slack)

    def share(self, query: int) -> float:
        """p_i of query i = 0, 1, ..."""
        if self.rescale_schedule:
            query = query * _SCHEDULED_QUERIES // self.queries
        return float(self.p_init / 2 ** sum(query > halving for halving in _HALVINGS))


@dataclass
class SquareRows(Rows):
    key: Tensor  # (n,) int64, of the noise; the block that begins with step i adds i
    noise: Tensor  # (n, _BLOCK, draws) fp64 numbers in [0, 1), of the present block of steps


class SquareSearch(Search[SquareRows]):
    """Step 0 evaluates the start, which `begin` puts into `best`; step i + 1 evaluates the proposal of query i."""

    interval = 50

    def __init__(self, settings: Square, view: nn.Module, slack: float) -> None:
        super().__init__(view, slack)
        self.settings = settings
        self.runs = settings.restarts
        self.steps = settings.queries + 1
        self._purpose = (settings.seed, name_key(settings.name))
        self._sides: Tensor | None = None

    @abstractmethod
    def first(self, start: Start) -> Tensor:
        """The points to begin with."""

    @abstractmethod
    def draws(self, channels: int) -> int:
        """How many random numbers a proposal takes."""

    @abstractmethod
    def propose(self, rows: SquareRows, side: Tensor, noise: Tensor) -> Tensor:
        """New points, with squares of these sides: (n,) int64, and noise (n, draws); `best` where the side is 0."""

    def begin(self, start: Start) -> SquareRows:
        if start.x.dim() != 4:
            raise ValueError(f"the square attack needs images (B, C, H, W), got {tuple(start.x.shape)}")
        if self._sides is None:
            self._sides = self._schedule(*start.x.shape[2:])
        noise = torch.zeros(len(start.x), _BLOCK, self.draws(start.x.shape[1]), device=start.x.device).double()
        rows = SquareRows(**fresh(start), key=start.noise_key, noise=noise)
        rows.best = self.first(start)
        return rows

    def advance(self, rows: SquareRows, step: Tensor) -> Passes:
        assert self._sides is not None
        proposal = self.propose(rows, self._sides[step].to(rows.key.device), self._noise(rows, step))
        if rows.x.device.type != "cpu":
            rows.observe(proposal, *self.success(answers(self.view, proposal), rows.y))
            return Passes(1, 0)
        # Small squares often repeat what is there. Such a proposal changes nothing, and is no reason to run the model;
        # on a GPU, finding out would cost more.
        is_new = (proposal != rows.best).flatten(1).any(1) | (step == 0)
        score, claims = torch.full_like(rows.score, -torch.inf), torch.zeros_like(rows.claimed)
        if bool(is_new.any()):
            score[is_new], claims[is_new] = self.success(answers(self.view, proposal[is_new]), rows.y[is_new])
        rows.observe(proposal, score, claims)
        return Passes(is_new.long(), 0)

    def random(self, key: Tensor, *shape: int) -> Tensor:
        """(n, *shape) numbers in [0, 1) in fp64, in which a product with a small whole number stays below that."""
        return keyed_uniform(key, shape, self._purpose, torch.float64)

    def _noise(self, rows: SquareRows, step: Tensor) -> Tensor:
        """(n, draws) numbers for this step. They come in blocks, since drawing a few takes as long as many."""
        place = step % _BLOCK
        begins = (place == 0).nonzero().squeeze(1)
        there = begins.to(rows.key.device)
        if len(begins):
            key = rows.key[there] + step[begins].to(there.device)
            rows.noise[there] = self.random(key, *rows.noise.shape[1:])
        return rows.noise[torch.arange(len(place), device=there.device), place.to(there.device)]

    def _schedule(self, height: int, width: int) -> Tensor:
        """The side of the square of every step; 0 in step 0."""
        roots = (math.sqrt(self.settings.share(query) * height * width) for query in range(self.settings.queries))
        return torch.tensor([0, *(self.side(root, min(height, width)) for root in roots)])

    def side(self, root: float, most: int) -> int:
        """The side of a square of area root * root in an image whose shorter side is `most`."""
        return min(max(round(root), 1), most)


class LinfSquareSearch(SquareSearch):
    def first(self, start: Start) -> Tensor:
        channels, _, width = start.x.shape[1:]
        stripes = _signs(self.random(start.noise_key + _START, channels, 1, width))
        return (start.x + per_sample(start.eps, 3) * stripes.to(start.x)).clamp(0, 1)

    def draws(self, channels: int) -> int:
        return 2 + channels

    def propose(self, rows: SquareRows, side: Tensor, noise: Tensor) -> Tensor:
        window = _window(noise[:, :2], side, rows.x)
        signs = _signs(noise[:, 2:])[:, :, None, None].to(rows.x)
        return torch.where(window.inside, (rows.x + per_sample(rows.eps, 3) * signs).clamp(0, 1), rows.best)


class L2SquareSearch(SquareSearch):
    _patterns: Tensor  # (largest side + 1, S, S): patterns of the sides that occur, in squares of the largest

    def first(self, start: Start) -> Tensor:
        count, channels, height, width = start.x.shape
        self._patterns = self._collect_patterns().to(start.x)
        side = max(min(height, width) // 5, 1)
        rows, columns = height // side, width // side
        noise = self.random(start.noise_key + _START, channels + 1, rows, columns)
        turned = (noise[:, :1] < 0.5)[..., None, None]
        pattern = bumps(side).to(start.x)
        tiles = torch.where(turned, pattern.T, pattern) * _signs(noise[:, 1:])[..., None, None].to(start.x)
        covered = tiles.transpose(3, 4).reshape(count, channels, rows * side, columns * side)
        top, left = (height - rows * side) // 2, (width - columns * side) // 2
        delta = torch.zeros_like(start.x)
        delta[:, :, top : top + rows * side, left : left + columns * side] = covered
        return _rescaled(start.x, delta, start.eps)

    def draws(self, channels: int) -> int:
        return 5 + channels

    def propose(self, rows: SquareRows, side: Tensor, noise: Tensor) -> Tensor:
        channels = rows.x.shape[1]
        first, second = _window(noise[:, :2], side, rows.x), _window(noise[:, 2:4], side, rows.x)
        delta = rows.best - rows.x
        signs = _signs(noise[:, 5:])[:, :, None, None].to(delta)
        pattern = self._pattern(first, side, noise[:, 4] < 0.5)
        new = unit_l2(pattern * signs + unit_l2(delta * first.inside, (2, 3)), (2, 3))
        unused = (per_sample(rows.eps, 3) ** 2 - delta.square().sum((1, 2, 3), keepdim=True)).clamp(min=0)
        freed = (delta * (first.inside | second.inside)).square().sum((2, 3), keepdim=True)
        moved = torch.where(first.inside, new * (unused / channels + freed).sqrt(), delta * ~second.inside)
        return torch.where(per_sample(side > 0, 3), _rescaled(rows.x, moved, rows.eps), rows.best)

    def side(self, root: float, most: int) -> int:
        side = max(round(root), 3)
        return min(side + (side % 2 == 0), most)

    def _collect_patterns(self) -> Tensor:
        assert self._sides is not None
        largest = int(self._sides.max())
        patterns = torch.zeros(largest + 1, largest, largest)
        for side in set(self._sides.tolist()) - {0}:
            patterns[side, :side, :side] = bumps(side)
        return patterns

    def _pattern(self, window: _Window, side: Tensor, turned: Tensor) -> Tensor:
        """The patterns in their windows, 0 outside: (n, 1, H, W)."""
        last = self._patterns.shape[1] - 1
        down, across, swap = window.down.clamp(0, last), window.across.clamp(0, last), per_sample(turned, 3)
        down, across = torch.where(swap, across, down), torch.where(swap, down, across)
        return self._patterns[per_sample(side, 3), down, across] * window.inside


class _Window(NamedTuple):
    """A square in each of n images."""

    inside: Tensor  # (n, 1, H, W) bool
    down: Tensor  # (n, 1, H, 1) int64, rows counted from its upper edge
    across: Tensor  # (n, 1, 1, W) int64, columns counted from its left edge


def _window(noise: Tensor, side: Tensor, images: Tensor) -> _Window:
    """A square of each side (n,) at a uniformly random place, by noise (n, 2); a side of 0 has nothing inside."""
    height, width = images.shape[2:]
    top, left = ((noise[:, i] * (size - side + 1)).long() for i, size in enumerate((height, width)))
    down = (torch.arange(height, device=side.device) - top[:, None])[:, None, :, None]
    across = (torch.arange(width, device=side.device) - left[:, None])[:, None, None, :]
    side = per_sample(side, 3)
    return _Window((down >= 0) & (down < side) & (across >= 0) & (across < side), down, across)


def _signs(noise: Tensor) -> Tensor:
    """-1 or 1."""
    return torch.where(noise < 0.5, -1, 1)


def _rescaled(x: Tensor, delta: Tensor, eps: Tensor) -> Tensor:
    return (x + per_sample(eps, 3) * unit_l2(delta, (1, 2, 3))).clamp(0, 1)


def bumps(side: int) -> Tensor:
    """The pattern eta, (side, side) of norm 1: a positive bump on the upper half of a square, a negative on the lower.

    A bump on a rectangle h x w is sum_{k=d}^{n} 1 / (k + 1)^2 at the Chebyshev distance d from (h // 2, w // 2), n the
    larger of the two; each bump has norm 1 before the whole is scaled.
    """
    upper = side // 2
    pattern = torch.cat([_bump(upper, side), -_bump(side - upper, side)])
    return _unit(pattern)


def _bump(height: int, width: int) -> Tensor:
    if height == 0:
        return torch.zeros(0, width)
    down, across = (torch.arange(height) - height // 2).abs(), (torch.arange(width) - width // 2).abs()
    terms = 1 / torch.arange(1, max(height // 2, width // 2) + 2, dtype=torch.float64) ** 2
    tails = terms.flip(0).cumsum(0).flip(0)
    return _unit(tails[torch.maximum(down[:, None], across)].float())


def _unit(tensor: Tensor) -> Tensor:
    return unit_l2(tensor, (0, 1))
