"""EAT and CEAT against losses written out member by member, and what they leave in the models."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ceat_fast.ensemble import Ensemble
from ceat_fast.methods import CEAT, EAT, METHODS, Batch, Method, make_method

MEMBERS, SAMPLES, CLASSES = 3, 5, 4


class FixedLogits(nn.Module):
    """Logits looked up by the input's first value: 0.0 is the clean, 1.0 the adversarial batch."""

    def __init__(self, clean: Tensor, adversarial: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.stack([clean, adversarial]))

    def forward(self, x: Tensor) -> Tensor:
        return self.table[int(x.flatten()[0])]


@pytest.fixture
def setup() -> tuple[Ensemble, Tensor, Batch]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, MEMBERS, SAMPLES, CLASSES, generator=generator, dtype=torch.float64)
    ensemble = Ensemble([FixedLogits(logits[0, m], logits[1, m]) for m in range(MEMBERS)], backend="loop")
    images = torch.zeros(SAMPLES, 1, 2, 2)
    batch = Batch(images, torch.tensor([0, 1, 2, 3, 0]), torch.arange(SAMPLES))
    return ensemble, torch.ones_like(images), batch


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(z) for z in logits]
    return [power / sum(powers) for power in powers]


def test_eat_is_the_cross_entropy_of_the_adversarial_logits(setup: tuple[Ensemble, Tensor, Batch]) -> None:
    ensemble, adversarial, batch = setup
    output = EAT().step(ensemble, adversarial, batch)
    for m, member in enumerate(ensemble.members):
        probabilities = [softmax(row) for row in member.table[1].tolist()]
        expected = [-math.log(p[y]) for p, y in zip(probabilities, batch.labels.tolist(), strict=True)]
        assert output.losses[m].item() == pytest.approx(sum(expected) / SAMPLES, abs=1e-6)
        assert output.parts["ce"][m].tolist() == pytest.approx(expected, abs=1e-6)
    assert output.nat_logits is None


def test_ceat_is_equation_22(setup: tuple[Ensemble, Tensor, Batch]) -> None:
    ensemble, adversarial, batch = setup
    lam, mu = 0.5, 2.0
    output = CEAT(lam=lam, mu=mu, impl="torch").step(ensemble, adversarial, batch)
    clean = [[softmax(row) for row in member.table[0].tolist()] for member in ensemble.members]
    perturbed = [[softmax(row) for row in member.table[1].tolist()] for member in ensemble.members]
    for m in range(MEMBERS):
        b, c = (peer for peer in range(MEMBERS) if peer != m)
        total = 0.0
        for i, y in enumerate(batch.labels.tolist()):
            nat = sum((p - (k == y)) ** 2 for k, p in enumerate(clean[m][i]))
            adv = sum((p - q) ** 2 for p, q in zip(perturbed[m][i], clean[m][i], strict=True))
            nat_weight = math.exp(lam * abs(clean[b][i][y] - clean[c][i][y]))
            adv_weight = math.exp(mu * abs(perturbed[b][i][y] - perturbed[c][i][y]))
            total += -math.log(perturbed[m][i][y]) + lam * nat_weight * nat + mu * adv_weight * adv
            assert output.parts["adv_weight"][m, i].item() == pytest.approx(adv_weight, abs=1e-12)
        assert output.losses[m].item() == pytest.approx(total / SAMPLES, abs=1e-12)


def test_eat_and_ceat_report_the_same_adversarial_disparity(setup: tuple[Ensemble, Tensor, Batch]) -> None:
    ensemble, adversarial, batch = setup
    eat = EAT().step(ensemble, adversarial, batch).parts["adv_disparity"]
    ceat = CEAT(impl="torch").step(ensemble, adversarial, batch).parts["adv_disparity"]
    torch.testing.assert_close(eat.double(), ceat, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", [EAT(), CEAT(impl="torch")], ids=["EAT", "CEAT"])
def test_a_member_is_trained_by_its_own_loss_alone(method: Method, setup: tuple[Ensemble, Tensor, Batch]) -> None:
    ensemble, adversarial, batch = setup
    losses = method.step(ensemble, adversarial, batch).losses
    first, second = ensemble.members[0].table, ensemble.members[1].table
    own, other = torch.autograd.grad(losses[0], [first, second], allow_unused=True)
    assert own.abs().sum() > 0
    assert other is None or other.abs().sum() == 0


def test_the_adversarial_batch_passes_batchnorm_before_the_clean_one() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x).flatten(1)

    ensemble = Ensemble([Norm()], backend="loop").train()
    images = torch.rand(4, 1, 2, 1, generator=torch.Generator().manual_seed(0))
    batch = Batch(images, torch.tensor([0, 1, 0, 1]), torch.arange(4))
    CEAT(impl="torch").step(ensemble, images + 1.0, batch)
    clean = images.mean().item()
    after_adversarial = 0.1 * (clean + 1.0)  # momentum 0.1, running mean starts at 0
    expected = 0.9 * after_adversarial + 0.1 * clean
    assert ensemble.members[0].norm.running_mean.item() == pytest.approx(expected, abs=1e-6)


def test_max_weight_bounds_the_weights_and_with_them_the_loss(setup: tuple[Ensemble, Tensor, Batch]) -> None:
    ensemble, adversarial, batch = setup
    free = CEAT(lam=5.0, mu=5.0, impl="torch").step(ensemble, adversarial, batch)
    capped = CEAT(lam=5.0, mu=5.0, max_weight=2.0, impl="torch").step(ensemble, adversarial, batch)
    assert free.parts["adv_weight"].max() > 9
    assert capped.parts["adv_weight"].max() == capped.parts["nat_weight"].max() == 2.0
    excess = sum(
        5.0 * (free.parts[f"{kind}_weight"] - capped.parts[f"{kind}_weight"]) * free.parts[kind]
        for kind in ("nat", "adv")
    )
    torch.testing.assert_close(free.losses - capped.losses, excess.mean(1))


def test_perturb_gives_the_attack_the_batch_and_its_indices(setup: tuple[Ensemble, Tensor, Batch]) -> None:
    ensemble, adversarial, batch = setup
    calls = []

    def attack(model: nn.Module, x: Tensor, y: Tensor, index: Tensor | None = None) -> Tensor:
        calls.append((model, x, y, index))
        return adversarial

    assert EAT().perturb(attack, ensemble, batch) is adversarial
    assert calls[0][0] is ensemble
    assert calls[0][3] is batch.indices


def test_methods_by_name() -> None:
    assert make_method("CEAT", lam=5, mu=1) == CEAT(lam=5, mu=1)
    assert set(METHODS) == {"EAT", "CEAT"}
    with pytest.raises(ValueError, match=r"unknown method 'CAET' \(did you mean 'CEAT'\?\)"):
        make_method("CAET")


def test_labels_name_the_numbers() -> None:
    assert EAT().label == "EAT"
    assert CEAT(lam=5.0, mu=1.0, max_weight=20.0).label == "CEAT(lam=5, mu=1, max_weight=20)"


@pytest.mark.parametrize(
    "settings", [{"lam": -1.0}, {"mu": math.nan}, {"max_weight": 0.5}, {"pair_reduction": "median"}]
)
def test_bad_settings_are_refused_at_once(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        CEAT(**settings)
