"""APGD: its schedule, optimum on linear models, the authors' trajectory, passes, and independence of the batch."""

from __future__ import annotations

import pytest
import torch
from attack_models import Counting, correct_batch, first_run, linear, small_net
from torch import nn

from ceat_fast.attacks import APGD, apgd
from ceat_fast.attacks.apgd import checkpoint_periods
from ceat_fast.attacks.worklist import Start

LOSSES = ["ce", "dlr", "dlr-targeted"]
HALF = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
LABEL = torch.tensor([0])


def test_checkpoints_are_those_of_the_paper():
    """0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93 and 0.99 of 100 steps."""
    assert checkpoint_periods(100) == [22, 19, 16, 13, 10, 7, 6, 6]
    assert checkpoint_periods(1) == [1]


def test_a_checkpoint_halves_the_step_size_after_few_rises_or_none_of_the_best_loss() -> None:
    """Of 22 steps, 16 rises are few. A best loss that stands still counts unless the last checkpoint halved as well."""
    search = APGD(0.1, steps=100).search(small_net(), 0.0, 10)
    x, y = torch.rand(4, 1, 6, 6, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    rows = search.begin(first_run(x, y, 0.1, torch.zeros(4, 10)))
    rows.rises = torch.tensor([16, 17, 17, 17])
    rows.checked_loss = torch.tensor([0.5, 1.0, 1.0, 0.5])
    rows.halved = torch.tensor([False, False, True, False])
    rows.loss, rows.best_loss = torch.full((4,), 0.75), torch.ones(4)
    rows.best_point, rows.best_grad = x, torch.ones_like(x)
    there = rows.point
    grad = search._check(rows, torch.zeros_like(x), torch.full((4,), 16))
    halves = [True, True, False, False]
    assert rows.halved.tolist() == halves
    assert rows.eta.tolist() == [0.1, 0.1, 0.2, 0.2]
    for row, goes_back in enumerate(halves):
        assert torch.equal(rows.point[row], x[row] if goes_back else there[row])
        assert grad[row].unique().tolist() == [goes_back]
    assert rows.rises.tolist() == [0] * 4
    assert rows.checked_loss.tolist() == [1.0] * 4


@pytest.mark.parametrize("loss", LOSSES)
def test_linear_model_ends_in_the_best_corner(loss):
    """The margin of class 1 rises along (2, -1, 3, 0); a bias of 9 keeps label 0 right, so the search goes on."""
    weights = [[0.0, 1, 0, 5], [2, 0, 3, 5], [0, 0, 0, 5], [0, 0, 0, 5], [0, 0, 0, 5]]
    model = linear(weights, [9.0, 0, -1, -2, -3])
    result = APGD(0.125, loss=loss, targets=1).run(model, HALF, LABEL)
    assert not result.fooled.item()
    assert result.x_adv.flatten()[:3].tolist() == [0.625, 0.375, 0.625]
    # z_1 - z_0: 5 / 2 at x, less the bias, plus eps * (2 + 1 + 3).
    assert result.margin.item() == pytest.approx(2.5 - 0.5 - 9 + 0.125 * 6)


def test_linear_model_in_l2_ends_along_the_weights():
    model = linear([[0.0, 0, 0, 0], [2, -1, 2, 0], [0, 0, 0, 0]], [9.0, 0, 0])
    result = APGD(0.3, norm="L2", loss="ce").run(model, HALF, LABEL)
    assert (result.x_adv - HALF).flatten().tolist() == pytest.approx([0.2, -0.1, 0.2, 0], abs=1e-6)
    assert result.norm.item() == pytest.approx(0.3)


def test_image_range_cuts_the_ball():
    model = linear([[0.0, 0], [1, -1], [0, 0]], [9.0, 0, 0])
    x = torch.tensor([[0.95, 0.02]], dtype=torch.float64)
    assert APGD(0.1)(model, x, LABEL).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.02), ("L2", 0.1)])
@pytest.mark.parametrize("loss", LOSSES)
def test_trajectory_is_that_of_the_authors_code(norm, eps, loss, monkeypatch):
    """From the same start: the same best loss and the same point after 60 steps (5 checkpoints).

    Their loss of the start counts as 0 at the first checkpoint, which could matter only to rows that rise in exactly 10
    of the first 13 steps.
    """
    authors = pytest.importorskip("pyautoattack.autopgd_base")
    model = small_net(dtype=torch.float32)
    x, y = correct_batch(model, 12)
    direction = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) * 2 - 1
    order = torch.inf if norm == "Linf" else 2
    direction /= torch.linalg.vector_norm(direction.flatten(1), order, dim=1)[:, None, None, None]
    monkeypatch.setattr(apgd, "random_direction", lambda *unused: direction)
    with torch.no_grad():
        clean = model(x)
    search = APGD(eps, norm, loss=loss, steps=60).search(model, 0.0, 10)
    rows = search.begin(first_run(x, y, eps, clean))
    with torch.no_grad():
        for step in range(search.steps - 1):  # the last one only looks
            search.advance(rows, torch.full((12,), step))
        search.advance(rows, torch.full((12,), search.steps - 1))

    common = {"n_iter": 60, "norm": norm, "eps": eps, "seed": 0, "device": "cpu"}
    if loss == "dlr-targeted":
        theirs = authors.APGDAttack_targeted(model, **common)
        theirs.y_target = clean.sort(dim=1)[1][:, -2]
    else:
        theirs = authors.APGDAttack(model, loss=loss, **common)
    theirs.init_hyperparam(x)
    best, _, best_loss, _ = theirs.attack_single_run(x, y, x_init=(x + eps * direction).clamp(0, 1))
    assert torch.allclose(rows.best_loss, best_loss, atol=2e-4)
    assert ((rows.best_point - best).abs().flatten(1).amax(1) < 0.02 * eps).float().mean() >= 0.75


@pytest.mark.parametrize(
    ("loss", "forwards", "backwards"),
    [("ce", 1 + 101, 100), ("dlr", 1 + 101, 100), ("dlr-targeted", 1 + 9 * 101, 9 * 100)],
)
def test_passes_of_a_surviving_sample(loss, forwards, backwards):
    """One look at the clean image, 100 steps and a look at the last point for each run.

    The authors' code needs 102 forwards and 101 backwards for "ce", and 919 and 909 for 9 targets: it evaluates the
    gradient of the last point, and the clean image once more for each target.
    """
    model = Counting(small_net())
    x, y = correct_batch(model.model, 3)
    result = APGD(1e-6, loss=loss).run(model, x, y)
    assert not result.fooled.any()
    assert result.forwards.tolist() == [forwards] * 3
    assert result.backwards.tolist() == [backwards] * 3
    assert (model.passes.forwards, model.passes.backwards) == (3 * forwards, 3 * backwards)


def test_fooled_samples_leave_at_once():
    """Sample 0 is on the edge, so a first point fools it; sample 1 survives 20 steps; sample 2 is wrong at first."""
    model = Counting(linear([[0.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], [2.0, 0, -9]))
    x = torch.stack([HALF[0] - 1e-6, HALF[0] - 0.4, HALF[0] + 0.1])
    result = APGD(0.1, steps=20).run(model, x, torch.zeros(3, dtype=torch.int64))
    assert result.attacks == ["clean", "apgd-ce"]
    assert result.fooled.tolist() == [True, False, True]
    assert result.fooled_by.tolist() == [1, -1, 0]
    assert result.forwards.tolist()[1:] == [1 + 21, 1]
    # Clean, one or two points, and the judge.
    assert result.forwards[0].item() in (3, 4)
    assert torch.equal(result.x_adv[2], x[2])
    assert result.robust_accuracy == pytest.approx(1 / 3)


def test_a_later_run_is_not_started_once_a_sample_is_fooled():
    """In a batch with rows enough; a small one has room for it, and the sample's verdict is that of the first run."""
    model = linear([[0.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]], [2.0, 0, -9, -9])
    for count in (40, 1):
        x, label = (HALF - 1e-3).repeat(count, *[1] * (HALF.dim() - 1)), LABEL.repeat(count)
        many = APGD(0.1, loss="dlr-targeted", steps=20, restarts=3).run(model, x, label)
        once = APGD(0.1, loss="dlr-targeted", steps=20).run(model, x, label)
        assert many.fooled.all()
        assert torch.equal(many.forwards, once.forwards) == (count == 40)
        assert torch.equal(many.fooled_by, once.fooled_by)


def test_targets_are_the_likeliest_wrong_classes_in_order():
    search = APGD(0.1, loss="dlr-targeted", targets=3, restarts=2).search(small_net(5), 0.0, 5)
    clean = torch.tensor([[0.1, 0.9, 0.3, 0.8, 0.2]]).repeat(6, 1)
    x, y, run = torch.rand(6, 1, 6, 6), torch.full((6,), 1), torch.arange(6)
    rows = search.begin(Start(x, y, torch.full((6,), 0.1), clean, run, noise_key=run))
    assert search.runs == 6
    assert rows.target.tolist() == [3, 3, 2, 2, 4, 4]


def test_averaged_gradients_point_where_noise_hides_them():
    """Multiplicative noise of either sign hides the gradient of one pass in 40 %; the mean of 40 shows it."""

    class Noisy(nn.Module):
        def forward(self, x):
            sign = torch.where(torch.rand(len(x), 1, dtype=x.dtype) < 0.4, -1.0, 1.0)
            signal = x.flatten(1).sum(1, keepdim=True) * sign * 0.01
            return torch.cat([torch.full_like(signal, 9), signal, torch.zeros_like(signal)], 1)

    torch.manual_seed(0)
    search = APGD(0.1, eot=40).search(Noisy().eval(), 0.0, 3)
    zero = torch.zeros(1, dtype=torch.int64)
    rows = search.begin(first_run(HALF, zero, 0.1, torch.zeros(1, 3)))
    with torch.no_grad():
        passes = search.advance(rows, zero)
    assert tuple(passes) == (40, 40)
    assert (rows.point > HALF).all()


def test_zero_gradients_are_flagged():
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3), nn.Threshold(100.0, 0.0)).double().eval()
    x = torch.rand(4, 1, 6, 6, dtype=torch.float64)
    with pytest.warns(UserWarning, match="apgd-ce: zero gradient at the start of 4 searches"):
        APGD(0.1, steps=2).run(model, x, torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "cross"}, "unknown loss 'cross'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"restarts": 0}, "restarts must be at least 1, got 0"),
        ({"targets": 0}, "targets must be at least 1, got 0"),
        ({"eot": 0}, "eot must be at least 1, got 0"),
        ({"rho": 1.5}, r"rho must be in \[0, 1\], got 1.5"),
        ({"norm": "L1"}, "unknown norm 'L1'"),
        ({"eps": 1.5}, r"eps must be in \[0, 1\], got 1.5"),
        ({"precision": "bf16"}, "unknown precision 'bf16'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        APGD(**settings)


@pytest.mark.parametrize(("loss", "classes"), [("dlr", 2), ("dlr-targeted", 3)])
def test_refuses_too_few_classes(loss, classes):
    model = small_net(classes)
    with pytest.raises(
        ValueError, match=f"loss='{loss}' needs at least {classes + 1} classes, the model has {classes}"
    ):
        APGD(0.1, loss=loss)(model, *correct_batch(model, 2))
