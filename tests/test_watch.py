"""Seeing a run: validation and the best checkpoint, callbacks, TensorBoard, progress, and signs of trouble."""

from __future__ import annotations

import io
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from rich.console import Console
from tiny_training import VALIDATED, At, Judge, Tiny, tiny_config, train

from ceat_fast.attacks import PGD
from ceat_fast.data import load_dataset
from ceat_fast.methods import CEAT, EAT, StepOutput
from ceat_fast.training import (
    EMA,
    SGD,
    Callback,
    CheckpointConfig,
    Run,
    Trainer,
    TrainingStoppedError,
    ValidationConfig,
    WatchConfig,
)
from ceat_fast.training.checkpoint import Checkpoint, checkpoints, load_weights, save_checkpoint
from ceat_fast.training.validation import hold_out
from ceat_fast.training.watch import Watch, catastrophic_overfitting, collapse


def test_validation_is_pgd_on_images_that_are_not_trained_on(tmp_path: Path) -> None:
    trainer = train(tiny_config(tmp_path / "run", validation=VALIDATED, epochs=2))
    digits = load_dataset("digits")
    kept, held_out = hold_out(96, 32)
    assert sorted([*kept.tolist(), *held_out.tolist()]) == list(range(96))
    assert torch.equal(trainer.images, digits.train_images[kept])
    x, y = digits.train_images[held_out].float() / 16, digits.train_labels[held_out]
    attack = PGD(eps=0.1, alpha=0.05, steps=2, seed=0)
    adversarial = attack(trainer.ensemble, x, y)
    record = trainer.run.metrics[-1]
    with torch.no_grad():
        assert record["val_nat_accuracy"] == (trainer.ensemble(x).argmax(1) == y).double().mean().item()
        assert record["val_adv_accuracy"] == (trainer.ensemble(adversarial).argmax(1) == y).double().mean().item()
        members = [(logits.argmax(1) == y).double().mean().item() for logits in trainer.ensemble.member_logits(x)]
    assert record["val_nat_accuracy_members"] == members


def test_the_held_out_images_are_the_same_for_every_seed(tmp_path: Path) -> None:
    trainers = [Trainer(tiny_config(tmp_path / f"{seed}", validation=VALIDATED, seed=seed)) for seed in (0, 1)]
    assert torch.equal(trainers[0].validation.images, trainers[1].validation.images)


def test_validation_judges_every_so_many_epochs_and_the_last(tmp_path: Path) -> None:
    validation = ValidationConfig(images=8, attack=VALIDATED.attack, every=2)
    records = train(tiny_config(tmp_path / "run", validation=validation, epochs=3)).run.metrics
    assert ["val_adv_accuracy" in record for record in records] == [False, True, True]


def test_the_best_checkpoint_is_the_first_of_the_highest_robust_accuracy(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", validation=VALIDATED, epochs=4, average=EMA(decay=0.5))
    run = train(config, callbacks=[Judge(0.1, 0.3, 0.2, 0.3)]).run
    (best,) = checkpoints(run.checkpoints, "best")
    assert best.name == "best-000000004"  # two epochs of two steps
    assert load_weights(best)["members.0.fc.weight"].sum().item() == run.metrics[1]["weights"]


def test_the_best_weights_of_what_is_trained_again_are_forgotten(tmp_path: Path) -> None:
    """Epochs of two steps. The last checkpoint is that after step 4, the best weights are those after step 6."""

    def killed() -> None:
        raise ConnectionResetError

    config = tiny_config(tmp_path / "run", validation=VALIDATED, epochs=4, checkpoint=CheckpointConfig(every=2))
    with pytest.raises(ConnectionResetError):
        train(config, callbacks=[Judge(0.3, 0.2, 0.4), At(7, killed)])
    run = Run.open(tmp_path / "run")
    assert [path.name for path in checkpoints(run.checkpoints, "best")] == ["best-000000006"]
    train(replace(config, resume=True), callbacks=[Judge(0.3, 0.2, 0.1, 0.25)])
    (best,) = checkpoints(run.checkpoints, "best")
    assert best.name == "best-000000008"  # those of epoch 1 are gone too
    assert load_weights(best)["members.0.fc.weight"].sum().item() == run.metrics[3]["weights"]


def test_a_checkpoint_stays_beside_those_of_higher_steps(tmp_path: Path) -> None:
    for step in (9, 5, 6):
        save_checkpoint(tmp_path, Checkpoint(step, {"weight": torch.zeros(1)}, None, None), 1, "best")
    assert [path.name for path in checkpoints(tmp_path, "best")] == ["best-000000006"]


def test_a_callback_in_ten_lines(tmp_path: Path) -> None:
    """The one that docs/training.md shows."""

    class LargestGradient(Callback):
        def __init__(self) -> None:
            self.largest = 0.0

        def on_step(self, trainer: Trainer, output: StepOutput) -> None:
            norms = [p.grad.norm().item() for p in trainer.ensemble.parameters()]
            self.largest = max(self.largest, *norms)

        def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
            record["largest_gradient"], self.largest = self.largest, 0.0

    records = train(tiny_config(tmp_path / "run"), callbacks=[LargestGradient()]).run.metrics
    assert all(record["largest_gradient"] > 0 for record in records)


def test_what_a_callback_adds_is_kept_as_json_or_refused_by_name(tmp_path: Path) -> None:
    class Adds(Callback):
        def __init__(self, value: object) -> None:
            self.value = value

        def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
            record["mine"] = self.value

    for number, value in enumerate([torch.tensor(2.0), numpy.float32(2), 2]):
        run = train(tiny_config(tmp_path / str(number), epochs=1), callbacks=[Adds(value)]).run
        assert run.metrics[0]["mine"] == 2
    for name, wrong in (("nan", math.nan), ("vector", torch.zeros(2))):
        with pytest.raises(ValueError, match=r"the record of an epoch must hold what JSON can, got mine="):
            train(tiny_config(tmp_path / name, epochs=1), callbacks=[Adds(wrong)])


def test_callbacks_are_called_in_order_also_when_the_run_fails(tmp_path: Path) -> None:
    calls: list[str] = []

    class Recorder(Callback):
        def on_start(self, trainer: Trainer) -> None:
            calls.append("start")

        def on_step(self, trainer: Trainer, output: StepOutput) -> None:
            calls.append(f"step {trainer.steps_done}")

        def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
            calls.append(f"epoch {record['epoch']}")
            if record["epoch"] == 2:
                raise OverflowError

        def on_end(self, trainer: Trainer) -> None:
            calls.append("end")

    with pytest.raises(OverflowError):
        train(tiny_config(tmp_path / "run", batch_size=60), callbacks=[Recorder()])
    assert calls == ["start", "step 1", "step 2", "epoch 1", "step 3", "step 4", "epoch 2", "end"]


def test_tensorboard_holds_the_records(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = train(tiny_config(tmp_path / "run", tensorboard=True, epochs=2)).run
    accumulator = event_accumulator.EventAccumulator(str(run.folder / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in accumulator.Scalars("loss")]
    assert losses == [(record["epoch"], pytest.approx(record["loss"])) for record in run.metrics]
    member = [(event.step, event.value) for event in accumulator.Scalars("loss_members/2")]
    assert member == [(record["epoch"], pytest.approx(record["loss_members"][2])) for record in run.metrics]


def test_tensorboard_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install \"ceat-fast\[tensorboard\]\""):
        Trainer(tiny_config(tmp_path / "run", tensorboard=True))
    assert not (tmp_path / "run").exists()


def test_the_progress_names_the_parts(tmp_path: Path) -> None:
    text = io.StringIO()
    config = tiny_config(tmp_path / "run", method=CEAT(lam=5.0, mu=1.0, impl="torch"), validation=VALIDATED, epochs=1)
    Trainer(config, console=Console(file=text, width=1000)).fit()
    line = text.getvalue()
    for part in ("epoch 1/1", "images/s", "loss", "ce", "nat", "adv", "disparity", "largest weight", "robust"):
        assert part in line
    bar = io.StringIO()
    terminal = Console(file=bar, width=1000, force_terminal=True)
    Trainer(tiny_config(tmp_path / "bar", epochs=1), console=terminal).fit()
    assert all(part in bar.getvalue() for part in ("epoch 1/1", "images/s", "disparity", "largest weight", "left"))


def record(epoch: int, loss: float = 1.0, robust: float | None = None, members: Any = None) -> dict[str, Any]:
    entries = {"epoch": epoch, "loss": loss, "val_adv_accuracy": robust, "train_nat_accuracy_members": members}
    return {name: value for name, value in entries.items() if value is not None}


def test_collapse_is_an_accuracy_at_chance_for_some_epochs() -> None:
    fine, gone = [0.5, 0.4], [0.5, 0.1]
    assert collapse([record(1, members=gone), record(2, members=gone)], 0.1, 3) is None
    records = [record(epoch, members=gone) for epoch in (1, 2, 3)]
    assert "member 1 has collapsed: accuracy 10.0% in epoch 3" in str(collapse(records, 0.1, 3))
    assert collapse([*records[:2], record(3, members=fine)], 0.1, 3) is None
    assert collapse(records, 0.09, 3) is None  # better than the most frequent class
    assert collapse([record(1), record(2), record(3)], 0.1, 3) is None  # nothing is known


def test_catastrophic_overfitting_is_a_falling_robustness_at_a_falling_loss() -> None:
    good = record(1, loss=1.5, robust=0.4)
    assert catastrophic_overfitting([good], 0.1) is None
    assert catastrophic_overfitting([good, record(2, loss=1.4, robust=0.35)], 0.1) is None
    assert (
        catastrophic_overfitting([good, record(2, loss=1.6, robust=0.1)], 0.1) is None
    )  # the run got worse as a whole
    finding = catastrophic_overfitting([good, record(2, loss=1.2), record(3, loss=0.9, robust=0.1)], 0.1)
    assert "fell from 40.0% in epoch 1 to 10.0% in epoch 3 while the loss fell from 1.500 to 0.900" in str(finding)


def test_warnings_come_once_and_off_is_silent() -> None:
    warnings: list[str] = []
    records = [record(epoch, members=[0.1]) for epoch in (1, 2, 3, 4)]
    for reaction, expected in (("off", 0), ("warn", 1)):
        watch = Watch(WatchConfig(collapse=reaction), 0.1, warnings.append)
        watch.look(records[:3], "kept")
        watch.look(records, "kept")
        assert len(warnings) == expected
    with pytest.raises(TrainingStoppedError, match=r"member 0 has collapsed.*; kept"):
        Watch(WatchConfig(collapse="stop"), 0.1, warnings.append).look(records, "kept")


def test_a_run_that_collapses_is_stopped_before_its_checkpoint(tmp_path: Path) -> None:
    """The classes are constant from the start of the third epoch on; the checkpoint of the second is the last."""

    class Break(Callback):
        def on_step(self, trainer: Trainer, output: StepOutput) -> None:
            if trainer.steps_done >= 4:
                with torch.no_grad():
                    trainer.ensemble.members[1].fc.weight.zero_()
                    trainer.ensemble.members[1].fc.bias.copy_(torch.arange(10))

    config = tiny_config(
        tmp_path / "run",
        method=EAT(),
        validation=VALIDATED,
        optimizer=SGD(lr=0.1),
        epochs=9,
        watch=WatchConfig(collapse="stop", patience=2),
    )
    with pytest.raises(
        TrainingStoppedError, match=r"member 1 has collapsed.*grad_clip.*last checkpoint: .*step-000000004"
    ):
        train(config, callbacks=[Break()])
    assert [record["epoch"] for record in Run.open(tmp_path / "run").metrics] == [1, 2, 3]


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    class Break(Callback):
        def on_step(self, trainer: Trainer, output: StepOutput) -> None:
            if trainer.steps_done == 6:  # the last step of the second epoch: no loss sees it
                trainer.ensemble.members[0].fc.bias.data[3] = float("nan")

    with pytest.raises(TrainingStoppedError, match=r"a weight is NaN or infinite.*last checkpoint: .*step-000000003"):
        train(tiny_config(tmp_path / "run"), callbacks=[Break()])


def test_too_many_held_out_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"validation\.images=96 leaves nothing to train on"):
        Trainer(tiny_config(tmp_path / "run", validation=ValidationConfig(images=96)))


class Wide(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(64, 1000)


def wide(num_classes: int, in_channels: int) -> torch.nn.Module:
    return Wide()


def broken(num_classes: int, in_channels: int) -> torch.nn.Module:
    return torch.nn.Linear(7, num_classes)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("wide", r"member 1 must return logits \(2, 10\).*'digits', got \(2, 1000\)"),
        ("broken", r"member 1 cannot run on images \(2, 1, 8, 8\)"),
    ],
)
def test_models_that_do_not_fit_are_refused_before_the_run_begins(model: str, message: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", models=["tiny_training:tiny", f"{__name__}:{model}"])
    with pytest.raises(ValueError, match=message):
        Trainer(config)
    assert not (tmp_path / "run").exists()
