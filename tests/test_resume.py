"""A run that is cut off at any step and started again ends like one that was not, to the bit; damaged checkpoints."""

from __future__ import annotations

import dataclasses
import io
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import killable
import pytest
import torch
from rich.console import Console
from tiny_training import At, everything_config, tiny_config, train, without_time

from ceat_fast.data import load_dataset
from ceat_fast.methods import EAT, Epoch
from ceat_fast.training import (
    SWA,
    AdamW,
    CheckpointConfig,
    CheckpointError,
    Run,
    TrainConfig,
    Trainer,
    TrainingInterrupted,
    load_config,
)
from ceat_fast.training.checkpoint import checkpoints, load_checkpoint, usable_checkpoint
from ceat_fast.training.config import config_to_yaml

PATIENCE = 900  # seconds; importing torch takes minutes on a machine that is busy


class Crash(Exception):
    pass


def crash() -> None:
    raise Crash


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of the final checkpoint and of the best one, apart from the state, which holds seconds."""
    newest = checkpoints(folder / "checkpoints")[0]
    files = [newest / "weights.safetensors", *checkpoints(folder / "checkpoints", "best")[0].glob("*.safetensors")]
    files += newest.glob("average.safetensors")
    return {f"{file.parent.name}/{file.name}": file.read_bytes() for file in files}


def assert_same_run(a: Path, b: Path) -> None:
    assert without_time(Run.open(a).metrics) == without_time(Run.open(b).metrics)
    assert contents(a) == contents(b)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that is not interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(everything_config(folder))
    return folder


# 1: before the first checkpoint; 4: at one; 5: after the last batch of an epoch; 8: between; 15: after the last batch.
@pytest.mark.parametrize("step", [1, 4, 5, 8, 15])
def test_a_crash_at_a_step_leaves_no_trace(step: int, whole: Path, tmp_path: Path) -> None:
    config = everything_config(tmp_path / "run")
    with pytest.raises(Crash):
        train(config, callbacks=[At(step, crash)])
    train(dataclasses.replace(config, resume=True))
    assert_same_run(tmp_path / "run", whole)


def test_crashes_without_end(whole: Path, tmp_path: Path) -> None:
    config = everything_config(tmp_path / "run", resume=True)
    for step in (2, 3, 5, 6, 9, 10, 14):
        with pytest.raises(Crash):
            train(config, callbacks=[At(step, crash)])
    train(config)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize(
    ("numbers", "code"),
    [([signal.SIGTERM], 143), ([signal.SIGINT], 130), ([signal.SIGTERM, signal.SIGTERM, signal.SIGINT], 143)],
)
def test_a_signal_saves_and_ends_with_its_exit_code(numbers: list[int], code: int, whole: Path, tmp_path: Path) -> None:
    def send() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.01)

    config = everything_config(tmp_path / "run", checkpoint=CheckpointConfig(every=100))
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterrupted, match=r"saved .*step-000000007") as caught:
        train(config, callbacks=[At(7, send)])
    assert caught.value.exit_code == code
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    train(dataclasses.replace(config, resume=True))
    assert_same_run(tmp_path / "run", whole)


def test_an_interruption_reaches_another_process() -> None:
    interruption = pickle.loads(pickle.dumps(TrainingInterrupted(signal.SIGINT, "after step 3")))
    assert (type(interruption), str(interruption), interruption.exit_code) == (TrainingInterrupted, "after step 3", 130)


def test_a_second_ctrl_c_interrupts_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt) as caught:
        train(everything_config(tmp_path / "run"), callbacks=[At(1, twice)])
    assert not isinstance(caught.value, TrainingInterrupted)


@pytest.fixture(scope="module")
def processes() -> Iterator[Any]:
    """Processes that are forked from one which has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killable"])
    with pytest.MonkeyPatch.context() as patch:
        tests = Path(__file__).parent
        patch.setenv("PYTHONPATH", os.pathsep.join([str(tests.parent), str(tests), *sys.path]))
        yield context


# At any moment of a step, also while a checkpoint is being written. SIGTERM saves every time.
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(("kills", "epochs"), [(8, 12), pytest.param(20, 24, marks=pytest.mark.slow)])
def test_kills_at_random_moments_and_the_same_command_again(
    kills: int, epochs: int, number: int, code: int, processes: Any, tmp_path: Path
) -> None:
    folder, config = tmp_path / "killed", tmp_path / "config.yaml"
    config.write_text(config_to_yaml(everything_config(tmp_path / "whole", epochs=epochs)))
    train(load_config(config))
    command = ["train", "--config", str(config), "--out", str(folder), "--resume", "true"]
    generator = random.Random(0)
    for _ in range(kills):
        process = processes.Process(target=killable.run, args=(command, torch.get_num_threads()))
        process.start()
        target = steps_saved(folder) + generator.randint(1, 3)
        while process.is_alive() and steps_saved(folder) < target:
            time.sleep(0.001)
        time.sleep(generator.uniform(0.0, 0.02))  # a step takes about as long
        assert process.is_alive()
        os.kill(process.pid, number)
        process.join(PATIENCE)
        assert process.exitcode == code
    last = processes.Process(target=killable.run, args=(command, torch.get_num_threads()))
    last.start()
    last.join(PATIENCE)
    assert last.exitcode == 0
    assert_same_run(folder, tmp_path / "whole")


def steps_saved(folder: Path) -> int:
    found = checkpoints(folder / "checkpoints")
    return int(found[0].name.removeprefix("step-")) if found else 0


class Counting(EAT):
    """A method that carries a tensor from step to step, and changes it when an epoch begins."""

    count = torch.zeros(())

    def begin_epoch(self, epoch: Epoch) -> None:
        self.count = self.count + 100

    def step(self, *arguments: Any) -> Any:
        self.count = self.count + 1
        return super().step(*arguments)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"count": self.count}

    def load_state_dict(self, state: Any) -> None:
        self.count = state["count"]


@pytest.mark.parametrize("step", [3, 4, 6], ids=["end of epoch", "first batch", "end of second epoch"])
def test_the_state_of_a_method_is_kept(step: int, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", method=Counting(), checkpoint=CheckpointConfig(every_steps=1))
    with pytest.raises(TrainingInterrupted):
        train(config, callbacks=[At(step, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    resumed = train(dataclasses.replace(config, resume=True))
    assert resumed.stepper.method.count.item() == 3 * 100 + 9
    assert config.method.count.item() == 0  # the settings are not touched


def test_adam_and_swa_resume_too(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"optimizer": AdamW(lr=0.01), "average": SWA(start_epoch=2), "epochs": 4}
    train(everything_config(tmp_path / "whole", **settings))
    config = everything_config(tmp_path / "run", **settings)
    for step in (7, 17):  # before the first weights enter the mean, and after the second ones
        with pytest.raises(Crash):
            train(dataclasses.replace(config, resume=True), callbacks=[At(step, crash)])
    train(dataclasses.replace(config, resume=True))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.fixture
def cut_off(tmp_path: Path) -> Path:
    """A run with checkpoints after steps 8 and 10, of 15."""
    with pytest.raises(Crash):
        train(
            everything_config(tmp_path / "run", checkpoint=CheckpointConfig(every_steps=2)), callbacks=[At(11, crash)]
        )
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-000000010", "step-000000008"]
    return tmp_path / "run"


def truncate(path: Path) -> None:
    with open(path / "weights.safetensors", "r+b") as file:
        file.truncate(100)


def flip(path: Path) -> None:
    data = bytearray((path / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "state.pt").write_bytes(data)


def foreign(path: Path) -> None:
    (path / "manifest.json").write_text(json.dumps({"format": "something else"}))


def newer(path: Path) -> None:
    tree = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(tree | {"version": 99}))


def empty(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "weights.safetensors has 100 bytes instead of"),
        (flip, "state.pt does not have the checksum"),
        (foreign, "of the format 'something else'"),
        (newer, "version 99, and this ceat_fast reads version"),
        (empty, "manifest.json is missing"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    damage: Any, message: str, cut_off: Path, whole: Path
) -> None:
    damage(checkpoints(cut_off / "checkpoints")[0])
    console = Console(record=True, width=1000, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115
    trainer = Trainer(everything_config(cut_off, resume=True), console=console)
    assert trainer.steps_done == 8
    text = console.export_text()
    assert message in text
    assert "step-000000010 cannot be used" in text
    assert "using step-000000008" in text
    trainer.fit()
    assert_same_run(cut_off, whole)


def test_no_usable_checkpoint_is_an_error_and_not_a_new_start(cut_off: Path) -> None:
    for path in checkpoints(cut_off / "checkpoints"):
        truncate(path)
    with pytest.raises(
        CheckpointError, match=r"step-000000010 cannot be used.*step-000000008 cannot be used.*no earlier"
    ):
        Trainer(everything_config(cut_off, resume=True), console=Console(quiet=True))
    with pytest.raises(CheckpointError, match="has 100 bytes"):
        Run.open(cut_off).load_ensemble(load_dataset("digits"), "cpu")


def test_checkpoints_are_bounded_in_number_and_safe_to_load(tmp_path: Path) -> None:
    config = everything_config(tmp_path / "run", checkpoint=CheckpointConfig(every_steps=1, keep=3))
    trainer = train(config)
    names = sorted(path.name for path in trainer.run.checkpoints.iterdir())
    assert names[1:] == ["step-000000013", "step-000000014", "step-000000015"]
    assert names[0].startswith("best-")
    torch.load(trainer.run.checkpoints / names[-1] / "state.pt", weights_only=True)


def test_the_last_and_the_best_checkpoint_load_as_ensembles(whole: Path) -> None:
    run, digits = Run.open(whole), load_dataset("digits")
    last = run.load_ensemble(digits, "cpu")
    best = run.load_ensemble(digits, "cpu", checkpoint="best")
    robust = [record["val_adv_accuracy"] for record in run.metrics]
    first_best = robust.index(max(robust))
    assert [path.name for path in checkpoints(run.checkpoints, "best")] == [f"best-{5 * (first_best + 1):09d}"]
    saved = load_checkpoint(checkpoints(run.checkpoints)[0], torch.device("cpu"))
    assert saved.average is not None
    for name, tensor in last.state_dict().items():
        assert torch.equal(tensor, saved.average[name]), name  # where there is an average, it is what is judged
    assert not best.training
    with pytest.raises(ValueError, match=r"unknown checkpoint 'bset' \(did you mean 'best'\?\)"):
        run.load_ensemble(digits, "cpu", checkpoint="bset")


def test_leftovers_of_a_killed_write_are_removed(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    leftover = tmp_path / "run" / "checkpoints" / ".step-000000020.tmp-123"
    leftover.mkdir()
    (leftover / "weights.safetensors").write_bytes(b"half")
    train(everything_config(tmp_path / "run", resume=True))
    assert not leftover.exists()


def test_a_record_that_was_cut_off_is_dropped(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 4, "lo')
    assert [record["epoch"] for record in Run.open(tmp_path / "run").metrics] == [1, 2, 3]
    train(everything_config(tmp_path / "run", resume=True))
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("line", [b"", b'{"loss": 1.0}', b'{"epoch": 1, "loss": NaN}', b"[1]", b"\xff"])
def test_a_damaged_record_is_named(line: bytes, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + line + b"\n" + b"".join(rest))
    with pytest.raises(ValueError, match=r"run/metrics.jsonl: line 2 is not the record of an epoch; remove it"):
        train(everything_config(tmp_path / "run", resume=True))


@pytest.mark.parametrize("damaged", [b'[{"python": "3.1', b"3", b"{}", b"\xff"])
def test_a_damaged_list_of_machines_is_begun_anew(damaged: bytes, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "environment.json"
    path.write_bytes(damaged)
    text = warnings_of(everything_config(tmp_path / "run", resume=True))
    assert f"warning: {path} is damaged, and begun anew" in text
    assert len(json.loads(path.read_text())) == 1


def test_missing_records_are_told(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    text = warnings_of(everything_config(tmp_path / "run", resume=True, epochs=4))
    assert "metrics.jsonl lacks 3 of 3 finished epochs" in text
    assert [record["epoch"] for record in Run.open(tmp_path / "run").metrics] == [4]


def test_missing_checkpoints_are_told(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    text = warnings_of(everything_config(tmp_path / "run", resume=True))
    assert "checkpoints holds no checkpoint: 3 finished epochs are trained again" in text
    assert_same_run(tmp_path / "run", whole)


def warnings_of(config: TrainConfig) -> str:
    text = io.StringIO()
    Trainer(config, console=Console(width=1000, file=text)).fit()
    return text.getvalue()


def test_a_full_disk_is_told_and_costs_nothing(cut_off: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        fill_disk = At(11, lambda: patch.setattr(os, "fsync", full))
        with pytest.raises(
            OSError, match=r"cannot save .*step-000000012: .*No space left.*newest one: .*step-000000010"
        ):
            train(everything_config(cut_off, resume=True), callbacks=[fill_disk])
    train(everything_config(cut_off, resume=True))
    assert_same_run(cut_off, whole)


def test_a_disk_that_is_too_small_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two checkpoints are kept and a third is written: each holds weights, their average and the momentum, which for
    three members of 65 x 10 + 2 weights, 2 statistics and a count of 8 bytes are 3 x (3 x 2,624 bytes) = 0.02 MB."""
    trainer = Trainer(everything_config(tmp_path / "run"), console=Console(quiet=True))
    room = shutil._ntuple_diskusage(10**9, 10**9 - 20_000, 20_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: room)
    with pytest.raises(OSError, match=r"has 0\.0 MB free, and the checkpoints need about 0\.1 MB; make room"):
        trainer.fit()
    assert trainer.steps_done == 0
    monkeypatch.undo()
    train(everything_config(tmp_path / "run"))  # the folder still counts as new


def full(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def test_two_processes_cannot_train_in_one_folder(tmp_path: Path) -> None:
    config = everything_config(tmp_path / "run", resume=True)
    second = lambda: train(config)  # noqa: E731
    with pytest.raises(OSError, match="another process is training in"):
        train(config, callbacks=[At(3, second)])


def test_a_second_process_that_is_refused_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = everything_config(folder)
    other = dataclasses.replace(config, resume=True, epochs=77, tensorboard=True)
    evaluation = folder / ".evaluation.json.tmp-1"  # of a process that writes at the moment

    def second() -> None:
        evaluation.write_text("half")
        before = written(folder)
        with pytest.raises(OSError, match="another process is training in"):
            Trainer(other, console=Console(quiet=True))
        assert written(folder) == before

    train(config, callbacks=[At(3, second)])
    train(dataclasses.replace(config, resume=True))
    assert evaluation.exists()


def test_what_is_refused_late_changes_nothing_either(cut_off: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = everything_config(cut_off, resume=True, epochs=77)
    before = written(cut_off)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 0))
        with pytest.raises(OSError, match="MB free"):
            train(other)
    for path in checkpoints(cut_off / "checkpoints"):
        truncate(path)
    with pytest.raises(CheckpointError, match="no earlier"):
        train(other)
    assert written(cut_off) == before


def written(folder: Path) -> list[bytes]:
    """What a session writes when it begins."""
    return [(folder / name).read_bytes() for name in ("config.yaml", "environment.json")]


@pytest.mark.parametrize("resume", [False, True])
def test_a_trainer_does_not_undo_what_another_one_did_since(resume: bool, tmp_path: Path) -> None:
    config = everything_config(tmp_path / "run", epochs=1)
    if resume:
        train(config)
        config = dataclasses.replace(config, epochs=2, resume=True)
    late = Trainer(config, console=Console(quiet=True))
    train(config)
    with pytest.raises(OSError, match=r"another process has trained in .*run' since this Trainer was made"):
        late.fit()


def test_a_trainer_goes_on_where_its_fit_was_interrupted(whole: Path, tmp_path: Path) -> None:
    interrupt = At(7, lambda: os.kill(os.getpid(), signal.SIGTERM))
    trainer = Trainer(everything_config(tmp_path / "run"), console=Console(quiet=True), callbacks=[interrupt])
    with pytest.raises(TrainingInterrupted):
        trainer.fit()
    trainer.fit()
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize(("step", "what"), [(11, "finished"), (14, "begun")])
def test_fewer_epochs_than_the_run_has_are_refused(step: int, what: str, tmp_path: Path) -> None:
    """Epochs of five steps; the last checkpoints are those after steps 10 and 12."""
    epoch = {"finished": 2, "begun": 3}[what]
    config = everything_config(tmp_path / "run", checkpoint=CheckpointConfig(every_steps=2), resume=True)
    with pytest.raises(Crash):
        train(config, callbacks=[At(step, crash)])
    before = written(tmp_path / "run")
    message = rf"epochs={epoch - 1}, but the run in .*run' has {what} epoch {epoch}; give at least {epoch}"
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(config, epochs=epoch - 1))
    assert written(tmp_path / "run") == before
    assert len(train(dataclasses.replace(config, epochs=epoch)).records) == epoch


def test_usable_checkpoint_of_an_empty_folder(tmp_path: Path) -> None:
    assert usable_checkpoint(tmp_path, print) is None
