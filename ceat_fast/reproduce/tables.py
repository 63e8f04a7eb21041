"""A reproduction as tables, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from ceat_fast.reproduce.outcome import BlockResult, Reproduction, RowResult
from ceat_fast.reproduce.statistics import Summary


class Grid(NamedTuple):
    """A table of text; groups of rows belong together."""

    title: str
    header: Sequence[str]
    groups: Sequence[Sequence[Sequence[str]]]

    def rich(self) -> Table:
        """For the terminal."""
        table = Table(title=self.title, title_justify="left")
        for number, name in enumerate(self.header):
            table.add_column(name, justify="left" if number < 2 else "right", no_wrap=True)
        for group in self.groups:
            for row in group:
                table.add_row(*row, end_section=row is group[-1])
        return table

    def print(self) -> None:
        """To the terminal, as wide as the table needs: a wrapped number cannot be read."""
        table, console = self.rich(), Console()
        needed = Console(width=1000).measure(table).maximum
        Console(width=max(console.width, needed)).print(table)

    def markdown(self) -> str:
        """For a file."""
        rows = [self.header, [":--"] * 2 + ["--:"] * (len(self.header) - 2)]
        rows += [row for group in self.groups for row in group]
        return f"{self.title}\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def grids(result: Reproduction) -> Iterator[Grid]:
    """Accuracies of every block, and differences where it has both rows of any."""
    for block in result.blocks:
        yield accuracy_grid(result, block)
        differences = contrast_grid(result, block)
        if differences.groups:
            yield differences


def accuracy_grid(result: Reproduction, block: BlockResult) -> Grid:
    """Mean and standard deviation over the seeds, the paper's number, and the difference."""
    columns = result.experiment.columns
    groups = []
    for row in block.rows:
        ours = ["ours", *(_mean_and_deviation(row, column) for column in columns)]
        group = [[row.row.name, *ours, _seconds(row)]]
        if row.row.paper:
            paper = [row.row.paper.get(column) for column in columns]
            group.append(["", "paper", *("" if value is None else f"{value:.2f}" for value in paper), ""])
            group.append(["", "difference", *(_difference(row, column) for column in columns), ""])
        groups.append(group)
    title = f"{result.experiment.title}: {block.title}. {_what(result, block)}"
    return Grid(title, ("method", "", *columns, "s/epoch"), groups)


def contrast_grid(result: Reproduction, block: BlockResult) -> Grid:
    """Differences between rows, paired by seed, with their 95 % intervals; a star where the interval leaves out 0."""
    columns, groups = result.experiment.columns, []
    for first, second in result.experiment.contrasts:
        found = [block.contrast(first, second, column) for column in columns]
        if not any(ours for ours, _ in found):
            continue
        group = [[f"{first} - {second}", "ours", *(_interval(ours) for ours, _ in found)]]
        if any(paper is not None for _, paper in found):
            group.append(["", "paper", *("" if paper is None else f"{paper:+.2f}" for _, paper in found)])
        groups.append(group)
    title = f"Differences in points, {block.title}: mean over the seeds and 95 % interval; * leaves out 0"
    return Grid(title, ("difference", "", *columns), groups)


def verdicts(result: Reproduction) -> list[str]:
    """One sentence per block and column: how many differences are clearly positive, clearly negative, or neither."""
    sentences = []
    for block in result.blocks:
        for column in result.experiment.columns:
            found = [block.contrast(*pair, column)[0] for pair in result.experiment.contrasts]
            known = [ours for ours in found if ours is not None and ours.half_width is not None]
            if known:
                up = sum(ours.is_clear and ours.mean > 0 for ours in known)
                down = sum(ours.is_clear and ours.mean < 0 for ours in known)
                sentences.append(
                    f"{block.title}, {column}: of {len(known)} differences {up} are clearly positive, "
                    f"{down} clearly negative, {len(known) - up - down} neither."
                )
    return sentences


def sentences(result: Reproduction) -> list[str]:
    """What the numbers say, which trainings failed, and what was left out."""
    return [*verdicts(result), *failures(result), *left_out(result)]


def left_out(result: Reproduction) -> list[str]:
    """One sentence per data set that was not run."""
    return [f"{setting.stands_in}: left out, {reason}." for setting, reason in result.left_out]


def failures(result: Reproduction) -> list[str]:
    """One sentence per training that failed."""
    return [
        f"{block.title}, {row.row.name}, seed {seed}: {reason}"
        for block in result.blocks
        for row in block.rows
        for seed, reason in row.failures.items()
    ]


def _what(result: Reproduction, block: BlockResult) -> str:
    setting = block.setting
    counts = sorted({len(values) for row in block.rows for values in row.numbers.values() if values})
    seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1])))) if counts else "0"
    parts = [
        f"Ours: {', '.join(block.models)}, eps {setting.evaluation.eps}, mean ± standard deviation over {seeds} seed(s)"
    ]
    if result.experiment.measure == "attacks":
        parts.append(f"PGD, MIM and CW of {setting.evaluation.steps} steps")
    limited = [judgement for judgement in setting.judgements if judgement.images is not None]
    if result.experiment.measure == "attacks":
        parts += [f"{', '.join(j.attacks)} on the first {j.images} test images" for j in limited]
    if setting.stands_in is not None:
        data, models = block.block.dataset, ", ".join(dict.fromkeys(block.block.models))
        parts.append(f"the paper's are of {data} with {models}: compare the differences between rows, not the values")
    return "; ".join(parts)


def _mean_and_deviation(row: RowResult, column: str) -> str:
    summary = row.summary(column)
    if summary is None:
        return "failed" if row.failures else "-"
    return f"{summary.mean:.1f}" + ("" if summary.deviation is None else f" ± {summary.deviation:.1f}")


def _difference(row: RowResult, column: str) -> str:
    summary, paper = row.summary(column), row.row.paper.get(column)
    return "" if summary is None or paper is None else f"{summary.mean - paper:+.1f}"


def _seconds(row: RowResult) -> str:
    return "-" if row.seconds is None else f"{row.seconds.mean:.1f}"


def _interval(summary: Summary | None) -> str:
    if summary is None:
        return "-"
    width = "" if summary.half_width is None else f" ± {summary.half_width:.1f}"
    return f"{summary.mean:+.1f}{width}" + ("*" if summary.is_clear else "")
