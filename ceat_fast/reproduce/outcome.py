"""What an experiment gave: numbers by block, row, column and seed, beside the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ceat_fast.reproduce.cells import Outcome
from ceat_fast.reproduce.experiments import Block, Experiment, Row
from ceat_fast.reproduce.scales import Scale
from ceat_fast.reproduce.setting import Setting
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
    """One block, in one setting."""

    block: Block
    setting: Setting
    rows: list[RowResult]

    @property
    def title(self) -> str:
        """The paper's, with what stands in for its data."""
        return self.setting.titled(self.block.title)

    @property
    def dataset(self) -> str:
        """Ours."""
        return self.setting.datasets[self.block.dataset]

    @property
    def models(self) -> list[str]:
        """Ours."""
        return [self.setting.models[model] for model in self.block.models]

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
    """A whole experiment at a scale.

    Attributes:
        experiment, scale: what was run.
        blocks: the results.
        left_out: settings of the scale that were not run, and why.
    """

    experiment: Experiment
    scale: Scale
    blocks: list[BlockResult]
    left_out: list[tuple[Setting, str]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values: what was run, and every number by seed."""
        return {
            "experiment": self.experiment.name,
            "scale": self.scale.name,
            "blocks": [
                {
                    "title": block.title,
                    "dataset": block.dataset,
                    "train_images": block.setting.train_images,
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


def row_result(
    row: Row, outcomes: Sequence[tuple[int, Outcome]], setting: Setting, columns: Sequence[str]
) -> RowResult:
    """From (seed, outcome) of each training of a row."""
    found = {
        column: {
            seed: 100 * outcome.numbers[setting.judged_as(column)]
            for seed, outcome in outcomes
            if setting.judged_as(column) in outcome.numbers
        }
        for column in columns
    }
    seconds = [outcome.seconds for _, outcome in outcomes if not outcome.failure]
    failures = {seed: outcome.failure for seed, outcome in outcomes if outcome.failure}
    curves = {seed: [100 * value for value in outcome.curve] for seed, outcome in outcomes if outcome.curve}
    return RowResult(row, found, summarise(seconds) if seconds else None, curves, failures)
