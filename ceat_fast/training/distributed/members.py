"""An ensemble whose members live in several processes.

Every process computes the forward and backward of its own members on the same inputs. Between them pass

* after a forward, what the members need of each other: logits, or only the true-class probabilities (M numbers per
  sample) where the caller says that nothing else matters (`exchanging`);
* in a backward that reaches the inputs, their gradients: each process has the part of its own members.

So the losses of all members are formed in each process as in a single one, and attacks and methods need not know.
With the true-class probability h_j of a member that lives elsewhere, any logits with softmax(z_j)[y] = h_j give the
peers' losses, weights and the coupling r_m = p_m[y] / sum_j p_j[y] of the attack, for all of these depend on member j
by h_j alone; here the rest of its probability is spread evenly over the other classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ceat_fast.attacks import PGD
from ceat_fast.ensemble import Ensemble, frozen
from ceat_fast.methods import Attack, StepOutput
from ceat_fast.ops.reference import compute_dtype


class _SumGradient(torch.autograd.Function):
    """The identity, whose gradient is the sum of the processes' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class SpreadEnsemble(Ensemble):
    """`members` are those of this process, `member_logits` those of all, (M, B, K), in member order.

    Args:
        local: the ensemble of this process's members, which runs them.
        indices: their places among all.
        count: M.
        group: the processes that hold the others.
    """

    def __init__(self, local: Ensemble, indices: Sequence[int], count: int, group: dist.ProcessGroup) -> None:
        super().__init__(list(local.members), backend=local.backend, average=local.average)
        self.training = local.training
        self._local = (local,)  # not a submodule: its members already are
        self._indices, self._count, self._group = list(indices), count, group
        self._labels: Tensor | None = None

    @property
    def local(self) -> Ensemble:
        """The ensemble of this process's members."""
        return self._local[0]

    def around(self, local: Ensemble) -> SpreadEnsemble:
        """The same with other members in the place of this process's, for the same labels."""
        spread = SpreadEnsemble(local, self._indices, self._count, self._group)
        spread._labels = self._labels
        return spread

    @contextmanager
    def exchanging(self, labels: Tensor | None) -> Iterator[None]:
        """Within the `with` block only the probabilities of these labels (B,) are exchanged: in `member_logits` the
        rows of other processes' members are right in that class alone. None exchanges the logits."""
        self._labels, before = labels, self._labels
        try:
            yield
        finally:
            self._labels = before

    def member_logits(self, x: Tensor, per_member: bool | None = None) -> Tensor:
        """As of an `Ensemble`.

        Raises:
            NotImplementedError: one input per member.
        """
        if per_member or (per_member is None and x.dim() == 5 and x.shape[0] == self._count):
            raise NotImplementedError("members in several processes take one input for all of them")
        if x.requires_grad:
            x = _SumGradient.apply(x, self._group)
        logits = self.local.member_logits(x, per_member=False)
        if self._labels is None:
            everyone = self._gathered(logits.detach())
        else:
            logits = logits.to(compute_dtype(logits.dtype))
            labels = self._labels.repeat(logits.shape[1] // len(self._labels))
            everyone = logits_of(self._gathered(_at(logits.detach().log_softmax(-1), labels)), labels, logits.shape[2])
        return everyone.index_copy(0, self._rows(logits), logits)

    def collect(self, output: StepOutput) -> StepOutput:
        """What a method returned here, with the rows of other processes' members taken from there; in fp32 or wider."""
        given = [output.losses, *output.parts.values(), output.adv_logits, output.nat_logits]
        # What the members share has one row and is the same everywhere.
        own = [tensor.detach() for tensor in given if tensor is not None and len(tensor) == self._count]
        whole = iter(self._gathered_together(own, compute_dtype(output.losses.dtype)))
        losses, *parts, adv, nat = (
            tensor if tensor is None or len(tensor) != self._count else next(whole) for tensor in given
        )
        named = dict(zip(output.parts, cast("list[Tensor]", parts), strict=True))
        return StepOutput(cast("Tensor", losses), named, adv, nat)

    def _gathered_together(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """(M, ...) tensors whose rows of this process are right -> the same, all rows right, in one message."""
        rows = [tensor[self._indices].to(dtype).reshape(len(self._indices), -1) for tensor in tensors]
        flat = torch.split(self._gathered(torch.cat(rows, dim=1)), [row.shape[1] for row in rows], dim=1)
        return [part.reshape(tensor.shape) for part, tensor in zip(flat, tensors, strict=True)]

    def _gathered(self, own: Tensor) -> Tensor:
        """(m, ...) rows of each process -> (M, ...) of all."""
        everyone = own.new_zeros(self._count, *own.shape[1:]).index_copy(0, self._rows(own), own)
        dist.all_reduce(everyone, group=self._group)
        return everyone

    def _rows(self, like: Tensor) -> Tensor:
        return torch.tensor(self._indices, device=like.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> SpreadEnsemble:
        raise TypeError("members in several processes cannot be copied by one of them")


@contextmanager
def frozen_view(ensemble: Ensemble, precision: str = "fp32") -> Iterator[Ensemble]:
    """`ceat_fast.ensemble.frozen`, also of members in several processes: each copies its own."""
    if isinstance(ensemble, SpreadEnsemble):
        with frozen(ensemble.local, precision) as local:
            assert isinstance(local, Ensemble)
            yield ensemble.around(local).eval()
    else:
        with frozen(ensemble, precision) as view:
            assert isinstance(view, Ensemble)
            yield view


def perturb_with(attack: PGD) -> Attack:
    """The attack for training loops, also on members in several processes."""

    def perturb(model: nn.Module, x: Tensor, y: Tensor, index: Tensor | None = None) -> Tensor:
        if not isinstance(model, SpreadEnsemble):
            return attack.perturb(model, x, y, index)
        with frozen_view(model, attack.precision) as view:
            return replace(attack, precision="fp32").perturb(view, x, y, index)

    return perturb


def _at(log_prob: Tensor, labels: Tensor) -> Tensor:
    """(m, B, K) -> (m, B, 1), the entries of the labels (B,)."""
    return log_prob.gather(-1, labels.expand(len(log_prob), -1)[..., None])


def logits_of(log_prob: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Logits (M, B, K) with that log-probability (M, B, 1) of the labels and the rest spread evenly."""
    rest = torch.log(-torch.expm1(log_prob)) - math.log(classes - 1)
    return rest.expand(-1, -1, classes).scatter(-1, labels.expand(len(log_prob), -1)[..., None], log_prob)
