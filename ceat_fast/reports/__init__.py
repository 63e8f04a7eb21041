"""Reports: tables for the terminal, HTML pages about one or several evaluations, and files for other programs."""

from __future__ import annotations

from ceat_fast.reports.comparison import write_comparison
from ceat_fast.reports.files import robustbench_card, write_files
from ceat_fast.reports.report import write_report
from ceat_fast.reports.tables import score_table
from ceat_fast.reports.training_figures import write_training_figures

__all__ = [
    "robustbench_card",
    "score_table",
    "write_comparison",
    "write_files",
    "write_report",
    "write_training_figures",
]
