"""AutoAttack here and in the package pyautoattack 0.2.0, on trained ensembles of three: verdicts and time.

    python bench/autoattack.py [--quick] [--images 100] [--ensembles NAME ...] [--root DATA] [--runs DIR] [--json FILE]
    python bench/autoattack.py --run RUN --eps 4/255 [--images 100] [--root DATA] [--json FILE]

The second form judges a run of `ceat-fast train`. The first trains every ensemble (or takes it from the folder of an
earlier call), on the digits that come with the package or on a part of CIFAR-10 in DATA. The images are attacked in
chunks, by one contender after the other, so that a slow minute hits all of them. --quick judges fewer images of the
digits with a tenth of the budget. The contenders are pyautoattack on the ensemble as it is, ceat_fast in fp32, and in
mixed precision where the device has instructions for bf16; where it has none, mixed precision would be the same search
in fp32 again.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from records import write_record
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ceat_fast.attacks import AttackResult, AutoAttack, parse_budget
from ceat_fast.data import Dataset, load_dataset
from ceat_fast.ensemble import Ensemble, resolve_precision
from ceat_fast.methods import EAT, Method, Standard
from ceat_fast.training import SGD, AttackConfig, DataConfig, MultiStep, Run, TrainConfig, Trainer

QUICK = {"version": "custom", "attacks": ("apgd-ce", "apgd-t", "fab-t", "square"), "steps": 10, "queries": 500}


@dataclass(frozen=True)
class Subject:
    """An ensemble to judge, and the radius to judge it at."""

    data: str
    method: Method
    training_eps: float
    eps: float
    epochs: int
    training_images: int
    model: str
    lr: float


# The radii leave an ensemble a part of its accuracy, where verdicts can differ. CIFAR-10 is judged with the small
# networks of the digits, whose full budget a CPU can afford for many images, and with ResNet-20 for the time.
SUBJECTS = {
    "digits, standard": Subject("digits", Standard(), 0.0, 0.1, 20, 1437, "digits_resnet", 0.1),
    "digits, adversarial": Subject("digits", EAT(), 0.15, 0.2, 20, 1437, "digits_resnet", 0.1),
    "cifar10, standard": Subject("cifar10", Standard(), 0.0, 1 / 255, 8, 5000, "digits_resnet", 0.05),
    "cifar10, adversarial": Subject("cifar10", EAT(), 8 / 255, 4 / 255, 8, 5000, "digits_resnet", 0.05),
    "cifar10, resnet20": Subject("cifar10", EAT(), 8 / 255, 4 / 255, 4, 2000, "resnet20", 0.05),
}


def load(subject: Subject, root: str | None) -> Dataset:
    data = load_dataset(subject.data, root)
    count = subject.training_images
    return dataclasses.replace(data, train_images=data.train_images[:count], train_labels=data.train_labels[:count])


def train(name: str, subject: Subject, data: Dataset, runs: Path, device: str) -> Ensemble:
    eps = subject.training_eps
    config = TrainConfig(
        out=str(runs / name.replace(", ", "_")),
        method=subject.method,
        models=[subject.model] * 3,
        data=DataConfig(subject.data, augment="none"),
        attack=AttackConfig(eps=eps, alpha=eps / 2 or 0.01, steps=4),
        optimizer=SGD(lr=subject.lr, grad_clip=1.0),
        schedule=MultiStep(milestones=[subject.epochs * 3 // 4]),
        epochs=subject.epochs,
        device=device,
        resume=True,
    )
    trainer = Trainer(config, dataset=data)
    trainer.fit()
    return trainer.run.load_ensemble(data, device).eval()


class Passes(nn.Module):
    """Counts the images that pass a model forwards, and backwards to the input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.counts = Counter(forwards=0, backwards=0)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.counts["forwards"] += len(x)
        if x.requires_grad:
            x.register_hook(self._count)  # type: ignore[no-untyped-call]
        logits: Tensor = self.model(x)
        return logits

    def _count(self, grad: Tensor) -> None:
        self.counts["backwards"] += len(grad)


class Contender:
    """An attack, and what it found and took so far."""

    def __init__(self, attack: AutoAttack, model: nn.Module) -> None:
        self.attack = attack
        self.model = Passes(model) if attack.backend == "reference" else model
        self.parts: list[AttackResult] = []
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def run(self, x: Tensor, y: Tensor, index: Tensor) -> None:
        began = time.perf_counter()
        part = self.attack.run(self.model, x, y, index)
        self.parts.append(part)
        self.seconds["total"] += time.perf_counter() - began
        for name, seconds in part.seconds.items():
            self.seconds[name] += seconds

    @property
    def fooled(self) -> Tensor:
        return torch.cat([part.fooled for part in self.parts])

    def record(self) -> dict[str, Any]:
        """Accuracies after each attack, seconds and passes; fooled: one character per image."""
        counts = torch.cat([part.fooled_by for part in self.parts])
        names = self.parts[0].attacks
        passes = {
            "forwards": int(sum(part.forwards.sum() for part in self.parts)),
            "backwards": int(sum(part.backwards.sum() for part in self.parts)),
        }
        if isinstance(self.model, Passes):
            passes = dict(self.model.counts)
        return {
            "label": self.attack.label,
            "precision": self.parts[0].precision,
            "accuracy_after": {
                name: 1 - ((counts >= 0) & (counts <= place)).double().mean().item() for place, name in enumerate(names)
            },
            "seconds": dict(self.seconds),
            "passes": passes,
            "fooled": "".join("01"[flag] for flag in self.fooled.tolist()),
            "flags": sorted({flag for part in self.parts for flag in part.flags}),
        }


def contenders(model: nn.Module, eps: float, settings: dict[str, Any], seeds: int) -> dict[str, Contender]:
    attacks = {}
    for seed in range(seeds):
        suffix = f", seed {seed}" if seed else ""
        attacks[f"pyautoattack{suffix}"] = AutoAttack(eps, backend="reference", seed=seed, **settings)
        attacks[f"ceat_fast{suffix}"] = AutoAttack(eps, seed=seed, **settings)
    if resolve_precision("auto", model) != "fp32":
        attacks["ceat_fast, mixed"] = AutoAttack(eps, precision="mixed", **settings)
    return {name: Contender(attack, model) for name, attack in attacks.items()}


def compare(found: dict[str, Contender], model: nn.Module, data: Dataset, chunks: Sequence[Tensor]) -> dict[str, Any]:
    """What each contender found on chunks of test images (their numbers), and how it compares with pyautoattack."""
    device = next(model.parameters()).device
    for numbers in chunks:
        x = data.test_images[numbers].to(device).float() / data.scale
        y = data.test_labels[numbers].to(device)
        for contender in found.values():
            contender.run(x, y, numbers.to(device))
    reference = found["pyautoattack"]
    records = {name: contender.record() for name, contender in found.items()}
    for name, contender in found.items():
        records[name]["agreement"] = (contender.fooled == reference.fooled).double().mean().item()
        records[name]["speedup"] = {
            part: reference.seconds[part] / seconds for part, seconds in contender.seconds.items()
        }
    return records


def table(title: str, records: dict[str, Any]) -> Table:
    """Robust accuracy, agreement and seconds, one row per contender."""
    parts = [part for part in records["ceat_fast"]["seconds"] if part != "clean"]
    result = Table(title=title)
    for heading in ("", "clean", "robust", "flags as pyautoattack", *(f"{part}, s" for part in parts), "passes"):
        result.add_column(heading, justify="right" if heading else "left")
    for name, record in records.items():
        accuracy = record["accuracy_after"]
        times = (f"{record['seconds'][part]:.1f} ({record['speedup'][part]:.2f}x)" for part in parts)
        passes = f"{record['passes']['forwards']:,} f, {record['passes']['backwards']:,} b"
        accuracies = (f"{accuracy['clean']:.1%}", f"{list(accuracy.values())[-1]:.1%}")
        result.add_row(name, *accuracies, f"{record['agreement']:.1%}", *times, passes)
    return result


def ensembles(arguments: argparse.Namespace, runs: Path) -> Iterator[tuple[str, Ensemble, Dataset, float]]:
    """(name, ensemble, data, radius) of everything that is to be judged."""
    if arguments.run:
        run = Run.open(arguments.run)
        data = load_dataset(run.config.data.name, arguments.root or run.config.data.root)
        yield run.folder.name, run.load_ensemble(data, arguments.device), data, parse_budget("eps", arguments.eps)
        return
    for name in arguments.ensembles or [name for name in SUBJECTS if arguments.root or name.startswith("digits")]:
        data = load(SUBJECTS[name], arguments.root)
        yield name, train(name, SUBJECTS[name], data, runs, arguments.device), data, SUBJECTS[name].eps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="40 images of the digits, a tenth of the budget")
    parser.add_argument("--ensembles", nargs="+", choices=SUBJECTS, help="default: the digits; all of them with --root")
    parser.add_argument("--run", help="judge this run instead")
    parser.add_argument("--eps", default="8/255", help="radius for --run")
    parser.add_argument("--images", type=int, default=100, help="test images to judge")
    parser.add_argument("--first", type=int, default=0, help="number of the first of them")
    parser.add_argument("--chunk", type=int, help="images that a contender judges before the next one: 50, all on CUDA")
    parser.add_argument("--seeds", type=int, default=1, help="both with so many seeds: what chance alone changes")
    parser.add_argument("--root", help="folder of CIFAR-10")
    parser.add_argument("--runs", help="folder that keeps the trained ensembles; default: a temporary one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args()
    images = min(arguments.images, 40) if arguments.quick else arguments.images
    settings = QUICK if arguments.quick else {}
    console, results = Console(width=max(160, Console().width)), {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, model, data, eps in ensembles(arguments, Path(arguments.runs or temporary)):
            numbers = torch.arange(arguments.first, min(arguments.first + images, len(data.test_labels)))
            found = contenders(model, eps, settings, arguments.seeds)
            chunk = arguments.chunk or (len(numbers) if arguments.device.startswith("cuda") else 50)
            results[name] = compare(found, model, data, torch.split(numbers, chunk))
            console.print(table(f"{name}, eps {eps:.4f}, {len(numbers)} images", results[name]))
            if "ceat_fast, mixed" not in found:
                console.print(
                    f"no row for mixed precision: {arguments.device} has no bf16 instructions, it searches in fp32"
                )
    if arguments.json:
        record = {
            "budget": "quick" if arguments.quick else "standard",
            "images": [arguments.first, images],
            "mixed_precision_searches_in": resolve_precision("auto", model),
            "ensembles": results,
        }
        write_record(arguments.json, record)


if __name__ == "__main__":
    main()
