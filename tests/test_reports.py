"""Reports: self-contained, well-formed, escaped, with the numbers of the evaluations."""

from __future__ import annotations

import base64
import csv
import io
import re
import shutil
import struct
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from ceat_fast.evaluation import (
    CLEAN,
    BlackBoxResult,
    Check,
    EvaluationResult,
    Examples,
    Score,
    TransferMatrix,
    evaluate_run,
)
from ceat_fast.evaluation.protocol import EvaluationConfig
from ceat_fast.methods import CEAT, EAT, Method
from ceat_fast.reports import (
    comparison,
    figures,
    page,
    robustbench_card,
    score_table,
    sections,
    write_comparison,
    write_report,
)
from ceat_fast.reports.canvas import canvas, legend, whole_epochs
from ceat_fast.reports.evaluated import Evaluated
from ceat_fast.reports.statistics import main_columns, mcnemar, paired_difference, strongest, worst_case
from ceat_fast.reports.tables import check_table
from ceat_fast.training import SGD, AttackConfig, DataConfig, MultiStep, TrainConfig, Trainer

VOID = {"meta", "img", "br", "wbr"}


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
        self.text += f"{data} "


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
        optimizer=SGD(lr=0.1),
        schedule=MultiStep(milestones=[]),
        epochs=2,
        device="cpu",
    )
    trainer = Trainer(config, console=Console(quiet=True))
    trainer.fit()
    sweeps = {"eps_sweep": [0.1, "51/255"], "step_sweep": [6]}
    evaluate_run(trainer.run, EvaluationConfig(["PGD", "CW"], **sweeps, images=40, sanity_samples=20))
    return out


def score(subject: str, attack: str, correct: list[int], margin: list[float] | None = None) -> Score:
    flags = torch.tensor(correct, dtype=torch.bool)
    margins = torch.tensor(margin) if margin else torch.where(flags, 1.0, -1.0)
    return Score(subject, attack, flags, torch.zeros(len(flags)).long(), margins, torch.full((len(flags),), 0.1))


def settings(attack: str = "PGD", eps: float = 0.1, **others: object) -> dict[str, object]:
    given = {"attack": attack, "eps": eps, "eps_as_given": str(eps), "eps_255": eps * 255, **others}
    return {"settings": given, "seconds": 2.0, "passes": [20, 20], "flags": [], "found_by": {}}


NOTHING = {"settings": {}, "seconds": 0.1, "passes": [1, 0], "flags": [], "found_by": {}}
ABOUT = {"name": "toy", "classes": 2, "dataset": "digits", "fingerprint": {"data": "d1"}}


def toy(pgd: list[int], auto: list[int] | None = None, **about: object) -> EvaluationResult:
    scores = [score("model", CLEAN, [1, 1, 1, 0]), score("model", "PGD-20", pgd)]
    attacks = {CLEAN: NOTHING, "PGD-20": settings(steps=20)}
    if auto is not None:
        scores.append(score("model", "AA", auto))
        attacks["AA"] = settings("AutoAttack", version="standard", precision="fp32", backend="native")
    labels = torch.tensor([0, 0, 1, 1])
    return EvaluationResult(scores, attacks, labels, [Check("logits", "ok", "fine")], ABOUT | about)


def saved(result: EvaluationResult, folder: Path) -> Path:
    folder.mkdir()
    result.save(folder / "evaluation.json")
    return folder


def test_the_report_is_one_well_formed_page_with_the_numbers(runs: list[Path], tmp_path: Path) -> None:
    out = write_report(runs, tmp_path / "deep" / "report.html")
    outline = Outline(out.read_text())
    assert outline.open == []
    # eps and step curves; classes and 8 x 3 example images of each run; 3 curves, 3 disparities, 2 weights of training
    assert len(outline.images) == 2 + 2 * (1 + 24) + 8
    assert all(image["alt"] for image in outline.images)
    assert all(address.startswith("data:image/png;base64,") for address in outline.addresses)
    for run in runs:
        result = EvaluationResult.load(run / "evaluation.json")
        for name in (CLEAN, "PGD-3", "CW-3"):
            for subject in result.subjects:
                low, high = result.score(subject, name).interval
                assert f"{100 * result.score(subject, name).accuracy:.1f}" in outline.text
                assert f"{100 * low:.1f}-{100 * high:.1f}" in outline.text
    for words in ("76.5/255", "worst of these", "Sanity checks", "Hardest images: EAT", "2 epochs in"):
        assert words in outline.text
    for image in outline.images:
        png = base64.b64decode(str(image["src"]).partition(",")[2])
        width, height = struct.unpack(">II", png[16:24])
        assert (width, height) == (8, 8) or (width > 200 and height > 150)


def test_an_existing_report_is_kept_unless_told(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    out.write_text("mine")
    with pytest.raises(FileExistsError, match="choose another file"):
        write_report(runs[1:], out)
    assert out.read_text() == "mine"
    write_report(runs[1:], out, replace=True)
    assert "adversarial weight" not in out.read_text()  # EAT has none


def test_evaluations_with_the_same_name_are_told_apart(tmp_path: Path) -> None:
    folders = [saved(toy([1, 0, 0, 0]), tmp_path / name) for name in "ab"]
    text = Outline(write_report(folders, tmp_path / "r.html").read_text()).text
    assert all(f"toy in {folder}" in text for folder in folders)


def test_what_cannot_be_reported_is_refused(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one folder"):
        write_report([], tmp_path / "r.html")
    with pytest.raises(ValueError, match="must be evaluated first: ceat-fast evaluate"):
        write_report([tmp_path], tmp_path / "r.html")
    (tmp_path / "evaluation.json").write_text("{}")
    with pytest.raises(ValueError, match="no evaluation of this version"):
        write_report([tmp_path], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_the_same_as_files(runs: list[Path], tmp_path: Path) -> None:
    write_report(runs, tmp_path / "r.html", files=tmp_path / "files")
    names = {path.name for path in (tmp_path / "files").iterdir()}
    assert {"scores.csv", "samples.csv", "evaluations.json", "eps.png", "steps.png"} <= names
    assert {
        "classes-EAT.png",
        "card-EAT.json",
    } <= names
    assert any(name.startswith("card-CEAT-") for name in names)
    result = EvaluationResult.load(runs[1] / "evaluation.json")
    rows = list(csv.DictReader((tmp_path / "files" / "scores.csv").open()))
    assert len(rows) == 2 * len(result.scores)
    (row,) = [r for r in rows if (r["method"], r["subject"], r["attack"]) == ("EAT", "member 1", "CW-3")]
    assert int(row["correct"]) == int(result.score("member 1", "CW-3").correct.sum())
    assert float(row["low_95"]) == result.score("member 1", "CW-3").interval[0]
    samples = list(csv.DictReader((tmp_path / "files" / "samples.csv").open()))
    assert len(samples) == 40 * len(rows)
    (sample,) = [
        s for s in samples if (s["method"], s["subject"], s["attack"], s["sample"]) == ("EAT", "ensemble", "PGD-3", "7")
    ]
    assert int(sample["prediction"]) == int(result.score("ensemble", "PGD-3").prediction[7])
    assert int(sample["label"]) == int(result.labels[7])
    assert float(sample["margin"]) == pytest.approx(result.score("ensemble", "PGD-3").margin[7].item(), rel=1e-4)
    assert float(sample["norm"]) == pytest.approx(0.3, rel=1e-4)
    with pytest.raises(FileExistsError, match="is not empty"):
        write_report(runs, tmp_path / "other.html", files=tmp_path / "files")


def test_transfer_results_beside_the_evaluation_are_shown(runs: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "evaluation.json").write_bytes((runs[1] / "evaluation.json").read_bytes())
    fooled = torch.arange(80).view(2, 2, 20) % 4 == 0
    names = ["member 0", "member 1"]
    attack = {"eps": 0.03, "steps": 50, "restarts": 5}
    counted = torch.ones(2, 20).bool()
    TransferMatrix(names, names, fooled, counted, torch.arange(20), "all", attack, 1.0).save(folder / "transfer.json")
    correct = {("other", "PGD-CE"): torch.arange(20)[None] < 13}
    black_box = BlackBoxResult(["ensemble"], correct, torch.ones(1, 20).bool(), {}, {("other", "PGD-CE"): 1.0})
    black_box.save(folder / "black_box.json")
    text = Outline(write_report([folder], tmp_path / "r.html").read_text()).text
    assert "Mean between members: 25.0 %" in text
    assert "other / PGD-CE" in text
    assert "65.0" in text
    assert "Training" not in text  # the folder is no run


def test_a_comparison_counts_image_by_image(tmp_path: Path) -> None:
    folders = [
        saved(toy([1, 0, 0, 0], name="old"), tmp_path / "a"),
        saved(toy([0, 1, 1, 0], name="new"), tmp_path / "b"),
    ]
    text = write_comparison(folders, tmp_path / "c.html").read_text()
    outline = Outline(text)
    assert outline.open == []
    assert re.findall(r'<td class="number best">([\d.]+)', text) == ["75.0", "75.0", "50.0"]  # a tie, and the new one
    assert "compared with old" in outline.text
    assert "+25.0" in outline.text
    assert "+2 -1, p 1.000" in outline.text
    assert "on how many images the method alone is right (+), and on how many old alone (-)" in outline.text
    assert "4 test images of digits" in outline.text
    with pytest.raises(FileExistsError, match="choose another file"):
        write_comparison(folders, tmp_path / "c.html")


def test_a_comparison_of_runs_shows_curves_and_differing_settings(runs: list[Path], tmp_path: Path) -> None:
    outline = Outline(write_comparison(runs, tmp_path / "c.html").read_text())
    assert outline.open == []
    assert len(outline.images) == 2 + 1 + 8  # curves over eps and steps, classes, training
    assert "method CEAT EAT" in " ".join(outline.text.partition("Settings of training that differ")[2].split())
    assert "method.lam" in outline.text
    assert "init_args" not in outline.text
    assert "schedule" not in outline.text.partition("Settings of training that differ")[2]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (toy([1, 0, 0, 0], fingerprint={"data": "d2"}), "was judged on other images"),
        (
            EvaluationResult(
                toy([1, 0, 0, 0]).scores,
                {CLEAN: NOTHING, "PGD-20": settings(eps=0.2, steps=20)},
                torch.zeros(4),
                [],
                ABOUT,
            ),
            "PGD-20 was made with other settings in .*eps: 0.1 there, 0.2 here",
        ),
        (
            EvaluationResult([score("model", CLEAN, [1, 1, 1, 1])], {CLEAN: NOTHING}, torch.zeros(4), [], ABOUT),
            "no attack",
        ),
    ],
    ids=["other data", "other settings", "no common attack"],
)
def test_what_cannot_be_compared_is_refused(other: EvaluationResult, message: str, tmp_path: Path) -> None:
    folders = [saved(toy([1, 0, 0, 0]), tmp_path / "a"), saved(other, tmp_path / "b")]
    with pytest.raises(ValueError, match=message):
        write_comparison(folders, tmp_path / "c.html")
    with pytest.raises(ValueError, match="at least two evaluations"):
        write_comparison(folders[:1], tmp_path / "c.html")


def test_several_evaluations_head_their_rows(tmp_path: Path) -> None:
    folders = [saved(toy([1, 0, 0, 0], name=name), tmp_path / name) for name in ("old", "new")]
    text = write_report(folders, tmp_path / "r.html").read_text()
    assert Outline(text).open == []
    heads = re.findall(r'<th scope="rowgroup" colspan="\d"><span>(\w+)</span></th>', text)
    assert heads == ["old", "new"] * 2  # accuracies, times
    alone = write_report(folders[:1], tmp_path / "one.html").read_text()
    assert 'scope="rowgroup"' not in alone


def test_long_paths_may_be_broken_in_row_headings() -> None:
    text = page.table("", ("run", "eps"), [[["EAT in runs/my_run", "8/255"]]], 1)
    assert "runs/<wbr>my_<wbr>run" in text
    assert "8/255" in text


def test_epochs_have_no_fractions_and_names_hide_no_line() -> None:
    figure, axis = canvas()
    axis.plot([1, 2, 3], [0.1, 0.2, 0.3], label="a method with a name of more than a few letters")
    whole_epochs(axis)
    legend(figure, axis)
    figure.draw_without_rendering()
    assert all(tick == round(tick) for tick in axis.get_xticks())
    assert figure.legends[0].get_window_extent().y1 <= axis.get_window_extent().y0


def test_mcnemar() -> None:
    # n = 12, P(X <= 2) = (1 + 12 + 66) / 4096
    assert mcnemar(10, 2) == pytest.approx(2 * 79 / 4096)
    assert mcnemar(2, 10) == mcnemar(10, 2)
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(0, 5000) == pytest.approx(0.0, abs=1e-300)
    d = paired_difference(score("model", CLEAN, [1, 1, 0, 0]), score("model", CLEAN, [1, 0, 1, 1]))
    assert d[:3] == (0.25, 2, 1)


def test_small_p_values_are_said_to_be_small() -> None:
    shown = [comparison._p_value(p) for p in (0.0009, 0.001, 0.0049, 1.0)]
    assert shown == ["< 0.001", "0.001", "0.005", "1.000"]


def test_of_many_classes_those_are_shown_that_are_hardest_under_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Class 0 is never right when clean, class 1 never under attack."""
    shown: list[int] = []

    def picture(result: EvaluationResult, order: torch.Tensor) -> figures.Picture:
        shown.extend(order.tolist())
        return figures.Picture(b"", 1)

    monkeypatch.setattr(sections, "MOST_CLASSES", 1)
    monkeypatch.setattr(sections, "class_picture", picture)
    result = toy([1, 1, 0, 0])
    result.scores[0] = score("model", CLEAN, [0, 0, 1, 1])
    sections.classes(Evaluated("toy", Path("toy"), result))
    assert shown == [1]


def test_the_speed_counts_the_images_of_every_subject() -> None:
    """4 images of two subjects in 2 seconds are 4 images/s."""
    scores = [score(who, name, [1, 1, 1, 0]) for name in (CLEAN, "PGD-20") for who in ("ensemble", "member 0")]
    attacks = {CLEAN: NOTHING, "PGD-20": settings(steps=20)}
    result = EvaluationResult(scores, attacks, torch.tensor([0, 0, 1, 1]), [], ABOUT)
    text = Outline(sections.cost([Evaluated("toy", Path("toy"), result)])).text
    assert "PGD-20 2.0 4 20 20" in " ".join(text.split())


def test_the_worst_case_is_right_under_every_attack() -> None:
    result = toy([1, 1, 0, 1], auto=[1, 0, 1, 1])
    result.scores[1].margin = torch.tensor([0.5, 0.4, -0.3, 0.1])
    result.scores[2].margin = torch.tensor([0.2, -0.6, 0.1, 0.9])
    worst = worst_case(result, "model")
    assert worst is not None
    assert worst.correct.tolist() == [True, False, False, False]  # the last one is wrong when clean
    assert torch.allclose(worst.margin, torch.tensor([0.2, -0.6, -0.3, -1.0]))
    assert strongest(result) == "AA"  # of equal ones the last
    assert worst_case(toy([1, 1, 0, 1]), "model") is None


def test_the_table_leaves_out_the_further_points_of_a_sweep() -> None:
    attacks = {
        CLEAN: NOTHING,
        "a": settings(steps=20),
        "b": settings(steps=50),
        "c": settings("CW"),
        "d": settings(eps=0.2, steps=20),
    }
    scores = [score("model", name, [1, 0]) for name in attacks]
    assert main_columns(EvaluationResult(scores, attacks, torch.zeros(2).long())) == [CLEAN, "a", "c"]


def test_the_card_has_robustbenchs_keys() -> None:
    card = robustbench_card(toy([1, 1, 0, 0], auto=[1, 0, 0, 0], architectures=["resnet20"] * 3))
    # the keys of robustbench's model_info files
    assert list(card) == [
        "link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "architecture",
        "eps", "clean_acc", "reported", "autoattack_acc", "footnote", "unreliable",
    ]  # fmt: skip
    assert (card["clean_acc"], card["autoattack_acc"], card["number_forward_passes"]) == ("75.00", "25.00", 3)
    assert (card["eps"], card["unreliable"], card["authors"]) == ("0.1", False, None)
    assert robustbench_card(toy([1, 1, 0, 0]))["autoattack_acc"] is None
    result = toy([1, 1, 0, 0], auto=[1, 0, 0, 0])
    result.attacks["AA"]["settings"] |= {"precision": "mixed", "eps_as_given": "8/255"}
    result.checks.append(Check("zero gradients", "flag", "many"))
    card = robustbench_card(result)
    assert (card["autoattack_acc"], card["unreliable"]) == (None, True)
    for given, shown in (("8/255", "8/255"), ("16 / 510", "8/255"), ("2.5/255", "2.5/255"), ("0.031", "0.031")):
        result.attacks["AA"]["settings"] |= {"precision": "fp32", "eps_as_given": given}
        assert robustbench_card(result)["eps"] == shown


def test_flags_are_shown_in_full(tmp_path: Path) -> None:
    result = toy([1, 0, 0, 0])
    result.checks += [
        Check("zero gradients", "flag", "12.0% are zero", "use CW"),
        Check("deterministic", "ok", "0.0e+00"),
    ]
    text = Outline(write_report([saved(result, tmp_path / "a")], tmp_path / "r.html").read_text()).text
    assert "zero gradients: 12.0% are zero" in text
    assert "use CW" in text
    assert "1 flag" in text
    assert "None of" not in text
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(check_table(result))
    shown = console.export_text()
    assert shown.splitlines()[0].strip() == "Sanity checks: 1 flag"
    assert all(words in shown for words in ("12.0% are zero", "-> use CW", "2 passed", "deterministic"))


def test_autoattacks_parts_are_counted(tmp_path: Path) -> None:
    result = toy([1, 0, 0, 0], auto=[1, 0, 0, 0])
    result.attacks["AA"]["found_by"] = {"model": {"apgd-ce": 17, "clean": 19, "square": 23}}
    text = Outline(write_report([saved(result, tmp_path / "a")], tmp_path / "r.html").read_text()).text
    table = text.partition("how many images each part was the first to mislead")[2]
    assert table.split()[:8] == ["subject", "clean", "apgd-ce", "square", "model", "19", "17", "23"]


def test_one_attack_alone_has_no_parts(tmp_path: Path) -> None:
    result = toy([1, 0, 0, 0], auto=[1, 0, 0, 0])
    result.attacks["AA"] |= settings("Square") | {"found_by": {"model": {"square": 23}}}
    text = Outline(write_report([saved(result, tmp_path / "a")], tmp_path / "r.html").read_text()).text
    assert "each part was the first" not in text


def test_text_is_escaped(tmp_path: Path) -> None:
    picture = figures.Picture(b"", 10)
    text = page.page(
        "<a>", page.section("a & b", page.figure(picture, 'say "x"', "<i>")), page.details("<u>", "</pre>")
    )
    text += page.table("<q>", ("<s>",), [[["<em>"]]], 1) + page.box("flag", "<tt>", "<kbd>")
    text += page.tiles({"<sub>": ("<sup>", "<var>")}) + page.example({'"<dfn>': b""}, "<code>", "<samp>")
    for tag in ("a", "i", "u", "q", "s", "em", "tt", "kbd", "sub", "sup", "var", "dfn", "code", "samp"):
        assert f"<{tag}>" not in text
    assert "</pre></pre>" not in text
    assert "&lt;a&gt;" in text
    assert "a &amp; b" in text
    assert 'alt="say &quot;x&quot;"' in text
    report = write_report([saved(toy([1, 0, 0, 0], name="<script>"), tmp_path / "a")], tmp_path / "r.html").read_text()
    assert "<script" not in report


def test_the_table_shows_accuracy_and_interval() -> None:
    scores = [score("ensemble", CLEAN, [1] * 81 + [0] * 182), score("ensemble", "PGD-20", [0] * 263)]
    result = EvaluationResult(scores, {CLEAN: NOTHING, "PGD-20": settings()}, torch.zeros(263).long())
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(score_table({"CEAT(lam=1, mu=5)": result}))
    lines = console.export_text().splitlines()
    clean = next(line for line in lines if "clean" in line)
    assert "30.8 (25.5-36.6)" in clean
    assert "0.0 (0.0-1.4)" in next(line for line in lines if "PGD-20" in line)
    assert "CEAT(lam=1, mu=5)" in lines[0]
    console.print(score_table({"CEAT(lam=1, mu=5)": result, "EAT": result}))
    lines = console.export_text().splitlines()
    assert "CEAT(lam=1, mu=5)" not in lines[0]
    assert [line.split()[1] for line in lines if "clean" in line] == ["CEAT(lam=1,", "EAT"]


def test_no_number_of_the_table_is_cut_off_in_a_narrow_terminal() -> None:
    members = [f"member {number}" for number in range(3)]
    scores = [score(who, CLEAN, [1] * 51 + [0] * 9) for who in ("ensemble", *members)]
    result = EvaluationResult(scores, {CLEAN: NOTHING}, torch.zeros(60).long())
    for results in ({"CEAT(lam=1, mu=5)": result}, {"CEAT(lam=1, mu=5)": result, "EAT": result}):
        console = Console(width=72, record=True, file=io.StringIO())
        console.print(score_table(results))
        assert "…" not in console.export_text(clear=False)
        assert console.export_text().count("85.0") == 4 * len(results)


def test_the_perturbation_is_shown_around_grey() -> None:
    clean = torch.full((1, 2, 2), 0.5)
    shown = figures.perturbation(clean, clean + torch.tensor([[[0.1, -0.1], [0.0, 0.05]]]), eps=0.1)
    assert torch.allclose(shown, torch.tensor([[[1.0, 0.0], [0.5, 0.75]]]), atol=1e-6)
    png = figures.image_png(torch.rand(3, 5, 7))
    assert struct.unpack(">II", png[16:24]) == (7, 5)


def test_a_matrix_needs_a_name_for_every_row_and_column() -> None:
    picture = figures.heat_map(torch.eye(2) * 100, ["a", "b"], ["c", "d"], "from", "to", good_is_high=False)
    assert picture.png[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match=r"a matrix of \(2, 2\) needs as many names, got 2 and 1"):
        figures.heat_map(torch.eye(2), ["a", "b"], ["c"], "from", "to", good_is_high=False)


def test_examples_read_back(tmp_path: Path) -> None:
    clean = torch.rand(2, 1, 3, 3)
    numbers = torch.tensor([1, 2])
    Examples("PGD-20", 8 / 255, clean, clean + 1e-7, numbers, numbers, numbers + 1, numbers).save(tmp_path / "e")
    read = Examples.load(tmp_path / "e")
    assert (read.attack, read.eps) == ("PGD-20", 8 / 255)
    assert torch.equal(read.adversarial, clean + 1e-7)
    assert read.adversarial_predictions.tolist() == [2, 3]


@pytest.mark.parametrize("rest", [b"", b"half a", None], ids=["empty", "no header", "cut"])
def test_damaged_examples_are_named(tmp_path: Path, rest: bytes | None) -> None:
    numbers = torch.tensor([1, 2])
    path = saved(toy([1, 0, 0, 0]), tmp_path / "a") / "evaluation.examples.safetensors"
    Examples("PGD-20", 0.1, torch.rand(2, 1, 3, 3), torch.rand(2, 1, 3, 3), numbers, numbers, numbers, numbers).save(
        path
    )
    path.write_bytes(path.read_bytes()[:-20] if rest is None else rest)
    with pytest.raises(ValueError, match=r"'.*/evaluation\.examples\.safetensors' holds no examples, or is damaged"):
        write_report([tmp_path / "a"], tmp_path / "r.html")
    save_file({"other": numbers}, path)
    with pytest.raises(ValueError, match=r"evaluation\.examples\.safetensors' holds no examples"):
        write_report([tmp_path / "a"], tmp_path / "r.html")


def test_a_run_whose_machine_is_not_recorded(runs: list[Path], tmp_path: Path) -> None:
    run = shutil.copytree(runs[0], tmp_path / "run")
    (run / "environment.json").unlink()
    text = Outline(write_report([run], tmp_path / "r.html").read_text()).text
    assert '"evaluation": {' in text
    assert '"training": [' not in text
