"""The keyed noise: splitmix64 by its published numbers, uniform, and pinned."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ceat_fast.attacks import keyed_uniform
from ceat_fast.attacks.noise import _mix, _signed


def test_splitmix64_gives_the_published_numbers():
    """Seed 1234567, as in the generator's public test vectors."""
    gamma = _signed(0x9E3779B97F4A7C15)
    outputs = _mix(1234567 + torch.arange(1, 6) * gamma)
    assert [value % 2**64 for value in outputs.tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_keyed_uniform_is_uniform_and_uncorrelated():
    """One million numbers: mean and variance within 5 standard errors, 16 bins by chi-square (15 degrees)."""
    u = keyed_uniform(torch.arange(1000), (10, 100), (7, 1, 0), torch.float64)
    assert u.shape == (1000, 10, 100)
    assert u.min() >= 0
    assert u.max() < 1
    assert u.mean().item() == pytest.approx(0.5, abs=5 * 12**-0.5 / 1000)
    assert u.var().item() == pytest.approx(1 / 12, abs=5 * 180**-0.5 / 1000)
    counts = torch.histc(u, 16, 0, 1)
    assert ((counts - 62500).square() / 62500).sum().item() < 44  # exceeded once in 10,000
    flat = u.flatten(1) - 0.5
    others = keyed_uniform(torch.arange(1000), (1000,), (7, 1, 1), torch.float64) - 0.5
    for a, b in ((flat[1:], flat[:-1]), (flat[:, 1:], flat[:, :-1]), (flat, others)):
        assert abs((a * b).mean().item() * 12) < 5 / 1000


def test_keyed_uniform_is_pinned():
    """Results of a seed must not change with a version, or recorded evaluations would not repeat."""
    u = keyed_uniform(torch.tensor([0, 5]), (2,), (3, 1, 0), torch.float64) * 2**24
    assert u.tolist() == [[6314699, 3127565], [9584075, 10992901]]
    assert torch.equal(keyed_uniform(torch.tensor([0, 5]), (2,), (3, 1, 0), torch.float32).double() * 2**24, u)


def splitmix_chain(key, index, count):
    """`keyed_uniform` in Python integers."""
    mask = 2**64 - 1

    def mix(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    gamma, state = 0x9E3779B97F4A7C15, 0
    for part in (*key, index):
        state = mix(((state ^ part % 2**64) + gamma) & mask)
    return [mix((state + n * gamma) & mask) >> 40 for n in range(1, count + 1)]


@given(
    key=st.lists(st.integers(-(2**63), 2**64 - 1), min_size=1, max_size=3),
    index=st.integers(0, 2**63 - 1),
)
@settings(max_examples=30, deadline=None)
def test_keyed_uniform_matches_python_integers(key, index):
    u = keyed_uniform(torch.tensor([index]), (4,), key, torch.float64) * 2**24
    assert u[0].tolist() == splitmix_chain(key, index, 4)
