"""One optimizer over all members against one for each, step by step; averages of the weights; training precision."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_training import Tiny, tiny_config, train
from torch import nn

from ceat_fast.ensemble import Ensemble
from ceat_fast.methods import EAT
from ceat_fast.training import EMA, SGD, SWA, Adam, AdamW, MultiStep, OptimizerConfig, Trainer
from ceat_fast.training.averaging import AveragedEnsemble
from ceat_fast.training.optimizers import MemberOptimizer

STEPS = 8


def members(seed: int = 0) -> list[nn.Module]:
    """Two alike and one of its own shape: parameters of every size, in channels_last too."""
    torch.manual_seed(seed)
    own = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 36, 10, bias=False))
    return [Tiny(), Tiny(), own.to(memory_format=torch.channels_last)]


def gradients_of(member: nn.Module, generator: torch.Generator, scale: float) -> None:
    for parameter in member.parameters():
        values = torch.randn(parameter.shape, generator=generator) * scale
        parameter.grad = values.to(memory_format=torch.preserve_format)


SETTINGS: list[tuple[OptimizerConfig, type[torch.optim.Optimizer], dict[str, object]]] = [
    (SGD(0.1, 0.01, None, 0.9), torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    (
        SGD(0.1, 0.01, None, 0.8, True),
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.01, "nesterov": True},
    ),
    (SGD(0.1, 0.0, None, 0.0), torch.optim.SGD, {"lr": 0.1}),
    (Adam(0.01, 0.02, None, 0.8, 0.99), torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.02, "betas": (0.8, 0.99)}),
    (AdamW(0.01, 0.02), torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.02}),
]


@pytest.mark.parametrize("backend", ["loop", "vmap"])  # vmap: the parameters are views into shared storage
@pytest.mark.parametrize(("config", "kind", "settings"), SETTINGS)
def test_every_step_is_that_of_separate_optimizers(
    backend: str, config: OptimizerConfig, kind: type[torch.optim.Optimizer], settings: dict[str, object]
) -> None:
    ensemble, alone = Ensemble(members(), backend=backend), members()
    ensemble.train().member_logits(torch.rand(4, 1, 8, 8), per_member=False)
    for ours, theirs in zip(ensemble.members, alone, strict=True):
        theirs.load_state_dict(ours.state_dict())
    together = MemberOptimizer(config, list(ensemble.members))
    separate = [kind(member.parameters(), fused=True, **settings) for member in alone]  # type: ignore[call-arg]
    for step in range(STEPS):
        factor = 0.5 if step >= 4 else 1.0
        together.set_rate(factor)
        for optimizer in separate:
            for group in optimizer.param_groups:
                group["lr"] = config.lr * factor
        for ours, theirs in zip(ensemble.members, alone, strict=True):
            gradients_of(ours, torch.Generator().manual_seed(step), 1.0)
            gradients_of(theirs, torch.Generator().manual_seed(step), 1.0)
        together.torch.step()
        for optimizer in separate:
            optimizer.step()
        for ours, theirs in zip(ensemble.members, alone, strict=True):
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                assert torch.equal(a, b), step


def test_the_norm_of_each_member_is_clipped_by_itself() -> None:
    ours, theirs = members(), members()
    together = MemberOptimizer(SGD(grad_clip=2.0), ours)
    for member, other, scale in zip(ours, theirs, (0.001, 1.0, 30.0), strict=True):
        gradients_of(member, torch.Generator().manual_seed(0), scale)
        gradients_of(other, torch.Generator().manual_seed(0), scale)
        nn.utils.clip_grad_norm_(other.parameters(), 2.0)
    together.clip()
    for member, other in zip(ours, theirs, strict=True):
        for a, b in zip(member.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=0)
    norms = [math.sqrt(sum(p.grad.square().sum().item() for p in member.parameters())) for member in ours]
    assert norms[0] < 0.1
    assert norms[1:] == pytest.approx([2.0, 2.0], rel=1e-4)


def test_frozen_parameters_stay_and_shared_ones_are_refused() -> None:
    body, head = nn.Linear(2, 2), nn.Linear(2, 2)
    body.requires_grad_(False)
    optimizer = MemberOptimizer(SGD(), [nn.Sequential(body, head)])
    assert [p is q for p, q in zip(optimizer.parameters[0], head.parameters(), strict=True)] == [True, True]
    with pytest.raises(ValueError, match="must not share parameters"):
        MemberOptimizer(SGD(), [head, nn.Sequential(head)])
    with pytest.raises(ValueError, match="needs at least one parameter"):
        MemberOptimizer(SGD(), [head, body])


def test_the_averages_are_those_of_the_definition() -> None:
    ensemble = Ensemble([Tiny()], backend="loop")
    weight = ensemble.members[0].fc.weight
    ema, swa = AveragedEnsemble(EMA(decay=0.75), ensemble), AveragedEnsemble(SWA(start_epoch=2), ensemble)
    for step, value in enumerate([8.0, 4.0, 16.0, 0.0, 2.0, 5.0]):  # epochs of two steps
        with torch.no_grad():
            weight.fill_(value)
            ensemble.members[0].norm.running_var.fill_(value)
            ensemble.members[0].norm.num_batches_tracked.fill_(int(value))
        ema.update(ensemble, step, 2)
        swa.update(ensemble, step, 2)
    # 8, then 3/4 of the old and 1/4 of the new: 7, 9.25, 6.9375, 5.703125, 5.52734375
    assert ema.ensemble.members[0].fc.weight.unique().tolist() == [5.52734375]
    assert ema.ensemble.members[0].norm.running_var.tolist() == [5.52734375]
    # the ends of epochs 2 and 3: steps 3 and 5
    assert swa.ensemble.members[0].fc.weight.unique().tolist() == [2.5]
    assert swa.count == 2
    assert swa.ensemble.members[0].norm.num_batches_tracked.item() == 5
    assert weight.unique().tolist() == [5.0]
    assert not swa.ensemble.training
    assert weight.requires_grad


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.05), ("fp16", 0.01)])
def test_low_precision_trains_like_fp32(precision: str, tolerance: float, tmp_path: Path) -> None:
    runs = {
        name: train(tiny_config(tmp_path / name, method=EAT(), precision=name, epochs=4, schedule=MultiStep(0, [])))
        for name in ("fp32", precision)
    }
    first, second = (runs[name].run.metrics for name in ("fp32", precision))
    assert second[-1]["loss"] < 0.9 * second[0]["loss"]
    for a, b in zip(first, second, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=tolerance)
        assert b["loss"] != a["loss"]
    assert {p.dtype for p in runs[precision].ensemble.parameters()} == {torch.float32}


def test_an_overflow_in_fp16_leaves_the_step_out_and_lowers_the_scale(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", method=EAT(), precision="fp16", epochs=1, batch_size=96)
    trainer = Trainer(config, console=Console(quiet=True))
    trainer.stepper.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    before = trainer.ensemble.members[0].fc.weight.detach().clone()
    trainer.fit()
    assert torch.equal(trainer.ensemble.members[0].fc.weight, before)
    assert trainer.stepper.scaler.get_scale() == 2.0**125
    resumed = Trainer(replace(config, epochs=2, resume=True), console=Console(quiet=True))
    assert resumed.stepper.scaler.get_scale() == 2.0**125
