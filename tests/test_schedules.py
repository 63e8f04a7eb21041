"""Learning-rate schedules against torch's, step by step, and the warm-up of learning rate and attack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_training import tiny_config
from torch import nn

from ceat_fast.methods import EAT
from ceat_fast.training import AttackConfig, Cosine, MultiStep, OneCycle, Schedule, Trainer

EPOCHS, STEPS = 12, 5


def rates_of_torch(make: Any) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    scheduler = make(optimizer)
    rates = []
    for _ in range(EPOCHS * STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        (
            MultiStep(milestones=[4, 9], gamma=0.2),
            lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [4 * STEPS, 9 * STEPS], 0.2),
        ),
        (
            Cosine(final=0.05),
            lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, EPOCHS * STEPS, eta_min=0.4 * 0.05),
        ),
        (
            OneCycle(rise=0.4, div=10.0, final_div=100.0),
            lambda o: torch.optim.lr_scheduler.OneCycleLR(
                o, 0.4, EPOCHS * STEPS, pct_start=0.4, div_factor=10.0, final_div_factor=100.0, cycle_momentum=False
            ),
        ),
    ],
    ids=["MultiStep", "Cosine", "OneCycle"],
)
def test_factors_are_those_of_torch(schedule: Schedule, make: Any) -> None:
    ours = [0.4 * schedule.factor(step, STEPS, EPOCHS) for step in range(EPOCHS * STEPS)]
    assert ours == pytest.approx(rates_of_torch(make), rel=1e-6)


def test_the_paper_divides_by_ten_after_75_and_95_epochs() -> None:
    factors = [MultiStep().factor(epoch * 390, 390, 120) for epoch in range(120)]
    assert factors == pytest.approx([1.0] * 75 + [0.1] * 20 + [0.01] * 25)


def test_warm_up_is_linear_in_the_steps() -> None:
    schedule = MultiStep(warmup_epochs=2, milestones=[])
    assert [schedule.factor(step, 2, 9) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    cosine = Cosine(warmup_epochs=1)
    assert cosine.factor(0, 3, 4) == pytest.approx(0.25)
    assert cosine.factor(6, 3, 4) == pytest.approx(0.5)


@pytest.mark.parametrize("rise", [0.1, 0.25, 0.3, 0.5])  # of 1 to 10 steps some rises take exactly one
def test_a_one_cycle_of_few_steps_stays_finite(rise: float) -> None:
    for steps in range(1, 11):
        factors = [OneCycle(rise=rise).factor(step, 1, steps) for step in range(steps)]
        assert all(0 < factor <= 1 for factor in factors), steps


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cosine(final=1.5), r"schedule.final must be in \[0, 1\], got 1.5"),
        (lambda: OneCycle(warmup_epochs=1), "schedule.warmup_epochs must be 0 for OneCycle"),
        (lambda: OneCycle(rise=1.0), r"schedule.rise must be in \(0, 1\)"),
        (lambda: OneCycle(div=0.5), "schedule.div must be finite and at least 1"),
        (lambda: MultiStep(milestones=[0]), "schedule.milestones must be epochs above 0"),
        (lambda: MultiStep(warmup_epochs=-1), "schedule.warmup_epochs must be at least 0"),
    ],
)
def test_wrong_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("steps", "reach"), [(1, 0.04), (3, 0.08)], ids=["step size", "radius"])
def test_the_attack_warms_up_step_by_step(steps: int, reach: float, tmp_path: Path) -> None:
    """96 images in batches of 40: 3 steps per epoch, so the attack goes 1/4, 2/4, 3/4 as far, then all of its way."""
    attack = AttackConfig(eps=0.08, alpha=0.04, steps=steps, random_start=False)
    config = tiny_config(tmp_path / "run", method=EAT(), attack=attack, eps_warmup_epochs=1, epochs=2)
    trainer = Trainer(config, console=Console(quiet=True))
    moves = []
    original = trainer.stepper.method.step

    def watch(ensemble: Any, adversarial: torch.Tensor, batch: Any) -> Any:
        moves.append((adversarial - batch.images).abs().max().item())
        return original(ensemble, adversarial, batch)

    trainer.stepper.method.step = watch  # type: ignore[method-assign]
    trainer.fit()
    assert moves == pytest.approx([reach * share for share in (0.25, 0.5, 0.75, 1, 1, 1)], rel=1e-4)
