"""Every method through the trainer, from the command line's settings on; and the method that docs/methods.md shows."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from method_models import small_ensemble
from rich.console import Console

from ceat_fast.attacks import PGD
from ceat_fast.cli import main
from ceat_fast.data import load_dataset
from ceat_fast.evaluation import evaluate
from ceat_fast.methods import METHODS, CalibratedDistance, Epoch, Method, make_method
from ceat_fast.training import SGD, AttackConfig, DataConfig, MultiStep, TrainConfig, Trainer, load_config
from ceat_fast.training.config import config_to_yaml

ATTACKED = [name for name in METHODS if name != "Standard"]
WITH_PLUG_IN = [name for name in ATTACKED if name != "CEAT"]


def config(out: Path, method: Method, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "out": str(out),
        "method": method,
        "models": ["digits_resnet"] * 3,
        "data": DataConfig("digits", train_images=96),
        "attack": AttackConfig(eps=0.1, alpha=0.05, steps=2),
        "optimizer": SGD(lr=0.02, grad_clip=1.0),
        "schedule": MultiStep(milestones=[]),
        "epochs": 2,
        "batch_size": 48,
        "device": "cpu",
    }
    return TrainConfig(**(settings | changes))


def train(settings: TrainConfig) -> Trainer:
    trainer = Trainer(settings, console=Console(quiet=True))
    trainer.fit()
    return trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return dict(trainer.ensemble.state_dict())


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_trains_every_member(name: str, tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path / "run", make_method(name)), console=Console(quiet=True))
    before = {key: value.clone() for key, value in weights(trainer).items()}
    records = trainer.fit()
    assert len(records) == 2
    for key, value in weights(trainer).items():
        assert value.isfinite().all()
        if key.endswith("fc.weight"):
            assert not torch.equal(value, before[key])
    assert (name == "Standard") == ("train_adv_accuracy" not in records[-1])


@pytest.mark.parametrize("name", WITH_PLUG_IN)
def test_every_method_trains_with_the_plug_in(name: str, tmp_path: Path) -> None:
    method = make_method(name, plus_ceat=CalibratedDistance(lam=1.0, mu=1.0))
    last = train(config(tmp_path / "run", method, epochs=1)).run.metrics[-1]
    assert last["adv_weight_max"] >= last["adv_weight"] >= 1


@pytest.mark.parametrize("members", [2, 4])
@pytest.mark.parametrize("name", ["ADP", "GAL", "TRS", "DVERGE", "LAFED", "FASTEN", "CEAT"])
def test_methods_train_two_and_four_members(name: str, members: int, tmp_path: Path) -> None:
    settings = config(tmp_path / "run", make_method(name), models=["digits_resnet"] * members, epochs=1)
    assert len(train(settings).run.metrics[-1]["loss_members"]) == members


# Two and five alike, four as in Table 3, and mixed ones: with and without two of one architecture.
@pytest.mark.parametrize("depths", [(2, 2), (2,) * 4, (2,) * 5, (2, 3, 5), (3, 2, 3, 5)], ids=str)
@pytest.mark.parametrize("name", ATTACKED)
def test_a_step_of_two_to_five_members_alike_or_of_different_depths(name: str, depths: tuple[int, ...]) -> None:
    ensemble, batch = small_ensemble(depths, samples=8)
    method = make_method(name)
    method.begin_epoch(Epoch(number=1, total=2, samples=8, seed=0))
    attack = PGD(eps=0.1, alpha=0.05, steps=2, goal=method.goal, seed=0).perturb
    losses = method.step(ensemble, method.perturb(attack, ensemble, batch), batch).losses
    losses.sum().backward()
    assert losses.shape == (len(depths),)
    assert losses.isfinite().all()
    for member in ensemble.members:
        assert member.head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ATTACKED)
def test_batched_members_train_like_members_in_a_loop(name: str) -> None:
    results = []
    for backend in ("loop", "vmap"):
        ensemble, batch = small_ensemble(samples=8, backend=backend)
        method = make_method(name)
        method.begin_epoch(Epoch(number=1, total=2, samples=8, seed=0))
        torch.manual_seed(0)
        attack = PGD(eps=0.1, alpha=0.05, steps=1, goal=method.goal, seed=0).perturb
        inputs = method.perturb(attack, ensemble, batch)
        output = method.step(ensemble, inputs, batch)
        gradients = torch.autograd.grad(output.losses.sum(), [member.head.weight for member in ensemble.members])
        results.append((inputs, output.losses, *gradients))
    for expected, value in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["DVERGE", "FASTEN", "LAFED", "TRS"])
def test_methods_with_draws_and_state_resume_like_an_uninterrupted_run(name: str, tmp_path: Path) -> None:
    whole = train(config(tmp_path / "whole", make_method(name), epochs=3))
    train(config(tmp_path / "parts", make_method(name), epochs=1))
    resumed = train(config(tmp_path / "parts", make_method(name), epochs=3, resume=True))
    for key, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[key]), key


def test_a_run_does_not_touch_the_configured_method(tmp_path: Path) -> None:
    settings = config(tmp_path / "run", make_method("FASTEN"), epochs=1)
    train(settings)
    assert settings.method.state_dict() == {}


def test_methods_and_the_plug_in_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "models: [digits_resnet, digits_resnet]\ndata: {name: digits, train_images: 32}\nepochs: 1\ndevice: cpu\n"
        "attack: {steps: 1}\nmethod: {class_path: ADP, init_args: {alpha: 1, plus_ceat: {lam: 2, samples: F1}}}\n"
    )
    run = str(tmp_path / "run")
    assert main(["train", "--config", str(file), "--out", run, "--method.plus_ceat.mu", "3"]) == 0
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert all(line in text for line in ("alpha: 1.0", "lam: 2.0", "mu: 3.0", "samples: F1"))
    capsys.readouterr()
    assert main(["train", "--config", str(file), "--out", run + "2", "--method.plus_ceat.samples", "F5"]) == 2
    assert "unknown samples 'F5'" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(METHODS))
def test_a_config_file_brings_every_method_back_with_all_its_settings(name: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    for plug_in in (None, CalibratedDistance(mu_exponent=0.0, samples="F2")):
        if plug_in is not None and name not in WITH_PLUG_IN:
            continue
        written = config(tmp_path / "run", make_method(name, plus_ceat=plug_in))
        file.write_text(config_to_yaml(written))
        assert load_config(file) == written


def documented_method(repository: Path) -> str:
    text = (repository / "docs" / "methods.md").read_text()
    (block,) = re.findall(r'```python\n("""trades\.py.*?)```', text, re.DOTALL)
    return block


def test_the_method_of_the_documentation_is_one_short_file_that_trains_and_takes_the_plug_in(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = documented_method(repository)
    assert source.count("\n") < 60
    (tmp_path / "trades.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    options = ["--method", "trades.TRADES", "--method.beta", "3", "--method.plus_ceat.mu", "2"]
    options += ["--data.train_images", "64", "--epochs", "1", "--device", "cpu", "--out", str(tmp_path / "run")]
    try:
        assert main(["train", "--config", str(repository / "configs" / "digits_eat.yaml"), *options]) == 0
    finally:
        sys.modules.pop("trades", None)
    stored = (tmp_path / "run" / "config.yaml").read_text()
    assert "class_path: trades.TRADES" in stored
    assert "beta: 3.0" in stored


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKED)
def test_every_method_beats_chance_under_pgd_20(name: str, tmp_path: Path) -> None:
    """Three small networks, 8 epochs of the digits; chance is 10 %, an undefended ensemble falls below that."""
    settings = config(
        tmp_path / "run",
        make_method(name),
        data=DataConfig("digits", augment="none"),
        attack=AttackConfig(eps=0.1, alpha=0.04, steps=5),
        optimizer=SGD(lr=0.05, grad_clip=1.0),
        epochs=8,
        batch_size=64,
    )
    ensemble = train(settings).ensemble
    data = load_dataset("digits")
    attack = {"PGD-20": PGD(eps=0.1, alpha=0.0125, steps=20, seed=0)}
    result = evaluate(ensemble, data.test_images / data.scale, data.test_labels, attack, members=False)
    assert result.score("ensemble").accuracy > 0.6
    assert result.score("ensemble", "PGD-20").accuracy > 0.2
