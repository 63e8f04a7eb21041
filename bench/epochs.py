"""Training time per epoch of every method in one run, and of author-style loops for CEAT and DVERGE.

    python bench/epochs.py [--model resnet20 --shape cifar] [--batches N] [--rounds N] [--json FILE]

Every method takes the same batches with the same networks, by the trainer's own step: attack, losses, backward pass,
optimizer. A measurement is N batches, scaled to an epoch. Methods that draw a layer once per epoch draw one per batch
here, and the author-style DVERGE takes the same layers. Executions are not measured first and nothing is compiled.
bench/peers.py holds the author-style loops.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peers
import torch
from records import write_record
from rich.console import Console
from rich.table import Table
from timing import Timing, compare
from torch import Tensor, nn

from ceat_fast.data import load_dataset
from ceat_fast.ensemble import Ensemble
from ceat_fast.methods import METHODS, Batch, Epoch, make_method
from ceat_fast.methods.features import layers_at
from ceat_fast.models import build_model
from ceat_fast.training import SGD, AttackConfig, MultiStep, TrainConfig
from ceat_fast.training.distributed import Layout
from ceat_fast.training.step import Stepper

EPOCH_IMAGES = {"digits": 1437, "cifar": 50_000}
AUTHORS = {"CEAT": "CEAT, author style", "DVERGE": "DVERGE, author style"}
RATE, MOMENTUM, DECAY = 0.01, 0.9, 1e-4


@dataclass(frozen=True)
class Setting:
    """One problem: an ensemble, its batches and the training attack."""

    model: str
    shape: str
    members: int
    batch: int
    batches: int
    steps: int
    device: str

    def build(self) -> list[nn.Module]:
        torch.manual_seed(0)
        channels = 1 if self.shape == "digits" else 3
        return [build_model(self.model, 10, channels).to(self.device).train() for _ in range(self.members)]

    def data(self) -> list[Batch]:
        """The first digits, or random images of CIFAR's shape."""
        count = self.batch * self.batches
        index = torch.arange(count)
        if self.shape == "digits":
            digits = load_dataset("digits")
            images = digits.train_images[index % len(digits.train_images)].float() / digits.scale
            labels = digits.train_labels[index % len(digits.train_images)]
        else:
            generator = torch.Generator().manual_seed(0)
            images = torch.rand(count, 3, 32, 32, generator=generator)
            labels = torch.randint(0, 10, (count,), generator=generator)
        parts = [tensor.to(self.device).split(self.batch) for tensor in (images, labels, index)]
        return [Batch(*batch) for batch in zip(*parts, strict=True)]

    @property
    def batches_per_epoch(self) -> float:
        return EPOCH_IMAGES[self.shape] / self.batch


def ours(name: str, setting: Setting, data: Sequence[Batch]) -> Callable[[], object]:
    """The batches as `Trainer` steps through them."""
    config = TrainConfig(
        method=make_method(name),
        models=[setting.model] * setting.members,
        attack=AttackConfig(eps=peers.EPS, alpha=peers.ALPHA, steps=setting.steps),
        optimizer=SGD(lr=RATE, momentum=MOMENTUM, weight_decay=DECAY),
        schedule=MultiStep(milestones=[]),
        batch_size=setting.batch,
    )
    ensemble = Ensemble(setting.build())
    layout = Layout(torch.device(setting.device), setting.members, 1)
    stepper = Stepper(config, ensemble, layout, setting.batches)

    def run() -> None:
        for number, batch in enumerate(data):
            # Numbered from 1, since the first epoch of FASTEN has nothing stored to mix with.
            stepper.method.begin_epoch(Epoch(number + 1, setting.batches + 1, len(data) * setting.batch, number))
            stepper.step(number, batch, len(batch.labels))

    return run


def author(name: str, setting: Setting, data: Sequence[Batch]) -> Callable[[], object]:
    """The same batches in the author's style."""
    members = setting.build()
    optimizers = [torch.optim.SGD(m.parameters(), RATE, momentum=MOMENTUM, weight_decay=DECAY) for m in members]

    def step(number: int, x: Tensor, y: Tensor) -> None:
        if name == "CEAT":
            peers.author_step(members, optimizers, x, y, setting.steps)
        else:
            layers = layers_at(members, random.Random(number).random())
            peers.author_dverge_step(members, optimizers, layers, x, y, setting.steps)

    def run() -> None:
        for number, batch in enumerate(data):
            step(number, batch.images, batch.labels)

    return run


def measure(setting: Setting, rounds: int) -> dict[str, Timing]:
    """Seconds per epoch by method and way, interleaved."""
    data = setting.data()
    candidates = {name: ours(name, setting, data) for name in METHODS}
    candidates |= {title: author(name, setting, data) for name, title in AUTHORS.items()}
    scale = setting.batches_per_epoch / setting.batches
    timings = compare(candidates, rounds=rounds, device=setting.device)
    return {name: Timing(*(scale * seconds for seconds in asdict(t).values())) for name, t in timings.items()}


def show(setting: Setting, timings: dict[str, Timing]) -> Table:
    table = Table(
        title=f"Seconds per epoch of {EPOCH_IMAGES[setting.shape]:,} images: {setting.members} x {setting.model}, "
        f"batches of {setting.batch}, PGD-{setting.steps}"
    )
    for heading in ("method", "s/epoch (quartiles)", "of EAT's", "author style takes"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for name, timing in timings.items():
        peer = timings.get(AUTHORS.get(name, ""))
        table.add_row(
            name,
            f"{timing.median:.3g} ({timing.low:.3g} to {timing.high:.3g})",
            f"{timing.median / timings['EAT'].median:.2f}",
            "" if peer is None else f"{peer.median / timing.median:.2f} times as long",
        )
    return table


def record(setting: Setting, timings: dict[str, Timing], rounds: int) -> dict[str, Any]:
    return {
        "setting": asdict(setting),
        "rounds": rounds,
        "seconds_per_epoch": {name: timing.as_dict() for name, timing in timings.items()},
        "author_style_takes": {name: timings[title].median / timings[name].median for name, title in AUTHORS.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits_resnet")
    parser.add_argument("--shape", choices=EPOCH_IMAGES, default="digits", help="of the images, and of the epoch")
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64, help="images per step")
    parser.add_argument("--batches", type=int, default=4, help="steps that are measured, and scaled to an epoch")
    parser.add_argument("--steps", type=int, default=10, help="PGD steps of the training attack")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    options = {name: value for name, value in vars(arguments).items() if name not in ("rounds", "json")}
    setting = Setting(**options)
    timings = measure(setting, arguments.rounds)
    Console(width=max(Console().width, 100)).print(show(setting, timings))
    if arguments.json:
        write_record(arguments.json, record(setting, timings, arguments.rounds))


if __name__ == "__main__":
    main()
