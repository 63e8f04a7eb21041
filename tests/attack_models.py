"""Models for the tests of APGD, FAB, Square and AutoAttack. In fp64 a row's answer does not depend on its batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ceat_fast.attacks import PGD
from ceat_fast.attacks.worklist import Start
from ceat_fast.data import iterate_batches, load_dataset
from ceat_fast.ensemble import Ensemble
from ceat_fast.models import digits_resnet


def linear(weights: list[list[float]], bias: list[float] | None = None) -> nn.Module:
    """Logits W x + b of inputs of any shape, in fp64."""
    layer = nn.Linear(len(weights[0]), len(weights), dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weights))
        layer.bias.copy_(torch.tensor(bias if bias is not None else [0.0] * len(weights)))
    return nn.Sequential(nn.Flatten(), layer).eval()


def small_net(classes: int = 10, channels: int = 1, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A random smooth network on 6x6 images."""
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(36 * channels, 24), nn.Tanh(), nn.Linear(24, classes)]
    return nn.Sequential(*layers).to(dtype).eval()


def correct_batch(model: nn.Module, count: int, channels: int = 1) -> tuple[Tensor, Tensor]:
    """Random images that the model of `small_net` classifies "correctly": labels are its answers."""
    dtype = next(model.parameters()).dtype
    x = torch.rand(count, channels, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        return x, model(x).argmax(1)


def first_run(x: Tensor, y: Tensor, eps: float, clean: Tensor) -> Start:
    """What the first run of every sample starts from, all with the same noise."""
    zeros = torch.zeros_like(y)
    return Start(x, y, torch.full((len(x),), eps, dtype=x.dtype), clean, run=zeros, noise_key=zeros)


class Passes:
    """Rows that passed forwards, and backwards to the input; copies of a model count together."""

    forwards = backwards = 0

    def __deepcopy__(self, memo: object) -> Passes:
        return self


class Counting(nn.Module):
    """Counts the passes of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.passes = Passes()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.passes.forwards += len(x)
        if x.requires_grad:
            x.register_hook(self._count)
        return self.model(x)

    def _count(self, grad: Tensor) -> None:
        self.passes.backwards += len(grad)


def digits_ensemble(eps: float, epochs: int, members: int = 3) -> Ensemble:
    """Small ResNets, trained together on the digits, by PGD-5 at that eps unless it is 0."""
    data = load_dataset("digits")
    torch.manual_seed(0)
    ens = Ensemble([digits_resnet() for _ in range(members)])
    optimizer = torch.optim.SGD(ens.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(0)
    attack = PGD(eps, max(eps, 0.01) / 3, 5, seed=0)
    for _ in range(epochs):
        for x, y, index in iterate_batches(data.train_images, data.train_labels, 64, generator, scale=data.scale):
            x_adv = attack.perturb(ens, x, y, index) if eps else x
            loss = sum(F.cross_entropy(logits, y) for logits in ens.train().member_logits(x_adv))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return ens.eval()


def digits_test(count: int) -> tuple[Tensor, Tensor]:
    """The first test images of the digits, in fp32."""
    data = load_dataset("digits")
    return data.test_images[:count].float() / data.scale, data.test_labels[:count]
