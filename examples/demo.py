"""Train CEAT and the EAT baseline on real handwritten digits, judge both, print a table and write a report.

    python examples/demo.py --out runs/demo

Run again, it continues where it was interrupted; with both runs finished it judges them and writes the report anew.
The settings come from configs/digits_*.yaml.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jsonargparse import auto_cli
from rich.console import Console

from ceat_fast.evaluation import EvaluationResult, evaluate_run
from ceat_fast.reports import score_table, write_report
from ceat_fast.training import Run, Trainer, load_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def main(out: str = "runs/demo", epochs: int | None = None) -> None:
    """Train CEAT and the EAT baseline on the digits, judge both, print a table and write a report.

    Args:
        out: folder of the two runs and the report.
        epochs: train so many epochs instead of those of the config files.
    """
    console = Console()
    results: dict[str, EvaluationResult] = {}
    runs: list[Run] = []
    for name in ("digits_eat", "digits_ceat"):
        config = load_config(CONFIGS / f"{name}.yaml")
        config = dataclasses.replace(config, out=f"{out}/{name}", epochs=epochs or config.epochs, resume=True)
        trainer = Trainer(config, console=console)
        records = trainer.fit()
        seconds = sum(record["seconds"] for record in records)
        console.print(f"{config.method.label}: {len(records)} epochs in {seconds:.0f} s", highlight=False)
        results[config.method.label] = evaluate_run(trainer.run)
        runs.append(trainer.run)
    report = write_report([run.folder for run in runs], Path(out) / "report.html", replace=True)
    console.print(score_table(results))
    console.print(f"report: {report}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    auto_cli(main)
