"""One table of accuracies, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from ceat_fast.evaluation import EvaluationResult


def score_table(results: Mapping[str, EvaluationResult]) -> Table:
    """Accuracy in percent with its 95 % interval; rows: method and subject, columns: attacks."""
    columns = list(dict.fromkeys(score.attack for result in results.values() for score in result.scores))
    table = Table(title="Accuracy in % (95 % interval)", title_justify="left")
    for name in ("method", "subject"):
        table.add_column(name)
    for name in columns:
        table.add_column(name, justify="right")
    for label, result in results.items():
        for subject in result.subjects:
            cells = {
                score.attack: percent(score.accuracy, *score.interval)
                for score in result.scores
                if score.subject == subject
            }
            table.add_row(
                label,
                subject,
                *(cells.get(column, "-") for column in columns),
                end_section=subject == result.subjects[-1],
            )
    return table


def percent(value: float, low: float, high: float) -> str:
    """For example "85.3 (81.2-88.6)"."""
    return f"{100 * value:.1f} ({100 * low:.1f}-{100 * high:.1f})"
