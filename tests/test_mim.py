"""MIM and M-DI2 against loops written out in plain Python, and the noise of the diverse inputs."""

from __future__ import annotations

import math

import pytest
import torch
from attack_models import correct_batch, small_net
from torch import Tensor, nn
from torch.nn import functional as F

from ceat_fast.attacks import MDI2, MIM, PGD, mim
from ceat_fast.attacks.diversity import resize_and_pad
from ceat_fast.ensemble import Ensemble

WEIGHTS = ((1.0, -2.0, 0.5), (-1.5, 1.0, 1.0))  # logits z_k = tanh(w_k . x): a gradient that changes along the way


class TinyNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(WEIGHTS, dtype=torch.float64))

    def forward(self, x):
        return (x @ self.weight.T).tanh()


def gradient_by_hand(x, label):
    """d CE / dx of TinyNet in Python floats: sum_k (p_k - [k = y]) (1 - z_k^2) w_k."""
    z = [math.tanh(sum(w * v for w, v in zip(row, x, strict=True))) for row in WEIGHTS]
    total = sum(math.exp(v) for v in z)
    outer = [(math.exp(v) / total - (k == label)) * (1 - v * v) for k, v in enumerate(z)]
    return [sum(outer[k] * WEIGHTS[k][i] for k in range(2)) for i in range(3)]


def mim_by_hand(x, label, eps, alpha, steps, decay, norm):
    x_adv, memory = list(x), [0.0] * 3
    for _ in range(steps):
        gradient = gradient_by_hand(x_adv, label)
        mean = sum(abs(g) for g in gradient) / 3
        memory = [decay * m + g / mean for m, g in zip(memory, gradient, strict=True)]
        if norm == "Linf":
            moved = [v + alpha * math.copysign(1, m) for v, m in zip(x_adv, memory, strict=True)]
            moved = [min(max(v, c - eps), c + eps) for v, c in zip(moved, x, strict=True)]
        else:
            length = math.sqrt(sum(m * m for m in memory))
            delta = [v + alpha * m / length - c for v, m, c in zip(x_adv, memory, x, strict=True)]
            far = math.sqrt(sum(d * d for d in delta))
            moved = [c + d * min(1, eps / far) for c, d in zip(x, delta, strict=True)]
        x_adv = [min(max(v, 0.0), 1.0) for v in moved]
    return x_adv


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_mim_step_by_step(norm, decay):
    x = torch.tensor([[0.3, 0.6, 0.9], [0.5, 0.1, 0.4], [0.02, 0.5, 0.97]], dtype=torch.float64)
    y = torch.tensor([0, 1, 1])
    for steps in range(1, 7):
        result = MIM(eps=0.2, alpha=0.07, steps=steps, decay=decay, norm=norm)(TinyNet().eval(), x, y)
        expected = [
            mim_by_hand(row, label, 0.2, 0.07, steps, decay, norm)
            for row, label in zip(x.tolist(), y.tolist(), strict=True)
        ]
        torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


def test_momentum_carries_on_where_the_gradient_turns():
    """The second gradient points back with the same mean; decay 2 outweighs it, decay 0 follows it."""

    class Tent(nn.Module):
        def forward(self, x):
            return torch.cat([(x - 0.55).abs(), torch.zeros_like(x)], dim=1)

    x, y = torch.tensor([[0.5]], dtype=torch.float64), torch.tensor([0])
    follow, carry = (MIM(0.5, 0.1, 2, decay=decay)(Tent().eval(), x, y).item() for decay in (0.0, 2.0))
    assert follow == pytest.approx(0.5)
    assert carry == pytest.approx(0.7)


def test_mim_is_published_without_a_random_start_and_decay_one():
    assert (MIM().random_start, MIM().decay) == (False, 1.0)
    x, y = torch.full((2, 3), 0.5, dtype=torch.float64), torch.tensor([0, 1])
    assert torch.equal(MIM(steps=0)(TinyNet().eval(), x, y), x)


def test_mim_without_decay_is_pgd():
    x, y = torch.rand(5, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 0])
    for norm in ("Linf", "L2"):
        settings = {"eps": 0.2, "alpha": 0.03, "steps": 5, "random_start": False, "norm": norm}
        expected = PGD(**settings)(TinyNet().eval(), x, y)
        torch.testing.assert_close(MIM(decay=0, **settings)(TinyNet().eval(), x, y), expected, atol=1e-12, rtol=0)


def test_a_gradient_of_zero_moves_nothing():
    class Flat(nn.Module):
        def forward(self, x):
            return torch.zeros(len(x), 3, dtype=x.dtype) + 0 * x[:, :1]

    x = torch.rand(2, 3)
    assert torch.equal(MIM()(Flat().eval(), x, torch.tensor([0, 1])), x)


def test_members_have_momentum_of_their_own():
    torch.manual_seed(0)
    members = [nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)) for _ in range(3)]
    ens = Ensemble(members).double().eval()
    x, y = torch.rand(5, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    for attack in (MIM, MDI2):
        together = attack(0.1, 0.03, 4, goal="members", seed=0)(ens, x, y)
        for member, result in zip(ens.members, together, strict=True):
            torch.testing.assert_close(result, attack(0.1, 0.03, 4, seed=0)(member, x, y), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("shape", "least_size"), [((7, 9), 0.5), ((8, 8), 0.9), ((5, 4), 0.0), ((6, 6), 1.0)])
def test_resizing_is_torchs_interpolation_laid_on_zeros(shape, least_size):
    """torch's bilinear resize and pad, one image at a time, at sizes and places read off the same numbers."""
    height, width = shape
    x = torch.rand(40, 3, height, width, dtype=torch.float64)
    uniform = torch.rand(40, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    result = resize_and_pad(x, uniform, 0.5, least_size)
    sizes = set()
    for image, (chance, size, top, left), got in zip(x, uniform.tolist(), result, strict=True):
        if chance >= 0.5:
            torch.testing.assert_close(got, image, atol=1e-12, rtol=0)
            continue
        low = [max(1, int(least_size * n)) for n in shape]
        h, w = (a + int(size * (n - a)) for a, n in zip(low, shape, strict=True))
        sizes.add((h, w))
        small = F.interpolate(image[None], (h, w), mode="bilinear", align_corners=False)
        above, before = int(top * (height - h + 1)), int(left * (width - w + 1))
        expected = F.pad(small, (before, width - w - before, above, height - h - above))[0]
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    assert max(sizes) == ((height, width) if least_size == 1 else (height - 1, width - 1))


def test_the_model_of_mdi2_sees_other_sizes_and_the_gradient_returns_to_the_image():
    """A corner pixel reaches the model in a smaller image too, at another place."""

    class Corner(nn.Module):
        def forward(self, x):
            return torch.stack([x[:, 0, 0, 0], torch.zeros_like(x[:, 0, 0, 0])], dim=1)

    x, y = torch.full((200, 1, 10, 10), 0.5), torch.zeros(200, dtype=torch.int64)
    plain = MIM(0.1, 0.1, 1)(Corner().eval(), x, y)
    assert bool((plain != x).flatten(1).sum(1).eq(1).all())
    diverse = MDI2(0.1, 0.1, 1, probability=1.0, least_size=0.8, seed=0)(Corner().eval(), x, y)
    moved = (diverse != x).flatten(1).sum(1)
    # The corner shows the image where the place is (0, 0), 1 of 4 or of 9 places, else the zeros of the border.
    assert 0.1 < (moved > 0).float().mean().item() < 0.35
    assert torch.equal(MDI2(0.1, 0.1, 1, probability=0.0, seed=0)(Corner().eval(), x, y), plain)


def test_every_step_draws_other_sizes_and_places(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []

    def watched(x: Tensor, uniform: Tensor, *settings: float) -> Tensor:
        drawn.append(uniform)
        return x

    monkeypatch.setattr(mim, "resize_and_pad", watched)
    model = small_net()
    MDI2(0.1, 0.02, 3, seed=0)(model, *correct_batch(model, 2))
    assert len(torch.stack(drawn).unique()) == 3 * 2 * 4  # steps, samples, numbers of each


def test_long_searches_without_decay_see_the_inputs_of_every_step() -> None:
    """An iterate that returns is no cycle: the step after it sees other inputs."""
    model = small_net()
    x, y = correct_batch(model, 4)
    attack = MDI2(0.1, 0.02, 60, decay=0.0, probability=1.0, least_size=0.5, seed=0)
    assert torch.equal(attack(model, x, y), attack.perturb(model, x, y))


@pytest.mark.parametrize("restarts", [1, 2])
def test_diverse_inputs_depend_on_the_sample_alone(restarts):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 3)).double().eval()
    x = torch.rand(7, 1, 8, 8, dtype=torch.float64)
    y = torch.arange(7) % 3
    attack = MDI2(0.1, 0.02, 5, restarts=restarts, seed=4, least_size=0.6)
    whole = attack(model, x, y)
    parts = [attack(model, x[s], y[s], torch.arange(7)[s]) for s in (slice(0, 1), slice(1, 7))]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-12, rtol=0)
    assert not torch.equal(MDI2(0.1, 0.02, 5, seed=5, least_size=0.6)(model, x, y), whole)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: MIM(decay=-1), ValueError, "decay must be finite and at least 0, got -1"),
        (lambda: MIM(decay="1"), TypeError, "decay must be a number, got '1'"),
        (lambda: MIM(restarts=2), ValueError, "restarts=2 without random_start would repeat one search"),
        (lambda: MDI2(probability=1.5), ValueError, r"probability must be in \[0, 1\], got 1.5"),
        (lambda: MDI2(least_size=float("nan")), ValueError, r"least_size must be in \[0, 1\], got nan"),
    ],
)
def test_bad_settings(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_diverse_inputs_are_images():
    with pytest.raises(ValueError, match=r"input diversity needs images \(B, C, H, W\), got \(2, 3\)"):
        MDI2(steps=1)(TinyNet().eval(), torch.full((2, 3), 0.5, dtype=torch.float64), torch.tensor([0, 1]))
