"""An `Ensemble` as the model of other people's attacks, which expect one module with logits out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ceat_fast.attacks import PGD
from ceat_fast.ensemble import Ensemble

EPS = 0.1


@pytest.fixture
def ens():
    torch.manual_seed(0)
    members = [nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4)) for _ in range(3)]
    ens = Ensemble(members)
    x = torch.rand(256, 1, 4, 4)
    y = 2 * (x[:, 0, :2].mean((1, 2)) > 0.5).long() + (x[:, 0, 2:].mean((1, 2)) > 0.5).long()
    optimizer = torch.optim.Adam(ens.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.nll_loss(ens(x), y).backward()
        optimizer.step()
    return ens.eval()


@pytest.fixture
def correct(ens):
    """24 images that the ensemble classifies, with their labels."""
    x = torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    y = 2 * (x[:, 0, :2].mean((1, 2)) > 0.5).long() + (x[:, 0, 2:].mean((1, 2)) > 0.5).long()
    keep = (ens(x).argmax(1) == y).nonzero().squeeze(1)[:24]
    assert len(keep) == 24
    return x[keep], y[keep]


def fooled(ens, x_adv, x, y):
    assert (x_adv - x).abs().max().item() <= EPS + 1e-6
    return (ens(x_adv).argmax(1) != y).float().mean().item()


def test_pyautoattack(ens, correct):
    pyautoattack = pytest.importorskip("pyautoattack", reason="pip install pyautoattack")
    x, y = correct
    attack = pyautoattack.AutoAttack(ens, attacks=["apgd-ce", "square"], eps=EPS, version="custom", seed=0)
    attack.apgd.n_restarts = 1
    attack.square.n_queries = 50
    theirs, _ = attack.run_standard_evaluation(x, y, batch_size=24)
    ours = PGD(eps=EPS, alpha=EPS / 4, steps=20, seed=0)(ens, x, y)
    assert fooled(ens, theirs, x, y) >= fooled(ens, ours, x, y) > 0.2


def test_foolbox(ens, correct):
    foolbox = pytest.importorskip("foolbox", reason="pip install foolbox")
    x, y = correct
    model = foolbox.PyTorchModel(ens, bounds=(0, 1), device="cpu")
    torch.manual_seed(0)
    _, theirs, success = foolbox.attacks.LinfPGD(rel_stepsize=0.25, steps=20)(model, x, y, epsilons=EPS)
    ours = PGD(eps=EPS, alpha=EPS / 4, steps=20, seed=0)(ens, x, y)
    assert success.float().mean().item() == pytest.approx(fooled(ens, theirs, x, y))
    assert fooled(ens, ours, x, y) == pytest.approx(fooled(ens, theirs, x, y), abs=0.1)


def test_foolbox_in_the_l2_ball(ens, correct):
    foolbox = pytest.importorskip("foolbox", reason="pip install foolbox")
    x, y = correct
    model = foolbox.PyTorchModel(ens, bounds=(0, 1), device="cpu")
    torch.manual_seed(0)
    _, theirs, _ = foolbox.attacks.L2PGD(rel_stepsize=0.25, steps=40)(model, x, y, epsilons=0.3)
    ours = PGD(eps=0.3, alpha=0.075, steps=40, seed=0, norm="L2")(ens, x, y)
    assert (ours - x).flatten(1).norm(dim=1).max().item() <= 0.3 + 1e-6
    rates = [(ens(z).argmax(1) != y).float().mean().item() for z in (theirs, ours)]
    assert rates[1] == pytest.approx(rates[0], abs=0.1)
    assert rates[1] > 0.2


def test_art(ens, correct):
    pytest.importorskip("art", reason="pip install adversarial-robustness-toolbox packaging")
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    x, y = correct
    classifier = PyTorchClassifier(
        ens, loss=nn.CrossEntropyLoss(), input_shape=x.shape[1:], nb_classes=4, clip_values=(0, 1), device_type="cpu"
    )
    predicted = classifier.predict(x.numpy(), batch_size=24)
    torch.testing.assert_close(torch.from_numpy(predicted), ens(x).detach())
    attack = ProjectedGradientDescentPyTorch(
        classifier, norm="inf", eps=EPS, eps_step=EPS / 4, max_iter=20, num_random_init=1, verbose=False
    )
    theirs = torch.from_numpy(attack.generate(x.numpy(), y.numpy()))
    ours = PGD(eps=EPS, alpha=EPS / 4, steps=20, seed=0)(ens.eval(), x, y)
    assert fooled(ens, ours, x, y) == pytest.approx(fooled(ens, theirs, x, y), abs=0.1)
