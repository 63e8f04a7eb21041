"""Every method at the smoke scale of the reproduction, and with the networks of the paper's mixed ensemble."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ceat_fast.attacks import PGD
from ceat_fast.data import load_dataset
from ceat_fast.ensemble import Ensemble
from ceat_fast.evaluation import evaluate
from ceat_fast.methods import METHODS, Batch, Epoch, make_method
from ceat_fast.models import build_model
from ceat_fast.reproduce import SCALES
from ceat_fast.training import Trainer

ATTACKED = [name for name in METHODS if name != "Standard"]


@pytest.mark.parametrize("name", ATTACKED)
def test_every_method_beats_chance_under_pgd_20_at_the_smoke_scale(name: str, tmp_path: Path) -> None:
    (smoke,) = SCALES["smoke"].settings
    config = smoke.train_config(make_method(name), "cifar10", ("resnet20",) * 3, seed=0)
    trainer = Trainer(replace(config, out=str(tmp_path / "run"), device="cpu"), console=Console(quiet=True))
    trainer.fit()
    data = load_dataset("digits")
    images, labels = data.test_images[:100] / data.scale, data.test_labels[:100]
    attack = {"PGD-20": PGD(eps=0.05, alpha=0.0125, steps=20, seed=0)}
    result = evaluate(trainer.ensemble, images, labels, attack, members=False)
    assert result.score("ensemble", "PGD-20").accuracy > 0.2  # chance is 0.1, the most frequent class 0.12


@pytest.mark.parametrize("name", ATTACKED)
def test_a_step_of_resnet_20_26_and_32(name: str) -> None:
    """The mixed ensemble of Table 3, on images of 8x8 so that it is quick."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ensemble = Ensemble([build_model(depth, 10) for depth in ("resnet20", "resnet26", "resnet32")]).train()
        batch = Batch(torch.rand(4, 3, 8, 8), torch.arange(4), torch.arange(4))
    method = make_method(name)
    method.begin_epoch(Epoch(number=1, total=2, samples=4, seed=0))
    attack = PGD(eps=0.031, alpha=0.031, steps=1, goal=method.goal, seed=0).perturb
    losses = method.step(ensemble, method.perturb(attack, ensemble, batch), batch).losses
    losses.sum().backward()
    assert losses.shape == (3,)
    assert losses.isfinite().all()
    for member in ensemble.members:
        assert member.fc.weight.grad.abs().sum() > 0
