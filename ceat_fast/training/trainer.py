"""The training loop: attack, losses, one optimizer step per member; metrics, checkpoints and a progress bar."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from ceat_fast.attacks import PGD
from ceat_fast.data import Dataset, iterate_batches, load_dataset
from ceat_fast.ensemble import Ensemble
from ceat_fast.environment import resolve_device
from ceat_fast.methods import Attack, Batch, StepOutput
from ceat_fast.training.checkpoint import Checkpoint, last_checkpoint, load_checkpoint, save_checkpoint
from ceat_fast.training.config import TrainConfig
from ceat_fast.training.metrics import EpochMetrics
from ceat_fast.training.progress import TrainingProgress
from ceat_fast.training.run import Run, build_ensemble
from ceat_fast.training.seeds import stream_seed

READ_EVERY = 20  # batches between readings of the device: each one waits for the GPU


class NonFiniteLossError(RuntimeError):
    """A member's loss became NaN or infinite."""


class Trainer:
    """Train the members of an ensemble as `config` says.

    Args:
        config: the settings; `config.out` becomes the run folder.
        dataset: use this data instead of loading `config.data`.
        ensemble: train these members instead of building `config.models`.
        console: where the progress bar goes; standard error by default.

    Every random number follows from `config.seed`: initialisation, order, augmentation, attack noise and what models
    draw themselves come from streams of their own, keyed by the epoch. So a resumed run ends like an uninterrupted one.

    Raises:
        FileExistsError: the run folder holds something already.
        ValueError: labels outside [0, K), images that are not uint8, settings that do not fit.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        dataset: Dataset | None = None,
        ensemble: Ensemble | None = None,
        console: Console | None = None,
    ) -> None:
        self.config = config
        self.device = resolve_device(config.device)
        self.dataset = dataset or load_dataset(config.data.name, config.data.root)
        self.images, self.labels = self._training_data()
        self.ensemble = (ensemble or build_ensemble(config, self.dataset, self.device)).to(self.device)
        self.optimizers = [self._optimizer(member) for member in self.ensemble.members]
        self.run = Run.start(config)
        self.console = console or Console(stderr=True)
        self.epochs_done = self._restore()

    def fit(self) -> list[dict[str, Any]]:
        """Train to the last epoch; returns the records of metrics.jsonl.

        Raises:
            NonFiniteLossError: a loss became NaN or infinite; the last checkpoint is kept.
        """
        with TrainingProgress(self.console, type(self.config.method).__name__, self.config.epochs) as progress:
            for epoch in range(self.epochs_done, self.config.epochs):
                record = self._train_epoch(epoch, progress)
                self.run.add_metrics(record)
                self.epochs_done = epoch + 1
                if self.epochs_done % self.config.checkpoint_every == 0 or self.epochs_done == self.config.epochs:
                    self._save()
        self.ensemble.eval()
        return self.run.metrics

    def _train_epoch(self, epoch: int, progress: TrainingProgress) -> dict[str, Any]:
        rate = self.config.optimizer.learning_rate(epoch)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        attack, metrics, losses = self._attack(epoch), EpochMetrics(self.ensemble.combine), []
        self.ensemble.train()
        start = time.perf_counter()
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(stream_seed(self.config.seed, "model", epoch))
            batches = -(-len(self.images) // self.config.batch_size)
            for number, batch in enumerate(self._batches(epoch), start=1):
                output = self._step(attack, batch)
                metrics.update(output, batch.labels)
                losses.append(output.losses.detach())
                if number % READ_EVERY == 0 or number == batches:
                    self._require_finite(losses, epoch)
                    rate_now = metrics.samples / (time.perf_counter() - start)
                    progress.update(epoch, number / batches, losses[-1], metrics, rate_now)
        seconds = time.perf_counter() - start
        speed = {"seconds": seconds, "images_per_second": metrics.samples / seconds}
        record = {"epoch": epoch + 1, "lr": rate, **metrics.result(), **speed}
        progress.finish_epoch(record)
        return record

    def _step(self, attack: Attack, batch: Batch) -> StepOutput:
        adversarial = self.config.method.perturb(attack, self.ensemble, batch)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        output = self.config.method.step(self.ensemble, adversarial, batch)
        torch.autograd.backward(output.losses.sum())
        for member, optimizer in zip(self.ensemble.members, self.optimizers, strict=True):
            if self.config.optimizer.grad_clip is not None:
                nn.utils.clip_grad_norm_(member.parameters(), self.config.optimizer.grad_clip)
            optimizer.step()
        return output

    def _batches(self, epoch: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(stream_seed(self.config.seed, "data", epoch))
        augment = self.dataset.augment if self.config.data.augment == "auto" else self.config.data.augment
        size, scale = self.config.batch_size, self.dataset.scale
        batches = iterate_batches(self.images, self.labels, size, generator, augment=augment, scale=scale)
        return (Batch(*batch) for batch in batches)

    def _attack(self, epoch: int) -> Attack:
        settings, seed = self.config.attack, stream_seed(self.config.seed, "attack", epoch)
        return PGD(**vars(settings), goal=self.config.method.goal, seed=seed).perturb

    def _optimizer(self, member: nn.Module) -> torch.optim.SGD:
        o = self.config.optimizer
        return torch.optim.SGD(
            member.parameters(), o.lr, o.momentum, weight_decay=o.weight_decay, nesterov=o.nesterov, foreach=True
        )

    def _training_data(self) -> tuple[Tensor, Tensor]:
        limit = self.config.data.train_images
        images, labels = self.dataset.train_images[:limit], self.dataset.train_labels[:limit]
        classes = self.dataset.num_classes
        if len(images) == 0 or len(images) != len(labels):
            raise ValueError(f"data set {self.dataset.name!r}: {len(images)} training images, {len(labels)} labels")
        if labels.min() < 0 or labels.max() >= classes:
            wrong = int(((labels < 0) | (labels >= classes)).nonzero()[0])
            raise ValueError(
                f"data set {self.dataset.name!r}: label {int(labels[wrong])} of training image {wrong} "
                f"is outside [0, {classes})"
            )
        return images.to(self.device), labels.to(self.device)

    def _require_finite(self, losses: list[Tensor], epoch: int) -> None:
        finite = torch.stack(losses).isfinite()
        if not finite.all():
            batch, member = (int(i) for i in (~finite).nonzero()[0])
            kept = last_checkpoint(self.run.checkpoints)
            raise NonFiniteLossError(
                f"loss {losses[batch][member].item()} in epoch {epoch + 1}, batch {batch + 1}, member {member} "
                f"({self.config.models[member]}); a lower optimizer.lr, optimizer.warmup_epochs, optimizer.grad_clip "
                f"or the method's max_weight help; last checkpoint: {kept or 'none yet'}"
            )

    def _save(self) -> None:
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        save_checkpoint(self.run.checkpoints, Checkpoint(self.epochs_done, self.ensemble.state_dict(), states))

    def _restore(self) -> int:
        path = last_checkpoint(self.run.checkpoints)
        if path is None:
            self.run.forget_metrics_after(0)
            return 0
        checkpoint = load_checkpoint(path, self.device)
        self.ensemble.load_state_dict(checkpoint.weights)
        for optimizer, state in zip(self.optimizers, checkpoint.optimizers, strict=True):
            optimizer.load_state_dict(state)
        self.run.forget_metrics_after(checkpoint.epochs)
        return checkpoint.epochs
