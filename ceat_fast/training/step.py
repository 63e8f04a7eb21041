"""One optimizer step: search the adversarial inputs, form the losses, back-propagate, update every member.

Everything random in it is keyed by the seed, the number of the step and the sample, so that the position in the run is
all that has to be known to continue it.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ceat_fast.attacks import PGD
from ceat_fast.ensemble import Ensemble
from ceat_fast.ensemble.frozen import DTYPES
from ceat_fast.methods import CEAT, EAT, Batch, Method, StepOutput
from ceat_fast.methods.calibrated import DistanceSettings
from ceat_fast.ops import dispatch
from ceat_fast.training.capture import CapturedStep, obstacle
from ceat_fast.training.config import TrainConfig
from ceat_fast.training.distributed import Layout, SpreadEnsemble, SynchronisedBatchNorm, perturb_with
from ceat_fast.training.optimizers import MemberOptimizer
from ceat_fast.training.schedules import warmup_factor
from ceat_fast.training.seeds import stream_seed


class Stepper:
    """Makes the steps of a run.

    Args:
        config: the settings.
        ensemble: the members to train.
        layout: which part of the work is this process's.
        steps_per_epoch: optimizer steps in an epoch.

    Raises:
        ValueError: settings that do not go together.
    """

    def __init__(self, config: TrainConfig, ensemble: Ensemble, layout: Layout, steps_per_epoch: int) -> None:
        self.config, self.ensemble, self.layout, self.steps_per_epoch = config, ensemble, layout, steps_per_epoch
        self.method = copy.deepcopy(config.method)
        self.method.require_members(layout.count)
        _require_backends(self.method, layout.device)
        self.optimizer = MemberOptimizer(config.optimizer, list(ensemble.members))
        self.scaler = torch.amp.GradScaler(layout.device.type, enabled=config.precision == "fp16")
        self._exchanges_labels = _needs_true_class_only(self.method) and ensemble.average == "prob"
        if isinstance(ensemble, SpreadEnsemble):
            _require_spreadable(config, self.method)
        self._captured: CapturedStep | None = None
        if config.cuda_graph != "off":
            self._capture_steps(required=config.cuda_graph == "on")

    @property
    def is_captured(self) -> bool:
        """Whether steps on full batches are replays of a CUDA graph."""
        return self._captured is not None

    def step(self, step: int, batch: Batch, samples: int) -> StepOutput:
        """Train on this process's part of the batch of step `step`; the whole batch has that many samples.

        Returns:
            The output of all members on this part; its tensors hold until the next step.
        """
        torch.manual_seed(stream_seed(self.config.seed, "step", step, self.layout.data_rank))
        self.optimizer.set_rate(self.config.schedule.factor(step, self.steps_per_epoch, self.config.epochs))
        attack, rise = self._attack(step)
        if self._captured is not None and samples == self.config.batch_size and rise == 1:
            return self._captured(attack, batch)
        return self._train(attack, batch, len(batch.labels) / samples)

    def _train(self, attack: PGD, batch: Batch, share: float = 1.0) -> StepOutput:
        """The part of a step that a CUDA graph can hold; this process has that share of the samples."""
        with self._exchange(batch.labels):
            adversarial = self.method.perturb(perturb_with(attack), self.ensemble, batch)
            self.optimizer.torch.zero_grad(set_to_none=True)
            with self._autocast(), self._batch_norm():
                output = self.method.step(self.ensemble, adversarial, batch)
        torch.autograd.backward(self.scaler.scale(output.losses.sum() * share))
        self.layout.sum_gradients([parameter for own in self.optimizer.parameters for parameter in own])
        self.scaler.unscale_(self.optimizer.torch)
        self.optimizer.clip()
        self.scaler.step(self.optimizer.torch)
        self.scaler.update()
        return self.ensemble.collect(output) if isinstance(self.ensemble, SpreadEnsemble) else output

    def state(self) -> dict[str, Any]:
        """What the steps carry from one to the next, apart from weights and optimizer; plain values and tensors."""
        return {"method": self.method.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` gave."""
        self.method.load_state_dict(state["method"])
        self.scaler.load_state_dict(state["scaler"])

    def _capture_steps(self, required: bool) -> None:
        reason = obstacle(self.method, self.layout.device, self.config.precision, self.layout.is_alone)
        if reason is None:
            self.optimizer.make_capturable()
            self._captured = CapturedStep(self._train, required)
        elif required:
            raise ValueError(f"cuda_graph='on': a step cannot be captured: {reason}")

    def _attack(self, step: int) -> tuple[PGD, float]:
        """The attack of a step, and which part of its final strength it has."""
        config = self.config
        attack = PGD(
            **vars(config.attack),
            goal=self.method.goal,
            seed=stream_seed(config.seed, "attack", step // self.steps_per_epoch),
        )
        rise = warmup_factor(step, config.eps_warmup_epochs * self.steps_per_epoch)
        if rise < 1:
            attack = replace(attack, eps=attack.radius * rise, alpha=attack.step_size * rise)
        return attack, rise

    def _exchange(self, labels: Tensor) -> AbstractContextManager[None]:
        if not isinstance(self.ensemble, SpreadEnsemble):
            return nullcontext()
        return self.ensemble.exchanging(labels if self._exchanges_labels else None)

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = DTYPES[self.config.precision]
        return nullcontext() if dtype is None else torch.autocast(self.layout.device.type, dtype)

    def _batch_norm(self) -> AbstractContextManager[Any]:
        group = self.layout.data_group
        if self.layout.data_ranks == 1 or group is None or not self.config.parallel.sync_batchnorm:
            return nullcontext()
        return SynchronisedBatchNorm(group)


def _needs_true_class_only(method: Method) -> bool:
    distances = [part for part in (method, method.plus_ceat) if isinstance(part, DistanceSettings)]
    return all(distance.samples == "all" for distance in distances)


def _require_backends(method: Method, device: torch.device) -> None:
    for name, part in (("method", method), ("method.plus_ceat", method.plus_ceat)):
        if isinstance(part, DistanceSettings) and part.impl != "auto":
            reason = dispatch.missing(part.impl, device.type)
            if reason is not None:
                raise ValueError(f"{name}.impl={part.impl!r} cannot run on {device.type!r}: {reason}")


def _require_spreadable(config: TrainConfig, method: Method) -> None:
    if type(method) not in (EAT, CEAT):
        raise ValueError(f"parallel.members={config.parallel.members} is for EAT and CEAT, got {type(method).__name__}")
    if config.precision == "fp16":
        raise ValueError(
            "precision='fp16' needs parallel.members=1: its loss scale belongs to all members; bf16 has none"
        )
    if config.attack.restarts > 1 and config.attack.precision != "fp32":
        raise ValueError(
            f"attack.precision={config.attack.precision!r} with attack.restarts={config.attack.restarts} needs "
            "parallel.members=1: the restarts are compared in fp32"
        )
