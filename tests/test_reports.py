"""The HTML report: self-contained, well-formed, escaped, with the numbers of the runs."""

from __future__ import annotations

import base64
import io
import struct
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from ceat_fast.evaluation import EvaluationResult, Score, evaluate_run
from ceat_fast.methods import CEAT, EAT, Method
from ceat_fast.reports import figures, page, score_table, write_report
from ceat_fast.training import AttackConfig, DataConfig, OptimizerConfig, TrainConfig, Trainer

VOID = {"meta", "img"}


class Outline(HTMLParser):
    """Collects images and text, and checks that every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attrs))
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def linear(num_classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [trained(folder / "ceat", CEAT(impl="torch")), trained(folder / "eat", EAT())]


def trained(out: Path, method: Method) -> Path:
    config = TrainConfig(
        out=str(out),
        method=method,
        models=[f"{__name__}:linear"] * 3,
        data=DataConfig("digits", train_images=64),
        attack=AttackConfig(eps=0.1, alpha=0.05, steps=1),
        evaluation=AttackConfig(eps=0.3, alpha=0.1, steps=3),
        optimizer=OptimizerConfig(lr=0.1, milestones=[]),
        epochs=2,
        device="cpu",
    )
    trainer = Trainer(config, console=Console(quiet=True))
    trainer.fit()
    evaluate_run(trainer.run, images=40)
    return out


def test_the_report_is_one_well_formed_page_with_the_numbers(runs: list[Path], tmp_path: Path) -> None:
    out = write_report(runs, tmp_path / "new" / "report.html", device="cpu")
    text = out.read_text()
    outline = Outline(text)
    assert outline.open == []
    assert text.startswith("<!doctype html>")
    assert 'name="viewport"' in text
    assert "<title>Robustness of CEAT" in text
    assert len(outline.images) == 5  # curves, disparities, weights, and examples of each run
    assert all(image["alt"] for image in outline.images)
    assert all(address.startswith("data:image/png;base64,") for address in outline.addresses)
    for run in runs:
        for score in EvaluationResult.load(run / "evaluation.json").scores:
            assert f"{100 * score.accuracy:.1f} (" in outline.text
    assert "PGD-3: Linf, eps 0.3 (76.5/255), step 0.1, 3 steps" in outline.text
    for image in outline.images:
        png = base64.b64decode(str(image["src"]).partition(",")[2])
        width, height = struct.unpack(">II", png[16:24])
        assert width > 200
        assert height > 150


def test_an_existing_report_is_kept_unless_told(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    out.write_text("mine")
    with pytest.raises(FileExistsError, match="choose another file"):
        write_report(runs[:1], out, device="cpu")
    assert out.read_text() == "mine"
    write_report(runs[1:], out, device="cpu", replace=True)
    assert len(Outline(out.read_text()).images) == 3  # EAT has no weights


def test_runs_with_the_same_method_are_told_apart(runs: list[Path], tmp_path: Path) -> None:
    other = trained(tmp_path / "other", EAT())
    text = Outline(write_report([runs[1], other], tmp_path / "r.html", device="cpu").read_text()).text
    assert f"EAT in {runs[1]}" in text
    assert f"EAT in {other}" in text


def test_what_cannot_be_reported_is_refused(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one run"):
        write_report([], tmp_path / "r.html")
    with pytest.raises(ValueError, match="is not a run folder"):
        write_report([tmp_path], tmp_path / "r.html")
    (tmp_path / "copy").mkdir()
    for name in ("config.yaml", "metrics.jsonl", "environment.json"):
        (tmp_path / "copy" / name).write_bytes((runs[0] / name).read_bytes())
    with pytest.raises(ValueError, match="evaluated first"):
        write_report([tmp_path / "copy"], tmp_path / "r.html")


def test_text_is_escaped() -> None:
    text = page.page("<b>", page.section("a & b", page.figure(b"", 'say "x"', "<i>")), page.details("<u>", "</pre>"))
    for raw in ("<b>", "<i>", "<u>", "</pre></pre>"):
        assert raw not in text
    assert "&lt;b&gt;" in text
    assert "a &amp; b" in text
    assert 'alt="say &quot;x&quot;"' in text


def test_the_table_shows_accuracy_and_interval() -> None:
    scores = [Score("ensemble", "clean", torch.arange(263) < 81), Score("ensemble", "PGD-20", torch.zeros(263).bool())]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(score_table({"CEAT(lam=1, mu=5)": EvaluationResult(scores, {}, {})}))
    row = next(line for line in console.export_text().splitlines() if "ensemble" in line)
    assert "CEAT(lam=1, mu=5)" in row
    assert "30.8 (25.5-36.6)" in row
    assert "0.0 (0.0-1.4)" in row


def test_the_perturbation_is_magnified_around_grey() -> None:
    clean = torch.full((1, 1, 4, 4), 0.5)
    labels = torch.tensor([3])
    same = figures.Examples(clean, clean, labels, labels, labels)
    moved = figures.Examples(clean, clean + 0.1, labels, labels, torch.tensor([5]))
    assert figures.adversarial_examples(same, 5.0) != figures.adversarial_examples(moved, 5.0)
