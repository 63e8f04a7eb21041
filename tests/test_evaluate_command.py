"""`ceat-fast evaluate`: what it can judge, how it continues, what it refuses; and `ceat-fast compare`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from ceat_fast.cli import main
from ceat_fast.evaluation.progress import EvaluationProgress
from ceat_fast.evaluation.protocol import EvaluationConfig, columns
from ceat_fast.evaluation.sources import CheckpointSource, SourceOptions
from ceat_fast.training import SGD, AttackConfig, DataConfig, MultiStep, Run, TrainConfig, Trainer


def linear(num_classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))


QUICK = ["--attack.eps", "0.1", "--attack.alpha", "0.05", "--attack.steps", "2", "--attacks", "[PGD]", "--images", "40"]
QUICK += ["--sanity_samples", "0", "--device", "cpu"]
MODELS = f"[{__name__}:linear,{__name__}:linear]"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = TrainConfig(
        out=str(tmp_path_factory.mktemp("runs") / "run"),
        models=[f"{__name__}:linear"] * 2,
        data=DataConfig("digits", train_images=64),
        attack=AttackConfig(eps=0.1, alpha=0.05, steps=1),
        evaluation=AttackConfig(eps=0.2, alpha="12/255", steps=2),
        optimizer=SGD(lr=0.1),
        schedule=MultiStep(milestones=[]),
        epochs=1,
        device="cpu",
    )
    trainer = Trainer(config, console=Console(quiet=True))
    trainer.fit()
    return trainer.run.folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def evaluated(folder: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return tree


def failure(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("ceat-fast: error: ")
    return message


def weights_of(run: Path) -> Path:
    return next((run / "checkpoints").iterdir()) / "weights.safetensors"


def test_a_run_its_checkpoint_and_its_weights_are_judged_alike(run: Path, tmp_path: Path) -> None:
    assert main(["evaluate", str(run), *QUICK]) == 0
    expected = evaluated(run)
    assert [score["subject"] for score in expected["scores"]][:3] == ["ensemble", "member 0", "member 1"]
    checkpoint = weights_of(run).parent
    assert main(["evaluate", str(checkpoint), *QUICK]) == 0
    found = evaluated(run / "evaluation" / checkpoint.name)
    assert found["scores"] == expected["scores"]
    assert found["about"]["name"].endswith(f", {checkpoint.name}")

    loose = tmp_path / "loose.safetensors"
    loose.write_bytes(weights_of(run).read_bytes())
    assert main(["evaluate", str(loose), "--models", MODELS, "--data.name", "digits", *QUICK]) == 0
    assert evaluated(tmp_path / "evaluations" / "loose")["scores"] == expected["scores"]


def test_what_is_not_given_comes_from_the_run(run: Path, tmp_path: Path) -> None:
    options = ["--attacks", "[PGD,MIM]", "--images", "20", "--attack.steps", "3", "--sanity_samples", "0"]
    assert main(["evaluate", str(run), *options, "--out", str(tmp_path / "out")]) == 0
    settings = evaluated(tmp_path / "out")["attacks"]["PGD-3"]["settings"]
    assert (settings["eps"], settings["alpha_as_given"], settings["steps"]) == (0.2, "12/255", 3)


def test_a_single_model_and_a_state_dict_of_torch(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = linear(10, 1)
    torch.save(model.state_dict(), tmp_path / "one.pt")
    options = ["--models", f"[{__name__}:linear]", "--data.name", "digits", *QUICK]
    assert main(["evaluate", "one.pt", *options, "--out", "out"]) == 0
    assert [score["subject"] for score in evaluated(tmp_path / "out")["scores"]] == ["model", "model"]
    torch.save({"epoch": 3, "state": model.state_dict()}, tmp_path / "more.pt")
    assert "must hold a state dict" in failure(capsys, "evaluate", "more.pt", *options)
    torch.save(model, tmp_path / "pickle.pt")
    assert "is no file of tensors alone" in failure(capsys, "evaluate", "pickle.pt", *options)
    (tmp_path / "cut.safetensors").write_bytes(b"1234")
    assert "is no file of tensors alone" in failure(capsys, "evaluate", "cut.safetensors", *options)
    save_file({"other": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert "does not fit models=" in failure(capsys, "evaluate", "other.safetensors", *options)


USER_MODULE = """
import torch
from torch import nn
from ceat_fast import Ensemble

def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def ensemble():
    torch.manual_seed(0)
    return Ensemble([nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for _ in range(3)])

def colours():
    return nn.Sequential(nn.Conv2d(3, 10, 8), nn.Flatten())

def sized(size):
    return plain()

def number():
    return 3

constant = 3
"""


def test_a_function_in_the_working_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my_models.py").write_text(USER_MODULE)
    assert main(["evaluate", "my_models:ensemble", "--data.name", "digits", *QUICK]) == 0
    found = evaluated(tmp_path / "evaluations" / "my_models-ensemble")
    assert [score["subject"] for score in found["scores"]][:4] == ["ensemble", "member 0", "member 1", "member 2"]
    assert found["about"]["name"] == "my_models:ensemble"
    assert main(["evaluate", "my_models:plain", "--data.name", "digits", *QUICK, "--out", "plain"]) == 0
    assert evaluated(tmp_path / "plain")["scores"][0]["subject"] == "model"
    capsys.readouterr()
    data = ["--data.name", "digits"]
    assert "data.name must name a data set" in failure(capsys, "evaluate", "my_models:plain")
    assert "must return an nn.Module, got int" in failure(capsys, "evaluate", "my_models:number", *data)
    message = failure(capsys, "evaluate", "my_models:sized", *data)
    assert "'my_models:sized' must be callable without arguments: missing a required argument: 'size'" in message
    message = failure(capsys, "evaluate", "my_models:colours", *data)
    assert "the model cannot take an image of shape (1, 8, 8)" in message
    assert "'constant' is not callable" in failure(capsys, "evaluate", "my_models:constant", *data)
    assert "has no 'plan'" in failure(capsys, "evaluate", "my_models:plan", *data)
    assert "no module named 'our_models'" in failure(capsys, "evaluate", "our_models:plain", *data)


def test_what_cannot_be_judged_is_refused_by_name(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is not a run folder, a checkpoint, a weights file or a module:function" in failure(capsys, "evaluate", "no")
    assert "is not a run folder" in failure(capsys, "evaluate", str(tmp_path))
    assert "unknown attack 'PDG' (did you mean 'PGD'?)" in failure(capsys, "evaluate", str(run), "--attacks", "[PDG]")
    assert "images must be at least 1" in failure(capsys, "evaluate", str(run), "--images", "0")
    assert "batch_size must be at least 1" in failure(capsys, "evaluate", str(run), "--batch_size", "0")
    assert "eps_sweep must be a number or a fraction" in failure(capsys, "evaluate", str(run), "--eps_sweep", "[x]")
    assert "has no best checkpoint" in failure(capsys, "evaluate", str(run), "--checkpoint", "best")
    assert "did you mean 'attacks'?" in failure(capsys, "evaluate", str(run), "--attaks", "[PGD]")
    loose = tmp_path / "loose.safetensors"
    loose.write_bytes(weights_of(run).read_bytes())
    message = failure(capsys, "evaluate", str(loose), "--data.name", "digits")
    assert "models must name the architectures" in message


def test_options_without_use_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my_models.py").write_text(USER_MODULE)
    best, own = ["--checkpoint", "best"], ["my_models:plain", "--data.name", "digits"]
    for argv, refusal in (
        ([str(run), "--models", MODELS], "models is for a weights file, not for a run folder: got models="),
        ([*own, "--models", MODELS], "models is for a weights file, not for a module:function: got models="),
        ([*own, *best], "checkpoint is for a run folder, not for a module:function: got checkpoint='best'"),
        ([str(weights_of(run).parent), *best], "not for a checkpoint or a weights file in a run folder: got"),
        ([str(weights_of(run)), *best], "not for a checkpoint or a weights file in a run folder: got"),
        ([str(weights_of(run)), "--models", MODELS, *best], "not for a weights file: got checkpoint='best'"),
        ([*own, "--checkpoint", "bogus"], "unknown checkpoint 'bogus'; allowed: 'last', 'best'"),
        ([str(run), "--eps_sweep", "[0, 0.1]"], "eps_sweep must hold radii above 0, got 0"),
        ([str(run), "--eps_sweep", "[0.1]", "--attack.eps", "0"], "eps_sweep needs attack.eps above 0"),
    ):
        assert refusal in failure(capsys, "evaluate", *argv)


def test_weights_that_do_not_fit_the_run_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(linear(10, 1).state_dict(), run / "member-0.safetensors")
    assert "does not fit the models of the run" in failure(capsys, "evaluate", str(run / "member-0.safetensors"))


def test_the_files_of_two_checkpoints_do_not_share_a_folder(run: Path, tmp_path: Path) -> None:
    options = SourceOptions()
    for name in ("step-000000001", "step-000000002", "step-000000003"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.safetensors").touch()
    (tmp_path / "step-000000002" / "average.safetensors").touch()
    assert [
        CheckpointSource(tmp_path / path, Run(run), options).folder.name
        for path in (
            "step-000000001",
            "step-000000001/weights.safetensors",
            "step-000000002/weights.safetensors",
            "step-000000002/average.safetensors",
            "step-000000003/weights.safetensors",
            "other.safetensors",
        )
    ] == ["step-000000001", "step-000000001", "step-000000002-weights", "step-000000002", "step-000000003", "other"]


def test_the_evaluation_of_another_model_is_not_replaced(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_models.py").write_text(USER_MODULE)
    own = ["my_models:plain", "--data.name", "digits", *QUICK]
    assert main(["evaluate", str(run), *QUICK, "--out", "out"]) == 0
    before = (tmp_path / "out" / "evaluation.json").read_bytes()
    (tmp_path / "out" / "journal").rename(tmp_path / "journal")
    message = failure(capsys, "evaluate", *own, "--out", "out")
    assert "'out/evaluation.json' is of another model (weights: " in message
    assert (tmp_path / "out" / "evaluation.json").read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "evaluation.examples.safetensors",
        "evaluation.json",
    ]
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").touch()
    assert "out='new' is a run folder; choose another folder" in failure(capsys, "evaluate", *own, "--out", "new")


def test_other_settings_do_not_mix(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), *QUICK, "--out", "out"]) == 0
    message = failure(capsys, "evaluate", str(run), *QUICK, "--out", "out", "--attack.eps", "8/255")
    assert "PGD-2 eps: 0.1 there, 0.031" in message
    assert "PGD-2 eps_as_given: 0.1 there, 8/255 here" in message
    assert main(["evaluate", str(run), *QUICK, "--out", "out", "--attacks", "[PGD,CW]"]) == 0
    assert list(evaluated(tmp_path / "out")["attacks"]) == ["clean", "PGD-2", "CW-2"]


def test_what_a_smaller_evaluation_replaces_is_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*QUICK, "--out", "out"]
    assert main(["evaluate", str(run), *options, "--attacks", "[PGD,CW]", "--images", "999"]) == 0
    assert "images=999: digits has 360 test images" in capsys.readouterr().err
    assert main(["evaluate", str(run), *options]) == 0
    line = "out/evaluation.json had 360 images and the columns CW-2; it is replaced, its verdicts stay in out/journal"
    assert line in capsys.readouterr().err
    assert main(["evaluate", str(run), *options]) == 0
    assert "replaced" not in capsys.readouterr().err


@pytest.mark.filterwarnings("error")
def test_a_damaged_journal_is_reported_as_a_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), *QUICK, "--out", "out"]) == 0
    part = tmp_path / "out" / "journal" / "part-0.jsonl"
    lines = part.read_text().splitlines(keepends=True)
    part.write_text("".join([*lines[:9], lines[9].replace("true", "false").replace("0", "1"), *lines[10:]]))
    capsys.readouterr()
    assert main(["evaluate", str(run), *QUICK, "--out", "out"]) == 0
    expected = "out/journal: part-0.jsonl line 10 is damaged; what it held is computed again"
    assert expected in capsys.readouterr().err.splitlines()


def test_adversarials_are_kept_where_told(run: Path, tmp_path: Path) -> None:
    assert main(["evaluate", str(run), *QUICK, "--out", "out", "--keep_adversarials", "true"]) == 0
    assert list((tmp_path / "out" / "journal" / "adversarials").rglob("ensemble-*.safetensors"))


INTERRUPTED = """
import os, signal, sys
from ceat_fast.cli import main
from ceat_fast.evaluation.journal import Journal

append, batches = Journal.append, []

def append_and_interrupt(journal, attack, records):
    append(journal, attack, records)
    batches.append(attack)
    if batches.count("PGD-2") == 3:
        os.kill(os.getpid(), signal.SIGINT)

Journal.append = append_and_interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
sys.exit(main())
"""


def test_ctrl_c_leaves_a_state_that_continues(run: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    options = [*QUICK, "--batch_size", "2", "--out"]
    command = [sys.executable, "-c", INTERRUPTED, "evaluate", str(run), *options, "out"]
    process = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.returncode == 130, process.stderr
    assert process.stderr.splitlines()[-1].startswith("ceat-fast: error: interrupted; the same command continues")
    part = tmp_path / "out" / "journal" / "part-0.jsonl"
    before = part.read_bytes()
    assert before.count(b'"attack":"PGD-2","subject"') == 2 + 2 * 2 + 2  # ensemble, two members, ensemble
    assert main(["evaluate", str(run), *options, "out"]) == 0
    assert part.read_bytes().startswith(before)
    assert main(["evaluate", str(run), *options, "whole"]) == 0
    assert evaluated(tmp_path / "out")["scores"] == evaluated(tmp_path / "whole")["scores"]


def test_two_evaluations_are_compared(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my_models.py").write_text(USER_MODULE)
    assert main(["evaluate", "my_models:ensemble", "--data.name", "digits", *QUICK, "--out", "a"]) == 0
    assert main(["evaluate", str(run), *QUICK, "--out", "b"]) == 0
    assert main(["compare", "a", "b", "--out", "c.html"]) == 0
    assert "compared with my_models:ensemble" in (tmp_path / "c.html").read_text()
    capsys.readouterr()
    assert "at least two evaluations" in failure(capsys, "compare", "a")
    assert "exists; choose another file" in failure(capsys, "compare", "a", "b", "--out", "c.html")
    message = failure(capsys, "compare", "a", "b", "./a", "--out", "d.html")
    assert "folders must name different evaluations, got './a' twice" in message


def test_the_columns_of_the_papers_table_and_sweeps() -> None:
    config = EvaluationConfig(
        ["PGD", "MIM", "CW", "Square", "AA"], eps_sweep=["8/255", 0.031], step_sweep=[20, 50], seed=3
    )
    found = columns(AttackConfig(steps=20), config)
    assert list(found) == ["PGD-20", "MIM-20", "CW-20", "Square", "AA", "PGD-50", "PGD-20 eps 8/255"]
    budgets = {name: (attack.radius, getattr(attack, "step_size", None)) for name, attack in found.items()}
    assert budgets["PGD-20"] == budgets["MIM-20"] == budgets["CW-20"] == (0.031, 0.007)
    assert budgets["AA"] == (0.031, None)
    assert budgets["PGD-20 eps 8/255"] == (8 / 255, pytest.approx(0.007 * 8 / 255 / 0.031))
    assert not found["MIM-20"].random_start  # as published
    assert found["AA"].version == "standard"
    assert {attack.seed for attack in found.values()} == {3}
    restarted = columns(AttackConfig(steps=10, restarts=5, precision="auto"), EvaluationConfig(["PGD", "MIM", "AA"]))
    assert list(restarted) == ["PGD-10x5", "MIM-10x5", "AA mixed"]
    assert restarted["MIM-10x5"].random_start  # restarts without it would repeat one search
    assert restarted["AA mixed"].precision == "mixed"
    assert list(columns(AttackConfig(), EvaluationConfig([], eps_sweep=[0.1]))) == ["PGD-10 eps 0.1", "PGD-10"]


def test_the_progress_tells_accuracy_speed_and_time_left() -> None:
    console = Console(force_terminal=True, width=140, record=True)
    with EvaluationProgress(console, 100) as progress:
        progress.begin("PGD-20")
        progress.advance(40, 30, computed=True)
        progress.tell(20, "apgd-t", 0.25, 0.5)
        progress.advance(20, 0, computed=False)
    text = console.export_text()
    assert all(words in text for words in ("PGD-20", "60/100", "accuracy 50.0%", "images/s", "left"))
    plain = Console(width=140, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with EvaluationProgress(plain, 100) as progress:
        progress.begin("AA")
        progress.advance(100, 30, computed=False)
        progress.end()
    assert plain.export_text() == "AA: 100/100 images  accuracy 30.0%  from the journal\n"


def test_the_time_left_within_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work within a batch counts as that part of its images: 30 of 100 in 90 seconds leave 210."""
    now = [0.0]
    monkeypatch.setattr("ceat_fast.evaluation.progress.time.monotonic", lambda: now[0])
    plain = Console(width=140, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with EvaluationProgress(plain, 100) as progress:
        progress._bars.get_time = lambda: now[0]
        progress.begin("AA")
        for now[0], done in ((30.0, 0.2), (60.0, 0.4), (90.0, 0.6)):
            progress.tell(50, "square", 0.5, done)
    assert plain.export_text() == "AA: 0/100 images  square: 50.0% of this batch misled  0:03:30 left\n"
