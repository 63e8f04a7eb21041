"""FAB: the projection against bisection, distances on linear models, the authors' results, and passes."""

from __future__ import annotations

import pytest
import torch
from attack_models import Counting, correct_batch, first_run, linear, small_net
from hypothesis import given, settings
from hypothesis import strategies as st

from ceat_fast.attacks import FAB
from ceat_fast.attacks.projection import to_hyperplane
from ceat_fast.attacks.worklist import Start
from ceat_fast.ensemble import Ensemble, Execution

ORDERS = {"Linf": torch.inf, "L2": 2.0}


def moves_by_bisection(points, normal, offset, norm):
    """The multiplier l of every row found by halving an interval 200 times, in fp64."""
    sign = torch.where(offset < 0, -1.0, 1.0)[:, None] * normal.sign()
    room = torch.where(sign > 0, points, 1 - points)
    slope = torch.ones_like(normal) if norm == "Linf" else normal.abs()
    low, high = torch.zeros(len(points), 1).double(), torch.full((len(points), 1), 1e6).double()
    for _ in range(200):
        middle = (low + high) / 2
        short = (normal.abs() * torch.minimum(middle * slope, room)).sum(1, keepdim=True) < offset.abs()[:, None]
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return -sign * torch.minimum(high * slope, room)


@settings(max_examples=60, deadline=None)
@given(
    norm=st.sampled_from(["Linf", "L2"]),
    size=st.sampled_from([1, 2, 7, 64]),  # nothing to sort, one breakpoint on each side, odd, an image
    scale=st.sampled_from([1.0, 1e-30, 1e20]),  # the hyperplane is the same
    reach=st.sampled_from([0.05, 0.5, 30.0]),  # inside the box, walls in the way, out of the box
    seed=st.integers(0, 2**31),
)
def test_projection_against_bisection(norm, size, scale, reach, seed):
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(8, size, dtype=torch.float64, generator=generator)
    points[:2] = points[:2].round()  # at the walls
    normal = torch.randn(8, size, dtype=torch.float64, generator=generator)
    normal[2:4, ::2] = 0
    offset = reach * torch.randn(8, dtype=torch.float64, generator=generator)
    offset[4] = 0
    expected = moves_by_bisection(points, normal, offset, norm)
    got = to_hyperplane(points, normal * scale, offset * scale, norm)
    assert torch.allclose(got, expected, atol=1e-7)
    single = to_hyperplane(points.float(), (normal * min(scale, 1)).float(), (offset * min(scale, 1)).float(), norm)
    assert torch.allclose(single.double(), expected, atol=1e-4)


def test_projection_by_hand():
    """2 p_0 + p_1 has to rise by 1: Linf moves both by 1/3; entry 1 has room for 0.2 in row 1, so entry 0 goes 0.4."""
    points = torch.tensor([[0.5, 0.5], [0.5, 0.8]])
    normal, offset = torch.tensor([[2.0, 1.0]]).repeat(2, 1), torch.tensor([-1.0, -1.0])
    assert torch.allclose(to_hyperplane(points, normal, offset, "Linf"), torch.tensor([[1 / 3, 1 / 3], [0.4, 0.2]]))
    # L2 goes along (2, 1) / 5 where it can.
    assert torch.allclose(to_hyperplane(points, normal, offset, "L2"), torch.tensor([[0.4, 0.2], [0.4, 0.2]]))


WEIGHTS = [[1.0, 0, 0, 0], [0, 2, -1, 0], [0, 0, 1, 1], [-1, 0, 0, 3]]
BIAS = [0.8, 0, 0, -1]


def linear_distance(x, norm):
    """|z_0 - z_k| / |w_0 - w_k|_dual for the nearest class; 1 for Linf's dual, 2 for L2's."""
    weights, bias = torch.tensor(WEIGHTS).double(), torch.tensor(BIAS).double()
    logits = x.flatten(1) @ weights.T + bias
    gaps = logits[:, :1] - logits[:, 1:]
    dual = 1 if norm == "Linf" else 2
    return (gaps / torch.linalg.vector_norm(weights[:1] - weights[1:], dual, dim=1)).amin(1)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("targeted", [False, True])
def test_nearest_point_of_a_linear_model(norm, targeted):
    """Within the overshoot of eta = 1.05; the walls are far enough away not to matter."""
    x = 0.5 + 0.05 * torch.rand(6, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model, y = linear(WEIGHTS, BIAS), torch.zeros(6, dtype=torch.int64)
    distance = linear_distance(x, norm)
    attack = FAB(0.5, norm, targeted=targeted, steps=20, minimal=True)
    result = attack.run(model, x, y)
    assert result.fooled.all()
    assert (result.norm >= distance).all()
    assert (result.norm <= 1.051 * distance).all()
    # The ball a little smaller than the distance holds no such point, and the one a little larger does.
    for share, fooled in ((0.99, False), (1.06, True)):
        found = FAB(0.5, norm, targeted=targeted, steps=20).run(model, x, y, eps=share * distance)
        assert found.fooled.eq(fooled).all()
        assert (found.norm <= share * distance).all()


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.03), ("L2", 0.2)])
@pytest.mark.parametrize("targeted", [False, True])
def test_distances_are_those_of_the_authors_code(norm, eps, targeted):
    authors = pytest.importorskip("pyautoattack.fab_pt")
    model = small_net(dtype=torch.float32)
    x, y = correct_batch(model, 16)
    ours = FAB(eps, norm, targeted=targeted, steps=25, targets=3, minimal=True).run(model, x, y)
    theirs = authors.FABAttack_PT(model, norm=norm, eps=eps, n_iter=25, targeted=targeted, device="cpu")
    distances = []
    for rank in (2, 3, 4) if targeted else (2,):
        theirs.target_class = rank
        found = theirs.attack_single_run(x, y, is_targeted=targeted)
        distances.append(torch.linalg.vector_norm((found - x).flatten(1), ORDERS[norm], dim=1))
    assert ours.fooled.all()
    assert torch.allclose(ours.norm, torch.stack(distances).amin(0), rtol=1e-3)


@pytest.mark.parametrize(
    ("targeted", "forwards", "backwards"),
    [(True, 1 + 9 * 200, 9 * 100), (False, 1 + 200, 10 * 100)],
)
def test_passes_of_a_surviving_sample(targeted, forwards, backwards):
    """Each step takes a gradient and checks where it led; untargeted, a gradient for each of 10 classes.

    The authors' code needs 1828 forwards and 900 backwards for 9 targets: it looks at the clean image and at the result
    of each target.
    """
    model = Counting(small_net())
    x, y = correct_batch(model.model, 2)
    result = FAB(1e-6, targeted=targeted).run(model, x, y)
    assert not result.fooled.any()
    assert result.forwards.tolist() == [forwards] * 2
    assert result.backwards.tolist() == [backwards] * 2
    assert model.passes.forwards == 2 * forwards


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_the_first_run_starts_at_the_image_and_others_half_way_to_the_surface(norm):
    model = small_net()
    x, y = correct_batch(model, 4)
    x = 0.3 + 0.4 * x  # far from the walls
    search = FAB(0.1, norm, targeted=True, restarts=2, targets=2).search(model, 0.0, 10)
    run = torch.arange(4)
    rows = search.begin(Start(x, y, torch.full((4,), 0.1).double(), model(x), run, noise_key=run))
    distance = torch.linalg.vector_norm((rows.point - x).flatten(1), ORDERS[norm], dim=1)
    assert distance.tolist() == pytest.approx([0, 0.05, 0, 0.05])


def test_a_step_mixes_in_the_move_from_the_image() -> None:
    """Both moves are 0.1 long, so alpha_max = 0.1 is the share: 0.9 (0.7 - 1.05 * 0.1) + 0.1 (0.5 + 1.05 * 0.1)."""
    x, y = torch.full((1, 2), 0.5, dtype=torch.float64), torch.tensor([0])
    search = FAB(0.3).search(linear([[0.0, 0], [1, 0]]), 0.0, 2)
    rows = search.begin(first_run(x, y, 0.3, torch.zeros(1, 2)))
    rows.point = x + torch.tensor([[0.2, 0.0]])
    point = search._toward(rows, torch.tensor([0.1]).double(), torch.tensor([[1.0, 0.0]]).double())
    assert point.flatten().tolist() == pytest.approx([0.596, 0.5])


def test_restarts_keep_the_nearest_point():
    model = small_net()
    x, y = correct_batch(model, 12)
    once, more = (FAB(0.1, steps=6, minimal=True, restarts=n).run(model, x, y) for n in (1, 3))
    assert (more.norm <= once.norm).all()
    assert more.backwards.tolist() == [3 * 60] * 12


def test_a_plain_image_range_is_kept():
    model = small_net()
    x, y = correct_batch(model, 8)
    x = x.round()
    x_adv = FAB(1.0, steps=10, minimal=True)(model, x, y)
    assert ((x_adv >= 0) & (x_adv <= 1)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha_max": 1.5}, r"alpha_max must be in \[0, 1\]"),
        ({"eta": 0.9}, "eta must be finite and at least 1"),
        ({"beta": -0.1}, r"beta must be in \[0, 1\]"),
        ({"steps": 0}, "steps must be at least 1"),
    ],
)
def test_refuses_settings(options, message):
    with pytest.raises(ValueError, match=message):
        FAB(**options)


class OneBackward(Ensemble):
    """As one that replays CUDA graphs: after a backward pass there is nothing left for another."""

    def execution(self, device, training=None):
        return Execution("loop", graph=True)

    def member_logits(self, x, per_member=None):
        return _OneBackward.apply(x, torch.stack([member(x) for member in self.members]))


class _OneBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, logits):
        ctx.passes = 0
        return logits.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.passes += 1
        return None, grad if ctx.passes == 1 else torch.full_like(grad, torch.nan)


def test_every_gradient_of_a_replayed_graph_has_a_forward_pass_of_its_own():
    net = small_net()
    x, y = correct_batch(net, 8)
    view = OneBackward([net]).eval()
    search, numbers = FAB(0.1, seed=0).search(view, 0.0, 10), torch.arange(8)
    rows = search.begin(Start(x, y, torch.full((8,), 0.1).double(), view(x), numbers * 0, noise_key=numbers))
    _, gradients, passes = search._nearest_boundary(rows)
    assert passes == (10, 10)
    assert gradients.isfinite().all()
