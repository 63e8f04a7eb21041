"""What a training method is: how the inputs are perturbed, and one differentiable loss per member.

The trainer works on a copy of the configured method, calls `begin_epoch` before the first batch of each epoch, then for
each batch `perturb` and `step`, both in train mode, and back-propagates the sum of the member losses. A method is a
dataclass: its fields are its settings, on the command line too. One of your own defines `member_losses`
(docs/methods.md has an example).

Conventions that all methods here keep:

* The search of adversarial inputs sees the members in eval mode. The passes whose losses are trained are in train mode:
  first the adversarial batch, then the clean one, then what the method has beside them, each normalised by its own
  BatchNorm statistics.
* Losses are means over the batch. Where a term belongs to all members together, each loss holds 1/M of it, so that the
  sum of the losses has it once. One optimizer for all members and one for each take the same steps, since momentum SGD
  and Adam treat every parameter by itself; only a bound of the gradient norm tells them apart.
* Arithmetic is in fp32 whatever the dtype of the logits, in fp64 for fp64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from ceat_fast.ensemble import Ensemble
from ceat_fast.methods.calibrated import CalibratedDistance
from ceat_fast.methods.labels import settings_label
from ceat_fast.methods.terms import cross_entropy, true_class_disparity


class Attack(Protocol):
    """Searches adversarial inputs: (B, ...) images in [0, 1], (B,) labels -> (B, ...) or, per member, (M, B, ...).

    It sees the model in eval mode and leaves its modes, gradients and running statistics as they were.
    """

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor | None = None) -> Tensor: ...


class Batch(NamedTuple):
    """One training batch."""

    images: Tensor  # (B, C, H, W) in [0, 1]
    labels: Tensor  # (B,) int64
    indices: Tensor  # (B,) int64, position in the data set: the key of the attack noise


class Epoch(NamedTuple):
    """Where a run stands."""

    number: int  # counted from 0
    total: int  # epochs of the whole run
    samples: int  # training images; indices of batches lie below
    seed: int  # for what a method draws once per epoch: other for each epoch, the same in every process of a run


class StepOutput(NamedTuple):
    """What a method returns for one batch; everything but `losses` is only logged once `Method.step` returns it."""

    losses: Tensor  # (M,), member m's loss, averaged over the batch
    parts: Mapping[str, Tensor]  # name -> (M, B), or (1, B) for what the members share, without gradient;
    #                              names that end in "_disparity" also get a histogram
    adv_logits: Tensor | None  # (M, B, K) on the adversarial input; None where the method has none
    nat_logits: Tensor | None  # (M, B, K) on the clean input; None where the method needs no clean forward


@dataclass
class Method(ABC):
    """Base of all training methods.

    Args:
        plus_ceat: adds the calibrated distance of CEAT to every member's loss (Table 2 of the paper). A method without
            a clean pass gets one, in train mode, after its own passes.
    """

    plus_ceat: CalibratedDistance | None = field(default=None, kw_only=True)

    goal: ClassVar[str] = "ensemble"  # whom the training attack is aimed at: "ensemble" (eq. 3) or "members" (eq. 2)
    least_members: ClassVar[int] = 1
    capturable: ClassVar[bool] = False  # no step looks at a value on the host: on CUDA it can be a graph, replayed
    always_in_label: ClassVar[tuple[str, ...]] = ()  # settings that tables show even where they are the default

    @property
    def label(self) -> str:
        """Name for tables and figures, with the settings that are not the default, for example "ADP(alpha=1) + L^D"."""
        name = settings_label(type(self).__name__, self, always=self.always_in_label, never=("plus_ceat",))
        return name if self.plus_ceat is None else f"{name} + {self.plus_ceat.label}"

    def require_members(self, count: int) -> None:
        """Raise ValueError if the method needs more members than so many."""
        if count < self.least_members:
            raise ValueError(f"{type(self).__name__} needs at least {self.least_members} members, got {count}")

    def begin_epoch(self, epoch: Epoch) -> None:  # noqa: B027 - most methods have nothing to do here
        """Called before the first batch of each epoch, also of the first one after a resume."""

    def perturb(self, attack: Attack, ensemble: Ensemble, batch: Batch) -> Tensor:
        """The inputs that need a search; `step` gets them as they are.

        `attack` is the configured one, aimed at `goal`. Methods that search several kinds of inputs stack them along a
        dimension in front.
        """
        return attack(ensemble, batch.images, batch.labels, batch.indices)

    @abstractmethod
    def member_losses(self, ensemble: Ensemble, adversarial: Tensor, batch: Batch) -> StepOutput:
        """Forward passes in train mode, and each member's own loss; logits keep their gradient for `plus_ceat`."""

    def step(self, ensemble: Ensemble, adversarial: Tensor, batch: Batch) -> StepOutput:
        """The losses of one batch with `plus_ceat`, and what is logged.

        Every method logs "ce", the cross-entropy of the adversarial input, and "adv_disparity".

        Raises:
            TypeError, ValueError: fewer members than the method needs, or `member_losses` returns something else than
                it has to.
        """
        self.require_members(len(ensemble.members))
        output = self.member_losses(ensemble, adversarial, batch)
        self._require_output(output, len(ensemble.members))
        if self.plus_ceat is not None:
            output = self._with_distance(self.plus_ceat, output, ensemble, batch)
        parts = dict(output.parts)
        if output.adv_logits is not None and "adv_disparity" not in parts:
            parts["ce"] = cross_entropy(output.adv_logits.detach(), batch.labels)
            parts["adv_disparity"] = true_class_disparity(parts["ce"])
        adv, nat = (None if z is None else z.detach() for z in (output.adv_logits, output.nat_logits))
        return StepOutput(output.losses, parts, adv, nat)

    def _require_output(self, output: object, members: int) -> None:
        """Refuse by name what a method of the user's may return."""
        name = f"{type(self).__name__}.member_losses"
        if not isinstance(output, StepOutput):
            raise TypeError(f"{name} must return a StepOutput, got {type(output).__name__}")
        losses = output.losses
        if losses.dim() != 1 or len(losses) < members:  # more where other processes have members, too
            raise ValueError(f"{name} must return losses ({members},), got {tuple(losses.shape)}")
        for part, values in output.parts.items():
            if values.dim() != 2 or len(values) not in (1, len(losses)):
                raise ValueError(f"{name}: part {part!r} must be ({members}, B) or (1, B), got {tuple(values.shape)}")

    def _with_distance(
        self, distance: CalibratedDistance, output: StepOutput, ensemble: Ensemble, batch: Batch
    ) -> StepOutput:
        if output.adv_logits is None:
            raise ValueError(f"plus_ceat needs adversarial inputs, which {type(self).__name__} does not have")
        nat_logits = output.nat_logits
        if nat_logits is None:
            nat_logits = ensemble.member_logits(batch.images, per_member=False)
        extra, parts = distance.distances(output.adv_logits, nat_logits, batch.labels)
        return StepOutput(output.losses + extra, {**output.parts, **parts}, output.adv_logits, nat_logits)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that the method carries from epoch to epoch; a checkpoint holds them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027 - most methods have no state
        """Take back what `state_dict` gave."""
