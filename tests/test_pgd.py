"""PGD: optimum on linear models, the ball, batching over members and restarts, and refusals."""

from __future__ import annotations

import copy
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from ceat_fast.attacks import CW, MDI2, MIM, PGD, parse_budget
from ceat_fast.attacks.objective import Objective
from ceat_fast.ensemble import Ensemble


class SmallNet(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 3)

    def forward(self, x):
        return self.fc(F.relu(self.bn(self.conv(4 * x))).mean((2, 3)))


@pytest.fixture
def ens():
    torch.manual_seed(0)
    ens = Ensemble([SmallNet().double() for _ in range(3)])
    for member in ens.members:
        member(torch.rand(64, 1, 4, 4, dtype=torch.float64))  # running statistics of its own
    return ens.eval()


def batch(size=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(size, 1, 4, 4, dtype=torch.float64, generator=generator)
    return x, torch.randint(3, (size,), generator=generator)


def linear(*weights):
    """Two classes, logit difference w1 - w0 . x; the last dimension of x is len(w)."""
    model = nn.Linear(len(weights[0]), 2, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.tensor(weights, dtype=torch.float64))
    return model.eval()


@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("random_start", [False, True])
def test_linear_model_ends_in_the_corner_of_the_ball(loss, random_start):
    """Class 1's weights exceed class 0's by (2, -1, 3, 0): label 0 is attacked along the signs, label 1 against."""
    model = linear([0.5, 1.0, -1.0, 2.0], [2.5, 0.0, 2.0, 2.0])
    x = torch.full((2, 4), 0.5, dtype=torch.float64)
    attack = PGD(eps=0.125, alpha=0.03, steps=9, random_start=random_start, loss=loss)
    result = attack(model, x, torch.tensor([0, 1]))[:, :3]
    expected = torch.tensor([[0.625, 0.375, 0.625], [0.375, 0.625, 0.375]], dtype=torch.float64)
    assert torch.equal(result, expected)


def test_image_range_cuts_the_ball():
    model = linear([0.0, 0.0], [1.0, -1.0])
    x = torch.tensor([[0.95, 0.02]], dtype=torch.float64)
    result = PGD(eps=0.1, alpha=0.1, steps=3)(model, x, torch.tensor([0]))
    assert result.tolist() == [[1.0, 0.0]]


def test_one_step_without_random_start_is_the_sign_step():
    model = linear([0.0, 0.0, 0.0], [1.0, -1.0, 0.0])
    x = torch.full((1, 3), 0.5, dtype=torch.float64)
    attack = PGD(eps=0.25, alpha=0.0625, steps=1, random_start=False)
    assert attack(model, x, torch.tensor([0])).tolist() == [[0.5625, 0.4375, 0.5]]


def test_members_goal_attacks_each_member_along_its_own_weights():
    ens = Ensemble([linear([0, 0], [1, 1]), linear([0, 0], [1, -1]), linear([0, 0], [-3, -3])]).eval()
    x = torch.full((1, 2), 0.5, dtype=torch.float64)
    result = PGD(eps=0.25, alpha=0.25, steps=3, goal="members")(ens, x, torch.tensor([0]))
    assert result.tolist() == [[[0.75, 0.75]], [[0.75, 0.25]], [[0.25, 0.25]]]


@settings(max_examples=25, deadline=None)
@given(
    eps=st.floats(0, 1),
    alpha=st.floats(1e-3, 2),
    steps=st.integers(0, 3),
    restarts=st.integers(1, 2),
    goal=st.sampled_from(["ensemble", "members"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.none() | st.integers(0, 2**63),
)
def test_result_stays_in_the_ball_and_in_the_image_range(eps, alpha, steps, restarts, goal, dtype, seed):
    torch.manual_seed(0)
    ens = Ensemble([nn.Sequential(nn.Flatten(), nn.Linear(16, 3)) for _ in range(2)]).to(dtype).eval()
    x, y = batch()
    x = x.to(dtype)
    x[0], x[1] = 0, 1
    result = PGD(eps, alpha, steps, restarts=restarts, goal=goal, seed=seed)(ens, x, y)
    assert result.shape == ((2, *x.shape) if goal == "members" else x.shape)
    assert result.dtype == dtype
    assert (result - x).abs().max().item() <= eps + torch.finfo(dtype).eps
    assert result.min() >= 0
    assert result.max() <= 1


def plain_pgd(model, x, y, start, eps, alpha, steps):
    """The textbook loop, for one model with logits out."""
    x_adv = start
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y, reduction="sum"), x_adv)
        x_adv = (x_adv.detach() + alpha * grad.sign()).clamp(x - eps, x + eps).clamp(0, 1)
    return x_adv


@pytest.mark.parametrize("backend", ["loop", "vmap"])
def test_ensemble_goal_is_the_textbook_loop_on_the_mean_probability(ens, backend):
    ens.backend = backend
    x, y = batch()
    result = PGD(eps=0.1, alpha=0.03, steps=4, random_start=False)(ens, x, y)

    def mean_log_prob(z):
        return torch.stack([member(z).softmax(1) for member in ens.members]).mean(0).log()

    torch.testing.assert_close(result, plain_pgd(mean_log_prob, x, y, x, 0.1, 0.03, 4), atol=1e-12, rtol=0)


@pytest.mark.parametrize("backend", ["loop", "vmap"])
@pytest.mark.parametrize("restarts", [1, 3])
def test_members_goal_equals_separate_attacks(ens, backend, restarts):
    ens.backend = backend
    x, y = batch()
    attack = PGD(eps=0.1, alpha=0.03, steps=4, restarts=restarts, seed=5)
    together = PGD(eps=0.1, alpha=0.03, steps=4, restarts=restarts, seed=5, goal="members")(ens, x, y)
    for member, result in zip(ens.members, together, strict=True):
        torch.testing.assert_close(result, attack(member, x, y), atol=1e-12, rtol=0)


def test_mixed_architectures(ens):
    torch.manual_seed(3)
    mixed = Ensemble([ens.members[0], SmallNet(7).double().eval(), ens.members[1]], "vmap").eval()
    x, y = batch()
    together = PGD(eps=0.1, alpha=0.03, steps=3, seed=5, goal="members")(mixed, x, y)
    for member, result in zip(mixed.members, together, strict=True):
        torch.testing.assert_close(result, PGD(eps=0.1, alpha=0.03, steps=3, seed=5)(member, x, y), atol=1e-12, rtol=0)


def test_average_of_logits_is_what_is_attacked(ens):
    ens.average = "logit"
    x, y = batch()
    result = PGD(eps=0.1, alpha=0.03, steps=4, random_start=False)(ens, x, y)

    def mean_logits(z):
        return torch.stack([member(z) for member in ens.members]).mean(0)

    torch.testing.assert_close(result, plain_pgd(mean_logits, x, y, x, 0.1, 0.03, 4), atol=1e-12, rtol=0)


@pytest.mark.parametrize("goal", ["ensemble", "members"])
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_input_gradient_is_that_of_the_loss_by_definition(ens, goal, loss):
    x, y = batch()
    if goal == "members":
        x = torch.stack([x, x.flip(0), x.roll(1, 0)])
    losses, grad = Objective(ens, y, goal, loss, check_labels=False).gradient(x)
    leaf = x.clone().requires_grad_()
    if goal == "members":
        prob = torch.cat([member(leaf[m]).softmax(1) for m, member in enumerate(ens.members)])
        y = y.repeat(3)
    else:
        prob = sum(member(leaf).softmax(1) for member in ens.members) / 3
    true = prob[torch.arange(len(y)), y].log()
    others = torch.stack([p[torch.arange(3) != label].max() for p, label in zip(prob, y, strict=True)]).log()
    expected = -true if loss == "ce" else others - true
    torch.testing.assert_close(losses, expected.detach(), atol=1e-12, rtol=0)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), leaf)[0], atol=1e-12, rtol=0)


def final_losses(model, x, y):
    logits = model(x)
    return F.cross_entropy(logits, y, reduction="none"), logits.argmax(1) != y


@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_restarts_keep_the_worst_of_the_single_searches(ens, loss):
    """Restart 0 has the noise of a single search, so the result can only be worse for the model."""
    x, y = batch(40)
    single, several = (
        PGD(eps=0.2, alpha=0.01, steps=1, seed=2, restarts=restarts, loss=loss)(ens, x, y) for restarts in (1, 6)
    )
    loss_1, wrong_1 = final_losses(ens, single, y)
    loss_6, wrong_6 = final_losses(ens, several, y)
    assert bool((wrong_6 >= wrong_1).all())
    unchanged = wrong_6 == wrong_1
    if loss == "ce":
        assert bool((loss_6 >= loss_1 - 1e-12)[unchanged].all())
    assert bool((loss_6 > loss_1).any())


class Peaks(nn.Module):
    """One input value v decides three logits, so that a correct row can have a higher loss than a wrong one."""

    def forward(self, x):
        v = x.flatten(1)[:, :1]
        correct_but_unsure = torch.tensor([[0.01, 0.0, 0.0]], dtype=x.dtype)  # CE 1.09
        wrong_but_close = torch.tensor([[0.0, 0.1, -9.0]], dtype=x.dtype)  # CE 0.74
        return torch.where(v < 0.5, correct_but_unsure, wrong_but_close) + 0 * v


def test_a_misclassified_restart_beats_a_correct_one_with_higher_loss():
    x = torch.full((50, 1), 0.5, dtype=torch.float64)
    y = torch.zeros(50, dtype=torch.int64)
    result = PGD(eps=0.5, alpha=0.1, steps=0, restarts=12, seed=0)(Peaks().eval(), x, y)
    assert result.min() >= 0.5  # all 12 starts below 0.5 has probability 50 / 4096; not with this seed


def test_seeded_noise_depends_on_the_sample_alone(ens):
    """The whole batch, its parts and a shuffle give the same result per sample."""
    x, y = batch(7)
    attack = PGD(eps=0.1, alpha=0.03, steps=2, restarts=2, seed=11)
    whole = attack(ens, x, y)
    parts = [attack(ens, x[s], y[s], torch.arange(7)[s]) for s in (slice(0, 3), slice(3, 7))]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-12, rtol=0)
    order = torch.tensor([4, 0, 6, 2, 1, 5, 3])
    torch.testing.assert_close(attack(ens, x[order], y[order], order), whole[order], atol=1e-12, rtol=0)


def test_seeds_and_restarts_differ_and_repeat(ens):
    x, y = batch()
    starts = {seed: PGD(steps=0, seed=seed)(ens, x, y) for seed in (0, 1, -1, 2**63)}
    values = list(starts.values())
    assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
    assert torch.equal(PGD(steps=0, seed=1)(ens, x, y), starts[1])


def test_without_a_seed_torch_seeds_the_noise(ens):
    x, y = batch()
    torch.manual_seed(4)
    first, second = PGD(steps=1)(ens, x, y), PGD(steps=1)(ens, x, y)
    torch.manual_seed(4)
    assert torch.equal(PGD(steps=1)(ens, x, y), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("goal", ["ensemble", "members"])
def test_the_model_is_left_as_it_was(ens, goal):
    for p in ens.parameters():
        p.grad = torch.ones_like(p)
    ens.members[1].fc.requires_grad_(False)
    state = copy.deepcopy(ens.state_dict())
    flags = [p.requires_grad for p in ens.parameters()]
    x, y = batch()
    with torch.no_grad():
        result = PGD(steps=2, goal=goal)(ens, x, y)
    assert not result.requires_grad
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in ens.parameters())
    assert all(torch.equal(value, state[key]) for key, value in ens.state_dict().items())
    assert [p.requires_grad for p in ens.parameters()] == flags


def test_perturb_attacks_in_eval_mode_and_restores_train_mode(ens):
    x, y = batch()
    expected = PGD(steps=2, seed=1)(ens, x, y)
    ens.train()
    ens.members[1].bn.eval()
    modes = [module.training for module in ens.modules()]
    state = copy.deepcopy(ens.state_dict())
    assert torch.equal(PGD(steps=2, seed=1).perturb(ens, x, y), expected)
    assert [module.training for module in ens.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in ens.state_dict().items())


class Failing(SmallNet):
    def forward(self, x):
        raise KeyError("broken model")


def test_the_model_is_restored_after_an_exception():
    model = Failing().train()
    x, y = batch()
    with pytest.raises(KeyError):
        PGD().perturb(model, x.float(), y)
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_inputs_made_in_inference_mode(ens):
    x, y = batch()
    expected = PGD(steps=2, seed=0)(ens, x, y)
    with torch.inference_mode():
        assert torch.equal(PGD(steps=2, seed=0)(ens, x.clone(), y.clone()), expected)


@pytest.mark.parametrize("goal", ["ensemble", "members"])
@pytest.mark.parametrize("restarts", [1, 2])
def test_empty_batch(ens, goal, restarts):
    x, y = batch()
    result = PGD(goal=goal, restarts=restarts, steps=2)(ens, x[:0], y[:0])
    assert result.shape == ((3, 0, 1, 4, 4) if goal == "members" else (0, 1, 4, 4))


@pytest.mark.parametrize(
    ("value", "expected"),
    [("8/255", 8 / 255), (" 8 / 255 ", 8 / 255), ("0.031", 0.031), (0.25, 0.25), (1, 1.0), (Fraction(1, 8), 0.125)],
)
def test_budget_forms(value, expected):
    assert parse_budget("eps", value) == expected


@pytest.mark.parametrize(
    "value", ["8/0", "eight", "", "1/2/3", "nan", "-1/255", -0.1, float("nan"), float("inf"), "1e999"]
)
def test_bad_budgets_are_refused_with_their_name_and_value(value):
    with pytest.raises(ValueError, match="eps must be") as caught:
        PGD(eps=value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [None, True, [0.1]])
def test_budgets_of_another_type(value):
    with pytest.raises(TypeError, match="alpha must be a number or text"):
        PGD(alpha=value)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"eps": 1.5}, ValueError, r"eps must be in \[0, 1\], got 1.5"),
        ({"eps": "300/255"}, ValueError, r"eps must be in \[0, 1\], got '300/255'"),
        ({"alpha": 0}, ValueError, "alpha must be above 0, got 0"),
        ({"steps": -1}, ValueError, "steps must be at least 0, got -1"),
        ({"steps": 2.0}, TypeError, "steps must be an int, got 2.0"),
        ({"restarts": 0}, ValueError, "restarts must be at least 1, got 0"),
        ({"restarts": 2, "random_start": False}, ValueError, "would repeat one search"),
        ({"seed": 1.0}, TypeError, "seed must be an int, an int64 tensor"),
        ({"loss": "mse"}, ValueError, "unknown loss 'mse'"),
        ({"goal": "member"}, ValueError, r"unknown goal 'member' \(did you mean 'members'\?\)"),
    ],
)
def test_bad_settings(arguments, error, text):
    with pytest.raises(error, match=text):
        PGD(**arguments)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda x, y: (x.half(), y), "x must be float32 or float64"),
        (lambda x, y: (x * 3, y), r"x must lie in \[0, 1\], got values from"),
        (lambda x, y: (x - 0.5, y), r"x must lie in \[0, 1\], got values from"),
        (lambda x, y: (x.where(x < x.max(), torch.nan), y), r"x must lie in \[0, 1\], got NaN"),
        (lambda x, y: (x, y.int()), r"y must be int64 of shape \(6,\), got torch.int32"),
        (lambda x, y: (x, y[:5]), r"y must be int64 of shape \(6,\), got torch.int64 \(5,\)"),
        (lambda x, y: (x, y - 9), "y must not be negative"),
        (lambda x, y: (x, y + 3), r"y must lie in \[0, 3\), got"),
    ],
)
def test_bad_inputs(ens, spoil, text):
    x, y = spoil(*batch())
    with pytest.raises(ValueError, match=text):
        PGD(steps=1)(ens, x, y)


def test_a_model_in_train_mode_is_refused(ens):
    ens.members[1].bn.train()
    with pytest.raises(ValueError, match=r"train mode \(members.1.bn\): call model.eval\(\)"):
        PGD()(ens, *batch())


def test_members_goal_needs_an_ensemble(ens):
    with pytest.raises(TypeError, match="goal='members' needs an Ensemble, got SmallNet"):
        PGD(goal="members")(ens.members[0], *batch())


def test_nan_logits_are_an_error(ens):
    with torch.no_grad():
        ens.members[2].fc.bias[1] = torch.nan
    with pytest.raises(ValueError, match="NaN logits on 6 of 6"):
        PGD(steps=1)(ens, *batch())


def test_a_model_must_return_logits():
    with pytest.raises(ValueError, match=r"model must return logits \(6, K\), got \(6, 1, 4, 4\)"):
        PGD(steps=1)(nn.Identity().eval(), *batch())
    with pytest.raises(ValueError, match=r"model must return logits \(6, K\), got tuple"):
        PGD(steps=1)(Several().eval(), *batch())


class Several(nn.Module):
    """Returns more than logits."""

    def forward(self, x):
        return x.flatten(1), x


class SeenTypes(SmallNet):
    """Notes the types of its inputs."""

    seen: list[torch.dtype] = []  # noqa: RUF012 copies of the model share it

    def forward(self, x):
        self.seen += [x.dtype] * (len(x) > 0)  # a length stops symbolic tracing, which would lose the note
        return super().forward(x)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_low_precision_searches_and_fp32_chooses(precision, dtype):
    torch.manual_seed(0)
    model = SeenTypes().eval()
    x, y = batch()
    SeenTypes.seen.clear()
    result = PGD(0.1, 0.03, 3, restarts=2, seed=0, precision=precision)(model, x.float(), y)
    assert SeenTypes.seen == [dtype] * 3 + [torch.float32]
    assert result.dtype == torch.float32
    exact = PGD(0.1, 0.03, 3, restarts=2, seed=0)(model, x.float(), y)
    assert (result == exact).float().mean().item() > 0.8


def test_unknown_precision():
    with pytest.raises(ValueError, match="unknown precision 'half'"):
        PGD(precision="half")


@pytest.mark.parametrize("attack", [PGD, MIM, CW, MDI2])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_compiled_model_is_attacked_like_the_model(ens, attack, norm):
    model = ens.members[0]
    compiled = torch.compile(model, backend="aot_eager").eval()
    x, y = batch()
    settings = {"eps": 0.1, "alpha": 0.03, "steps": 3, "norm": norm, "seed": 0}
    expected = attack(**settings)(model, x, y)
    torch.testing.assert_close(attack(**settings)(compiled, x, y), expected, atol=1e-12, rtol=0)


def test_a_model_of_torchvision():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=5).eval()
    x, y = torch.rand(3, 3, 32, 32), torch.tensor([0, 1, 2])
    result = PGD(eps="8/255", alpha="4/255", steps=2, seed=0)(model, x, y)
    assert (result - x).abs().max().item() <= 8 / 255 + 1e-7
    before, after = (F.cross_entropy(model(z), y, reduction="none") for z in (x, result))
    assert bool((after > before).all())


class Counted(nn.Module):
    """Counts the samples of its forward and backward passes."""

    forwards = 0
    backwards = 0

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        Counted.forwards += len(x)
        if x.requires_grad:
            x.register_hook(self._count)
        return self.fc(x.flatten(1))

    @staticmethod
    def _count(grad):
        Counted.backwards += len(grad)


@pytest.mark.parametrize("attack", [PGD, MIM, CW, MDI2])
@pytest.mark.parametrize(("restarts", "forwards", "backwards"), [(1, 20, 20), (5, 105, 100)])
def test_passes_per_sample(attack, restarts, forwards, backwards):
    """Restarts cost one more forward each, for the choice among them."""
    Counted.forwards = Counted.backwards = 0
    x, y = batch()
    attack(steps=20, random_start=True, restarts=restarts)(Counted().eval(), x.float(), y)
    assert (Counted.forwards / 6, Counted.backwards / 6) == (forwards, backwards)
