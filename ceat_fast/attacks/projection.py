"""The nearest point of a hyperplane inside the box [0, 1]^d, for many rows at once (appendix of the FAB paper).

Row t, hyperplane w.(p - t) + c = 0. To bring w.p down by c > 0, entry i moves by -sign(w_i) m_i, where

    m_i = min(l s_i, r_i)     r_i: room to the wall, t_i where w_i > 0, else 1 - t_i;  s_i = 1 for Linf, |w_i| for L2
    g(l) = sum_i |w_i| m_i = c

and c < 0 is the same with -w. g is concave, increasing and piecewise linear with breakpoints r_i / s_i: sorted, the
first breakpoint where g reaches c ends the piece on which l solves a linear equation. Where even g(inf) < c, the box
has no point of the hyperplane, and every entry goes to its wall.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_hyperplane(points: Tensor, normal: Tensor, offset: Tensor, norm: str) -> Tensor:
    """The shortest moves from points in [0, 1] onto hyperplanes, in norm "Linf" or "L2".

    Args:
        points: (n, d), the t above.
        normal: (n, d), the w.
        offset: (n,), the c.

    Returns:
        (n, d): p - t. Entries with w_i = 0 stay where they are.
    """
    # The hyperplane does not change with the scale, and the squares of a confident model's gradient underflow.
    scale = normal.abs().amax(1).clamp(min=torch.finfo(normal.dtype).tiny)
    normal, offset = normal / scale[:, None], offset / scale
    sign = torch.where(offset < 0, -1, 1)[:, None] * normal.sign()
    steep = normal.abs()
    room = torch.where(sign > 0, points, 1 - points)
    slope = torch.ones_like(steep) if norm == "Linf" else steep
    multiplier = _solve(steep, slope, room, offset.abs())
    return -sign * torch.minimum(multiplier[:, None] * slope, room)


def _solve(steep: Tensor, slope: Tensor, room: Tensor, offset: Tensor) -> Tensor:
    """l with sum_i |w_i| min(l s_i, r_i) = c, or one at which every entry is at its wall: (n,)."""
    breakpoints = (room / slope).nan_to_num(nan=0.0, posinf=0.0)  # entries without slope do not matter
    breakpoints, order = breakpoints.sort(dim=1)
    at_wall = (steep * room).gather(1, order)
    moving = (steep * slope).gather(1, order)
    # Entries before the piece are at their walls, the others still move. The second sum runs from the end, since a
    # difference of sums would leave rounding errors where few entries move.
    before = at_wall.cumsum(1) - at_wall
    after = moving.flip(1).cumsum(1).flip(1)
    reached = before + breakpoints * after >= offset[:, None]
    piece = reached.int().argmax(1, keepdim=True)
    before, after = before.gather(1, piece).squeeze(1), after.gather(1, piece).squeeze(1)
    solution = ((offset - before) / after.clamp(min=torch.finfo(after.dtype).tiny)).clamp(min=0)
    return torch.where(reached.any(1), solution, breakpoints[:, -1])
