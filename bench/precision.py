"""Does an attack that searches in bf16 find as many adversarial inputs as one in fp32? Verdicts are fp32's.

    python bench/precision.py [--json FILE] [--config configs/digits_ceat.yaml] [--seeds 3]

Trains the config once per seed, attacks all of its images by PGD-20 in each precision, with the same random starts, and
prints how many of them stay correctly classified.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ceat_fast import Ensemble
from ceat_fast.attacks import PGD
from ceat_fast.data import load_dataset
from ceat_fast.environment import describe_environment, resolve_device
from ceat_fast.training import Trainer
from ceat_fast.training.config import load_config

PRECISIONS = ("fp32", "bf16", "fp16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--config", type=Path, default=Path("configs/digits_ceat.yaml"))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    results = [measure(arguments.config, seed) for seed in range(arguments.seeds)]
    table = Table(title=f"Correct under PGD-20, {arguments.config.name}, {results[0]['samples']} samples")
    for heading in ("seed", *PRECISIONS, *(f"verdicts of {name} that differ" for name in PRECISIONS[1:])):
        table.add_column(heading, justify="right")
    for result in results:
        shares = (f"{result['correct'][name] / result['samples']:.2%}" for name in PRECISIONS)
        table.add_row(str(result["seed"]), *shares, *(str(result["differ"][name]) for name in PRECISIONS[1:]))
    Console(width=120).print(table)
    if arguments.json:
        record = {
            "command": " ".join(["python bench/precision.py", *sys.argv[1:]]),
            "environment": describe_environment(),
            "results": results,
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


def measure(path: Path, seed: int) -> dict[str, Any]:
    """Train with that seed, then attack training and test images in every precision."""
    config = load_config(path)
    data = load_dataset(config.data.name, config.data.root)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(replace(config, seed=seed, out=f"{folder}/run"))
        trainer.fit()
    ensemble, device = trainer.ensemble, resolve_device(config.device)
    images = torch.cat([data.train_images, data.test_images]).to(device).float() / data.scale
    labels = torch.cat([data.train_labels, data.test_labels]).to(device)
    attack = PGD(config.evaluation.eps, config.evaluation.alpha, steps=20, seed=0)
    correct = {name: verdicts(ensemble, replace(attack, precision=name), images, labels) for name in PRECISIONS}
    return {
        "seed": seed,
        "samples": len(labels),
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
