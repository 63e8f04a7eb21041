"""Fifty training steps: every optimisation of the engine gives the losses of the plain loop."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from ceat_fast import Ensemble
from ceat_fast.attacks import PGD
from ceat_fast.data import load_dataset
from ceat_fast.methods import CEAT
from ceat_fast.methods.base import Batch
from ceat_fast.models import digits_resnet

STEPS, BATCH, EPS, ALPHA, ATTACK_STEPS = 50, 16, 0.15, 0.06, 2
LAM, MU = 1.0, 2.0


def members():
    torch.manual_seed(0)
    # In float64 rounding stays far below the losses, also after the signs of fifty attacks.
    return [digits_resnet().double() for _ in range(3)]


def batches():
    data = load_dataset("digits")
    for step in range(STEPS):
        rows = torch.arange(step * BATCH, (step + 1) * BATCH)
        yield Batch(data.train_images[rows].double() / data.scale, data.train_labels[rows], rows)


def plain_attack(models, start, x, y):
    """Eq. 3 on the members themselves, BatchNorm by running statistics."""
    for model in models:
        model.eval()
    for _ in range(ATTACK_STEPS):
        start = start.detach().requires_grad_()
        prob = torch.stack([model(start).softmax(1) for model in models]).mean(0)
        (grad,) = torch.autograd.grad(F.nll_loss(prob.log(), y), start)
        start = (start + ALPHA * grad.sign()).clamp(x - EPS, x + EPS).clamp(0, 1)
    for model in models:
        model.train()
    return start.detach()


def plain_losses(adv, nat, y):
    """Eq. 22 for three members, the peers of each written out."""
    adv, nat = [z.softmax(1) for z in adv], [z.softmax(1) for z in nat]
    rows, onehot = torch.arange(len(y)), F.one_hot(y, 10).double()
    losses = []
    for m, (a, b) in enumerate([(1, 2), (0, 2), (0, 1)]):
        nat_gap = (nat[a][rows, y] - nat[b][rows, y]).abs().detach()
        adv_gap = (adv[a][rows, y] - adv[b][rows, y]).abs().detach()
        loss = -adv[m][rows, y].log()
        loss = loss + LAM * (LAM * nat_gap).exp() * (nat[m] - onehot).square().sum(1)
        losses.append((loss + MU * (MU * adv_gap).exp() * (adv[m] - nat[m]).square().sum(1)).mean())
    return losses


def plain_run():
    """One optimizer and one backward per member, a loop over them everywhere."""
    models, history = members(), []
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9, weight_decay=1e-4) for m in models]
    for epoch_step, (x, y, rows) in enumerate(batches()):
        start = PGD(EPS, ALPHA, 0, seed=epoch_step)(Ensemble(models).eval(), x, y, rows)
        x_adv = plain_attack(models, start, x, y)
        losses = plain_losses([m(x_adv) for m in models], [m(x) for m in models], y)
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward(retain_graph=True)
        for optimizer in optimizers:
            optimizer.step()
        history.append([loss.item() for loss in losses])
    return torch.tensor(history)


def engine_run(backend):
    """The trainer's way: frozen view, fused attack step and loss, one backward, one optimizer."""
    ensemble, history = Ensemble(members(), backend).train(), []
    optimizer = torch.optim.SGD(ensemble.parameters(), 0.05, momentum=0.9, weight_decay=1e-4, foreach=True)
    method = CEAT(LAM, MU)
    for epoch_step, batch in enumerate(batches()):
        attack = PGD(EPS, ALPHA, ATTACK_STEPS, seed=epoch_step)
        output = method.step(ensemble, method.perturb(attack.perturb, ensemble, batch), batch)
        optimizer.zero_grad()
        output.losses.sum().backward()
        optimizer.step()
        history.append(output.losses.tolist())
    return torch.tensor(history)


@pytest.fixture(scope="module")
def plain():
    return plain_run()


@pytest.mark.parametrize("backend", ["loop", "loop+channels_last", "vmap"])
def test_fifty_steps_have_the_losses_of_the_plain_loop(plain, backend):
    assert plain[-10:].mean() < 0.85 * plain[:10].mean()  # it does learn
    torch.testing.assert_close(engine_run(backend), plain, rtol=1e-6, atol=1e-6)


def test_low_precision_attacks_train_as_well(plain):
    """Not the same numbers: the attack's signs differ where the gradient is small. The same course of the loss."""
    torch.manual_seed(0)
    fp32 = [copy.deepcopy(m).float() for m in members()]
    ensemble, history = Ensemble(fp32).train(), []
    optimizer = torch.optim.SGD(ensemble.parameters(), 0.05, momentum=0.9, weight_decay=1e-4, foreach=True)
    for epoch_step, (x, y, rows) in enumerate(batches()):
        batch = Batch(x.float(), y, rows)
        attack = PGD(EPS, ALPHA, ATTACK_STEPS, seed=epoch_step, precision="bf16")
        output = CEAT(LAM, MU).step(ensemble, attack.perturb(ensemble, batch.images, y, rows), batch)
        optimizer.zero_grad()
        output.losses.sum().backward()
        optimizer.step()
        history.append(output.losses.tolist())
    assert torch.tensor(history)[-10:].mean() == pytest.approx(plain[-10:].mean().item(), rel=0.1)
