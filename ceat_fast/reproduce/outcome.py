"""What an experiment gave: accuracies by block, row, column and seed, beside the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ceat_fast.reproduce.cells import Outcome
from ceat_fast.reproduce.experiments import Block, Experiment, Row
from ceat_fast.reproduce.scales import Scale
from ceat_fast.reproduce.statistics import Summary, summarise


@dataclass(frozen=True)
class RowResult:
    """One row; accuracies are in percent, one per training that did not fail, by seed."""

    row: Row
    accuracies: dict[str, dict[int, float]]  # column -> seed -> accuracy
    seconds: Summary | None  # training time per epoch
    failures: dict[int, str]  # seed -> why there is nothing

    def summary(self, column: str) -> Summary | None:
        """Over the seeds; None where nothing was judged."""
        values = list(self.accuracies[column].values())
        return summarise(values) if values else None


@dataclass(frozen=True)
class BlockResult:
    """One block."""

    block: Block
    dataset: str
    models: list[str]
    rows: list[RowResult]

    def contrast(self, first: str, second: str, column: str) -> tuple[Summary | None, float | None]:
        """First minus second row, paired by seed, in points; and the paper's difference."""
        a, b = (next((r for r in self.rows if r.row.name == name), None) for name in (first, second))
        if a is None or b is None:
            return None, None
        left, right = a.accuracies[column], b.accuracies[column]
        values = [left[seed] - right[seed] for seed in left if seed in right]
        paper = [row.row.paper.get(column) for row in (a, b)]
        difference = None if paper[0] is None or paper[1] is None else paper[0] - paper[1]
        return (summarise(values) if values else None), difference


@dataclass(frozen=True)
class Reproduction:
    """A whole experiment at a scale."""

    experiment: Experiment
    scale: Scale
    blocks: list[BlockResult]

    def to_dict(self) -> dict[str, Any]:
        """Plain values: what was run, and every accuracy by seed."""
        return {
            "experiment": self.experiment.name,
            "scale": self.scale.name,
            "blocks": [
                {
                    "title": block.block.title,
                    "dataset": block.dataset,
                    "models": block.models,
                    "rows": [
                        {
                            "name": row.row.name,
                            "method": row.row.method.label,
                            "accuracies": row.accuracies,
                            "paper": dict(row.row.paper),
                            "seconds_per_epoch": None if row.seconds is None else row.seconds.mean,
                            "failures": row.failures,
                        }
                        for row in block.rows
                    ],
                }
                for block in self.blocks
            ],
        }


def row_result(row: Row, outcomes: Sequence[tuple[int, Outcome]], scale: Scale, columns: Sequence[str]) -> RowResult:
    """From (seed, outcome) of each training of a row."""
    accuracies = {
        column: {
            seed: 100 * outcome.accuracies[scale.attack_of(column)]
            for seed, outcome in outcomes
            if scale.attack_of(column) in outcome.accuracies
        }
        for column in columns
    }
    seconds = [outcome.seconds for _, outcome in outcomes if not outcome.failure]
    failures = {seed: outcome.failure for seed, outcome in outcomes if outcome.failure}
    return RowResult(row, accuracies, summarise(seconds) if seconds else None, failures)
