"""Does an attack that searches in bf16 find as many adversarial inputs as one in fp32? Verdicts are fp32's.

    python bench/precision.py [--json FILE] [--config configs/digits_ceat.yaml] [--seeds 3]
    python bench/precision.py --run RUN [--root DATA] [--precisions fp32 bf16] [--json FILE]

Trains the config once per seed and attacks all of its images, or takes a run of `ceat-fast train` and attacks its test
images: by PGD-20 in each precision, with the same random starts. Prints how many stay correctly classified.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from records import write_record
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ceat_fast import Ensemble
from ceat_fast.attacks import PGD
from ceat_fast.data import Dataset, load_dataset
from ceat_fast.environment import resolve_device
from ceat_fast.training import Run, TrainConfig, Trainer
from ceat_fast.training.config import load_config

PRECISIONS = ("fp32", "bf16", "fp16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--config", type=Path, default=Path("configs/digits_ceat.yaml"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--run", type=Path, help="attack the test images of this run instead")
    parser.add_argument("--root", help="folder of its data")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="fp32 among them")
    arguments = parser.parse_args()
    names = list(dict.fromkeys(["fp32", *arguments.precisions]))
    if arguments.run:
        title, results = arguments.run.name, [of_run(arguments.run, arguments.root, names)]
    else:
        title, results = arguments.config.name, [of_seed(arguments.config, s, names) for s in range(arguments.seeds)]
    table = Table(title=f"Correct under PGD-20, {title}, {results[0]['samples']} samples")
    for heading in ("seed", *names, *(f"verdicts of {name} that differ" for name in names[1:])):
        table.add_column(heading, justify="right")
    for result in results:
        shares = (f"{result['correct'][name] / result['samples']:.2%}" for name in names)
        table.add_row(str(result["seed"]), *shares, *(str(result["differ"][name]) for name in names[1:]))
    Console(width=120).print(table)
    if arguments.json:
        write_record(arguments.json, {"results": results})


def of_seed(path: Path, seed: int, names: Sequence[str]) -> dict[str, Any]:
    """Train with that seed, then attack training and test images."""
    config = load_config(path)
    data = load_dataset(config.data.name, config.data.root)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(replace(config, seed=seed, out=f"{folder}/run"))
        trainer.fit()
    images = torch.cat([data.train_images, data.test_images]), torch.cat([data.train_labels, data.test_labels])
    return measure(trainer.ensemble, replace(config, seed=seed), data, *images, names)


def of_run(path: Path, root: str | None, names: Sequence[str]) -> dict[str, Any]:
    """Attack the test images of a trained run."""
    run = Run.open(path)
    data = load_dataset(run.config.data.name, root or run.config.data.root)
    ensemble = run.load_ensemble(data, str(resolve_device(run.config.device))).eval()
    return measure(ensemble, run.config, data, data.test_images, data.test_labels, names)


def measure(
    ensemble: Ensemble, config: TrainConfig, data: Dataset, images: Tensor, labels: Tensor, names: Sequence[str]
) -> dict[str, Any]:
    device = resolve_device(config.device)
    x, y = images.to(device).float() / data.scale, labels.to(device)
    attack = PGD(config.evaluation.eps, config.evaluation.alpha, steps=20, seed=0)
    correct = {name: verdicts(ensemble, replace(attack, precision=name), x, y) for name in names}
    return {
        "seed": config.seed,
        "samples": len(y),
        "correct": {name: int(flags.sum()) for name, flags in correct.items()},
        "differ": {name: int((flags != correct["fp32"]).sum()) for name, flags in correct.items()},
    }


def verdicts(ensemble: Ensemble, attack: PGD, images: Tensor, labels: Tensor) -> Tensor:
    """(N,) bool: which samples stay correctly classified."""
    flags = []
    for rows in torch.arange(len(labels), device=images.device).split(500):
        adversarial = attack(ensemble, images[rows], labels[rows], rows)
        with torch.no_grad():
            flags.append(ensemble(adversarial).argmax(1) == labels[rows])
    return torch.cat(flags)


if __name__ == "__main__":
    main()
