"""The members' optimizers, run as one.

SGD and Adam update every number on its own, so one torch optimizer over the parameters of all members makes the same
step as one for each member, in a few kernels instead of M times as many. What looks at a member as a whole, the
clipping of its gradient norm, is done member by member.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ceat_fast.training.checks import require, require_positive


@dataclass
class OptimizerConfig(ABC):
    """Base of the optimizers.

    Args:
        lr: learning rate that the schedule multiplies.
        weight_decay: L2 penalty.
        grad_clip: upper bound of the gradient norm of each member; none by default.
    """

    lr: float = 0.01
    weight_decay: float = 1e-4
    grad_clip: float | None = None

    kept_per_weight: ClassVar[int] = 2  # numbers in the optimizer's state, at most

    def __post_init__(self) -> None:
        require_positive(self, "optimizer.", "lr", "grad_clip")
        require(0 <= self.weight_decay < math.inf, "optimizer.weight_decay", self.weight_decay, "finite and >= 0")

    @abstractmethod
    def build(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of these parameters; it must treat every number on its own."""


@dataclass
class SGD(OptimizerConfig):
    """Stochastic gradient descent with momentum, the paper's.

    Args:
        lr: learning rate that the schedule multiplies.
        weight_decay: L2 penalty.
        grad_clip: upper bound of the gradient norm of each member; none by default.
        momentum: in [0, 1).
        nesterov: Nesterov momentum.
    """

    momentum: float = 0.9
    nesterov: bool = False

    kept_per_weight: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "in [0, 1)")
        require(not self.nesterov or self.momentum > 0, "optimizer.nesterov", True, "false where momentum is 0")

    def build(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            parameters, self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov, fused=True
        )


@dataclass
class Adam(OptimizerConfig):
    """Adam; the weight decay is added to the gradient.

    Args:
        lr: learning rate that the schedule multiplies.
        weight_decay: L2 penalty.
        grad_clip: upper bound of the gradient norm of each member; none by default.
        beta1: decay of the mean of the gradient, in [0, 1).
        beta2: decay of the mean of its square, in [0, 1).
        eps: added to the root of that mean.
    """

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.beta1 < 1, "optimizer.beta1", self.beta1, "in [0, 1)")
        require(0 <= self.beta2 < 1, "optimizer.beta2", self.beta2, "in [0, 1)")
        require_positive(self, "optimizer.", "eps")

    def build(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        betas = self.beta1, self.beta2
        return torch.optim.Adam(parameters, self.lr, betas, self.eps, self.weight_decay, fused=True)


@dataclass
class AdamW(Adam):
    """Adam whose weight decay shrinks the weights directly; settings as for Adam."""

    def build(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        betas = self.beta1, self.beta2
        return torch.optim.AdamW(parameters, self.lr, betas, self.eps, self.weight_decay, fused=True)


class MemberOptimizer:
    """One torch optimizer over all members, with the numbers of one for each.

    Raises:
        ValueError: members that share a parameter, or have none to train.
    """

    def __init__(self, config: OptimizerConfig, members: Sequence[nn.Module]) -> None:
        self.config = config
        self.parameters = [[p for p in member.parameters() if p.requires_grad] for member in members]
        flat = [parameter for own in self.parameters for parameter in own]
        if not all(self.parameters):
            raise ValueError("every member needs at least one parameter to train")
        if len({id(parameter) for parameter in flat}) < len(flat):
            raise ValueError("members must not share parameters: each is trained by its own loss")
        self.torch = config.build(flat)

    def set_rate(self, factor: float) -> float:
        """Set the learning rate to `config.lr` times the factor of the schedule; returns it."""
        rate = self.config.lr * factor
        for group in self.torch.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        return rate

    def make_capturable(self) -> None:
        """From now on the learning rate lies on the device, where a CUDA graph of a step reads it."""
        for group in self.torch.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]), device=group["params"][0].device)
            group["capturable"] = True

    def clip(self) -> None:
        """Scale each member's gradient down to the norm `config.grad_clip`, if there is one."""
        if self.config.grad_clip is not None:
            for own in self.parameters:
                nn.utils.clip_grad_norm_(own, self.config.grad_clip, foreach=True)

    def state(self) -> list[list[dict[str, Any]]]:
        """Per member, per parameter: the optimizer's tensors, on the CPU."""
        return [[_moved(self.torch.state[p], torch.device("cpu")) for p in own] for own in self.parameters]

    def load_state(self, state: Sequence[Sequence[dict[str, Any]]]) -> None:
        """Continue from what `state` gave.

        Raises:
            ValueError: another number of members or parameters.
        """
        for own, saved in zip(self.parameters, state, strict=True):
            for parameter, values in zip(own, saved, strict=True):
                self.torch.state[parameter] = _moved(values, parameter.device)


def _moved(values: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device, copy=True) if isinstance(value, Tensor) else value for name, value in values.items()}
