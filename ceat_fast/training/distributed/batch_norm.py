"""BatchNorm over a batch that is spread over processes.

    mean = sum x / n,   var = sum (x - mean)^2 / n,   y = (x - mean) / sqrt(var + eps) * weight + bias

with the sums over all processes: what one process computes for the whole batch. `torch.nn.SyncBatchNorm` does so on
GPUs only and replaces the modules. Here the calls of `F.batch_norm` in train mode are answered while the block lasts,
so that modules, their names and their eval mode stay what they are. The sums are differentiable any number of times,
and members that run batched share one message.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class _Sum(torch.autograd.Function):
    """The sum of a tensor over the processes of a group; so is its derivative."""

    @staticmethod
    def forward(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total: Tensor = _Sum.apply(gradient, ctx.group)
        return total, None

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, None], tensor: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Any]:
        return _Sum.apply(tensor, group), dims[0]


class SynchronisedBatchNorm(TorchFunctionMode):
    """Within the `with` block, BatchNorm in train mode uses the statistics of all processes of the group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self._group = group

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.batch_norm:
            return _batch_norm(self._group, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _batch_norm(
    group: dist.ProcessGroup,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm`; in train mode for input (B, C, ...), with statistics in fp32 or wider."""
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    others = [dim for dim in range(x.dim()) if dim != 1]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    own = x.new_full((1,), x.numel() // x.shape[1])
    sums = _Sum.apply(torch.cat([x.sum(others), own]), group)
    count = sums[-1].detach()
    mean = sums[:-1] / count
    centred = x - mean.view(shape)
    var = _Sum.apply(centred.square().sum(others), group) / count
    with torch.no_grad():
        if running_mean is not None:
            running_mean.copy_(torch.lerp(running_mean, mean.to(running_mean.dtype), momentum))
        if running_var is not None:
            unbiased = (var * (count / (count - 1))).to(running_var.dtype)
            running_var.copy_(torch.lerp(running_var, unbiased, momentum))
    result = centred * (var + eps).rsqrt().view(shape)
    if weight is not None:
        result = result * weight.view(shape)
    if bias is not None:
        result = result + bias.view(shape)
    narrowed: Tensor = result.to(input.dtype)
    return narrowed
