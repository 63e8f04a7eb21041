"""The examples run, and the demo can be run again."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / name))


def test_a_training_loop_of_ones_own_learns() -> None:
    assert load("own_loop.py")["main"](epochs=2) > 0.3  # chance is 0.1


def test_the_demo_trains_judges_reports_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = load("demo.py")["main"]
    demo(out=str(tmp_path / "demo"), epochs=1)
    text = capsys.readouterr().out
    assert all(word in text for word in ("EAT", "CEAT(lam=1, mu=5)", "ensemble", "member 2", "clean", "PGD-20"))
    report = (tmp_path / "demo" / "report.html").read_text()
    metrics = (tmp_path / "demo" / "digits_ceat" / "metrics.jsonl").read_text()

    demo(out=str(tmp_path / "demo"), epochs=1)
    assert (tmp_path / "demo" / "digits_ceat" / "metrics.jsonl").read_text() == metrics
    assert len(report) > 50_000
