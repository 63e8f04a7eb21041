"""What an experiment gave: numbers by block, row, column and seed, beside the paper's."""

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
    """One row; numbers are in percent, one per training that did not fail, by seed."""

    row: Row
    numbers: dict[str, dict[int, float]]  # column -> seed -> number
    seconds: Summary | None  # training time per epoch
    curves: dict[int, list[float]]  # seed -> robust accuracy on held-out images after every epoch
    failures: dict[int, str]  # seed -> why there is nothing

    def summary(self, column: str) -> Summary | None:
        """Over the seeds; None where nothing was judged."""
        values = list(self.numbers[column].values())
        return summarise(values) if values else None


@dataclass(frozen=True)
class BlockResult:
    """One block."""

    block: Block
    dataset: str
    models: list[str]
    rows: list[RowResult]

    @property
    def title(self) -> str:
        """The paper's, with our data set if it is another one."""
        same = self.dataset == self.block.dataset
        return self.block.title if same else f"{self.block.title} ({self.dataset})"

    def contrast(self, first: str, second: str, column: str) -> tuple[Summary | None, float | None]:
        """First minus second row, paired by seed, in points; and the paper's difference."""
        a, b = (next((r for r in self.rows if r.row.name == name), None) for name in (first, second))
        if a is None or b is None:
            return None, None
        left, right = a.numbers[column], b.numbers[column]
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
        """Plain values: what was run, and every number by seed."""
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
                            "numbers": row.numbers,
                            "paper": dict(row.row.paper),
                            "curves": row.curves,
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
    found = {
        column: {
            seed: 100 * outcome.numbers[scale.judged_as(column)]
            for seed, outcome in outcomes
            if scale.judged_as(column) in outcome.numbers
        }
        for column in columns
    }
    seconds = [outcome.seconds for _, outcome in outcomes if not outcome.failure]
    failures = {seed: outcome.failure for seed, outcome in outcomes if outcome.failure}
    curves = {seed: [100 * value for value in outcome.curve] for seed, outcome in outcomes if outcome.curve}
    return RowResult(row, found, summarise(seconds) if seconds else None, curves, failures)
