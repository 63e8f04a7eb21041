"""Transfer among members and from surrogates, on models whose answers can be worked out by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn

from ceat_fast.attacks import CW, MDI2, MIM, PGD, AutoAttack
from ceat_fast.ensemble import Ensemble
from ceat_fast.evaluation import BlackBoxResult, TransferMatrix, black_box, surrogate_attacks, transferability


class Looker(nn.Module):
    """Class 1 where the weighted sum of two pixels is above 0.5; the gradient touches the pixels that have weight."""

    def __init__(self, *weights: float, sharpness: float = 20.0) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights))
        self.sharpness = sharpness

    def forward(self, x: Tensor) -> Tensor:
        margin = self.sharpness * ((x.flatten(1) * self.weights).sum(1) - 0.5)
        return torch.stack([-margin, margin], dim=1)


# Two pixels per image. An attack of radius 0.1 moves each pixel that a member looks at by 0.1 across 0.5.
PIXELS = torch.tensor([[0.55, 0.58], [0.55, 0.80], [0.80, 0.80], [0.45, 0.42], [0.35, 0.62]])
IMAGES = PIXELS.view(5, 1, 1, 2)
LABELS = torch.tensor([1, 1, 1, 0, 0])
ATTACK = PGD(eps=0.1, alpha=0.05, steps=4, random_start=False, seed=0)


def ensemble() -> Ensemble:
    """Members that look at the left pixel, at the right one, and at both; the second errs on the last image."""
    return Ensemble([Looker(1.0, 0.0), Looker(0.0, 1.0), Looker(0.5, 0.5)], backend="loop").eval()


# Which images each target misses, when shown what was made against each source.
# The ensemble's output is the mean of p = 1 / (1 + exp(-40 (s - 0.5))) over s = left, right, mean.
MISSED = {
    "member 0": {"member 0": [0, 1, 3], "member 1": [4], "member 2": [4]},
    "member 1": {"member 0": [], "member 1": [0, 3, 4], "member 2": [4]},
    "member 2": {"member 0": [0, 1, 3], "member 1": [0, 3, 4], "member 2": [0, 3, 4]},
}
SHOWN = {
    "member 0": [(0.45, 0.58), (0.45, 0.80), (0.70, 0.80), (0.55, 0.42), (0.45, 0.62)],
    "member 1": [(0.55, 0.48), (0.55, 0.70), (0.80, 0.70), (0.45, 0.52), (0.35, 0.72)],
    "member 2": [(0.45, 0.48), (0.45, 0.70), (0.70, 0.70), (0.55, 0.52), (0.45, 0.72)],
}


def missed_by_the_ensemble(source: str) -> list[int]:
    missed = []
    for sample, (left, right) in enumerate(SHOWN[source]):
        scores = (left, right, (left + right) / 2)
        mean = sum(1 / (1 + math.exp(-40 * (score - 0.5))) for score in scores) / 3
        assert abs(mean - 0.5) > 0.01
        if (mean > 0.5) != bool(LABELS[sample]):
            missed.append(sample)
    return missed


def missed(result: TransferMatrix, source: str, target: str) -> list[int]:
    flags = result.fooled[result.sources.index(source), result.targets.index(target)]
    return result.samples[flags].tolist()


def test_every_sample_counts_under_the_protocol_all() -> None:
    result = transferability(ensemble(), IMAGES, LABELS, ATTACK, protocol="all")
    assert result.sources == ["member 0", "member 1", "member 2"]
    assert result.targets == ["member 0", "member 1", "member 2", "ensemble"]
    for source, targets in MISSED.items():
        for target, expected in targets.items():
            assert missed(result, source, target) == expected
        assert missed(result, source, "ensemble") == missed_by_the_ensemble(source)
    assert result.rate("member 0", "member 0") == 3 / 5


def test_samples_that_all_members_have_right() -> None:
    """The last image is wrong for the second member when clean."""
    result = transferability(ensemble(), IMAGES, LABELS, ATTACK)
    assert result.protocol == "all_correct"
    assert result.samples.tolist() == [0, 1, 2, 3]
    assert result.rate("member 0", "member 0") == 3 / 4
    assert result.rate("member 0", "member 1") == 0
    assert result.rate("member 1", "member 1") == 2 / 4
    assert result.rate("member 2", "member 0") == 3 / 4
    assert result.rate("member 2", "ensemble") == len(set(missed_by_the_ensemble("member 2")) & {0, 1, 2, 3}) / 4


def test_samples_that_the_source_has_right() -> None:
    """The last image counts for the first and the third source, and the second target misses it from both."""
    result = transferability(ensemble(), IMAGES, LABELS, ATTACK, protocol="source_correct")
    assert result.counted.tolist() == [[True] * 5, [True] * 4 + [False], [True] * 5]
    assert result.rate("member 0", "member 1") == 1 / 5
    assert result.rate("member 1", "member 1") == 2 / 4
    assert result.rate("member 2", "member 2") == 3 / 5


def test_mean_transfer_leaves_out_the_diagonal_and_the_ensemble() -> None:
    flags = torch.zeros(2, 3, 4, dtype=torch.bool)
    flags[0, 1, :2] = flags[1, 0, :1] = flags[0, 0] = flags[1, 2] = True
    names = ["member 0", "member 1"]
    counted = torch.ones(2, 4, dtype=torch.bool)
    result = TransferMatrix(names, [*names, "ensemble"], flags, counted, torch.arange(4), "all", {}, 0.0, {}, {})
    assert result.rates.tolist() == [[1.0, 0.5, 0.0], [0.25, 0.0, 1.0]]
    assert result.mean_transfer == (0.5 + 0.25) / 2


def test_only_so_many_samples() -> None:
    result = transferability(ensemble(), IMAGES, LABELS, ATTACK, samples=2, index=torch.tensor([9, 8, 7, 6, 5]))
    assert result.samples.tolist() == [9, 8]
    assert result.fooled.shape == (3, 4, 2)


class Side(nn.Module):
    """Class 1 where the first pixel lies above `edge` or below 1 - edge: random starts decide which side is tried."""

    def __init__(self, edge: float) -> None:
        super().__init__()
        self.edge = nn.Parameter(torch.tensor(edge))

    def forward(self, x: Tensor) -> Tensor:
        margin = 20 * ((x.flatten(1)[:, 0] - 0.5).abs() + 0.5 - self.edge)
        return torch.stack([-margin, margin], dim=1)


class Right(nn.Module):
    """Class 1 where the first pixel lies above 0.55: only what went to the right misleads it."""

    def __init__(self) -> None:
        super().__init__()
        self.edge = nn.Parameter(torch.tensor(0.55))

    def forward(self, x: Tensor) -> Tensor:
        margin = 20 * (x.flatten(1)[:, 0] - self.edge)
        return torch.stack([-margin, margin], dim=1)


def test_a_target_is_misled_by_any_of_the_restarts() -> None:
    """From 0.5 the source is misled on either side; a single search goes right for about half of the samples."""
    pair = Ensemble([Side(0.55), Right()], backend="loop").eval()
    x = torch.full((40, 1, 1, 1), 0.5)
    y = torch.zeros(40, dtype=torch.int64)
    rates, accuracies = [], []
    for restarts in (1, 8):
        attack = PGD(eps=0.1, alpha=0.05, steps=4, restarts=restarts, seed=0)
        result = transferability(pair, x, y, attack)
        assert result.rate("member 0", "member 0") == 1
        rates.append(result.rate("member 0", "member 1"))
        surrogates = {"side": Side(0.55).eval()}
        accuracies.append(black_box(Right().eval(), surrogates, x, y, {"PGD": attack}).accuracies("model")["all"])
    assert 0.2 < rates[0] < 0.8
    assert rates[1] > 0.95
    assert 0.2 < accuracies[0] < 0.8
    assert accuracies[1] < 0.05


def random_ensemble(seed: int, classes: int = 4) -> Ensemble:
    torch.manual_seed(seed)
    return Ensemble(
        [nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, classes)) for _ in range(3)]
    ).eval()


def test_results_do_not_depend_on_the_batch_size() -> None:
    images = torch.rand(11, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    target, surrogate = random_ensemble(0), random_ensemble(1)
    labels = target(images).argmax(1)
    attack = PGD(eps=0.3, alpha=0.1, steps=3, restarts=2, seed=0)
    matrices = [transferability(target, images, labels, attack, protocol="all", batch_size=size) for size in (11, 4)]
    assert torch.equal(matrices[0].fooled, matrices[1].fooled)
    assert 0 < matrices[0].rates.mean().item() < 1
    attacks = {"M-DI2": MDI2(0.3, 0.1, 3, seed=0), "CW": CW(0.3, 0.1, 3, restarts=2, seed=0)}
    results = [black_box(target, {"other": surrogate}, images, labels, attacks, batch_size=size) for size in (11, 4)]
    for row, flags in results[0].correct.items():
        assert torch.equal(flags, results[1].correct[row])


def test_autoattack_has_no_number_of_restarts() -> None:
    auto = AutoAttack(eps=0.1, version="custom", attacks=("apgd-ce",), steps=4, seed=0)
    matrix = transferability(ensemble(), IMAGES, LABELS, auto, protocol="all")
    for source in MISSED:
        assert missed(matrix, source, source) == MISSED[source][source]
    result = black_box(ensemble(), {"both": Looker(0.5, 0.5).eval()}, IMAGES, LABELS, {"AA": auto})
    assert result.correct["both", "AA"].shape == (4, 5)


def test_black_box_accuracy_by_hand() -> None:
    """Surrogates that look at one pixel each; the target looks at both."""
    target = Looker(0.5, 0.5).eval()
    surrogates = {"left": Looker(1.0, 0.0).eval(), "right": Looker(0.0, 1.0).eval()}
    images = torch.tensor([[0.58, 0.58], [0.52, 0.56], [0.9, 0.9], [0.3, 0.6]]).view(4, 1, 1, 2)
    labels = torch.tensor([1, 1, 1, 1])
    still = {"none": PGD(eps=0.0, alpha=0.1, steps=1, random_start=False, seed=0)}
    attacks = {"PGD": PGD(eps=0.12, alpha=0.06, steps=3, random_start=False, seed=0), **still}
    result = black_box(target, surrogates, images, labels, attacks)
    # Sums after moving one pixel by 0.12: 1.04, 0.96, 1.68, 0.78, against an edge of 1.
    assert result.subjects == ["model"]
    assert result.clean.tolist() == [[True, True, True, False]]
    assert result.correct["left", "PGD"].tolist() == [[True, False, True, False]]
    assert result.correct["right", "none"].tolist() == [[True, True, True, False]]
    assert result.accuracies("model") == {
        "clean": 3 / 4,
        "left / PGD": 2 / 4,
        "left / none": 3 / 4,
        "right / PGD": 2 / 4,
        "right / none": 3 / 4,
        "all": 2 / 4,
    }


def test_the_worst_of_all_is_taken_sample_by_sample() -> None:
    """Each surrogate misleads another one of two samples, so that none withstands all."""
    target = Looker(0.5, 0.5).eval()
    surrogates = {"left": Looker(1.0, 0.0).eval(), "right": Looker(0.0, 1.0).eval()}
    images = torch.tensor([[0.52, 0.0], [0.0, 0.52]]).view(2, 1, 1, 2) + 0.5
    images = images.clamp(max=1)  # the pixel at 1 can only go down, the other one too: by 0.1 each
    labels = torch.tensor([1, 1])
    attack = {"PGD": PGD(eps=0.1, alpha=0.1, steps=1, random_start=False, seed=0)}
    result = black_box(target, surrogates, images, labels, attack)
    assert result.worst.tolist() == [[True, True]]  # sums of 1.5 - 0.1
    flags = {("left", "PGD"): torch.tensor([[True, False]]), ("right", "PGD"): torch.tensor([[False, True]])}
    crossed = BlackBoxResult(["model"], flags, torch.tensor([[True, True]]), {}, {}, {}, {})
    assert crossed.accuracies("model") == {"clean": 1.0, "left / PGD": 0.5, "right / PGD": 0.5, "all": 0.0}


def test_members_are_judged_on_the_same_inputs() -> None:
    surrogates = {"both": Looker(0.5, 0.5).eval()}
    result = black_box(ensemble(), surrogates, IMAGES, LABELS, {"PGD": ATTACK})
    assert result.subjects == ["ensemble", "member 0", "member 1", "member 2"]
    flags = result.correct["both", "PGD"]
    for number, member in enumerate(("member 0", "member 1", "member 2")):
        assert (~flags[number + 1]).nonzero().flatten().tolist() == MISSED["member 2"][member]
    assert (~flags[0]).nonzero().flatten().tolist() == missed_by_the_ensemble("member 2")
    assert black_box(ensemble(), surrogates, IMAGES, LABELS, {"PGD": ATTACK}, members=False).subjects == ["ensemble"]


def test_the_attacks_on_surrogates() -> None:
    attacks = surrogate_attacks("8/255", steps=7, restarts=2, seed=5)
    assert list(attacks) == ["PGD-CE", "M-PGD-CE", "M-DI2-CE", "PGD-CW", "M-PGD-CW", "M-DI2-CW"]
    assert [type(attack) for attack in attacks.values()] == [PGD, MIM, MDI2] * 2
    for name, attack in attacks.items():
        assert attack.loss == ("ce" if name.endswith("CE") else "margin")
        assert attack.step_size == pytest.approx(8 / 255 / 5)
        assert (attack.steps, attack.seed) == (7, 5)
        assert attack.restarts == (1 if name.startswith("M-DI2") else 2)
        assert attack.random_start == (not name.startswith("M-DI2"))


def test_files_read_back(tmp_path) -> None:
    matrix = transferability(ensemble(), IMAGES, LABELS, ATTACK, protocol="source_correct", about={"name": "test"})
    matrix.save(tmp_path / "transfer.json")
    tree = json.loads((tmp_path / "transfer.json").read_text())
    assert tree["rates"][0][1] == 1 / 5
    assert tree["counted"] == ["11111", "11110", "11111"]
    assert tree["attack"]["eps"] == 0.1
    assert TransferMatrix.load(tmp_path / "transfer.json").to_dict() == tree
    result = black_box(ensemble(), {"one": Looker(1.0, 0.0).eval()}, IMAGES, LABELS, {"PGD": ATTACK})
    result.save(tmp_path / "black_box.json")
    tree = json.loads((tmp_path / "black_box.json").read_text())
    assert tree["accuracies"]["member 0"]["one / PGD"]["accuracy"] == 2 / 5
    assert tree["verdicts"][0]["correct"][1] == "00101"
    assert BlackBoxResult.load(tmp_path / "black_box.json").to_dict() == tree
    with pytest.raises(ValueError, match="is no TransferMatrix of this version"):
        TransferMatrix.load(tmp_path / "black_box.json")


def test_bad_input_is_refused() -> None:
    with pytest.raises(TypeError, match="needs an Ensemble, got Looker"):
        transferability(Looker(1.0, 0.0).eval(), IMAGES, LABELS)
    with pytest.raises(ValueError, match="unknown protocol 'correct'"):
        transferability(ensemble(), IMAGES, LABELS, protocol="correct")
    with pytest.raises(ValueError, match="protocol='all_correct' leaves no sample for member 0"):
        transferability(ensemble(), IMAGES, 1 - LABELS)
    last = torch.tensor([4, 0, 1])
    with pytest.raises(ValueError, match="protocol='source_correct' leaves no sample for member 1"):
        transferability(ensemble(), IMAGES[last], LABELS[last], protocol="source_correct", samples=1)
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        transferability(ensemble(), IMAGES, LABELS, samples=0)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\), got 2"):
        transferability(ensemble(), IMAGES, 2 * LABELS)
    with pytest.raises(ValueError, match="train mode"):
        transferability(ensemble().train(), IMAGES, LABELS)
    with pytest.raises(ValueError, match="images must hold at least one, got none"):
        transferability(ensemble(), IMAGES[:0], LABELS[:0])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        transferability(ensemble(), IMAGES, LABELS, batch_size=0)
    with pytest.raises(ValueError, match="surrogates must hold at least one, got none"):
        black_box(ensemble(), {}, IMAGES, LABELS)
    with pytest.raises(ValueError, match=r"surrogates\['late'\]: model is in train mode"):
        black_box(ensemble(), {"late": Looker(1.0, 0.0).train()}, IMAGES, LABELS)
    other = nn.Sequential(nn.Flatten(), nn.Linear(2, 3)).eval()
    with pytest.raises(ValueError, match=r"surrogates\['other'\] has 3 classes, the model 2"):
        black_box(ensemble(), {"other": other}, IMAGES, LABELS)
