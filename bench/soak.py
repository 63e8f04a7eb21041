"""A long run on the digits with everything switched on: memory, open files and processes must not grow.

    python bench/soak.py [--json FILE] [--figure FILE] [--steps 2000]

Average, validation, callbacks, TensorBoard (where it is installed) and checkpoints every 50 steps take part. Exits with
1 where the resident memory grows by more than 2 % after the first quarter of the steps, or where files or processes are
left behind.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from records import write_record
from rich.console import Console

from ceat_fast.methods import CEAT, StepOutput
from ceat_fast.training import (
    EMA,
    SGD,
    AttackConfig,
    Callback,
    CheckpointConfig,
    DataConfig,
    MultiStep,
    TrainConfig,
    Trainer,
    ValidationConfig,
)

EVERY = 50  # steps between samples
ALLOWED_GROWTH = 0.02


class Sampler(Callback):
    """Resident memory in MB, open files and child processes, every so many steps."""

    def __init__(self) -> None:
        self.samples: list[dict[str, float]] = []

    def on_step(self, trainer: Trainer, output: StepOutput) -> None:
        if trainer.steps_done % EVERY == 0:
            self.samples.append({"step": trainer.steps_done, **usage()})


def usage() -> dict[str, float]:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "resident_mb": int(status["VmRSS"].split()[0]) / 1024,
        "files": len(os.listdir("/proc/self/fd")),
        "children": len(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()),
    }


def soak(folder: Path, steps: int) -> dict[str, Any]:
    """Train for at least that many steps; returns the samples and what they show."""
    config = TrainConfig(
        out=str(folder / "run"),
        method=CEAT(lam=1.0, mu=5.0),
        models=["digits_resnet"] * 3,
        data=DataConfig("digits"),
        attack=AttackConfig(eps=0.15, alpha=0.06, steps=1),
        optimizer=SGD(lr=0.05, grad_clip=1.0),
        schedule=MultiStep(milestones=[]),
        average=EMA(decay=0.99),
        validation=ValidationConfig(images=200, attack=AttackConfig(eps=0.15, alpha=0.06, steps=2), every=10),
        checkpoint=CheckpointConfig(every=10, every_steps=EVERY),
        epochs=1,
        batch_size=64,
        device="cpu",
        tensorboard=importlib.util.find_spec("tensorboard") is not None,
    )
    before, sampler = usage(), Sampler()
    trainer = Trainer(config, console=Console(quiet=True), callbacks=[sampler])
    config.epochs = -(-steps // trainer.batches)
    trainer.fit()
    batches, epochs = trainer.batches, config.epochs
    del trainer
    gc.collect()
    after = usage()
    settled, last = sampler.samples[len(sampler.samples) // 4 : -1], sampler.samples[-1]
    return {
        "steps": batches * epochs,
        "resident_mb_after_a_quarter": settled[0]["resident_mb"],
        "resident_mb_at_the_end": last["resident_mb"],
        "growth": last["resident_mb"] / settled[0]["resident_mb"] - 1,
        "files_left": after["files"] - before["files"],
        "children_left": after["children"] - before["children"],
        "most_files": max(sample["files"] for sample in sampler.samples),
        "samples": sampler.samples,
    }


def draw(record: dict[str, Any], path: Path) -> None:
    """Resident memory over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axes = figure.add_subplot()
    samples = record["samples"]
    axes.plot([s["step"] for s in samples], [s["resident_mb"] for s in samples])
    axes.set_ylim(0)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("resident memory, MB")
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the record to this file")
    parser.add_argument("--figure", type=Path, help="draw the memory over the steps into this file")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps, at least")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        record = soak(Path(folder), arguments.steps)
    if arguments.json:
        write_record(arguments.json, record)
    if arguments.figure:
        draw(record, arguments.figure)
    print(
        f"{record['steps']} steps: {record['resident_mb_after_a_quarter']:.0f} MB after a quarter of them, "
        f"{record['resident_mb_at_the_end']:.0f} MB at the end ({record['growth']:+.1%}); "
        f"{record['files_left']} files and {record['children_left']} processes left behind"
    )
    return int(record["growth"] > ALLOWED_GROWTH or record["files_left"] > 0 or record["children_left"] > 0)


if __name__ == "__main__":
    sys.exit(main())
