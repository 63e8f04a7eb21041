"""Features by layer name, the searches by features, and DVERGE, LAFED and FASTEN against their formulas."""

from __future__ import annotations

import itertools
import math

import numpy
import pytest
import torch
from method_models import (
    CLASSES,
    Small,
    fixed_ensemble,
    numbered,
    probabilities,
    small_ensemble,
    smooth_ensemble,
    softmax,
    unchanged_attack,
)
from torch import Tensor, nn

from ceat_fast.ensemble import Ensemble, frozen
from ceat_fast.ensemble.execution import Execution, Tuned
from ceat_fast.methods import DVERGE, FASTEN, LAFED, Batch, CalibratedDistance, Epoch, fasten
from ceat_fast.methods.features import MemberFeatures, feature_layers, features, layers_at, replaced_output
from ceat_fast.methods.lafed import mixed_logits, smoothed_targets
from ceat_fast.methods.vulnerable import FeatureMethod, distill, search_features
from ceat_fast.models import resnet20, resnet26, resnet32

CLEAN, ADVERSARIAL = 0, 1
MEMBERS = [2, 3, 5]
FIRST = Epoch(number=0, total=4, samples=6, seed=11)
SECOND = Epoch(number=1, total=4, samples=6, seed=12)


def own_attack(members: int):
    def attack(model: nn.Module, x: Tensor, y: Tensor, index: Tensor | None = None) -> Tensor:
        return unchanged_attack(model, x, y, index, members)

    return attack


def test_layers_are_normalisation_and_linear_layers_or_convolutions() -> None:
    assert feature_layers(Small(2)) == ["body.1", "body.4", "head"]
    plain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(32, 3))
    assert feature_layers(plain) == ["0", "2", "4"]
    assert feature_layers(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))) == ["0", "1"]
    with pytest.raises(ValueError, match="name modules of it in `layers`"):
        feature_layers(nn.Flatten())


def test_layers_of_mixed_depths_match_by_relative_depth() -> None:
    members = [resnet20(), resnet26(), resnet32()]
    counts = [len(feature_layers(member)) for member in members]
    assert counts == [22, 28, 34]  # stem, two per block, two projections, logits
    assert layers_at(members, 0.0) == ["bn1"] * 3
    assert layers_at(members, 0.9999) == ["fc"] * 3
    middle = [feature_layers(member).index(name) for member, name in zip(members, layers_at(members, 0.5), strict=True)]
    assert middle == [11, 14, 17]
    assert layers_at(members, 0.7, ["stages.0", "stages.1", "stages.2"]) == ["stages.2"] * 3


def test_every_layer_is_drawn_and_a_missing_one_is_named() -> None:
    drawn = {layers_at([Small(2)], (i + 0.5) / 30)[0] for i in range(30)}
    assert drawn == {"body.1", "body.4", "head"}
    with pytest.raises(ValueError, match=r"unknown layer of member 1 'body.9' \(did you mean"):
        layers_at([Small(5), Small(2)], 0.5, ["body.9"])


def test_features_are_the_outputs_of_the_named_module_and_the_pass_ends_there() -> None:
    member = Small(2).eval()
    x = torch.rand(3, 1, 8, 8)
    calls: list[str] = []
    member.head.register_forward_hook(lambda *arguments: calls.append("head"))
    torch.testing.assert_close(features(member, "body.1", x), member.body[1](member.body[0](x)))
    assert calls == []
    torch.testing.assert_close(features(member, "head", x), member(x))
    assert not member.body[1]._forward_hooks
    member.unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="does not run its layer 'unused'"):
        features(member, "unused", x)


def test_features_of_the_frozen_view_are_those_of_the_members_in_eval_mode() -> None:
    ensemble, batch = small_ensemble((2, 3))
    ensemble.member_logits(batch.images)  # running statistics that are not the initial ones
    with frozen(ensemble) as view:
        seen = [features(member, "body.4", batch.images) for member in view.members]
    ensemble.eval()
    for member, value in zip(ensemble.members, seen, strict=True):
        torch.testing.assert_close(value, features(member, "body.4", batch.images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("depths", [(2, 2, 2), (2, 3, 2)], ids=["alike", "mixed"])
def test_batched_features_are_those_of_each_member(depths: tuple[int, ...]) -> None:
    ensemble, batch = small_ensemble(depths, backend="vmap")
    layers = layers_at(list(ensemble.members), 0.4)
    x = torch.rand(len(depths), *batch.images.shape)
    with frozen(ensemble) as view:
        pointers = [tensor.data_ptr() for tensor in view.parameters()]
        for chosen in (None, [2, 0]):
            found = MemberFeatures(view, layers, chosen)(x if chosen is None else x[chosen])
            for number, value in zip(chosen or range(3), found, strict=True):
                torch.testing.assert_close(value, features(view.members[number], layers[number], x[number]))
        assert [tensor.data_ptr() for tensor in view.parameters()] == pointers


class Undecided(nn.Module):
    """A forward that vmap cannot run: it looks at the values."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.fc.weight.data.fill_(scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1) if x.sum().item() > 0 else -x.flatten(1))


@pytest.mark.parametrize("backend", ["auto", "vmap"])
def test_members_that_vmap_cannot_run_are_looped_over_unless_it_was_asked_for(backend: str) -> None:
    ensemble = Ensemble([Undecided(1.0), Undecided(2.0)], backend=backend)
    ensemble.tuned = Tuned(Execution("vmap"), Execution("vmap"))
    run = MemberFeatures(ensemble, ["fc", "fc"])
    x = torch.ones(2, 3, 1, 2, 2)
    if backend == "vmap":
        with pytest.raises(RuntimeError, match="vmap"):
            run(x)
    else:
        for value, member in zip(run(x), ensemble.members, strict=True):
            torch.testing.assert_close(value, member(x[0]))


def test_replaced_output_lasts_as_long_as_the_block() -> None:
    member = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    x = torch.rand(4, 2)
    plain, replaced = member(x), member[1](member[0](x) + 1)
    with replaced_output(member, "0", lambda output: output + 1):
        torch.testing.assert_close(member(x), replaced)
    torch.testing.assert_close(member(x), plain)


class Pixels(nn.Module):
    """Features are the pixels themselves, scaled; so the nearest input to a target is known."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scaled = nn.Linear(4, 4, bias=False, dtype=torch.float64)
        self.scaled.weight.data = scale * torch.eye(4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(x.flatten(1))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_search_finds_the_nearest_input_of_the_ball(scale: float) -> None:
    ensemble = Ensemble([Pixels(scale), Pixels(-scale)], backend="loop")
    source = torch.tensor([[0.2, 0.5, 0.96, 0.5]], dtype=torch.float64).view(1, 1, 2, 2)
    target = torch.tensor([[0.9, 0.1, 1.0, 0.52]], dtype=torch.float64).view(1, 1, 2, 2)
    settings = {"eps": 0.1, "alpha": 0.01, "steps": 30}
    found = search_features(ensemble, ["scaled"] * 2, source, source, target, **settings)
    nearest = torch.tensor([0.3, 0.4, 1.0, 0.52], dtype=torch.float64)  # the target, clipped to the ball and to [0, 1]
    assert found.shape == (2, 1, 1, 2, 2)
    # Momentum swings around a target inside the ball: it gathers speed on the way of 0.02 and of 0.04.
    assert (found.flatten(2) - nearest).abs().amax((0, 1)).tolist() == pytest.approx([0, 0, 0, 0], abs=0.05)
    assert (found.flatten(2) - nearest)[..., :2].abs().max() < 1e-9

    away = search_features(ensemble, ["scaled"] * 2, source, source, target, **settings, away=True, members=[1])
    expected = torch.tensor([0.1, 0.6, 0.86, 0.4], dtype=torch.float64)
    assert away.shape == (1, 1, 1, 2, 2)
    torch.testing.assert_close(away.flatten(), expected, atol=1e-9, rtol=0)


def test_the_search_has_momentum() -> None:
    """The first step goes past the target; the second gradient cancels the first, so the input stays, then returns."""
    ensemble = Ensemble([Pixels(1.0)], backend="loop")
    source = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
    places = []
    for steps in (1, 2, 3):
        found = search_features(ensemble, ["scaled"], source, source, source + 0.01, eps=0.3, alpha=0.02, steps=steps)
        places += found.unique().tolist()
    assert places == pytest.approx([0.52, 0.52, 0.5])


def test_without_a_gradient_the_search_stays_and_gives_no_nan() -> None:
    ensemble = Ensemble([Pixels(1.0)], backend="loop")
    source = torch.full((2, 1, 2, 2), 0.5, dtype=torch.float64)
    found = search_features(ensemble, ["scaled"], source, source, source, eps=0.1, alpha=0.01, steps=3)
    assert torch.equal(found[0], source)


def test_distilling_leaves_the_members_as_they_were() -> None:
    """Searching in train mode would feed every iterate into the running statistics."""
    ensemble, batch = small_ensemble((2, 3, 4))
    before = {name: tensor.clone() for name, tensor in ensemble.state_dict().items()}
    layers = layers_at(list(ensemble.members), 0.4)
    distilled = distill(ensemble, layers, batch.images, eps=0.07, alpha=0.01, steps=10)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ensemble.state_dict().items())
    assert all(module.training for module in ensemble.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in ensemble.parameters())
    assert (distilled - batch.images).abs().max() <= 0.07 + 1e-6
    assert not distilled.requires_grad
    ensemble.eval()
    for m, member in enumerate(ensemble.members):  # nearer to the features of the image before, in every member
        target = features(member, layers[m], batch.images.roll(1, 0))
        start, end = (
            (features(member, layers[m], x) - target).square().flatten(1).sum(1) for x in (batch.images, distilled[m])
        )
        assert (end < start).all()


def test_the_layer_is_drawn_for_every_epoch_or_for_every_step() -> None:
    ensemble, _ = small_ensemble((4, 4))
    method = DVERGE()
    seen = []
    for number in range(30):
        method.begin_epoch(Epoch(number, 30, 6, seed=number))
        layers = method.draw_layers(ensemble)
        assert layers == method.draw_layers(ensemble)
        seen.append(layers[0])
    assert set(seen) == {"body.1", "body.4", "body.7", "body.10", "head"}
    method = DVERGE(redraw="step")
    method.begin_epoch(FIRST)
    torch.manual_seed(0)
    assert len({method.draw_layers(ensemble)[0] for _ in range(30)}) == 5


@pytest.mark.parametrize("method", [DVERGE(), LAFED(), FASTEN()], ids=lambda method: type(method).__name__)
def test_a_batch_before_the_first_epoch_is_refused(method: FeatureMethod) -> None:
    ensemble, batch = small_ensemble()
    with pytest.raises(RuntimeError, match="call begin_epoch before the first batch"):
        method.perturb(own_attack(3), ensemble, batch)


def cross_entropies(ensemble: Ensemble, number: int, labels: list[int]) -> numpy.ndarray:
    """(M,) means over the batch."""
    rows = probabilities(ensemble, number)
    return numpy.array([-sum(math.log(p[i][y]) for i, y in enumerate(labels)) / len(labels) for p in rows])


@pytest.mark.parametrize("members", MEMBERS)
def test_dverge(members: int) -> None:
    ensemble, batch = fixed_ensemble(members, 2 + members)
    labels = batch.labels.tolist()
    distilled = torch.stack([numbered(batch, 2 + j) for j in range(members)])
    inputs = torch.stack([numbered(batch, ADVERSARIAL, members), distilled])
    losses = DVERGE(distillation=0.7).step(ensemble, inputs, batch).losses
    for i in range(members):
        others = sum(cross_entropies(ensemble, 2 + j, labels)[i] for j in range(members) if j != i)
        expected = 0.7 * others + cross_entropies(ensemble, ADVERSARIAL, labels)[i]
        assert losses[i].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("method", [DVERGE(), LAFED(), FASTEN()], ids=lambda method: type(method).__name__)
def test_perturb_stacks_what_the_attack_and_the_search_found(method: FeatureMethod) -> None:
    ensemble, batch = small_ensemble((2, 3))
    method.begin_epoch(FIRST)
    attack, searched = method.perturb(own_attack(2), ensemble, batch)
    assert torch.equal(attack[0], batch.images)
    assert attack.shape == searched.shape == (2, 6, 1, 8, 8)
    assert 0 < (searched - batch.images).abs().max() <= 0.07 + 1e-6
    assert searched.min() >= 0
    assert searched.max() <= 1
    assert method.drawn_layers == layers_at(list(ensemble.members), 0.45237, None)  # Random(11).random()


def test_smoothed_targets_are_probabilities_with_a_level_per_member() -> None:
    targets = smoothed_targets(torch.tensor([2, 0]), members=3, classes=4, smoothing=0.1)
    assert targets[0].tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]
    torch.testing.assert_close(targets[1, 0], torch.tensor([0.1 / 3, 0.1 / 3, 0.9, 0.1 / 3]))
    torch.testing.assert_close(targets[2, 1], torch.tensor([0.8, 0.2 / 3, 0.2 / 3, 0.2 / 3]))
    torch.testing.assert_close(targets.sum(-1), torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"smoothing must be below 0.375 for 3 members and 4 classes"):
        smoothed_targets(torch.tensor([0]), members=3, classes=4, smoothing=0.4)


def test_mixed_logits_by_hand() -> None:
    member = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4)).double()
    generator = torch.Generator().manual_seed(0)
    x, first, second = torch.rand(3, 5, 2, generator=generator, dtype=torch.float64)
    share = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    logits = mixed_logits(member, "0", x, [first, second], share)
    hidden = share[:, None] * member[0](x) + (1 - share[:, None]) * (member[0](first) + member[0](second)) / 2
    torch.testing.assert_close(logits, member[2](torch.tanh(hidden)))
    torch.testing.assert_close(logits[4], member(x)[4])
    torch.testing.assert_close(mixed_logits(member, "0", x, [], share), member(x))


def test_lafed_of_two_members_has_nothing_to_mix() -> None:
    ensemble, batch = fixed_ensemble(2, 4)
    labels = batch.labels.tolist()
    distilled = torch.stack([numbered(batch, 2 + j) for j in range(2)])
    method = LAFED(smoothing=0.1, diversification=0.7)
    method.drawn_layers = ["", ""]
    losses = method.step(ensemble, torch.stack([numbered(batch, ADVERSARIAL, 2), distilled]), batch).losses
    for i in range(2):
        rows = probabilities(ensemble, 2 + (1 - i))[i]
        soft = 0.0
        for p, y in zip(rows, labels, strict=True):
            targets = [1 - 0.1 * i if k == y else 0.1 * i / (CLASSES - 1) for k in range(CLASSES)]
            soft -= sum(t * math.log(q) for t, q in zip(targets, p, strict=True)) / len(labels)
        expected = 0.7 * soft + cross_entropies(ensemble, ADVERSARIAL, labels)[i]
        assert losses[i].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("members", [3, 5])
def test_lafed(members: int) -> None:
    """The whole loss from the weights, with the draws of peers and shares taken again from the same seed."""
    ensemble, batch = smooth_ensemble(members)
    labels, own = batch.labels, batch.images.expand(members, *batch.images.shape) * 0.9
    distilled = torch.stack([(batch.images + 0.1 * (j + 1)).clamp(0, 1) for j in range(members)])
    method = LAFED(smoothing=0.1, diversification=0.7)
    method.drawn_layers = ["first"] * members
    torch.manual_seed(5)
    losses = method.step(ensemble, torch.stack([own, distilled]), batch).losses
    torch.manual_seed(5)
    for i, member in enumerate(ensemble.members):
        first, last = ((layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in member.children())
        order = [j for j in torch.randperm(members).tolist() if j != i]
        share = torch.rand(len(labels)).double().numpy()[:, None]
        hidden = [x.flatten(1).numpy() @ first[0].T + first[1] for x in (*distilled, own[i])]
        mixed = share * hidden[order[0]] + (1 - share) * sum(hidden[j] for j in order[1:]) / (members - 2)
        total = 0.0
        for n, y in enumerate(labels.tolist()):
            soft, hard = (softmax((numpy.tanh(h[n]) @ last[0].T + last[1]).tolist()) for h in (mixed, hidden[-1]))
            targets = [1 - 0.1 * i if k == y else 0.1 * i / (CLASSES - 1) for k in range(CLASSES)]
            total -= 0.7 * sum(t * math.log(p) for t, p in zip(targets, soft, strict=True)) + math.log(hard[y])
        assert losses[i].item() == pytest.approx(total / len(labels), abs=1e-6)  # targets are in fp32


@pytest.mark.parametrize(("members", "samples"), [(3, 6), (3, 65), (5, 7)])
def test_lafed_really_mixes_for_any_batch_size(members: int, samples: int) -> None:
    """Each member's loss depends on what came from every peer, and not on what came from itself."""
    ensemble, batch = small_ensemble((2,) * members, samples=samples)
    method = LAFED(layers=["body.1"])
    method.begin_epoch(FIRST)
    inputs = method.perturb(own_attack(members), ensemble, batch).requires_grad_()
    losses = method.step(ensemble, inputs, batch).losses
    for i in range(members):
        (gradient,) = torch.autograd.grad(losses[i], inputs, retain_graph=True)
        sizes = gradient[1].abs().flatten(1).sum(1)
        assert all((sizes[j] > 0) == (j != i) for j in range(members))


@pytest.mark.parametrize("members", MEMBERS)
def test_fasten(members: int) -> None:
    ensemble, batch = fixed_ensemble(members, 3)
    labels = batch.labels.tolist()
    method = FASTEN(adversarial=0.5, consistency=3.0, diversity=0.05)
    inputs = torch.stack([numbered(batch, ADVERSARIAL, members), numbered(batch, 2, members)])
    losses = method.step(ensemble, inputs, batch).losses
    clean, adversarial, star = (probabilities(ensemble, number) for number in range(3))
    mean = (clean + adversarial + star) / 3

    def divergence(p: numpy.ndarray, q: numpy.ndarray) -> float:
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    for i in range(members):
        total = 0.0
        for s in range(len(labels)):
            total += 3.0 / 3 * sum(divergence(mean[i, s], p[i, s]) for p in (clean, star, adversarial))
            peers = sum(divergence(mean[k, s], mean[i, s]) for k in range(members) if k != i)
            total -= 0.05 * 3.0 / (members - 1) * peers
        ce = cross_entropies(ensemble, 2, labels) + 0.5 * cross_entropies(ensemble, ADVERSARIAL, labels)
        assert losses[i].item() == pytest.approx(ce[i] + total / len(labels), abs=1e-6)


def test_the_disagreement_of_fasten_has_a_gradient_and_drives_members_apart() -> None:
    """In the public code the term is built from constants: its gradient is zero."""
    ensemble, batch = fixed_ensemble(3, 3)
    inputs = torch.stack([numbered(batch, ADVERSARIAL, 3), numbered(batch, 2, 3)])
    gradients = []
    for diversity in (0.0, 1.0):
        output = FASTEN(diversity=diversity).step(ensemble, inputs, batch)
        gradients.append(torch.autograd.grad(output.losses.sum(), [member.table for member in ensemble.members]))
    before = output.parts["disagreement"].mean()
    with torch.no_grad():
        for member, without, with_term in zip(ensemble.members, *gradients, strict=True):
            assert (with_term - without).abs().sum() > 0.1
            member.table -= 0.1 * (with_term - without)
    after = FASTEN().step(ensemble, inputs, batch).parts["disagreement"].mean()
    assert after > before + 0.001


def test_the_clean_pass_of_fasten_carries_gradient_only_for_the_plug_in() -> None:
    inputs = torch.stack([torch.full((3, 5, 1, 2, 2), 1.0), torch.full((3, 5, 1, 2, 2), 2.0)])
    for plug_in in (None, CalibratedDistance()):
        ensemble, batch = fixed_ensemble(3, 3)
        FASTEN(plus_ceat=plug_in).step(ensemble, inputs, batch).losses.sum().backward()
        clean = ensemble.members[0].table.grad[CLEAN]
        assert (clean.abs().sum() > 0) == (plug_in is not None)


def recycling(monkeypatch: pytest.MonkeyPatch, found: list[float]) -> tuple[FASTEN, Batch, Ensemble]:
    """FASTEN whose search finds x + found[call]; two members, images 0.5."""
    steps = iter(found)

    def search(
        ensemble: Ensemble, layers: list[str], start: Tensor, center: Tensor, *_: Tensor, **__: object
    ) -> Tensor:
        return torch.stack([center + next(steps), center + next(steps)])

    monkeypatch.setattr(fasten, "search_features", search)
    ensemble, batch = small_ensemble((2, 2))
    return FASTEN(eps=0.06), batch._replace(images=torch.full_like(batch.images, 0.5)), ensemble


def test_fasten_recycles_perturbations_over_epochs_and_members(monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch, ensemble = recycling(monkeypatch, [0.05, 0.06, -0.06, -0.06])
    torch.manual_seed(0)
    method.begin_epoch(FIRST)
    first = method.perturb(own_attack(2), ensemble, batch)[1] - batch.images
    assert sorted(first[:, 0, 0, 0, 0].tolist()) == pytest.approx([0.05, 0.06])  # nothing is mixed in the first epoch
    assert (method.state_dict()["stored"] == 127).all()  # the second one was stored last
    method.begin_epoch(SECOND)
    second = method.perturb(own_attack(2), ensemble, batch)[1] - batch.images
    later, earlier = sorted(second[:, 0, 0, 0, 0].tolist())
    # r * (-0.06) + (1 - r) * stored: the first starts from 0.06, the second from what the first left.
    assert 0.06 > earlier > later > -0.06
    stored = method.state_dict()["stored"][:6].flatten().unique()
    assert stored.item() == pytest.approx(later * 127 / 0.06, abs=1.0)


def test_fasten_continues_from_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch, ensemble = recycling(monkeypatch, [0.05, 0.06, 0.01, 0.02, 0.01, 0.02])
    method.begin_epoch(FIRST)
    method.perturb(own_attack(2), ensemble, batch)
    resumed = FASTEN(eps=0.06)
    resumed.load_state_dict({name: tensor.clone() for name, tensor in method.state_dict().items()})
    results = []
    for instance in (method, resumed):
        torch.manual_seed(0)
        instance.begin_epoch(SECOND)
        results.append(instance.perturb(own_attack(2), ensemble, batch))
    assert torch.equal(*results)
    assert FASTEN().state_dict() == {}


def test_every_member_of_fasten_gets_an_input_of_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two members are searched; each of them gets the other's, and the rest one of the two."""
    searched: list[int] = []

    def search(ensemble: Ensemble, layers: list[str], start: Tensor, center: Tensor, *_: Tensor, **settings) -> Tensor:
        searched.extend(settings["members"])
        return torch.stack([center + 0.01 * (member + 1) for member in settings["members"]])

    monkeypatch.setattr(fasten, "search_features", search)
    ensemble, batch = small_ensemble((2,) * 5)
    batch = batch._replace(images=torch.full_like(batch.images, 0.5))
    pairs = set()
    for seed in range(20):
        method = FASTEN()
        method.begin_epoch(FIRST)
        searched.clear()
        torch.manual_seed(seed)
        stars = method.perturb(own_attack(5), ensemble, batch)[1]
        sources = [round(100 * (star[0, 0, 0, 0].item() - 0.5)) - 1 for star in stars]
        assert len(set(searched)) == 2
        assert set(sources) <= set(searched)
        assert all(source != i for i, source in enumerate(sources))
        pairs.add(frozenset(searched))
    assert len(pairs) > 5


def test_the_searches_of_fasten_start_at_points_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each member, and in each epoch."""
    starts: list[Tensor] = []

    def search(
        ensemble: Ensemble, layers: list[str], start: Tensor, center: Tensor, *_: Tensor, **__: object
    ) -> Tensor:
        starts.extend(start)
        return center.expand(2, *center.shape)

    monkeypatch.setattr(fasten, "search_features", search)
    ensemble, batch = small_ensemble((2, 2))
    method = FASTEN()
    for epoch in (FIRST, SECOND):
        method.begin_epoch(epoch)
        method.perturb(own_attack(2), ensemble, batch)
    assert len(starts) == 4
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(starts, 2))


def test_the_radius_of_fasten_is_its_own_and_not_that_of_the_attack() -> None:
    ensemble, batch = small_ensemble((2, 3))
    batch = batch._replace(images=batch.images.clamp(0.3, 0.7))
    method = FASTEN(eps=0.2)
    method.begin_epoch(FIRST)
    _, stars = method.perturb(own_attack(2), ensemble, batch)
    assert (stars - batch.images).abs().max().item() == pytest.approx(0.2, abs=1e-5)
