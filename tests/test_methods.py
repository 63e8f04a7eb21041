"""What all methods keep to, and AT, EAT, CEAT and the plug-in against losses written out member by member."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from method_models import CLASSES, fixed_ensemble, numbered, probabilities, small_ensemble
from torch import Tensor, nn

from ceat_fast.ensemble import Ensemble
from ceat_fast.methods import (
    ADP,
    AT,
    CEAT,
    DVERGE,
    EAT,
    FASTEN,
    GAL,
    LAFED,
    MART,
    METHODS,
    SCORE,
    TRS,
    Batch,
    CalibratedDistance,
    Epoch,
    Method,
    Standard,
    StepOutput,
    make_method,
)
from ceat_fast.methods.filters import peer_filter

CLEAN, ADVERSARIAL = 0, 1
FIRST_EPOCH = Epoch(number=0, total=2, samples=6, seed=3)
# Methods whose losses each train one member alone; the others share terms between members.
SEPARATE = [AT, EAT, CEAT, DVERGE, LAFED, FASTEN, SCORE, MART]
# One number of members where the peers have no pair (2), one where pairs are one (3), one where they are several (5).
MEMBERS = [2, 3, 5]


def searched(method: Method, ensemble: Ensemble, number: float, batch_like: Tensor) -> Tensor:
    """Inputs as `perturb` would give them, all of one value."""
    members = len(ensemble.members)
    shape = {EAT: (), CEAT: (), ADP: (), GAL: (), TRS: (2,), AT: (members,), SCORE: (members,), MART: (members,)}
    return torch.full((*shape.get(type(method), (2, members)), *batch_like.shape), number)


@pytest.mark.parametrize("members", MEMBERS)
@pytest.mark.parametrize("method", [EAT(), AT()], ids=["EAT", "AT"])
def test_eat_and_at_are_the_cross_entropy_of_the_adversarial_logits(method: Method, members: int) -> None:
    ensemble, batch = fixed_ensemble(members, 2)
    adversarial = searched(method, ensemble, ADVERSARIAL, batch.images)
    output = method.step(ensemble, adversarial, batch)
    for m, rows in enumerate(probabilities(ensemble, ADVERSARIAL)):
        expected = [-math.log(p[y]) for p, y in zip(rows, batch.labels.tolist(), strict=True)]
        assert output.losses[m].item() == pytest.approx(sum(expected) / len(expected), abs=1e-12)
        assert output.parts["ce"][m].tolist() == pytest.approx(expected, abs=1e-12)
    assert output.nat_logits is None


def test_at_attacks_each_member_and_eat_the_ensemble() -> None:
    assert (AT.goal, EAT.goal, CEAT.goal) == ("members", "ensemble", "ensemble")
    ensemble, batch = fixed_ensemble(3, 4)
    own = torch.cat([numbered(batch, m + 1)[None] for m in range(3)])
    output = AT().step(ensemble, own, batch)
    for m in range(3):
        rows = probabilities(ensemble, m + 1)[m]
        expected = [-math.log(p[y]) for p, y in zip(rows, batch.labels.tolist(), strict=True)]
        assert output.losses[m].item() == pytest.approx(sum(expected) / len(expected), abs=1e-12)


def test_standard_training_is_the_cross_entropy_of_the_clean_logits() -> None:
    ensemble, batch = fixed_ensemble(3, 1)
    method = Standard()

    def attack(*arguments: object) -> Tensor:
        raise AssertionError("standard training attacks nothing")

    output = method.step(ensemble, method.perturb(attack, ensemble, batch), batch)
    expected = [
        -sum(math.log(p[y]) for p, y in zip(rows, batch.labels.tolist(), strict=True)) / len(rows)
        for rows in probabilities(ensemble, CLEAN)
    ]
    assert output.losses.tolist() == pytest.approx(expected, abs=1e-12)
    assert output.adv_logits is None


def written_out_distance(
    ensemble: Ensemble,
    labels: list[int],
    lam: float,
    mu: float,
    nat_exponent: float,
    adv_exponent: float,
    keep: Tensor | None = None,
) -> list[float]:
    """lam * L_nat^D + mu * L_adv^D of every member, sample by sample; D is the spread of the peers."""
    clean, perturbed = probabilities(ensemble, CLEAN), probabilities(ensemble, ADVERSARIAL)
    result = []
    for m in range(len(clean)):
        total = 0.0
        for i, y in enumerate(labels):
            if keep is not None and not keep[m, i]:
                continue
            nat = sum((p - (k == y)) ** 2 for k, p in enumerate(clean[m][i]))
            adv = sum((p - q) ** 2 for p, q in zip(perturbed[m][i], clean[m][i], strict=True))
            peers = [j for j in range(len(clean)) if j != m]
            spreads = [max(p[j][i][y] for j in peers) - min(p[j][i][y] for j in peers) for p in (clean, perturbed)]
            total += lam * math.exp(nat_exponent * spreads[0]) * nat + mu * math.exp(adv_exponent * spreads[1]) * adv
        result.append(total / len(labels))
    return result


@pytest.mark.parametrize("members", MEMBERS)
def test_ceat_is_equation_22(members: int) -> None:
    ensemble, batch = fixed_ensemble(members, 2)
    lam, mu = 0.5, 2.0
    output = CEAT(lam=lam, mu=mu, impl="torch").step(ensemble, numbered(batch, ADVERSARIAL), batch)
    ce = EAT().step(ensemble, numbered(batch, ADVERSARIAL), batch).losses
    distances = written_out_distance(ensemble, batch.labels.tolist(), lam, mu, lam, mu)
    expected = [a + b for a, b in zip(ce.tolist(), distances, strict=True)]
    assert output.losses.tolist() == pytest.approx(expected, abs=1e-12)


# Table 4: lam = 0 leaves L_nat out, mu = 0 L_adv, exponents of 0 leave e^D out.
@pytest.mark.parametrize(
    ("lam", "mu", "exponent"), [(0.0, 5.0, 0.0), (0.0, 5.0, None), (1.0, 5.0, 0.0), (1.0, 5.0, None), (1.0, 0.0, None)]
)
def test_the_parts_of_ceat_by_switch(lam: float, mu: float, exponent: float | None) -> None:
    ensemble, batch = fixed_ensemble(3, 2)
    method = CEAT(lam=lam, mu=mu, lam_exponent=exponent, mu_exponent=exponent, impl="torch")
    adversarial = numbered(batch, ADVERSARIAL)
    ce = EAT().step(ensemble, adversarial, batch).losses
    exponents = (lam, mu) if exponent is None else (exponent, exponent)
    expected = written_out_distance(ensemble, batch.labels.tolist(), lam, mu, *exponents)
    distances = method.step(ensemble, adversarial, batch).losses - ce
    assert distances.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("members", MEMBERS)
@pytest.mark.parametrize("method", [AT, EAT, ADP, SCORE, MART], ids=lambda method: method.__name__)
def test_plus_ceat_adds_the_calibrated_distance(method: type[Method], members: int) -> None:
    ensemble, batch = fixed_ensemble(members, 2)
    plain, extended = method(), method(plus_ceat=CalibratedDistance(lam=0.5, mu=2.0, impl="torch"))
    adversarial = searched(plain, ensemble, ADVERSARIAL, batch.images)
    output = extended.step(ensemble, adversarial, batch)
    difference = output.losses - plain.step(ensemble, adversarial, batch).losses
    expected = written_out_distance(ensemble, batch.labels.tolist(), 0.5, 2.0, 0.5, 2.0)
    assert difference.tolist() == pytest.approx(expected, abs=1e-12)
    assert {"nat_weight", "adv_weight", "ce", "adv_disparity"} <= output.parts.keys()


def test_eat_plus_ceat_is_ceat_with_its_gradients() -> None:
    ensemble, batch = fixed_ensemble(3, 2)
    gradients = []
    for method in (CEAT(impl="torch"), EAT(plus_ceat=CalibratedDistance(impl="torch"))):
        losses = method.step(ensemble, numbered(batch, ADVERSARIAL), batch).losses
        gradients.append(torch.autograd.grad(losses.sum(), list(ensemble.parameters())))
    for expected, gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["ADP", "GAL", "TRS", "DVERGE", "LAFED", "FASTEN"])
def test_plus_ceat_trains_through_the_passes_of_every_method(name: str) -> None:
    """Table 2's pairs: the added gradient is that of the distance on the method's own adversarial and clean logits."""
    extended, plain = (METHODS[name](plus_ceat=plus) for plus in (CalibratedDistance(lam=1.0, mu=1.0), None))
    gradients = []
    for method in (extended, plain):
        ensemble, batch = small_ensemble()
        method.begin_epoch(FIRST_EPOCH)
        torch.manual_seed(0)
        layers = method.draw_layers(ensemble) if hasattr(method, "draw_layers") else []
        assert len(layers) in (0, 3)
        output = method.step(ensemble, searched(method, ensemble, 0.5, batch.images), batch)
        gradients.append(torch.autograd.grad(output.losses.sum(), [m.head.weight for m in ensemble.members]))
    ensemble, batch = small_ensemble()
    torch.manual_seed(0)
    noisy = GAL()._noisy(batch.images) if name == "GAL" else batch.images
    adv, nat = ensemble.member_logits(torch.full_like(batch.images, 0.5)), ensemble.member_logits(noisy)
    losses, _ = CalibratedDistance(lam=1.0, mu=1.0).distances(adv, nat, batch.labels)
    expected = torch.autograd.grad(losses.sum(), [m.head.weight for m in ensemble.members])
    for with_distance, without, difference in zip(*gradients, expected, strict=True):
        torch.testing.assert_close(with_distance - without, difference, atol=1e-5, rtol=1e-4)


def test_ceat_and_standard_training_refuse_the_plug_in() -> None:
    for method in (CEAT, Standard):
        with pytest.raises(ValueError, match="plus_ceat must be left out"):
            method(plus_ceat=CalibratedDistance())


def correct_or_not(verdicts: list[list[bool]]) -> tuple[Tensor, Tensor]:
    """Logits (M, B, 2) with those verdicts on label 0, and the labels."""
    right = torch.tensor(verdicts)
    return torch.stack([right.float(), 1 - right.float()], -1), torch.zeros(right.shape[1], dtype=torch.int64)


def test_filters_of_three_members_are_equations_10_to_14() -> None:
    # Columns: every verdict of (b, c), the peers of member 0; b is member 1.
    logits, labels = correct_or_not([[True] * 4, [True, False, True, False], [False, True, True, False]])
    expected = {"F1": [1, 0, 0, 0], "F2": [0, 1, 0, 0], "F3": [0, 0, 1, 0], "F4": [0, 0, 0, 1]}
    expected |= {"consistent": [0, 0, 1, 1], "inconsistent": [1, 1, 0, 0], "all": [1, 1, 1, 1]}
    for samples, members in expected.items():
        assert peer_filter(logits, labels, samples)[0].int().tolist() == members, samples
    # The peers of member 1 are 0, always right, and 2.
    assert peer_filter(logits, labels, "F1")[1].int().tolist() == [1, 0, 0, 1]
    assert peer_filter(logits, labels, "F3")[1].int().tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("members", [1, 2, 4])
def test_filters_of_other_numbers_of_members(members: int) -> None:
    logits, labels = correct_or_not([[True, False, m % 2 == 0] for m in range(members)])
    sets = {name: peer_filter(logits, labels, name)[0].tolist() for name in ("F1", "F2", "F3", "F4")}
    expected = {
        1: {"F1": [0, 0, 0], "F2": [0, 0, 0], "F3": [1, 1, 1], "F4": [0, 0, 0]},  # no peers: nobody disagrees
        2: {"F1": [0, 0, 0], "F2": [0, 0, 0], "F3": [1, 0, 0], "F4": [0, 1, 1]},  # the only peer agrees with itself
        4: {"F1": [0, 0, 0], "F2": [0, 0, 1], "F3": [1, 0, 0], "F4": [0, 1, 0]},  # peers: wrong, right, wrong
    }
    assert sets == {name: [bool(value) for value in row] for name, row in expected[members].items()}


@pytest.mark.parametrize("samples", ["consistent", "inconsistent", "F1", "F4"])
@pytest.mark.parametrize("as_plug_in", [False, True], ids=["CEAT", "plus_ceat"])
def test_filtered_distances_leave_the_other_samples_their_cross_entropy(samples: str, as_plug_in: bool) -> None:
    ensemble, batch = fixed_ensemble(3, 2, samples=40)
    settings = {"lam": 0.0, "mu": 2.0, "mu_exponent": 0.0, "samples": samples, "impl": "torch"}
    method = EAT(plus_ceat=CalibratedDistance(**settings)) if as_plug_in else CEAT(**settings)
    adversarial = numbered(batch, ADVERSARIAL)
    output = method.step(ensemble, adversarial, batch)
    keep = peer_filter(output.adv_logits, batch.labels, samples)
    assert 0 < keep.sum() < keep.numel()
    ce = EAT().step(ensemble, adversarial, batch).losses
    expected = written_out_distance(ensemble, batch.labels.tolist(), 0.0, 2.0, 0.0, 0.0, keep)
    assert (output.losses - ce).tolist() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(output.parts["selected"].bool(), keep)


@pytest.mark.parametrize("method", list(METHODS.values()), ids=list(METHODS))
def test_every_method_logs_what_reports_compare(method: type[Method]) -> None:
    ensemble, batch = small_ensemble()
    instance = method()
    instance.begin_epoch(FIRST_EPOCH)
    if hasattr(instance, "draw_layers"):
        instance.draw_layers(ensemble)
    output = instance.step(ensemble, searched(instance, ensemble, 0.5, batch.images), batch)
    assert output.losses.shape == (3,)
    assert all(part.shape[1] == 6 and not part.requires_grad for part in output.parts.values())
    assert not any(z.requires_grad for z in (output.adv_logits, output.nat_logits) if z is not None)
    if output.adv_logits is not None:
        log_prob = output.adv_logits.log_softmax(-1)[:, torch.arange(6), batch.labels]
        torch.testing.assert_close(output.parts["ce"], -log_prob)
        h = log_prob.exp()
        torch.testing.assert_close(output.parts["adv_disparity"][0], (h[1] - h[2]).abs())


@pytest.mark.parametrize("method", SEPARATE, ids=lambda method: method.__name__)
def test_a_member_is_trained_by_its_own_loss_alone(method: type[Method]) -> None:
    ensemble, batch = small_ensemble()
    instance = method()
    instance.begin_epoch(FIRST_EPOCH)
    if hasattr(instance, "draw_layers"):
        instance.draw_layers(ensemble)
    losses = instance.step(ensemble, searched(instance, ensemble, 0.5, batch.images), batch).losses
    own, other = torch.autograd.grad(
        losses[0], [ensemble.members[0].head.weight, ensemble.members[1].head.weight], allow_unused=True
    )
    assert own.abs().sum() > 0
    assert other is None or other.abs().sum() == 0


class Passes(nn.Module):
    """Notes the value of every batch that passes in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.fc = nn.Linear(4, CLASSES)
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not torch.is_inference_mode_enabled():
            self.seen.append(round(x.flatten()[0].item(), 3))
        return self.fc(self.norm(x).flatten(1))


ADV, NAT, OTHER = 0.5, 0.25, 0.75
PASSES = {
    "Standard": [NAT],
    "AT": [ADV],
    "EAT": [ADV],
    "CEAT": [ADV, NAT],
    "ADP": [ADV, NAT],
    "GAL": [ADV, NAT],
    "TRS": [ADV, NAT, OTHER],
    "DVERGE": [ADV, OTHER, OTHER],
    "LAFED": [ADV, OTHER, OTHER],
    "FASTEN": [ADV, NAT, OTHER],
    "SCORE": [ADV, NAT],
    "MART": [ADV, NAT],
}


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("plug_in", [False, True], ids=["plain", "plus_ceat"])
def test_passes_in_train_mode_adversarial_first_each_with_its_own_statistics(name: str, plug_in: bool) -> None:
    """The order matters: it decides with which weight a batch enters BatchNorm's running statistics."""
    if plug_in and name in ("CEAT", "Standard"):
        pytest.skip("takes no plug-in")
    method = METHODS[name](plus_ceat=CalibratedDistance() if plug_in else None)
    if name == "GAL":
        method.noise_std = 0.0
    ensemble = Ensemble([Passes() for _ in range(3)], backend="loop").train()
    _, batch = small_ensemble()
    batch = batch._replace(images=torch.full((6, 1, 2, 2), NAT), labels=batch.labels % CLASSES)
    method.begin_epoch(FIRST_EPOCH)
    if hasattr(method, "draw_layers"):
        method.draw_layers(ensemble)
    inputs = searched(method, ensemble, ADV, batch.images)
    if PASSES[name][-1] == OTHER:
        inputs[1] = OTHER
    method.step(ensemble, inputs, batch)
    expected = PASSES[name] + ([NAT] if plug_in and NAT not in PASSES[name] else [])
    assert ensemble.members[0].seen == ensemble.members[2].seen == expected


def test_the_adversarial_batch_updates_running_statistics_before_the_clean_one() -> None:
    ensemble = Ensemble([Passes()], backend="loop").train()
    images = torch.rand(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    _, batch = small_ensemble(samples=4)
    batch = batch._replace(images=images, labels=torch.tensor([0, 1, 0, 1]))
    CEAT(impl="torch").step(ensemble, images + 1.0, batch)
    clean = images.mean().item()
    after_adversarial = 0.1 * (clean + 1.0)  # momentum 0.1, running mean starts at 0
    expected = 0.9 * after_adversarial + 0.1 * clean
    assert ensemble.members[0].norm.running_mean.item() == pytest.approx(expected, abs=1e-6)


def test_max_weight_bounds_the_weights_and_with_them_the_loss() -> None:
    ensemble, batch = fixed_ensemble(3, 2)
    adversarial = numbered(batch, ADVERSARIAL)
    free = CEAT(lam=5.0, mu=5.0, impl="torch").step(ensemble, adversarial, batch)
    capped = CEAT(lam=5.0, mu=5.0, max_weight=2.0, impl="torch").step(ensemble, adversarial, batch)
    assert free.parts["adv_weight"].max() > 9
    assert capped.parts["adv_weight"].max() == capped.parts["nat_weight"].max() == 2.0
    excess = sum(
        5.0 * (free.parts[f"{kind}_weight"] - capped.parts[f"{kind}_weight"]) * free.parts[kind]
        for kind in ("nat", "adv")
    )
    torch.testing.assert_close(free.losses - capped.losses, excess.mean(1))


def test_perturb_gives_the_attack_the_batch_and_its_indices() -> None:
    ensemble, batch = fixed_ensemble(3, 2)
    calls = []

    def attack(model: nn.Module, x: Tensor, y: Tensor, index: Tensor | None = None) -> Tensor:
        calls.append((model, x, y, index))
        return x + 1

    assert torch.equal(EAT().perturb(attack, ensemble, batch), batch.images + 1)
    assert calls[0][0] is ensemble
    assert calls[0][3] is batch.indices


def test_methods_by_name() -> None:
    assert make_method("CEAT", lam=5, mu=1) == CEAT(lam=5, mu=1)
    assert set(METHODS) == set(PASSES)
    with pytest.raises(ValueError, match=r"unknown method 'CAET' \(did you mean 'CEAT'\?\)"):
        make_method("CAET")


def test_labels_name_what_is_not_the_default() -> None:
    assert EAT().label == "EAT"
    assert ADP(alpha=1.0).label == "ADP(alpha=1)"
    assert CEAT().label == "CEAT(lam=1, mu=5)"
    assert CEAT(lam=5.0, mu=1.0, max_weight=20.0).label == "CEAT(lam=5, mu=1, max_weight=20)"
    assert DVERGE(plus_ceat=CalibratedDistance(mu=2.0)).label == "DVERGE + L^D(lam=1, mu=2)"
    assert EAT(plus_ceat=CalibratedDistance(samples="F1")).label == "EAT + L^D(lam=1, mu=5, samples=F1)"


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (CEAT, {"lam": -1.0}),
        (CEAT, {"mu": math.nan}),
        (CEAT, {"max_weight": 0.5}),
        (CEAT, {"pair_reduction": "median"}),
        (CEAT, {"samples": "F5"}),
        (CalibratedDistance, {"lam": -1.0}),
        (ADP, {"alpha": -1.0}),
        (GAL, {"noise_probability": 1.5}),
        (TRS, {"inner_steps": 0}),
        (DVERGE, {"alpha": 0.0}),
        (DVERGE, {"redraw": "batch"}),
        (LAFED, {"layers": []}),
        (FASTEN, {"eps": 0.0}),
        (SCORE, {"clip": 3.0}),
        (MART, {"beta": math.inf}),
    ],
)
def test_bad_settings_are_refused_at_once(method: type[Method], settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        method(**settings)


@pytest.mark.parametrize(
    ("method", "settings"),
    [(DVERGE, {"steps": 1.5}), (LAFED, {"steps": True}), (TRS, {"inner_steps": 2.0}), (ADP, {"beta": True})],
)
def test_settings_of_another_type_are_refused_at_once(method: type[Method], settings: dict[str, object]) -> None:
    with pytest.raises(TypeError, match=next(iter(settings))):
        method(**settings)


@pytest.mark.parametrize("name", ["ADP", "GAL", "TRS", "DVERGE", "LAFED", "FASTEN"])
def test_methods_that_compare_members_refuse_a_single_one(name: str) -> None:
    ensemble, batch = small_ensemble((2,))
    with pytest.raises(ValueError, match=f"{name} needs at least 2 members, got 1"):
        METHODS[name]().step(ensemble, batch.images, batch)


def test_fasten_refuses_a_single_member_before_it_draws_two() -> None:
    ensemble, batch = small_ensemble((2,))
    with pytest.raises(ValueError, match="FASTEN needs at least 2 members, got 1"):
        FASTEN().perturb(lambda model, x, y, index: x, ensemble, batch)


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (torch.zeros(2), TypeError, "Own.member_losses must return a StepOutput, got Tensor"),
        (
            StepOutput(torch.zeros(()), {}, None, None),
            ValueError,
            r"must return losses \(2,\), got \(\)",
        ),
        (StepOutput(torch.zeros(2), {"kl": torch.zeros(5)}, None, None), ValueError, r"part 'kl' must be \(2, B\) or"),
    ],
    ids=["no output", "losses", "part"],
)
def test_what_a_method_of_ones_own_must_return(output: Any, error: type[Exception], message: str) -> None:
    class Own(Method):
        def member_losses(self, ensemble: Ensemble, adversarial: Tensor, batch: Batch) -> StepOutput:
            return output

    ensemble, batch = fixed_ensemble(2, 1)
    with pytest.raises(error, match=message):
        Own().step(ensemble, batch.images, batch)
