"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from ceat_fast.evaluation import BlackBoxResult, EvaluationResult, TransferMatrix
from ceat_fast.evaluation.result import OK


def score_table(results: Mapping[str, EvaluationResult]) -> Table:
    """Accuracy in percent with its 95 % interval; rows: method and attack, columns: ensemble and members.

    A single method stands in the title, which leaves the numbers more room.
    """
    title = "Accuracy in % (95 % interval)"
    subjects = list(dict.fromkeys(subject for result in results.values() for subject in result.subjects))
    several = len(results) != 1
    table = Table(title=title if several else f"{next(iter(results))}: {title}", title_justify="left")
    for name in ("method", "attack") if several else ("attack",):
        table.add_column(name, overflow="fold")
    for name in subjects:
        table.add_column(name, justify="right", overflow="fold")  # a number that is cut off is another number
    for label, result in results.items():
        attacks = list(result.attacks)
        for attack in attacks:
            scores = {score.subject: score for score in result.scores if score.attack == attack}
            shown = {name: percent(score.accuracy, *score.interval) for name, score in scores.items()}
            cells = [shown.get(name, "-") for name in subjects]
            method = [label if attack == attacks[0] else ""] if several else []
            table.add_row(*method, attack, *cells, end_section=attack == attacks[-1])
    return table


def check_table(result: EvaluationResult) -> Table:
    """The flags of the sanity report, and the names of the checks without one."""
    passed = [check.name for check in result.checks if check.outcome == OK]
    table = Table(title=f"Sanity checks: {plural(len(result.flags), 'flag')}", title_justify="left", show_header=False)
    for check in result.flags:
        table.add_row(f"[bold red]{check.name}[/]", f"{check.finding}\n-> {check.advice}")
    table.add_row(f"[green]{len(passed)} passed[/]", ", ".join(passed))
    return table


def transfer_table(matrix: TransferMatrix) -> Table:
    """Success rate in percent; rows: whom the inputs were made against, columns: who was shown them."""
    table = Table(title=f"Inputs that mislead, in % of {len(matrix.samples)} samples", title_justify="left")
    table.add_column("made against")
    for name in matrix.targets:
        table.add_column(f"on {name}", justify="right")
    for name, rates in zip(matrix.sources, matrix.rates.tolist(), strict=True):
        table.add_row(name, *(f"{100 * rate:.1f}" for rate in rates))
    return table


def black_box_table(result: BlackBoxResult) -> Table:
    """Accuracy in percent; rows: what the inputs were made against, columns: subjects."""
    table = Table(title="Accuracy in % on inputs made against surrogates", title_justify="left")
    table.add_column("surrogate / attack")
    columns = [result.accuracies(subject) for subject in result.subjects]
    for name in result.subjects:
        table.add_column(name, justify="right")
    for row in columns[0]:
        table.add_row(row, *(f"{100 * column[row]:.1f}" for column in columns))
    return table


def plural(count: int, noun: str) -> str:
    """For example "1 flag" and "2 flags"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def percent(value: float, low: float, high: float) -> str:
    """For example "85.3 (81.2-88.6)"."""
    return f"{100 * value:.1f} ({100 * low:.1f}-{100 * high:.1f})"
