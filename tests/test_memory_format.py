"""Networks that cannot run on images in channels_last run all the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ceat_fast import Ensemble
from ceat_fast.attacks import APGD, PGD
from ceat_fast.ensemble import Execution, Tuned, frozen, tune
from ceat_fast.models import digits_resnet


class Flat(nn.Module):
    """Flattens by `view`, which images in channels_last do not have."""

    def __init__(self, traceable: bool) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Linear(16 * 64, 10)
        self.traceable = traceable

    def forward(self, x: Tensor) -> Tensor:
        if not self.traceable and bool(x.isnan().any()):
            raise ValueError("x holds NaN")
        h = F.max_pool2d(F.relu(self.second(F.relu(self.norm(self.first(x))))), 2)
        logits: Tensor = self.last(h.view(h.size(0), -1))
        return logits


def members(traceable: bool) -> list[nn.Module]:
    torch.manual_seed(0)
    return [Flat(traceable) for _ in range(3)]


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(4, 3, 16, 16), torch.randint(0, 10, (4,))


@pytest.fixture(params=[True, False], ids=["traceable", "untraceable"])
def traceable(request: pytest.FixtureRequest) -> bool:
    found: bool = request.param
    return found


def test_forward(traceable: bool) -> None:
    x, _ = batch()
    mine = [member.eval() for member in members(traceable)]
    expected = torch.stack([member(x) for member in mine])
    torch.testing.assert_close(Ensemble(mine).eval().member_logits(x), expected)


def test_training_moves_statistics_once(traceable: bool) -> None:
    """The pass that failed half-way left its traces in the running statistics, which are taken back."""
    x, _ = batch()
    ours, plain = members(traceable), members(traceable)
    ensemble = Ensemble(ours).train()
    for _ in range(2):
        logits = ensemble.member_logits(x)
        expected = torch.stack([member(x) for member in plain])
        torch.testing.assert_close(logits, expected)
    logits.sum().backward()
    expected.sum().backward()
    for own, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(own.state_dict(), other.state_dict())
        torch.testing.assert_close(own.first.weight.grad, other.first.weight.grad)


@pytest.mark.parametrize("whole", [True, False], ids=["ensemble", "module"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_views(traceable: bool, whole: bool, precision: str) -> None:
    x, _ = batch()
    model = (Ensemble(members(traceable)) if whole else members(traceable)[0]).eval()
    expected = model(x)
    with frozen(model, precision) as view:
        tolerance = 1e-4 if precision == "fp32" else 0.1
        torch.testing.assert_close(view(x), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("make", [lambda: PGD(steps=2, seed=0), lambda: APGD(steps=3, seed=0)], ids=["PGD", "APGD"])
@pytest.mark.parametrize("whole", [True, False], ids=["ensemble", "module"])
def test_attacks(traceable: bool, whole: bool, make: Callable[[], PGD]) -> None:
    x, y = batch()
    model = (Ensemble(members(traceable)) if whole else members(traceable)[0]).eval()
    assert make()(model, x, y).shape == x.shape


def test_tuning(traceable: bool) -> None:
    """What cannot run is no candidate."""
    x, y = batch()
    ensemble = Ensemble(members(traceable)).eval()
    tuned = tune(ensemble, x, remember=False)
    assert "channels_last" not in f"{tuned.attack} {tuned.training}"
    assert PGD(steps=2, seed=0)(ensemble, x, y).shape == x.shape


def test_who_names_an_execution_gets_its_error() -> None:
    x, _ = batch()
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        Ensemble(members(True), "loop+channels_last").eval()(x)


def test_other_errors_are_the_members_own() -> None:
    with pytest.raises(RuntimeError, match="expected input"):
        Ensemble(members(True)).eval()(torch.rand(4, 5, 16, 16))


class OneChannel(nn.Module):
    """Images that are in both formats at once, and weights that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Linear(16 * 64, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.second(F.relu(self.first(x))))
        logits: Tensor = self.last(h.view(len(x), -1))
        return logits


def test_images_of_one_channel() -> None:
    ensemble = Ensemble([OneChannel() for _ in range(2)]).eval()
    ensemble.tuned = Tuned(*[Execution("loop", channels_last=True)] * 2)
    x, y = torch.rand(4, 1, 8, 8), torch.randint(0, 10, (4,))
    assert PGD(steps=2, seed=0)(ensemble, x, y).shape == x.shape


def test_a_call_that_begins_anew_draws_the_same_numbers() -> None:
    """Otherwise a run that goes on would draw others than one that was not interrupted."""
    x, _ = batch()

    def outputs(call: Callable[[], Tensor]) -> Tensor:
        torch.manual_seed(0)
        return call()

    mine = [nn.Sequential(nn.Dropout(), member) for member in members(True)]
    ensemble = Ensemble(mine).train()
    first = outputs(lambda: ensemble.member_logits(x))
    torch.testing.assert_close(first, outputs(lambda: ensemble.member_logits(x)))
    torch.testing.assert_close(first, outputs(lambda: torch.stack([member(x) for member in mine])))


@pytest.mark.parametrize(
    "flat",
    [
        lambda h: h.view((h.size(0), -1)),
        lambda h: h.view(size=(h.size(0), -1)),
        lambda h: h.view(torch.int32).view(dtype=torch.float32).view(h.size(0), -1),
    ],
    ids=["tuple", "size", "other types"],
)
def test_every_way_to_call_view(flat: Callable[[Tensor], Tensor]) -> None:
    class Net(Flat):
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.last(flat(F.max_pool2d(F.relu(self.second(F.relu(self.first(x)))), 2)))
            return logits

    model, (x, _) = Net(True).eval(), batch()
    with frozen(model) as view:
        torch.testing.assert_close(view(x), model(x), rtol=1e-4, atol=1e-4)


def test_compiles_into_one_graph() -> None:
    """What a compiler traces is not tried first."""
    ensemble, x = Ensemble([digits_resnet() for _ in range(2)]).eval(), torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(ensemble, fullgraph=True)(x), ensemble(x))
