"""Exact shortcut for long searches of fixed step length, whose iterates run into cycles.

Where x_{t+1} = F(x_t) with a deterministic F, an iterate that returns bit for bit returns for ever: if x_t = x_s with
s < t, then x_n = x_{t + (n - t) mod (t - s)} for all n >= t. So the last of n iterates is less than t - s steps away,
and no more have to be computed. A sample is compared with one earlier iterate at a time, which is replaced at growing
intervals (after Brent, 1980): cycles of every length are found with the memory of one more batch.

Samples that have reached their last iterate leave the batch, so the result is that of the full search wherever the bits
of a sample's gradient do not depend on the batch around it; as with batch size, only rounding can make a difference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ceat_fast.attacks.ball import Ball, per_sample
from ceat_fast.attacks.objective import Objective

MIN_STEPS = 50  # shorter searches rarely return early enough for the comparisons to pay
_FIRST_INTERVAL = 8
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def walk_to_cycles(objective: Objective, around: Ball, alpha: float, x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """`steps` >= 1 steps along the gradient: (last iterates like x, losses (rows,) at the last gradient of each row).

    Where the model draws random numbers in its forward pass, nothing is sure to repeat, and every step is computed.
    """
    axis = x.dim() - around.sample_dims - 1
    samples = torch.arange(x.shape[axis], device=x.device)
    lasts, last_losses = x.clone(), x.new_empty(objective.searches, len(samples))
    end = torch.full_like(samples, steps)  # the step whose iterate equals the last one
    mark, mark_step = x, 0
    random_state, deterministic = _random_state(x.device), True
    for step in range(1, steps + 1):
        losses, gradient = objective.gradient(x)
        if step == 1:
            deterministic = torch.equal(random_state, _random_state(x.device))
        x = torch.where(per_sample(end < step, around.sample_dims), x, around.step(x, gradient, alpha))
        if deterministic:
            ahead = (steps - step) % (step - mark_step)
            end = torch.where(_same_bits(x, mark, axis), end.clamp(max=step + ahead), end)
        if step < steps and step - mark_step < max(_FIRST_INTERVAL, mark_step // 4):
            continue
        going = (end > step).nonzero().squeeze(1)
        if 2 * len(going) <= len(samples):
            lasts.index_copy_(axis, samples, x)
            last_losses.index_copy_(1, samples, losses.view(objective.searches, -1).to(x.dtype))
            if len(going) == 0:
                break
            samples, end, x = samples[going], end[going], x.index_select(axis, going)
            objective, around = objective.select(going), around.select(going)
        mark, mark_step = x, step
    return lasts, last_losses.flatten()


def _same_bits(a: Tensor, b: Tensor, axis: int) -> Tensor:
    """For each sample along `axis`, whether all its bits agree: -0.0 is not 0.0, and a NaN is itself."""
    bits = _BITS[a.dtype]
    return (a.view(bits) == b.view(bits)).movedim(axis, 0).flatten(1).all(1)


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
