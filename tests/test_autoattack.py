"""AutoAttack: its versions, parity with pyautoattack, independence of the batch, refusals, and what its result says."""

from __future__ import annotations

import importlib.util
import itertools
import warnings
from collections.abc import Sequence

import pytest
import torch
from attack_models import correct_batch, digits_ensemble, digits_test, linear, small_net
from torch import Tensor, nn

from ceat_fast.attacks import APGD, FAB, AutoAttack, Square
from ceat_fast.attacks.worklist import WorkList
from ceat_fast.ensemble import Ensemble

SHORT = {"version": "custom", "attacks": ("apgd-ce", "apgd-t", "fab-t", "square"), "steps": 10, "queries": 100}
EVERY_ATTACK = [
    APGD(0.03, steps=12, restarts=2),
    APGD(0.03, loss="dlr", steps=12),
    APGD(0.15, "L2", loss="dlr-targeted", steps=12, targets=3),
    FAB(0.03, steps=8, restarts=2),
    FAB(0.15, "L2", targeted=True, steps=8, targets=3),
    FAB(0.15, "L2", steps=8, restarts=2, minimal=True),
    Square(0.03, queries=80, restarts=2),
    Square(0.15, "L2", queries=80),
    AutoAttack(0.03, **SHORT),
]
NAMES = [f"{type(attack).__name__}-{attack.norm}-{number}" for number, attack in enumerate(EVERY_ATTACK)]


def test_standard_version_is_the_published_one():
    common = {"eps": 0.03, "norm": "L2", "seed": 5, "batch_size": 100}
    assert AutoAttack(0.03, "L2", seed=5, batch_size=100).stages == {
        "apgd-ce": APGD(loss="ce", steps=100, restarts=1, rho=0.75, eot=1, **common),
        "apgd-t": APGD(loss="dlr-targeted", steps=100, restarts=1, targets=9, rho=0.75, eot=1, **common),
        "fab-t": FAB(targeted=True, steps=100, restarts=1, targets=9, alpha_max=0.1, eta=1.05, beta=0.9, **common),
        "square": Square(queries=5000, p_init=0.8, restarts=1, rescale_schedule=False, **common),
    }


def test_other_versions_are_the_published_ones():
    plus = AutoAttack(version="plus").stages
    assert list(plus) == ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]
    assert [stage.restarts for stage in plus.values()] == [5, 5, 5, 1, 1, 1]
    assert not plus["fab"].targeted
    rand = AutoAttack(version="rand").stages
    assert {name: (stage.eot, stage.steps, stage.restarts) for name, stage in rand.items()} == {
        "apgd-ce": (20, 100, 1),
        "apgd-dlr": (20, 100, 1),
    }


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({}, "AutoAttack"),
        ({"version": "plus"}, "AutoAttack (plus)"),
        ({"precision": "mixed"}, "AutoAttack, mixed precision"),
        ({"backend": "reference"}, "AutoAttack, pyautoattack"),
        ({"version": "custom", "attacks": ("apgd-ce", "square")}, "apgd-ce + square"),
    ],
)
def test_only_the_full_fp32_budget_is_called_autoattack(settings, label):
    assert AutoAttack(**settings).label == label


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"version": "quick"}, "unknown version 'quick'"),
        ({"steps": 10}, "steps is fixed in version 'standard'; version='custom' takes it"),
        ({"version": "plus", "attacks": ("fab",)}, "attacks is fixed in version 'plus'"),
        ({"version": "custom"}, "version='custom' needs attacks"),
        ({"version": "custom", "attacks": ("apgd",)}, "unknown attack 'apgd'"),
        ({"version": "custom", "attacks": ("fab", "fab")}, "attacks must differ"),
        ({"version": "custom", "attacks": ("fab",), "steps": 0}, "steps must be at least 1, got 0"),
        ({"backend": "reference", "precision": "mixed"}, "backend='reference' computes in fp32"),
        ({"backend": "upstream"}, "unknown backend 'upstream'"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        AutoAttack(**settings)


@pytest.mark.parametrize("attack", EVERY_ATTACK, ids=NAMES)
def test_results_do_not_depend_on_the_batch_size_or_the_order(attack):
    model = small_net()
    x, y = correct_batch(model, 13)
    index = 100 + torch.arange(13)
    whole = attack.run(model, x, y, index)
    assert 0 < whole.fooled.sum() < 13 or (attack.name == "fab" and attack.minimal)
    for size in (1, 7):
        small = type(attack)(**{**vars_of(attack), "batch_size": size}).run(model, x, y, index)
        assert torch.equal(small.fooled, whole.fooled)
        assert torch.equal(small.fooled_by, whole.fooled_by)
        assert torch.allclose(small.x_adv, whole.x_adv, atol=1e-9)
        assert torch.allclose(small.margin, whole.margin, atol=1e-9)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))[:9]
    part = attack.run(model, x[order], y[order], index[order])
    assert torch.equal(part.fooled_by, whole.fooled_by[order])
    assert torch.allclose(part.x_adv, whole.x_adv[order], atol=1e-9)


def vars_of(attack):
    return {name: getattr(attack, name) for name in attack.__dataclass_fields__}


@pytest.mark.parametrize("attack", EVERY_ATTACK, ids=NAMES)
def test_starting_runs_early_changes_only_the_passes(attack, monkeypatch):
    """A GPU starts later runs of a sample before the earlier ones have ended, and looks at the rows every few steps."""
    model = small_net()
    x, y = correct_batch(model, 9)
    patient = attack.run(model, x, y)

    def eager(self, *arguments):
        prepare(self, *arguments)
        self._is_cpu = False

    prepare = WorkList.__init__
    monkeypatch.setattr(WorkList, "__init__", eager)
    early = attack.run(model, x, y)
    assert torch.equal(early.fooled_by, patient.fooled_by)
    assert torch.allclose(early.x_adv, patient.x_adv, atol=1e-9)
    assert (early.forwards >= patient.forwards).all()


@pytest.mark.parametrize("attack", EVERY_ATTACK, ids=NAMES)
def test_results_are_in_the_ball_and_say_what_the_model_answers(attack):
    model = small_net()
    x, y = correct_batch(model, 12)
    y[0] = (y[0] + 1) % 10  # wrong from the start
    result = attack.run(model, x, y)
    with torch.no_grad():
        answers = model(result.x_adv)
    assert torch.equal(result.prediction, answers.argmax(1))
    assert torch.equal(result.fooled, result.prediction != y)
    others = answers.scatter(1, y[:, None], -torch.inf).amax(1)
    assert torch.allclose(result.margin, others - answers.gather(1, y[:, None]).squeeze(1))
    order = torch.inf if attack.norm == "Linf" else 2
    assert torch.allclose(result.norm, torch.linalg.vector_norm((result.x_adv - x).flatten(1), order, dim=1))
    if not getattr(attack, "minimal", False):
        assert (result.norm <= attack.radius + 1e-9).all()
    assert ((result.x_adv >= 0) & (result.x_adv <= 1)).all()
    assert result.fooled_by[0] == 0
    assert result.norm[0] == 0
    assert result.accuracy_after("clean") == pytest.approx(11 / 12)
    assert result.accuracy_after(result.attacks[-1]) == pytest.approx(result.robust_accuracy)


def test_seeds_differ_and_repeat():
    model = small_net()
    x, y = correct_batch(model, 6)
    first, again, other = (APGD(0.01, steps=3, seed=seed)(model, x, y) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_radii_of_their_own():
    model = small_net()
    x, y = correct_batch(model, 6)
    eps = torch.tensor([0.0, 0.001, 0.01, 0.03, 0.3, 1.0]).double()
    for attack in (APGD(steps=10), FAB(steps=10), Square(queries=50)):
        result = attack.run(model, x, y, eps=eps)
        assert (result.norm <= eps + 1e-12).all()
        assert result.fooled[-1]
        assert not result.fooled[0]


@pytest.mark.parametrize("attack", EVERY_ATTACK, ids=NAMES)
def test_refuses_input(attack):
    model = small_net()
    x, y = correct_batch(model, 4)
    nan = small_net()
    nan[1].weight.data[:, 0] = torch.nan
    for bad, message in (
        ((model, 255 * x, y), r"x must lie in \[0, 1\]"),
        ((model, x.half(), y), "x must be float32 or float64"),
        ((model, x, y + 10), r"y must lie in \[0, 10\)"),
        ((model, x, y - 10), "y must not be negative"),
        ((model, x, y[:3]), "y must be int64 of shape"),
        ((small_net().train(), x, y), "model is in train mode"),
        ((nan, x, y), "model returned NaN or infinite logits on 4 of 4 samples"),
    ):
        with pytest.raises(ValueError, match=message):
            attack(*bad)


class Trap(nn.Module):
    """Sure of class 0, until an entry is above a half: then the logit of that class is broken."""

    def __init__(self, broken):
        super().__init__()
        self.broken = broken

    def forward(self, x):
        total = x.flatten(1).sum(1)
        logits = torch.stack([1 + 0 * total, total / 100, 0 * total], 1)
        beyond = (x.flatten(1).amax(1, keepdim=True) > 0.5001) & (torch.arange(3) == 0)
        return torch.where(beyond, self.broken, logits)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_refuses_broken_logits_that_come_up_on_the_way(broken):
    """An infinite logit of the true class would look like a robust sample."""
    x, y = torch.full((3, 1, 2, 2), 0.5), torch.zeros(3, dtype=torch.int64)
    for attack in (APGD(0.1, steps=5), FAB(0.1, steps=5), Square(0.1, queries=5)):
        with pytest.raises(ValueError, match=r"model returned NaN or infinite logits on [1-3] of 3"):
            attack(Trap(broken).eval(), x, y)
    with pytest.raises(ValueError, match="model returned NaN or infinite logits on 3 of 3 samples"):
        Square(0.1, queries=5)(Trap(broken).eval(), x + 0.1, y)


def test_a_class_may_be_ruled_out():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = small_net()

        def forward(self, x):
            return torch.where(torch.arange(10) == 9, -torch.inf, self.model(x))

    model = Masked().eval()
    x, y = correct_batch(model, 6)
    with pytest.warns(UserWarning, match="apgd-t: zero gradient"):  # towards that class
        result = AutoAttack(0.03, **SHORT).run(model, x, y)
    assert result.fooled.sum() > 0
    assert (result.prediction != 9).all()


def test_refuses_a_model_without_gradient():
    class Detached(nn.Module):
        def forward(self, x):
            return torch.stack([x.detach().flatten(1).sum(1) + k for k in range(4)], 1)

    for attack in (APGD(0.1), FAB(0.1)):
        with pytest.raises(ValueError, match="logits without a gradient with respect to x: only Square can attack it"):
            attack(Detached().eval(), torch.rand(2, 1, 6, 6), torch.full((2,), 3))


def test_refuses_a_model_without_logits():
    with pytest.raises(ValueError, match=r"model must return logits \(2, K\), got \(2, 3, 4\)"):
        APGD(0.1)(nn.Identity().eval(), torch.rand(2, 3, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="loss='dlr-targeted' needs at least 4 classes, the model has 3"):
        AutoAttack(0.1)(small_net(3).float(), torch.rand(2, 1, 6, 6), torch.zeros(2, dtype=torch.int64))


def test_flags_probabilities():
    model = nn.Sequential(small_net(), nn.Softmax(1)).eval()
    with pytest.warns(UserWarning, match="returns probabilities, not logits"):
        result = AutoAttack(0.01, **SHORT).run(model, *correct_batch(model[0], 4))
    assert any("probabilities" in flag for flag in result.flags)


@pytest.mark.parametrize("passes", [range(2, 10**6), [4]], ids=["always", "once"])
def test_flags_random_answers(passes: Sequence[int]) -> None:
    class Random(nn.Module):
        """Answers at random in these passes."""

        count = 0

        def __init__(self) -> None:
            super().__init__()
            self.model = small_net()

        def forward(self, x: Tensor) -> Tensor:
            Random.count += 1  # of all copies
            return self.model(x) + (torch.randn(len(x), 10) if Random.count in passes else 0)

    with pytest.warns(UserWarning, match="answers are random: use version='rand'"):
        AutoAttack(0.01, **SHORT).run(Random().eval(), *correct_batch(small_net(), 20))


def test_flags_square_beating_gradients():
    """Steps hide the gradient: only random search sees where the staircase goes up."""

    class Staircase(nn.Module):
        def forward(self, x):
            signal = ((x.flatten(1).mean(1) - 0.5) * 20).floor() + 0 * x.flatten(1).sum(1)
            zero = torch.zeros_like(signal)
            return torch.stack([zero + 0.5, signal, zero - 9, zero - 9], 1)

    x = torch.full((4, 1, 4, 4), 0.45, dtype=torch.float64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        settings = {"version": "custom", "attacks": ("apgd-ce", "square"), "steps": 5, "queries": 300}
        result = AutoAttack(0.2, **settings).run(Staircase().eval(), x, torch.zeros(4, dtype=torch.int64))
    assert result.fooled.all()
    messages = [str(warning.message) for warning in caught]
    assert any("square lowers the robust accuracy by 100.00%" in message for message in messages)
    assert any("apgd-ce: zero gradient at the start of 4 searches" in message for message in messages)


def test_a_square_that_comes_first_casts_no_doubt_on_gradients() -> None:
    x, y = torch.full((2, 1, 2, 2), 0.5, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    model = linear([[0.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]], [2.001, 0, 0, 0])
    result = AutoAttack(0.1, version="custom", attacks=("square", "apgd-ce"), queries=20, steps=3).run(model, x, y)
    assert result.fooled_by.tolist() == [1, 1]
    assert result.flags == []


def test_an_honest_model_is_not_flagged():
    model = small_net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert AutoAttack(0.02, **SHORT).run(model, *correct_batch(model, 8)).flags == []


def test_stages_run_one_by_one_agree_with_the_whole():
    """What a resumed evaluation does: each stage on the samples that the stages before it left."""
    model = small_net()
    x, y = correct_batch(model, 12)
    attack = AutoAttack(0.02, **SHORT)
    whole = attack.run(model, x, y)
    robust = torch.arange(12)
    for number, stage in enumerate(attack.stages.values(), start=1):
        result = stage.run(model, x[robust], y[robust], index=robust)
        assert robust[result.fooled].tolist() == (whole.fooled_by == number).nonzero().squeeze(1).tolist()
        robust = robust[~result.fooled]


def test_observer_hears_of_every_sample_once_per_attack():
    model = small_net()
    x, y = correct_batch(model, 12)
    heard = {}

    def observe(attack, samples, result):
        for sample in samples.tolist():
            assert sample not in heard.setdefault(attack, {})
            heard[attack][sample] = bool(result.fooled[sample])

    result = AutoAttack(0.02, batch_size=5, **SHORT).run(model, x, y, observer=observe)
    assert list(heard) == result.attacks
    for place, attack in enumerate(result.attacks):
        still = (result.fooled_by == -1) | (result.fooled_by >= max(place, 0))
        assert sorted(heard[attack]) == still.nonzero().squeeze(1).tolist() if place else len(heard[attack]) == 12
        for sample, fooled in heard[attack].items():
            assert fooled == (result.fooled_by[sample].item() == place)


def test_observer_hears_how_far_the_work_is(monkeypatch):
    monkeypatch.setattr("ceat_fast.attacks.session._HEARTBEAT", -1.0)
    model = small_net()
    x, y = correct_batch(model, 12)
    heard = []
    attack = AutoAttack(0.02, batch_size=5, **SHORT)
    result = attack.run(model, x, y, observer=lambda name, samples, so_far: heard.append((name, so_far.progress)))
    shares = [share for _, share in heard]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert 0.9 < shares[-1] <= result.progress == 1
    for name in attack.stages:
        own = [share for of, share in heard if of == name]
        assert len(set(own)) > 10, name  # at every step, not only where samples are done with
    ends = [max(share for of, share in heard if of == name) for name in attack.stages]
    # Steps are weighted by the passes that they take: of each sample 2 per step of APGD, 3 of FAB, 1 of Square.
    steps, queries = SHORT["steps"], SHORT["queries"]
    work = {"apgd-ce": 2 * (steps + 1), "apgd-t": 2 * 9 * (steps + 1), "fab-t": 3 * 9 * steps, "square": queries + 1}
    total = sum(work[name] for name in attack.stages)
    expected = list(itertools.accumulate(work[name] / total for name in attack.stages))
    assert ends == pytest.approx(expected, abs=0.02)


def test_ensemble_and_its_state_are_left_alone():
    torch.manual_seed(0)
    members = [nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5)) for _ in range(3)]
    ens = Ensemble(members).eval()
    for parameter in ens.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: tensor.clone() for name, tensor in ens.state_dict().items()}
    x, y = torch.rand(6, 1, 6, 6), torch.randint(5, (6,))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    for backend in ("native", "reference"):
        if backend == "reference":
            pytest.importorskip("pyautoattack")
        AutoAttack(0.02, backend=backend, **SHORT).run(ens, x, y)
        assert all(torch.equal(tensor, before[name]) for name, tensor in ens.state_dict().items())
        assert all(parameter.requires_grad and (parameter.grad == 1).all() for parameter in ens.parameters())
        assert torch.equal(torch.get_rng_state(), state)


def test_mixed_precision_confirms_in_fp32(monkeypatch):
    """A search that sees the outputs rounded to two digits: what it claims is judged by the model itself."""
    from ceat_fast.attacks import session

    model = small_net(dtype=torch.float32)

    class Coarse(nn.Module):
        def forward(self, x):
            logits = model(x)
            return logits + (logits.detach().bfloat16().float() - logits.detach())

    class Frozen:
        def __init__(self, *unused):
            pass

        def __enter__(self):
            return Coarse().eval()

        def __exit__(self, *unused):
            pass

    monkeypatch.setattr(session, "frozen", Frozen)
    monkeypatch.setattr(session, "resolve_precision", lambda *unused: "bf16")
    x, y = correct_batch(model, 40)
    mixed = AutoAttack(0.06, precision="mixed", **SHORT).run(model, x, y)
    assert mixed.precision == "mixed (bf16 search, fp32 verdicts)"
    with torch.no_grad():
        assert torch.equal(model(mixed.x_adv).argmax(1) != y, mixed.fooled)
    monkeypatch.undo()
    strict = AutoAttack(0.06, **SHORT).run(model, x, y)
    assert 5 < strict.fooled.sum() < 35
    assert (mixed.fooled == strict.fooled).float().mean() >= 0.95


def test_mixed_precision_says_what_it_searched_in():
    result = APGD(0.01, steps=2, precision="mixed").run(small_net(), *correct_batch(small_net(), 2))
    assert result.precision == "mixed (fp32 search, fp32 verdicts)"  # an fp64 model keeps its type


def test_a_compiled_model_is_not_taken_for_a_random_or_dynamic_one():
    model = small_net(dtype=torch.float32)
    x, y = correct_batch(model, 4)
    compiled = torch.compile(model, backend="aot_eager").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        settings = {"version": "custom", "attacks": ("apgd-ce", "fab", "square"), "steps": 3, "queries": 5}
        result = AutoAttack(0.02, **settings).run(compiled, x, y)
    assert result.flags == []
    assert torch.equal(result.fooled, AutoAttack(0.02, **settings).run(model, x, y).fooled)


def test_reference_backend_says_what_is_missing(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "autoattack" in name else find(name))
    model = small_net(dtype=torch.float32)
    with pytest.raises(ImportError, match=r'pip install "ceat_fast\[autoattack\]"'):
        AutoAttack(0.1, backend="reference")(model, *correct_batch(model, 2))


def test_reference_backend_refuses_fp64():
    model = small_net()
    with pytest.raises(ValueError, match=r"backend='reference' needs float32 inputs, got torch\.float64"):
        AutoAttack(0.1, backend="reference")(model, *correct_batch(model, 2))


@pytest.fixture(scope="module")
def weak_ensemble():
    return digits_ensemble(eps=0.0, epochs=2, members=2)


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.06), ("L2", 0.4)])
def test_parity_with_pyautoattack_on_a_short_budget(norm, eps, weak_ensemble):
    """20 steps and 100 queries of each; the noise differs, so a sample at the edge may fall to one of them only."""
    pytest.importorskip("pyautoattack")
    x, y = digits_test(100)
    settings = {**SHORT, "steps": 20, "eps": eps, "norm": norm, "targets": 4}
    ours, theirs = (
        AutoAttack(backend=backend, **settings).run(weak_ensemble, x, y) for backend in ("native", "reference")
    )
    assert theirs.attacks == ours.attacks
    assert (theirs.forwards == -1).all()
    assert 0.1 < theirs.robust_accuracy < 0.9
    assert (ours.fooled == theirs.fooled).double().mean() >= 0.98
    assert abs(ours.accuracy_after("apgd-ce") - theirs.accuracy_after("apgd-ce")) <= 0.03


@pytest.mark.slow
@pytest.mark.parametrize("trained_eps", [0.0, 0.15])
def test_parity_with_pyautoattack_on_the_full_budget(trained_eps):
    pytest.importorskip("pyautoattack")
    ens = digits_ensemble(trained_eps, epochs=8)
    x, y = digits_test(200)
    eps = 0.05 if trained_eps == 0 else 0.15
    ours, theirs = (AutoAttack(eps, backend=backend).run(ens, x, y) for backend in ("native", "reference"))
    assert (ours.fooled == theirs.fooled).double().mean() >= 0.99
    assert abs(ours.robust_accuracy - theirs.robust_accuracy) <= 0.01


@pytest.mark.parametrize("attack", [APGD(0.1), FAB(0.1), Square(0.1), AutoAttack(0.1, **SHORT)])
def test_no_samples(attack):
    model = small_net()
    x, y = correct_batch(model, 2)
    result = attack.run(model, x[:0], y[:0])
    assert result.x_adv.shape == (0, 1, 6, 6)
    assert result.fooled.tolist() == []


def test_inference_mode_and_no_grad_change_nothing():
    model = small_net()
    x, y = correct_batch(model, 3)
    attack = AutoAttack(0.02, **SHORT)
    outside = attack(model, x, y)
    with torch.inference_mode():
        assert torch.equal(attack(model, x.clone(), y.clone()), outside)
    with torch.no_grad():
        assert torch.equal(attack(model, x, y), outside)
