"""Verdicts on a model whose robustness is known, and what evaluation refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ceat_fast.attacks import PGD
from ceat_fast.ensemble import Ensemble
from ceat_fast.evaluation import EvaluationResult, Score, evaluate, wilson_interval


class Threshold(nn.Module):
    """Class 1 where the mean pixel is above `threshold`: an Linf attack moves the mean by exactly eps."""

    def __init__(self, threshold: float, sharpness: float = 20.0) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(threshold))
        self.sharpness = sharpness

    def forward(self, x: Tensor) -> Tensor:
        margin = self.sharpness * (x.flatten(1).mean(1) - self.threshold)
        return torch.stack([-margin, margin], dim=1)


LEVELS = (0.10, 0.35, 0.45, 0.55, 0.65, 0.90)  # mean pixels; distance to 0.5: 0.40, 0.15, 0.05 on either side
IMAGES = torch.tensor(LEVELS).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
LABELS = torch.tensor([0, 0, 0, 1, 1, 1])
ATTACK = {"PGD": PGD(eps=0.1, alpha=0.05, steps=4, seed=0)}


def flags(score: Score) -> list[bool]:
    return [bool(flag) for flag in score.correct]


def test_a_plain_model_survives_where_eps_is_below_its_distance_to_the_boundary() -> None:
    result = evaluate(Threshold(0.5).eval(), IMAGES, LABELS, ATTACK)
    assert result.subjects == ["model"]
    assert flags(result.score("model")) == [True] * 6
    assert flags(result.score("model", "PGD")) == [True, True, False, False, True, True]
    assert result.score("model", "PGD").accuracy == pytest.approx(4 / 6)


def test_each_member_is_judged_on_inputs_made_against_itself() -> None:
    ensemble = Ensemble([Threshold(0.5), Threshold(0.3, 1.0), Threshold(0.5)], backend="loop").eval()
    result = evaluate(ensemble, IMAGES, LABELS, ATTACK)
    assert result.subjects == ["ensemble", "member 0", "member 1", "member 2"]
    assert flags(result.score("member 1")) == [True, False, False, True, True, True]
    assert flags(result.score("member 1", "PGD")) == [True, False, False, True, True, True]
    assert flags(result.score("member 0", "PGD")) == [True, True, False, False, True, True]
    assert flags(result.score("ensemble", "PGD")) == [True, True, False, False, True, True]
    assert evaluate(ensemble, IMAGES, LABELS, ATTACK, members=False).subjects == ["ensemble"]


def test_the_result_does_not_depend_on_the_batch_size() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).eval()
    images = torch.rand(50, 1, 2, 2)
    labels = torch.randint(2, (50,))
    attack = {"PGD": PGD(eps=0.2, alpha=0.1, steps=1, seed=3)}
    one, other = (evaluate(model, images, labels, attack, batch_size=size) for size in (50, 7))
    assert torch.equal(one.score("model", "PGD").correct, other.score("model", "PGD").correct)


def test_the_default_attack_is_the_papers() -> None:
    result = evaluate(Threshold(0.5).eval(), IMAGES, LABELS)
    settings = result.attacks["PGD-20"]
    assert (settings["eps"], settings["alpha"], settings["steps"], settings["restarts"]) == (0.031, 0.007, 20, 1)
    assert settings["eps_255"] == pytest.approx(7.905)


def test_the_file_holds_everything_and_reads_back(tmp_path: Path) -> None:
    result = evaluate(Threshold(0.5).eval(), IMAGES, LABELS, {"PGD": PGD(eps="8/255", alpha="2/255", steps=2, seed=5)})
    path = tmp_path / "evaluation.json"
    result.save(path)
    tree = json.loads(path.read_text())
    assert tree["attacks"]["PGD"] | {"seconds": 0} == {
        "norm": "Linf",
        "eps": 8 / 255,
        "eps_255": 8.0,
        "eps_as_given": "8/255",
        "alpha": 2 / 255,
        "steps": 2,
        "restarts": 1,
        "random_start": True,
        "loss": "ce",
        "seed": 5,
        "precision": "fp32",
        "seconds": 0,
    }
    clean = tree["scores"][0]
    assert (clean["correct"], clean["total"], clean["verdicts"]) == (6, 6, "111111")
    assert torch.__version__.startswith(tree["environment"]["packages"]["torch"].partition("+")[0])
    assert EvaluationResult.load(path).to_dict() == tree
    assert [file.name for file in tmp_path.iterdir()] == ["evaluation.json"]


def test_wilson_interval() -> None:
    # Published example: 81 of 263 gives (0.2553, 0.3662) (Newcombe, Statistics in Medicine 17, 1998, table I).
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0)


class Broken(Threshold):
    """NaN logits for images whose mean is above 0.6."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return torch.where(x.flatten(1).mean(1, keepdim=True) > 0.6, torch.nan, logits)


def test_nan_logits_are_refused_and_counted() -> None:
    with pytest.raises(ValueError, match="NaN logits for 2 samples of a batch, the first is sample 4"):
        evaluate(Broken(0.5).eval(), IMAGES, LABELS, ATTACK)
    with pytest.raises(ValueError, match="NaN logits for 1 samples of a batch, the first is sample 4"):
        evaluate(Broken(0.5).eval(), IMAGES, LABELS, ATTACK, batch_size=5)


def test_bad_input_is_refused() -> None:
    model = Threshold(0.5).eval()
    with pytest.raises(ValueError, match="train mode"):
        evaluate(Threshold(0.5).train(), IMAGES, LABELS, ATTACK)
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]; 5 do not, the first is 1"):
        evaluate(model, IMAGES * 5, LABELS, ATTACK)
    with pytest.raises(ValueError, match="1 do not, the first is 2"):
        evaluate(model, IMAGES.index_fill(0, torch.tensor([2]), torch.nan), LABELS, ATTACK)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\); 3 do not, label 3 is 2"):
        evaluate(model, IMAGES, LABELS * 2, ATTACK)
    with pytest.raises(ValueError, match="labels must be int64"):
        evaluate(model, IMAGES, LABELS[:5], ATTACK)
    with pytest.raises(ValueError, match="labels must be int64"):
        evaluate(model, IMAGES[:0], LABELS[:0], ATTACK)
    with pytest.raises(ValueError, match="images must be floats"):
        evaluate(model, IMAGES.to(torch.uint8), LABELS, ATTACK)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        evaluate(model, IMAGES, LABELS, ATTACK, batch_size=0)
    with pytest.raises(ValueError, match="the name 'clean' is taken"):
        evaluate(model, IMAGES, LABELS, {"clean": ATTACK["PGD"]})


def test_a_submodule_in_train_mode_is_refused() -> None:
    model = nn.Sequential(Threshold(0.5), nn.Dropout(0.5)).eval()
    model[1].train()
    with pytest.raises(ValueError, match="train mode"):
        evaluate(model, IMAGES, LABELS, ATTACK)
