"""Verdicts on a model whose robustness is known, and what evaluation refuses."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ceat_fast.attacks import CW, MIM, PGD, AutoAttack, Square
from ceat_fast.ensemble import Ensemble
from ceat_fast.evaluation import EvaluationResult, Score, evaluate, wilson_interval
from ceat_fast.evaluation.fingerprint import digest_model
from ceat_fast.evaluation.runs import _without_tf32


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


def test_the_default_attack_is_the_papers() -> None:
    result = evaluate(Threshold(0.5).eval(), IMAGES, LABELS)
    settings = result.settings("PGD-20")
    assert (settings["eps"], settings["alpha"], settings["steps"], settings["restarts"]) == (0.031, 0.007, 20, 1)
    assert settings["eps_255"] == pytest.approx(7.905)
    assert result.attacks["PGD-20"]["passes"] == [20, 20]


def test_the_file_holds_everything_and_reads_back(tmp_path: Path) -> None:
    attacks = {"PGD": PGD(eps="8/255", alpha="8/255", steps=2, restarts=3, seed=5)}
    result = evaluate(Threshold(0.5).eval(), IMAGES, LABELS, attacks, about={"name": "toy"})
    path = tmp_path / "evaluation.json"
    result.save(path)
    tree = json.loads(path.read_text())
    settings = tree["attacks"]["PGD"]["settings"]
    expected = {"attack": "PGD", "norm": "Linf", "eps": 8 / 255, "eps_255": 8.0, "eps_as_given": "8/255"}
    expected |= {"alpha": 8 / 255, "alpha_as_given": "8/255", "steps": 2, "restarts": 3, "seed": 5, "loss": "ce"}
    assert {name: settings[name] for name in expected} == expected
    assert "goal" not in settings
    assert tree["attacks"]["PGD"]["passes"] == [9, 6]
    clean = tree["scores"][0]
    assert (clean["correct"], clean["total"], clean["verdicts"]) == (6, 6, "111111")
    assert clean["predictions"] == "0 0 0 1 1 1"
    assert clean["margins"] == "16 6 2 2 6 16"  # 2 * sharpness * distance to the threshold
    assert clean["norms"] == "0 0 0 0 0 0"
    assert tree["scores"][1]["norms"] == " ".join(["0.031373"] * 6)
    assert tree["labels"] == "0 0 0 1 1 1"
    assert tree["about"]["name"] == "toy"
    assert tree["about"]["classes"] == 2
    assert torch.__version__.startswith(tree["environment"]["packages"]["torch"].partition("+")[0])
    read = EvaluationResult.load(path)
    assert json.loads(json.dumps(read.to_dict())) == tree
    assert read.examples is not None
    assert torch.equal(read.examples.adversarial, result.examples.adversarial)  # type: ignore[union-attr]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["evaluation.examples.safetensors", "evaluation.json"]


@pytest.mark.parametrize("key", ["scores", "attacks", "labels", "checks", "about", "environment"])
def test_a_file_of_something_else_is_refused(key: str, tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    whole = evaluate(Threshold(0.5).eval(), IMAGES, LABELS, ATTACK, sanity_samples=0).to_dict()
    for tree in ({name: value for name, value in whole.items() if name != key}, whole | {key: None}):
        path.write_text(json.dumps(tree))
        with pytest.raises(ValueError, match="no evaluation of this version"):
            EvaluationResult.load(path)


def test_the_examples_are_the_samples_with_the_lowest_margin_under_attack() -> None:
    result = evaluate(Threshold(0.5).eval(), IMAGES, LABELS.roll(1), ATTACK)  # labels 1 0 0 0 1 1: samples 0, 3 wrong
    examples = result.examples
    assert examples is not None
    assert [examples.samples[0], *sorted(examples.samples[1:3]), examples.samples[3]] == [2, 1, 4, 5]  # by distance
    assert (examples.labels[0], examples.clean_predictions[0], examples.adversarial_predictions[0]) == (0, 0, 1)
    assert torch.allclose(examples.adversarial[0] - examples.clean[0], torch.tensor(0.1))
    assert torch.allclose(examples.adversarial[3] - examples.clean[3], torch.tensor(-0.1))
    assert (examples.attack, examples.eps) == ("PGD", 0.1)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4)).eval()


def everything(result: EvaluationResult) -> dict[str, Any]:
    """What must not depend on how the work was divided: all but times and margins' last digits."""
    return {
        f"{score.subject} {score.attack}": (score.correct.tolist(), score.prediction.tolist())
        for score in result.scores
    }


def random_task(members: int = 3, samples: int = 40) -> tuple[Ensemble, Tensor, Tensor]:
    ensemble = Ensemble([network(seed) for seed in range(members)]).eval()
    images = torch.rand(samples, 1, 4, 4, generator=torch.Generator().manual_seed(9))
    labels = ensemble(images).argmax(1)
    labels[::5] = (labels[::5] + 1) % 4
    return ensemble, images, labels.detach()


RANDOMISED = {
    "PGD": PGD(eps=0.1, alpha=0.03, steps=3, restarts=2, seed=3),
    "MIM": MIM(eps=0.1, alpha=0.03, steps=3, random_start=True, seed=3),
    "CW": CW(eps=0.05, alpha=0.02, steps=3, seed=3),
}


@pytest.mark.parametrize("batch_size", [1, 7, 500], ids=["single", "uneven", "larger than the set"])
def test_the_verdicts_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    model, images, labels = random_task()
    expected = everything(evaluate(model, images, labels, RANDOMISED, batch_size=20, sanity_samples=0))
    assert everything(evaluate(model, images, labels, RANDOMISED, batch_size=batch_size, sanity_samples=0)) == expected
    robust = expected["ensemble PGD"][0]
    assert 0 < sum(robust) < len(robust)


def test_the_verdicts_do_not_depend_on_the_order() -> None:
    model, images, labels = random_task()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    expected = evaluate(model, images, labels, RANDOMISED, sanity_samples=0)
    shuffled = evaluate(model, images[order], labels[order], RANDOMISED, index=order, sanity_samples=0)
    for one, other in zip(expected.scores, shuffled.scores, strict=True):
        assert torch.equal(one.prediction[order], other.prediction)


@dataclass(frozen=True)
class Brighten:
    """An attack that knows nothing of goals: adds eps to everything."""

    eps: float = 0.1
    seed: int | None = 0
    overshoot: float = 1.0

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor | None = None) -> Tensor:
        assert not isinstance(model, Threshold) or isinstance(model.threshold, nn.Parameter)
        return (x + self.overshoot * self.eps).clamp(0, 1)


def test_an_attack_without_goal_is_aimed_at_each_member() -> None:
    ensemble = Ensemble([Threshold(0.5), Threshold(0.75)], backend="loop").eval()
    result = evaluate(ensemble, IMAGES, LABELS, {"brighten": Brighten()})
    assert flags(result.score("member 0", "brighten")) == [True, True, False, True, True, True]
    assert flags(result.score("member 1", "brighten")) == [True, True, True, False, False, True]
    assert result.settings("brighten") == {
        "attack": "Brighten",
        "eps": 0.1,
        "eps_255": pytest.approx(25.5),
        "eps_as_given": "0.1",
        "seed": 0,
        "overshoot": 1.0,
    }


JUDGED = {
    "AA": AutoAttack(eps=0.1, version="custom", attacks=("apgd-ce", "square"), steps=4, queries=12, seed=2),
    "Square": Square(eps=0.1, queries=12, seed=2),
}


def test_attacks_that_tell_more_are_heard() -> None:
    model, images, labels = random_task()
    result = evaluate(model, images, labels, JUDGED, sanity_samples=0)
    wrong = int((~result.score("ensemble").correct).sum())
    facts = result.attacks["AA"]
    counts = facts["found_by"]["ensemble"]
    assert counts["clean"] == wrong == 8
    assert sum(counts.values()) == int((~result.score("ensemble", "AA").correct).sum())
    assert set(facts["found_by"]) == {"ensemble", "member 0", "member 1", "member 2"}
    # a robust sample costs 1 clean pass, 5 of APGD (start and 4 steps) and 13 of Square (corners and 12 queries)
    forwards, backwards = facts["passes"]
    assert 1 < forwards < 20
    assert 0 < backwards < 6
    judged = JUDGED["AA"].run(model.members[1], images, labels, torch.arange(len(images)))
    assert torch.equal(~judged.fooled, result.score("member 1", "AA").correct)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_verdicts_of_autoattack_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    model, images, labels = random_task(samples=20)
    options = {"members": False, "sanity_samples": 0}
    found = [evaluate(model, images, labels, JUDGED, batch_size=size, **options) for size in (20, batch_size)]
    for one, other in zip(found[0].scores, found[1].scores, strict=True):
        assert torch.equal(one.correct, other.correct)
    assert found[0].attacks["AA"]["found_by"] == found[1].attacks["AA"]["found_by"]
    assert found[0].attacks["AA"]["passes"] == pytest.approx(found[1].attacks["AA"]["passes"])


def test_a_compiled_model_gives_the_same_verdicts_and_fingerprint() -> None:
    model, images, labels = random_task(members=1)
    plain = evaluate(model.members[0], images, labels, RANDOMISED)
    compiled = evaluate(torch.compile(model.members[0], backend="eager"), images, labels, RANDOMISED)
    assert everything(compiled) == everything(plain)
    assert compiled.about["fingerprint"] == plain.about["fingerprint"]
    assert [check.outcome for check in compiled.checks] == [check.outcome for check in plain.checks]


class Volume(nn.Module):
    """The mean of a volume (C, D, H, W) against 0.5."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 5
        margin = self.scale * (x.flatten(1).mean(1) - 0.5)
        return torch.stack([-margin, margin], dim=1)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6])
def test_volumes_in_batches_of_as_many_as_there_are_members(batch_size: int) -> None:
    ensemble = Ensemble([Volume(), Volume()], backend="loop").eval()
    volumes = IMAGES.unsqueeze(2).expand(-1, 1, 2, 2, 2).contiguous()
    attacks = {**ATTACK, "AA": AutoAttack(eps=0.1, version="custom", attacks=("apgd-ce",), steps=4, seed=0)}
    result = evaluate(ensemble, volumes, LABELS, attacks, batch_size=batch_size, sanity_samples=2)
    for subject in ("ensemble", "member 1"):
        assert flags(result.score(subject, "PGD")) == [True, True, False, False, True, True]


@pytest.mark.parametrize("within", ["no_grad", "inference_mode", "autocast"])
def test_what_the_caller_is_within_does_not_matter(within: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
    images = torch.rand(6, 1, 2, 2)
    expected = evaluate(model, images, LABELS, ATTACK)
    contexts = {
        "no_grad": torch.no_grad(),
        "inference_mode": torch.inference_mode(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
    }
    with contexts[within]:
        result = evaluate(model, images.clone(), LABELS.clone(), ATTACK)
    for ours, right in zip(result.scores, expected.scores, strict=True):
        assert torch.equal(ours.margin, right.margin)


@dataclass(frozen=True)
class InPlace:
    """An attack that writes to its input, beyond its ball."""

    eps: float = 0.03

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor | None = None) -> Tensor:
        return x.add_(0.5).clamp_(0, 1)


def test_an_attack_that_writes_to_its_input_is_seen_through() -> None:
    images = IMAGES.clone()
    with pytest.raises(ValueError, match="left its ball"):
        evaluate(Threshold(0.5).eval(), images, LABELS, {"mine": InPlace()})
    assert torch.equal(images, IMAGES)


def test_distances_are_in_the_norm_of_the_attack() -> None:
    attack = PGD(eps=0.2, alpha=0.2, steps=2, random_start=False, seed=0, norm="L2")
    norm = evaluate(Threshold(0.5).eval(), IMAGES, LABELS, {"L2": attack}, sanity_samples=0).score("model", "L2").norm
    assert norm.tolist() == pytest.approx([0.2] * 6)  # four pixels by 0.1


def test_the_fingerprint_is_of_averages_and_buffers_too() -> None:
    digests = []
    for average, running_mean in (("prob", 0.0), ("logit", 0.0), ("prob", 1.0)):
        norm = nn.BatchNorm1d(2)
        norm.running_mean.fill_(running_mean)
        digests.append(digest_model(Ensemble([norm], average=average)))
    assert len(set(digests)) == 3


def test_convolutions_are_not_rounded_while_a_run_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with _without_tf32():
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32


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


def test_an_accuracy_is_the_quotient() -> None:
    """A mean in fp32 would be 0.9583333134651184."""
    correct = torch.arange(24) > 0
    assert Score("model", "clean", correct, *[torch.zeros(24)] * 3).accuracy == 23 / 24


def test_a_model_that_takes_other_images_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten()).eval()
    with pytest.raises(ValueError, match=r"the model cannot take an image of shape \(1, 2, 2\): .*channels"):
        evaluate(model, IMAGES, LABELS, ATTACK)


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
    with pytest.raises(ValueError, match=r"attacks\['PGD'\] has seed=None"):
        evaluate(model, IMAGES, LABELS, {"PGD": PGD(steps=1)})
    with pytest.raises(TypeError, match="must be a dataclass"):
        evaluate(model, IMAGES, LABELS, {"noise": lambda model, x, y, index: x})
    with pytest.raises(ValueError, match="index must be int64"):
        evaluate(model, IMAGES, LABELS, ATTACK, index=torch.arange(5))
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        evaluate(model, IMAGES, LABELS, ATTACK, samples=0)
    with pytest.raises(ValueError, match="sanity_samples must be at least 0"):
        evaluate(model, IMAGES, LABELS, ATTACK, sanity_samples=-1)
    with pytest.raises(ValueError, match="keep_adversarials=True needs a journal"):
        evaluate(model, IMAGES, LABELS, ATTACK, keep_adversarials=True)
    with pytest.raises(ValueError, match="must be a folder"):
        evaluate(model, IMAGES, LABELS, ATTACK, journal=__file__)
    with pytest.raises(ValueError, match="at least 2 classes"):
        evaluate(nn.Sequential(nn.Flatten(), nn.Linear(4, 1)).eval(), IMAGES, LABELS * 0, ATTACK)


def test_an_attack_that_leaves_its_set_is_refused() -> None:
    model = Threshold(0.5).eval()
    with pytest.raises(ValueError, match=r"Brighten left its ball: Linf distance 0.2, eps 0.1"):
        evaluate(model, IMAGES, LABELS, {"far": Brighten(overshoot=2.0)})
    with pytest.raises(ValueError, match=r"Brighten left \[0, 1\] or returned NaN"):
        evaluate(model, IMAGES, LABELS, {"nan": Brighten(overshoot=torch.nan)})


def test_a_submodule_in_train_mode_is_refused() -> None:
    model = nn.Sequential(Threshold(0.5), nn.Dropout(0.5)).eval()
    model[1].train()
    with pytest.raises(ValueError, match="train mode"):
        evaluate(model, IMAGES, LABELS, ATTACK)
