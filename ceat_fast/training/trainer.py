"""The training loop: steps, metrics, validation, checkpoints, and what ends it early."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ceat_fast.data import Dataset, iterate_batches, load_dataset
from ceat_fast.ensemble import Ensemble, tune
from ceat_fast.files import remove_temporaries
from ceat_fast.methods import Batch, Epoch
from ceat_fast.training.averaging import AveragedEnsemble
from ceat_fast.training.callbacks import Callback
from ceat_fast.training.checkpoint import checkpoints
from ceat_fast.training.config import TrainConfig
from ceat_fast.training.distributed import Layout, SpreadEnsemble
from ceat_fast.training.distributed.layout import local_device
from ceat_fast.training.inputs import require_members_fit, require_smallest_batch_fits, training_data
from ceat_fast.training.interrupts import Interrupts, TrainingInterrupted
from ceat_fast.training.metrics import EpochMetrics
from ceat_fast.training.progress import TrainingProgress, summary
from ceat_fast.training.run import Run, build_ensemble
from ceat_fast.training.seeds import stream_seed
from ceat_fast.training.state import Position, StateKeeper
from ceat_fast.training.step import Stepper
from ceat_fast.training.tensorboard import TensorBoard
from ceat_fast.training.validation import Validation, hold_out
from ceat_fast.training.watch import NonFiniteLossError, Watch

MEASURE_FROM_PASSES = 10_000
READ_EVERY = 20  # batches between readings of the device, at most: each one waits for the GPU
READ_SECONDS = 5.0  # between readings, about, where batches take longer: signals and the progress wait for them


class Trainer:
    """Train the members of an ensemble as `config` says.

    Args:
        config: the settings; `config.out` becomes the run folder.
        dataset: use this data instead of loading `config.data`.
        ensemble: train these members instead of building `config.models`.
        console: where the progress goes; standard error by default.
        callbacks: see `ceat_fast.training.Callback`.

    Attributes:
        run: the run folder.
        layout: the place of this process among those that train together.
        ensemble: what is trained; with `parallel.members` above 1 it holds this process's members.
        position: how far it is.
        records: one per finished epoch, as in metrics.jsonl.

    Every random number follows from `config.seed`: initialisation, order, augmentation, attack noise and what models
    draw themselves come from streams of their own, keyed by epoch, step and sample. So a run that was cut off anywhere
    and resumed ends like an uninterrupted one, to the bit on a CPU.

    Raises:
        FileExistsError: the run folder holds something already.
        OSError: another process trains in it.
        ValueError: labels outside [0, K), images that are not uint8, models that do not fit, settings that do not fit.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        dataset: Dataset | None = None,
        ensemble: Ensemble | None = None,
        console: Console | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.config = config
        self.device = local_device(config.device)
        self.dataset = dataset or load_dataset(config.data.name, config.data.root)
        images, labels = training_data(config, self.dataset)
        kept, held_out = hold_out(len(images), config.validation.images)
        whole = (ensemble or build_ensemble(config, self.dataset)).to(self.device)
        self.layout = Layout(self.device, len(whole.members), config.parallel.members)
        if ensemble is not None:
            self.layout.broadcast(whole)
        self.layout.require_batches(len(kept), config.batch_size)
        self.images, self.labels = images[kept].to(self.device), labels[kept].to(self.device)
        self.batches = -(-len(kept) // config.batch_size)
        self._local = self.layout.own(whole)
        require_members_fit(self._local, self.layout.members, self.images, self.dataset)
        require_smallest_batch_fits(self._local, self.layout, self.images, config, self.dataset)
        self.ensemble = self.layout.spread(self._local)
        self.stepper = Stepper(config, self.ensemble, self.layout, self.batches)
        self.average = AveragedEnsemble(config.average, self._local) if config.average is not None else None
        self.validation = None
        if len(held_out):
            judged = images[held_out].to(self.device), labels[held_out].to(self.device)
            self.validation = Validation(config.validation, *judged, self.dataset.scale, self.layout)
        self.console = console or Console(stderr=True, quiet=not self.layout.is_main)
        if (asked := config.data.train_images or 0) > len(images):
            text = f"data.train_images={asked}: {self.dataset.name} has {len(images)} training images"
            self.console.print(text, highlight=False, soft_wrap=True)
        self.callbacks = [*callbacks, *([TensorBoard()] if config.tensorboard else [])]
        self.metrics = EpochMetrics(self.ensemble.combine)
        self._read_every = 1  # until it is known how long a batch takes
        self.run = Run(config.out)
        self.keeper = StateKeeper(self.run.checkpoints, self.layout, self._local, self.average, self.stepper)
        with ExitStack() as stack:  # nothing is written before `fit`, and nothing read while another process writes
            with self.layout.main_first():
                if self.layout.is_main:
                    self.run.require_usable(config)
                    if self.run.config_path.exists():
                        stack.enter_context(self.run.lock())
                    self._found = self._in_folder()
            self.position = self.keeper.restore(self.metrics, self._warn)
            self._require_epochs()
            written = self.run.metrics
            self.records = [record for record in written if record["epoch"] <= self.position.epoch]
        lost = len(written) - len(self.records)
        if lost and not self.steps_done:
            self._warn(f"{self.run.checkpoints} holds no checkpoint: {lost} finished epochs are trained again")
        missing = self.position.epoch - len(self.records)
        if missing > 0:
            self._warn(f"{self.run.metrics_path} lacks {missing} of {self.position.epoch} finished epochs")

    @property
    def steps_done(self) -> int:
        """Optimizer steps since the start of the run."""
        return self.position.epoch * self.batches + self.position.batch

    @property
    def judged(self) -> Ensemble:
        """What is judged and taken home: the averaged ensemble once there is an average, else the trained one."""
        if self.average is None or not self.average.count:
            return self.ensemble
        average = self.average.ensemble
        return self.ensemble.around(average) if isinstance(self.ensemble, SpreadEnsemble) else average

    def fit(self) -> list[dict[str, Any]]:
        """Train to the last epoch; returns the records of metrics.jsonl.

        Raises:
            TrainingInterrupted: SIGTERM or Ctrl-C; a checkpoint was saved.
            NonFiniteLossError: a loss or weight became NaN or infinite; the last checkpoint is kept.
            TrainingStoppedError: what `config.watch` stops for.
            OSError: another process trains in this folder, or a checkpoint cannot be written.
        """
        chance = self.labels.bincount().max().item() / len(self.labels)
        watch = Watch(self.config.watch, chance, self._warn)
        with ExitStack() as stack:
            stack.enter_context(self._folder_of_its_own())
            interrupts = stack.enter_context(Interrupts())
            progress = stack.enter_context(
                TrainingProgress(self.console, type(self.config.method).__name__, self.config.epochs)
            )
            # Every batch has the same shapes: cuDNN measures once which of its kernels are the fastest for them.
            stack.enter_context(_cudnn_benchmark())
            stack.enter_context(torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []))
            self._choose_execution()
            for callback in self.callbacks:
                stack.callback(callback.on_end, self)
                callback.on_start(self)
            while self.position.epoch < self.config.epochs:
                self._train_epoch(interrupts, progress)
                self._finish_epoch(watch, progress)
                (signal,) = self.layout.largest(interrupts.requested)
                if signal or self._saves_now():
                    path = self._save()
                if signal and self.position.epoch < self.config.epochs:
                    raise self._interruption(signal, path)
        self.ensemble.eval()
        return self.records

    def _require_epochs(self) -> None:
        """Refuse fewer epochs than the run to resume has: they would stand in its settings and not be true."""
        begun = self.position.batch > 0
        epochs = self.position.epoch + begun
        if self.config.epochs < epochs:
            raise ValueError(
                f"epochs={self.config.epochs}, but the run in {self.config.out!r} has "
                f"{'begun' if begun else 'finished'} epoch {epochs}; give at least {epochs}"
            )

    def _choose_execution(self) -> None:
        """Measure once how the members run fastest, where the run is long enough for that; later sessions keep it."""
        steps = self.batches * self.config.epochs
        # Most methods train on clean and on adversarial inputs.
        passes, updates = self.config.attack.steps * steps, 2 * steps
        if self.layout.is_alone and not self.steps_done and passes + updates >= MEASURE_FROM_PASSES:
            first = self.images[: self.config.batch_size].float() / self.dataset.scale
            precision = self.config.attack.precision
            self.keeper.run_as(
                tune(
                    self._local,
                    first,
                    precision=precision,
                    training_precision=self.config.precision,
                    captured=self.stepper.is_captured,
                    passes=passes,
                    updates=updates,
                )
            )

    def _train_epoch(self, interrupts: Interrupts, progress: TrainingProgress) -> None:
        """The batches of the epoch that are still to be done."""
        position = self.position
        self._begin_epoch()
        self.ensemble.train()
        losses: list[Tensor] = []
        since = time.perf_counter() - position.seconds
        for batch in self._batches():
            step, samples = self.steps_done, len(batch.labels)
            part = Batch(*map(self.layout.part, batch))
            output = self.stepper.step(step, part, samples)
            if self.average is not None:
                self.average.update(self._local, step, self.batches)
            self.metrics.update(output, part.labels)
            losses.append(output.losses.detach() * (len(part.labels) / samples))
            position.batch += 1
            position.seconds = time.perf_counter() - since
            for callback in self.callbacks:
                callback.on_step(self, output)
            last = position.batch == self.batches  # what is due then waits for the end of the epoch
            reading = last or position.batch % self._read_every == 0
            saving = not last and self._saves_now()
            signal = interrupts.requested if self.layout.is_alone and not last else 0
            if reading and not last:
                signal = self._agree(interrupts.requested)
            if reading or saving or signal:
                self._require_finite(losses)
                losses.clear()
            if saving or signal:
                path = self._save()
            if signal:
                raise self._interruption(signal, path)
            if reading and progress.wants_updates:
                speed = self.metrics.samples * self.layout.data_ranks / position.seconds
                progress.update(position.epoch, position.batch / self.batches, speed, summary(self.metrics.result()))

    def _finish_epoch(self, watch: Watch, progress: TrainingProgress) -> None:
        position, config = self.position, self.config
        metrics = self.metrics.combined(self.layout.data_sum, self.layout.data_maximum)
        rate = config.optimizer.lr * config.schedule.factor(self.steps_done - 1, self.batches, config.epochs)
        speed = {"seconds": position.seconds, "images_per_second": metrics.samples / position.seconds}
        record = {"epoch": position.epoch + 1, "lr": rate, **metrics.result(), **speed}
        if self.validation is not None and self.validation.due(position.epoch + 1, config.epochs):
            record |= self.validation.judge(self.judged)
        for callback in self.callbacks:
            callback.on_epoch(self, record)
        is_best = "val_adv_accuracy" in record and record["val_adv_accuracy"] > self._best_accuracy()
        self.records.append(record)
        if self.layout.is_main:
            self.run.add_metrics(record)
        progress.finish_epoch(record)
        watch.look(self.records, self.keeper.newest)
        self.position, self.metrics = Position(position.epoch + 1), EpochMetrics(self.ensemble.combine)
        if is_best:
            self.keeper.save_best(self.steps_done)

    def _best_accuracy(self) -> float:
        """The robust accuracy on held-out images that the best checkpoint has; -1 if there is none."""
        step = self.keeper.best_step()
        found = [record for record in self.records if record["epoch"] * self.batches == step]
        return found[0].get("val_adv_accuracy", -1.0) if found else -1.0

    def _agree(self, signal: int) -> int:
        """A signal to any process; also sets, alike in all of them, when they read next."""
        milliseconds = round(1000 * self.position.seconds / self.position.batch)
        signal, slowest = self.layout.largest(signal, milliseconds)
        self._read_every = max(1, min(READ_EVERY, int(1000 * READ_SECONDS) // max(1, slowest)))
        return signal

    def _interruption(self, signal: int, saved: Path | None) -> TrainingInterrupted:
        place = "" if saved is None else f"; saved {saved}"
        return TrainingInterrupted(signal, f"interrupted after step {self.steps_done}{place}")

    def _saves_now(self) -> bool:
        """Whether a checkpoint is due at this position."""
        settings, epoch = self.config.checkpoint, self.position.epoch
        if settings.every_steps is not None and self.steps_done % settings.every_steps == 0:
            return True
        return self.position.batch == 0 and (epoch % settings.every == 0 or epoch == self.config.epochs)

    def _begin_epoch(self) -> None:
        method, epoch = self.stepper.method, self.position.epoch
        # In the middle of an epoch the method's state is that of the checkpoint, not of the epoch's beginning.
        state = copy.deepcopy(method.state_dict()) if self.position.batch else None
        method.begin_epoch(
            Epoch(epoch, self.config.epochs, len(self.images), stream_seed(self.config.seed, "epoch", epoch))
        )
        if state is not None:
            method.load_state_dict(state)

    def _batches(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(stream_seed(self.config.seed, "data", self.position.epoch))
        augment = self.dataset.augment if self.config.data.augment == "auto" else self.config.data.augment
        batches = iterate_batches(
            self.images,
            self.labels,
            self.config.batch_size,
            generator,
            augment=augment,
            scale=self.dataset.scale,
            skip=self.position.batch,
        )
        return (Batch(*batch) for batch in batches)

    def _require_finite(self, losses: Sequence[Tensor]) -> None:
        """Refuse losses of the last batches that are NaN or infinite in any process."""
        if not losses:
            return
        values = self.layout.data_sum(torch.stack(list(losses)))
        if not values.isfinite().all():
            row, member = (int(i) for i in (~values.isfinite()).nonzero()[0])
            batch = self.position.batch - len(losses) + row + 1
            raise NonFiniteLossError(
                f"loss {values[row][member].item()} in epoch {self.position.epoch + 1}, batch {batch}, "
                f"member {member}; {_REMEDIES}; {self.keeper.newest}"
            )

    def _save(self) -> Path | None:
        """Save the whole state; returns the path, on the main process."""
        if not self.keeper.has_finite_weights():
            raise NonFiniteLossError(
                f"a weight is NaN or infinite in epoch {self.position.epoch + 1}, batch {self.position.batch}; "
                f"{_REMEDIES}; {self.keeper.newest}"
            )
        return self.keeper.save(self.steps_done, self.position, self.metrics, self.config.checkpoint.keep)

    @contextmanager
    def _folder_of_its_own(self) -> Iterator[None]:
        """No other process trains in the run folder, and it holds nothing that this session does not continue."""
        with ExitStack() as stack:
            with self.layout.main_first():
                if self.layout.is_main:
                    stack.enter_context(self.run.lock())
                    if self._in_folder() != self._found:
                        raise OSError(
                            f"another process has trained in {self.config.out!r} since this Trainer was made; "
                            "make a new one"
                        )
                    self.keeper.require_space(self.config.checkpoint.keep)
                    self.run.begin(self.config, self._warn, self._local.average)
                    remove_temporaries(self.run.checkpoints)
                    self.run.forget_metrics_after(self.position.epoch)
                    self.keeper.forget_best_after(self.steps_done)
            try:
                yield
            finally:
                self._found = self._in_folder()  # a second `fit` goes on

    def _in_folder(self) -> tuple[bool, list[Path]]:
        """What tells whether somebody else trained: whether there is a run, and its checkpoints."""
        return self.run.config_path.exists(), checkpoints(self.run.checkpoints)

    def _warn(self, message: str) -> None:
        self.console.print(f"warning: {message}", style="yellow", highlight=False, soft_wrap=True)


@contextmanager
def _cudnn_benchmark() -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


_REMEDIES = "a lower optimizer.lr, schedule.warmup_epochs, optimizer.grad_clip or the method's max_weight help"
