"""The command line: train, resume, evaluate, report, info, and its errors."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path

import pytest
from torch import nn

from ceat_fast import __version__
from ceat_fast.cli import main
from ceat_fast.training import Trainer, TrainingInterrupted, load_config


def linear(num_classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))


CONFIG = f"""
models: ["{__name__}:linear", "{__name__}:linear", "{__name__}:linear"]
method: {{class_path: CEAT, init_args: {{lam: 5.0, mu: 1.0, impl: torch}}}}
data: {{name: digits, train_images: 64}}
attack: {{eps: 0.1, alpha: 0.05, steps: 1}}
evaluation: {{eps: 0.1, alpha: 0.05, steps: 2}}
schedule: {{milestones: []}}
epochs: 1
device: cpu
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return str(path)


def failure(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The single line with which `argv` is refused."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ceat-fast: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_train_evaluate_report(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    options = ["--config", config, "--out", str(run), "--method.mu", "2", "--optimizer.lr", "0.05"]
    assert main(["train", *options]) == 0
    assert f"next: ceat-fast evaluate {run}" in capsys.readouterr().out
    assert {path.name for path in (run / "figures").iterdir()} == {
        "loss-mean-over-members.png",
        "cross-entropy-adversarial.png",
        "training-accuracy-adversarial.png",
        "clean-weight.png",
        "adversarial-weight.png",
        "clean-disparity.png",
        "adversarial-disparity.png",
    }
    stored = load_config(run / "config.yaml")
    assert stored.method.lam == 5.0
    assert stored.method.mu == 2.0
    assert stored.optimizer.lr == 0.05
    assert stored.epochs == 1

    assert main(["train", *options, "--epochs", "2", "--resume", "true"]) == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2

    capsys.readouterr()
    assert main(["evaluate", str(run), "--attack.steps", "3", "--images", "50", "--device", "cpu"]) == 0
    table = capsys.readouterr().out
    assert all(text in table for text in ("clean", "PGD-3", "ensemble", "member 2"))
    tree = json.loads((run / "evaluation.json").read_text())
    assert list(tree["attacks"]) == ["clean", "PGD-3", "MIM-3", "CW-3"]
    assert tree["attacks"]["PGD-3"]["settings"]["eps"] == 0.1  # what is not given comes from the run
    assert {score["total"] for score in tree["scores"]} == {50}

    files = tmp_path / "files"
    assert main(["report", str(run), "--out", str(tmp_path / "report.html"), "--files", str(files)]) == 0
    assert (files / "scores.csv").is_file()
    assert "CEAT(lam=5, mu=2" in (tmp_path / "report.html").read_text()


def test_info_names_the_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("native", "triton", "torch", "python", "threads"))


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"ceat-fast {__version__}\n"


def test_help_explains_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--validation.images" in text
    assert "how many to hold out" in text
    assert "--optimizer.help" in text
    with pytest.raises(SystemExit):
        main(["train", "--optimizer.help", "SGD"])
    text = " ".join(capsys.readouterr().out.split())
    assert "learning rate that the schedule multiplies" in text
    assert "default: 0.01" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "CAET"], "did you mean 'CEAT'?"),
        (["--method", "ceat"], "did you mean 'CEAT'?"),
        (["--method.lamb", "3"], "did you mean 'method.lam'?"),
        (["--schedule", "Cosin"], "did you mean 'Cosine'?"),
        (["--average", "EMMA"], "did you mean 'EMA'?"),
        (["--schedule", "Cosine", "--schedule.finl", "0.1"], "did you mean 'schedule.final'?"),
        (["--device", "meta"], "device 'meta' cannot be used here (Cannot copy out of meta tensor; no data!)"),
        (["--out", "r\udcff"], "out='r\\udcff' cannot be written to a config file: it is no valid text"),
        (["--attack.qqq", "3"], "allowed: attack.alpha, attack.eps,"),
        (["--zzz.qqq", "3"], "allowed: attack, average,"),
        (["--watch.patence", "2"], "did you mean 'watch.patience'?"),
        (["--optimizer.lt", "3"], "did you mean 'optimizer.lr'?"),
        (["--epoch", "3"], "did you mean 'epochs'?"),
        (["--epochs", "many"], "epochs: Expected a <class 'int'>. Got value: many\n"),
        (["--batch-size", "3"], "did you mean 'batch_size'?"),
        (["--decay", "0.9"], "did you mean 'average.decay'?"),
        (["--learning_rate", "3"], "allowed: attack, average, backend,"),
        (["--optimizer", "Adam", "--optimizer.momentum", "0"], "allowed: optimizer.beta1, optimizer.beta2, "),
        (["--data", "digits"], "allowed: data.augment, data.name, data.root, data.train_images"),
        (["--data.name", "cifar"], "did you mean 'cifar10'?"),
        (["--data.name", "digits", "--models", "[resnet21]"], "unknown model 'resnet21' (did you mean 'resnet"),
        (["--attack.eps", "8/0"], "eps must be a number or a fraction such as '8/255', got '8/0'"),
        (["--method.lam=-1"], "lam must be finite and at least 0"),
        (["--config", "missing.yaml"], "missing.yaml"),
    ],
)
def test_wrong_train_options_are_one_line(
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in failure(capsys, "train", *options)
    assert list(tmp_path.iterdir()) == []


def test_wrong_keys_in_a_config_file_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("optimizer: {lt: 0.1}\n")
    assert "did you mean 'optimizer.lr'?" in failure(capsys, "train", "--config", str(path))
    path.write_text("!!python/object/apply:os.system ['true']\n")
    failure(capsys, "train", "--config", str(path))


def test_an_interrupted_training_says_how_it_continues(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(trainer: Trainer) -> None:
        raise TrainingInterrupted(signal.SIGTERM, "interrupted after step 3")

    monkeypatch.setattr(Trainer, "fit", interrupted)
    assert main(["train", "--config", config, "--out", str(tmp_path / "run")]) == 143
    line = "ceat-fast: error: interrupted after step 3; the same command with --resume true continues\n"
    assert capsys.readouterr().err == line


def test_a_run_that_goes_wrong_ends_with_one(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--optimizer.lr", "1e30", "--epochs", "9", "--out", str(tmp_path / "run")]
    assert main(["train", "--config", config, *options]) == 1
    assert re.search(r"^ceat-fast: error: .*; last checkpoint: .*step-\d+$", capsys.readouterr().err, re.MULTILINE)


def test_a_finished_run_without_its_records(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "my run"
    options = ["train", "--config", config, "--out", str(run), "--resume", "true"]
    assert main(options) == 0
    printed = capsys.readouterr().out
    assert f"{run}: 1 epoch, loss " in printed
    assert f"next: ceat-fast evaluate '{run}'\n" in printed
    (run / "metrics.jsonl").unlink()
    assert main(options) == 2
    message = f"ceat-fast: error: {run / 'metrics.jsonl'} lacks the finished epochs"
    assert message in capsys.readouterr().err


def test_an_existing_run_is_not_overwritten(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert "--resume true" in failure(capsys, "train", "--config", config, "--out", str(tmp_path / "run"))


def test_evaluate_refuses_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a run folder" in failure(capsys, "evaluate", str(tmp_path))


def test_no_command_and_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("usage: ceat-fast\n")
    assert "Train an ensemble." in captured.err
    assert "did you mean 'train'?" in failure(capsys, "trian")


def test_the_traceback_is_there_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CEAT_FAST_DEBUG", "1")
    with pytest.raises(ValueError, match="is not a run folder"):
        main(["evaluate", "nowhere"])


def test_transfer_between_members_and_from_surrogates(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(tmp_path / name) for name in ("first", "second")]
    for seed, run in enumerate(runs):
        assert main(["train", "--config", config, "--out", run, "--seed", str(seed)]) == 0
    capsys.readouterr()
    options = ["--eps", "0.1", "--steps", "2", "--surrogate_steps", "2", "--images", "40", "--protocol", "all"]
    assert main(["transfer", runs[0], "--surrogates", runs[1], *options]) == 0
    printed = capsys.readouterr().out
    matrix = json.loads((tmp_path / "first" / "transfer.json").read_text())
    assert matrix["targets"] == ["member 0", "member 1", "member 2", "ensemble"]
    assert len(matrix["samples"]) == 40
    assert (matrix["attack"]["eps"], matrix["attack"]["alpha"], matrix["attack"]["restarts"]) == (0.1, 0.02, 5)
    assert f"{100 * matrix['rates'][0][0]:.1f}" in printed
    result = json.loads((tmp_path / "first" / "black_box.json").read_text())
    rows = result["accuracies"]["ensemble"]
    assert list(rows) == ["clean", *(f"{runs[1]} / {name}" for name in result["attacks"]), "all"]
    assert rows["all"]["accuracy"] <= min(row["accuracy"] for row in rows.values())

    assert "cannot be its own surrogate" in failure(capsys, "transfer", runs[0], "--surrogates", runs[0])
    assert "unknown protocol 'none'" in failure(capsys, "transfer", runs[0], "--protocol", "none")
    assert "eps must be above 0 where alpha" in failure(capsys, "transfer", runs[0], "--eps", "0")

    before = (tmp_path / "first" / "transfer.json").read_bytes()
    out = tmp_path / "out"
    message = failure(capsys, "transfer", runs[0], *options, "--out", runs[1])
    assert f"out={runs[1]!r} is a run folder; choose another folder" in message
    out.touch()
    assert f"File exists: {str(out)!r}" in failure(capsys, "transfer", runs[0], *options, "--out", str(out))
    out.unlink()
    assert main(["transfer", runs[0], *options, "--images", "999", "--out", str(out), "--data.root", "no/where"]) == 0
    assert "images=999: digits has 360 test images" in capsys.readouterr().out
    assert len(json.loads((out / "transfer.json").read_text())["samples"]) == 360
    assert (tmp_path / "first" / "transfer.json").read_bytes() == before


def test_transfer_shows_what_it_cannot_write(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(tmp_path / "run")
    assert main(["train", "--config", config, "--out", run, "--data.train_images", "5000"]) == 0
    captured = capsys.readouterr()
    assert "data.train_images=5000: digits has 1437 training images" in captured.err

    def full(path: Path, value: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("ceat_fast.evaluation.transfer_result.write_json", full)
    assert main(["transfer", run, "--eps", "0.1", "--steps", "1", "--images", "20", "--protocol", "all"]) == 2
    captured = capsys.readouterr()
    assert "Inputs that mislead, in % of 20 samples" in captured.out
    assert f"No space left on device: '{run}/transfer.json'" in captured.err


@pytest.mark.parametrize(
    ("content", "refusal"),
    [
        (b"\xff\xfe", "must be text in UTF-8"),
        (b"", 'must hold settings, "name: value", got nothing'),
        (b"- epochs", 'must hold settings, "name: value", got something else'),
        (b"epochs: [", "must be YAML: while parsing"),
        (b"epochs: 1\nseed: 1\nepochs: 2", "gives epochs twice"),
        (b"data: {name: digits, augment: none, name: cifar10}", "gives data.name twice"),
    ],
    ids=["binary", "empty", "list", "broken", "twice", "twice below"],
)
def test_a_config_file_that_is_none_is_named(
    content: bytes, refusal: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "odd.yaml"
    path.write_bytes(content)
    message = failure(capsys, "train", "--config", str(path), "--out", str(tmp_path / "run"))
    assert f"config file {str(path)!r}: {refusal}" in message
    with pytest.raises(ValueError, match=re.escape(f"config file {str(path)!r}: {refusal}")):
        load_config(path)
    assert not (tmp_path / "run").exists()


def test_aliases_in_a_config_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("attack: &budget {eps: 0.2, alpha: 0.1}\nevaluation: *budget\n")
    assert load_config(path).evaluation.eps == 0.2


def test_a_method_of_the_users_lies_in_the_working_directory(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plain_method.py").write_text(
        "from dataclasses import dataclass\n"
        "from ceat_fast.methods import EAT\n\n"
        "@dataclass\nclass Plain(EAT):\n    strength: float = 1.0\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "plain.yaml"
    path.write_text(CONFIG.replace("{class_path: CEAT, init_args: {lam: 5.0, mu: 1.0, impl: torch}}", "EAT"))
    assert main(["train", "--config", str(path), "--method", "plain_method.Plain", "--out", "run"]) == 0
    assert load_config("run/config.yaml").method.label == "Plain"


def test_the_help_of_evaluate_shows_the_budget_that_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    assert re.search(r"gradient steps\. \(type: int, default: 20\)", capsys.readouterr().out)
