"""The paper's experiments as commands: what is run at which scale, that nothing is run twice, and what is written."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from tiny_training import tiny_config, train
from torch import nn

from ceat_fast.cli import main
from ceat_fast.evaluation import TransferConfig, TransferMatrix
from ceat_fast.methods import ADP, CEAT, DVERGE, EAT, FASTEN, GAL, LAFED, TRS
from ceat_fast.models import build_model
from ceat_fast.models.resnet import CIFAR10_STATISTICS
from ceat_fast.reproduce import EXPERIMENTS, SCALES, cells, figures, reproduce
from ceat_fast.reproduce.judgements import Attacked, Judgement, Transferred
from ceat_fast.reproduce.numbers import COLUMNS
from ceat_fast.reproduce.outcome import BlockResult, Reproduction, RowResult
from ceat_fast.reproduce.scales import Scale
from ceat_fast.reproduce.statistics import summarise
from ceat_fast.reproduce.tables import grids
from ceat_fast.training import SGD, Adam, AttackConfig, NonFiniteLossError, Run, TrainConfig, TrainingInterrupted
from ceat_fast.training.checkpoint import checkpoints


@pytest.fixture
def micro(monkeypatch: pytest.MonkeyPatch) -> str:
    """A scale of a second per training."""
    (smoke,) = SCALES["smoke"].settings
    setting = replace(
        smoke,
        sgd=(SGD(lr=0.1, grad_clip=1.0), 1),
        adam=(Adam(lr=0.01), 1),
        evaluation=AttackConfig(eps=0.05, alpha=0.05, steps=1),
        judgements=(Attacked(("PGD", "MIM"), images=40),),
        transfer=TransferConfig(
            eps=0.05, steps=1, restarts=1, surrogate_steps=1, surrogate_restarts=1, images=40, protocol="all"
        ),
        train_images=64,
        held_out=16,
    )
    monkeypatch.setitem(SCALES, "micro", Scale("micro", (setting,)))
    return "micro"


TINY_DATA = """
import torch
from ceat_fast.data import Dataset

def tiny(root):
    assert (root / "tiny-images").is_dir()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (80, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.arange(80) % 10
    return Dataset("tiny", images[:48], labels[:48], images[48:], labels[48:], 10, 255.0, "none")
"""


@pytest.fixture
def two_settings(micro: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The digits, and in the place of the CIFAR-10 subset random images, if the data folder has `tiny-images`."""
    (tmp_path / "tiny_data.py").write_text(TINY_DATA)
    monkeypatch.syspath_prepend(str(tmp_path))
    (digits,) = SCALES[micro].settings
    cifar10 = SCALES["small"].settings[1]
    second = replace(
        digits,
        datasets={"cifar10": "tiny_data:tiny"},
        models=cifar10.models,
        seeds=1,
        train_images=32,
        stands_in="random images",
        files="tiny-images",
    )
    monkeypatch.setitem(SCALES, "two", Scale("two", (digits, second)))
    return "two"


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders of the trainings that are started."""
    started: list[str] = []

    class Noting(cells.Trainer):
        def fit(self):
            started.append(self.config.out)
            return super().fit()

    monkeypatch.setattr(cells, "Trainer", Noting)
    return started


def test_the_tables_hold_the_numbers_of_the_paper() -> None:
    table1, table4 = EXPERIMENTS["table1"], EXPERIMENTS["table4"]
    cifar10, cifar100 = ({row.name: row.paper for row in block.rows} for block in table1.blocks)
    assert dict(cifar10["CEAT(1,5)"]) == {"NAT": 85.74, "PGD20": 59.25, "MIM": 59.97, "CW": 54.58, "AA": 51.75}
    assert cifar10["EAT"] == {"NAT": 85.51, "PGD20": 56.36, "MIM": 57.40}
    assert cifar100["FASTEN"]["AA"] == 22.32
    assert [row.name for row in table1.blocks[0].rows] == [
        "EAT", "ADP", "GAL", "TRS", "DVERGE", "LAFED", "FASTEN", "CEAT(5,1)", "CEAT(1,5)",
    ]  # fmt: skip
    assert [row.paper["PGD20"] for row in table4.blocks[0].rows] == [56.36, 59.74, 60.48, 58.43, 59.25]
    assert EXPERIMENTS["fig3"].blocks[0].rows[-1].paper["2>1"] == 18
    assert EXPERIMENTS["table3"].blocks[1].models == ("resnet20",) * 4
    for experiment in EXPERIMENTS.values():
        for block in experiment.blocks:
            assert all(row.paper.keys() <= set(experiment.columns) for row in block.rows)
            assert {name for pair in experiment.contrasts for name in pair} <= {row.name for row in block.rows}


def test_the_experiments_are_the_tables_and_figures_with_results() -> None:
    assert list(EXPERIMENTS) == ["table1", "table2", "table3", "table4", "fig2", "fig3", "fig4", "fig5", "fig6"]


def test_table_4_switches_the_parts_of_the_loss() -> None:
    methods = [row.method for row in EXPERIMENTS["table4"].blocks[0].rows]
    assert methods[0] == EAT()
    found = [(m.lam > 0, m.mu > 0, m.mu_exponent != 0) for m in methods[1:]]  # L_nat, L_adv, e^D
    assert found == [(False, True, False), (False, True, True), (True, True, False), (True, True, True)]
    assert methods[3].lam_exponent == 0


def test_the_paper_scale_is_section_4_1() -> None:
    (paper,) = SCALES["paper"].settings
    resnet20 = ("resnet20",) * 3
    ceat = paper.train_config(CEAT(lam=1.0, mu=5.0), "cifar10", resnet20, seed=2)
    assert (type(ceat.optimizer), ceat.optimizer.lr, ceat.optimizer.momentum) == (SGD, 0.01, 0.9)
    assert (ceat.epochs, ceat.schedule.milestones, ceat.schedule.gamma) == (120, [75, 95], 0.1)
    assert (ceat.attack.eps, ceat.attack.alpha, ceat.evaluation.steps) == (0.031, 0.007, 20)
    assert (ceat.data.name, ceat.models, ceat.seed) == ("cifar10", ["resnet20"] * 3, 2)
    for method in (ADP(), GAL(), TRS()):
        config = paper.train_config(method, "cifar100", resnet20, seed=0)
        assert (type(config.optimizer), config.optimizer.lr) == (Adam, 0.001)
        assert (config.epochs, config.schedule.milestones) == (150, [90, 120])
    assert paper.scaled(DVERGE()) == DVERGE()
    assert {name for judgement in paper.judgements for name in judgement.attacks} == {"PGD", "MIM", "CW", "AA"}
    assert all(judgement.images is None for judgement in paper.judgements)


def test_search_radii_keep_their_ratio_to_the_attack() -> None:
    small = SCALES["small"].settings[0]
    assert small.attack.eps == 0.15
    assert small.scaled(DVERGE()).eps == pytest.approx(0.07 * 0.15 / 0.031)
    assert small.scaled(LAFED()).alpha == pytest.approx(LAFED().alpha * 0.15 / 0.031)
    assert small.scaled(FASTEN()).eps == pytest.approx(0.06 * 0.15 / 0.031)
    assert small.scaled(TRS()).last_delta == pytest.approx(0.03 * 0.15 / 0.031)
    assert small.scaled(CEAT()) == CEAT()


@pytest.mark.parametrize("scale", ["smoke", "small", "paper"])
def test_every_training_of_every_scale_has_valid_settings(scale: str) -> None:
    for setting in SCALES[scale].settings:
        for experiment in EXPERIMENTS.values():
            for block in experiment.blocks:
                if block.dataset not in setting.datasets:
                    continue
                for row in block.rows:
                    config = setting.train_config(row.method, block.dataset, block.models, 0, experiment.per_epoch)
                    assert all(0 < milestone <= config.epochs for milestone in config.schedule.milestones)
            assert all(setting.judged_as(column) for column in experiment.columns)


@pytest.mark.parametrize("position", [0, 1], ids=["digits", "CIFAR-10"])
def test_the_networks_of_small_are_of_three_depths_and_take_its_images(position: int) -> None:
    setting = SCALES["small"].settings[position]
    channels, side = [(1, 8), (3, 32)][position]
    networks = [build_model(setting.models[name], 10, channels) for name in ("resnet20", "resnet26", "resnet32")]
    depths = [sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in n.modules()) + 1 for n in networks]
    assert depths == [4, 6, 8]
    for network in networks:
        assert network.eval()(torch.rand(2, channels, side, side)).shape == (2, 10)


def test_the_cifar_networks_normalise_each_colour_by_its_own_statistics() -> None:
    network = build_model("ceat_fast.reproduce.models:cifar_resnet_4", 10, 3)
    image = torch.tensor(CIFAR10_STATISTICS[0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    torch.testing.assert_close(network[1].normalize(network[0](image)), torch.zeros(1, 12, 2, 2))


def test_the_digits_of_small_keep_their_run_folders(tmp_path: Path) -> None:
    """Results of earlier versions are found again: folders are named by the settings of the training."""
    setting, block = SCALES["small"].settings[0], EXPERIMENTS["table1"].blocks[0]
    configs = [setting.train_config(row.method, block.dataset, block.models, 0) for row in block.rows]
    folders = [cells.make_cell("", config, (), tmp_path, "auto", None).folder.name for config in configs]
    assert folders[0] == "digits-EAT-b8bc7f01-seed0"
    assert folders[-1] == "digits-CEAT-f154559f-seed0"


def test_mean_deviation_and_interval() -> None:
    summary = summarise([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (summary.mean, summary.count) == (3.0, 5)
    assert summary.deviation == pytest.approx(math.sqrt(2.5))
    assert summary.half_width == pytest.approx(1.9634, abs=1e-3)  # t(4 degrees of freedom, 97.5 %) = 2.776
    assert summary.is_clear
    assert not summarise([-1.0, 0.5, 1.0]).is_clear
    assert not summarise([1.0, 1.0]).is_clear  # two can agree by chance
    assert summarise([0.0] * 16 + [17.0]).half_width == pytest.approx(2.120)  # t(16); the mean deviates by 1
    assert summarise([7.0]) == (summary.__class__)(7.0, None, None, 1)


def test_differences_are_between_trainings_of_the_same_seed() -> None:
    (setting,), block = SCALES["smoke"].settings, EXPERIMENTS["table4"].blocks[0]
    numbers = ({"NAT": {0: 50.0, 1: 60.0, 2: 80.0}}, {"NAT": {1: 55.0, 2: 70.0}})  # one training failed
    rows = [RowResult(row, found, None, {}, {}) for row, found in zip(block.rows, numbers, strict=False)]
    ours, _ = BlockResult(block, setting, rows).contrast(block.rows[0].name, block.rows[1].name, "NAT")
    assert (ours.mean, ours.count) == (7.5, 2)


def test_curves_over_the_epochs_are_means_over_the_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "picture", drawn.append)
    scale, experiment = SCALES["smoke"], EXPERIMENTS["fig2"]
    (block,) = experiment.blocks
    row = RowResult(block.rows[0], {}, None, {0: [10.0, 20.0], 1: [30.0, 60.0]}, {})
    figures._epochs(Reproduction(experiment, scale, [BlockResult(block, scale.settings[0], [row])], []))
    (line,) = drawn[0].axes[0].lines
    assert list(line.get_ydata()) == [20.0, 40.0]


def test_an_experiment_trains_each_row_once_and_never_again(micro: str, trainings: list[str], tmp_path: Path) -> None:
    options = {"out": tmp_path, "seeds": 1, "device": "cpu", "only": ["1: EAT", "5: e^D L_adv, e^D L_nat"]}
    first = reproduce("table4", micro, **options)
    assert len(trainings) == len(set(trainings)) == 2
    assert [row.row.name for row in first.blocks[0].rows] == options["only"]
    eat = first.blocks[0].rows[0]
    assert set(eat.numbers["NAT"]) == {0}
    assert eat.numbers["CW"] == eat.numbers["AA"] == {}
    trainings.clear()
    again = reproduce("table4", micro, **options)
    assert trainings == []
    assert again.to_dict() | {"blocks": None} == first.to_dict() | {"blocks": None}
    assert again.blocks[0].rows[0].numbers == eat.numbers
    # Table 1 has the same two trainings under other names.
    shared = reproduce("table1", micro, out=tmp_path, seeds=1, device="cpu", only=["EAT", "CEAT(1,5)"])
    assert trainings == []
    assert [row.numbers for row in shared.blocks[0].rows] == [row.numbers for row in first.blocks[0].rows]
    assert [block.block.title for block in shared.blocks] == ["CIFAR-10"]  # CIFAR-100 would be the digits again


def test_an_interrupted_experiment_goes_on_where_it_was(
    micro: str, trainings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, calls = cells.run_cell, []

    def interrupted(cell: cells.Cell) -> cells.Outcome:
        calls.append(cell.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return judge(cell)

    monkeypatch.setattr(cells, "run_cell", interrupted)
    options = {"out": tmp_path, "seeds": 2, "device": "cpu", "only": ["EAT"]}
    with pytest.raises(KeyboardInterrupt):
        reproduce("table1", micro, **options)
    assert len(trainings) == 1
    reproduce("table1", micro, **options)
    assert len(trainings) == 2


def test_what_is_to_be_done_after_an_interruption(
    micro: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(cell: cells.Cell) -> cells.Outcome:
        raise TrainingInterrupted(signal.SIGTERM, "interrupted after step 3")

    monkeypatch.setattr(cells, "run_cell", interrupted)
    assert main(["reproduce", "table1", "--scale", micro, "--out", str(tmp_path)]) == 143
    assert capsys.readouterr().err == "ceat-fast: error: interrupted after step 3; the same command continues\n"


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_several_jobs_end_when_they_are_interrupted(number: int, code: int, tmp_path: Path, repository: Path) -> None:
    """Ctrl-C reaches all processes, SIGTERM the first one; what is trained at the moment is saved."""
    command = [sys.executable, "-m", "ceat_fast", "reproduce", "table1", "--jobs", "2", "--device", "cpu"]
    with subprocess.Popen(
        [*command, "--out", str(tmp_path)],
        cwd=repository,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # where the tests run in the background
    ) as process:
        begun = time.monotonic()
        while len(list(tmp_path.glob("*/runs/*/metrics.jsonl"))) < 2 and time.monotonic() < begun + 300:
            time.sleep(0.05)
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        try:
            output, errors = process.communicate(timeout=300)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code
    assert output == ""
    assert errors.endswith("; the same command continues\n")
    finished = [line for line in errors.splitlines() if re.match(r"\d+/18 ", line)]
    assert len(errors.splitlines()) == len(finished) + 1


def test_a_second_data_set_is_a_block_of_its_own(two_settings: str, trainings: list[str], tmp_path: Path) -> None:
    (tmp_path / "data" / "tiny-images").mkdir(parents=True)
    options = {"out": tmp_path, "device": "cpu", "only": ["EAT", "CEAT(1,5)"], "data_root": str(tmp_path / "data")}
    result = reproduce("table1", two_settings, **options)
    assert [block.title for block in result.blocks] == ["CIFAR-10 (digits)", "CIFAR-10 (random images)"]
    assert [list(block.rows[0].numbers["NAT"]) for block in result.blocks] == [[0, 1], [0]]  # seeds of each
    assert len(trainings) == 2 * 2 + 2
    assert result.left_out == []
    text = (tmp_path / "two" / "table1.md").read_text()
    assert "Comparison of the methods (Table 1): CIFAR-10 (random images). Ours: ceat_fast.reproduce" in text
    assert "the paper's are of cifar10 with resnet20: compare the differences" in text
    blocks = json.loads((tmp_path / "two" / "table1.json").read_text())["blocks"]
    assert [(block["dataset"], block["train_images"]) for block in blocks] == [("digits", 64), ("tiny_data:tiny", 32)]


def test_seeds_depend_on_the_experiment(
    two_settings: str, trainings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data" / "tiny-images").mkdir(parents=True)
    first, second = SCALES[two_settings].settings
    fewer = (replace(first, other_seeds={"table4": 1}), replace(second, other_seeds={"table4": 0}))
    monkeypatch.setitem(SCALES, two_settings, Scale(two_settings, fewer))
    options = {"out": tmp_path, "device": "cpu", "data_root": str(tmp_path / "data")}
    result = reproduce("table4", two_settings, only=["1: EAT"], **options)
    assert [(block.title, list(block.rows[0].numbers["NAT"])) for block in result.blocks] == [
        ("CIFAR-10 (digits)", [0])
    ]
    sentence = "random images: left out, table4 would take too long at scale two (--seeds 1 includes it)."
    assert f"* {sentence}" in (tmp_path / "two" / "table4.md").read_text()
    asked = reproduce("table4", two_settings, only=["1: EAT"], seeds=1, **options)
    assert [block.title for block in asked.blocks] == ["CIFAR-10 (digits)", "CIFAR-10 (random images)"]
    assert asked.left_out == []
    others = reproduce("table1", two_settings, only=["EAT"], **options)
    assert [len(block.rows[0].numbers["NAT"]) for block in others.blocks] == [2, 1]


def test_small_has_five_seeds_where_the_results_are_published() -> None:
    seeds = {name: [setting.seeds_of(name) for setting in SCALES["small"].settings] for name in EXPERIMENTS}
    assert seeds.pop("table2") == [3, 0]
    assert seeds.pop("table3") == [2, 0]
    assert set(map(tuple, seeds.values())) == {(5, 1)}


def test_a_data_set_without_files_is_left_out_and_the_table_says_so(
    two_settings: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--scale", two_settings, "--out", str(tmp_path), "--seeds", "1", "--device", "cpu", "--only", "EAT"]
    assert main(["reproduce", "table1", *options, "--data_root", str(tmp_path / "nothing")]) == 0
    sentence = "random images: left out, there is no tiny-images in the data folder (--data_root)."
    assert sentence in capsys.readouterr().out
    text = (tmp_path / "two" / "table1.md").read_text()
    assert f"* {sentence}" in text
    assert "(random images)" not in text


def test_cifar10_at_small_needs_its_files_and_downloads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits, cifar10 = SCALES["small"].settings
    assert digits.is_there(str(tmp_path))
    assert not cifar10.is_there(str(tmp_path))
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert cifar10.is_there(str(tmp_path))
    monkeypatch.setenv("CEAT_FAST_DATA", str(tmp_path))
    assert cifar10.is_there(None)


@pytest.mark.parametrize("name", ["fig2", "fig4"])
def test_figures_have_a_panel_per_data_set(name: str, two_settings: str, tmp_path: Path) -> None:
    (tmp_path / "data" / "tiny-images").mkdir(parents=True)
    row = EXPERIMENTS[name].blocks[0].rows[0].name
    options = {"out": tmp_path, "seeds": 1, "device": "cpu", "only": [row], "data_root": str(tmp_path / "data")}
    assert len(reproduce(name, two_settings, **options).blocks) == 2
    width, height = struct.unpack(">II", (tmp_path / "two" / f"{name}.png").read_bytes()[16:24])
    assert width == pytest.approx(2 * 4.8 / 3.4 * height, rel=0.01)


def test_table_figure_and_numbers_are_written(micro: str, tmp_path: Path) -> None:
    result = reproduce("table4", micro, out=tmp_path, seeds=2, device="cpu", only=["1: EAT", "2: L_adv"])
    block = result.blocks[0]
    text = (tmp_path / micro / "table4.md").read_text()
    mean = sum(block.rows[0].numbers["NAT"].values()) / 2
    assert f"| 1: EAT | ours | {mean:.1f} ± " in text
    assert "|  | paper | 85.51 | 56.36 | 57.40 |  |  |  |" in text
    assert f"|  | difference | {mean - 85.51:+.1f} |" in text
    assert "compare the differences between rows, not the values" in text
    ours, paper = block.contrast("2: L_adv", "1: EAT", "PGD20")
    by_seed = [block.rows[1].numbers["PGD20"][s] - block.rows[0].numbers["PGD20"][s] for s in range(2)]
    assert ours.mean == pytest.approx(sum(by_seed) / 2)
    assert paper == pytest.approx(59.74 - 56.36)
    assert "| 2: L_adv - 1: EAT | ours |" in text
    assert "|  | paper | -2.40 | +3.38 | +2.29 |" in text
    assert re.search(
        r"CIFAR-10 \(digits\), NAT: of 1 differences [01] are clearly positive, [01] clearly negative", text
    )
    assert (tmp_path / micro / "table4.png").read_bytes().startswith(b"\x89PNG")
    nat = block.rows[0].numbers["NAT"]
    tree = json.loads((tmp_path / micro / "table4.json").read_text())
    assert tree["blocks"][0]["rows"][0]["numbers"]["NAT"] == {str(seed): value for seed, value in nat.items()}
    assert tree["environment"]["python"]


def test_a_training_that_fails_is_shown_as_failed(micro: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(cells.Trainer):
        def fit(self):
            if isinstance(self.config.method, CEAT):
                raise NonFiniteLossError("loss nan in epoch 1")
            return super().fit()

    monkeypatch.setattr(cells, "Trainer", Failing)
    result = reproduce("table4", micro, out=tmp_path, seeds=1, device="cpu", only=["1: EAT", "2: L_adv"])
    assert result.blocks[0].rows[1].failures == {0: "loss nan in epoch 1"}
    rows = [row for grid in grids(result) for group in grid.groups for row in group]
    assert next(row for row in rows if row[0] == "2: L_adv")[2] == "failed"
    assert "2: L_adv, seed 0: loss nan in epoch 1" in (tmp_path / micro / "table4.md").read_text()


def test_a_training_without_records_is_named(micro: str, tmp_path: Path) -> None:
    options = {"out": tmp_path, "seeds": 1, "device": "cpu", "only": ["EAT"]}
    reproduce("table1", micro, **options)
    (records,) = tmp_path.glob("micro/runs/*/metrics.jsonl")
    records.unlink()
    with pytest.raises(ValueError, match=r"metrics.jsonl lacks the finished epochs; remove .*EAT-"):
        reproduce("table1", micro, **options)


def test_members_of_three_depths_and_four_members(micro: str, tmp_path: Path) -> None:
    result = reproduce("table3", micro, out=tmp_path, seeds=1, device="cpu", only=["CEAT"])
    assert [len(block.models) for block in result.blocks] == [3, 4]
    assert len(set(result.blocks[0].models)) == 3
    assert all(block.rows[0].numbers["NAT"] for block in result.blocks)


def test_robust_accuracy_after_every_epoch(micro: str, tmp_path: Path) -> None:
    result = reproduce("fig2", micro, out=tmp_path, seeds=1, device="cpu", only=["L_adv, F3"])
    assert [len(row.curves[0]) for row in result.blocks[0].rows] == [1]
    assert len(list(grids(result))) == 1  # one row has no differences
    assert (tmp_path / micro / "fig2.png").is_file()


def test_transfer_between_members(micro: str, trainings: list[str], tmp_path: Path) -> None:
    options = {"out": tmp_path, "seeds": 1, "device": "cpu", "only": ["CEAT"]}
    first = reproduce("fig3", micro, **options)
    assert set(first.blocks[0].rows[0].numbers) == {f"{s}>{t}" for s in "123" for t in "123"}
    assert all(0 <= rates[0] <= 100 for rates in first.blocks[0].rows[0].numbers.values())
    again = reproduce("fig3", micro, **options)
    assert again.blocks[0].rows[0].numbers == first.blocks[0].rows[0].numbers
    assert len(trainings) == 1


def test_black_box_robustness_and_training_time(micro: str, trainings: list[str], tmp_path: Path) -> None:
    result = reproduce("fig6", micro, out=tmp_path, seeds=1, device="cpu", only=["EAT"])
    assert len(trainings) == 2  # the surrogate, trained on clean images, and the row
    assert trainings[0].endswith("-seed1000")  # which no row has
    row = result.blocks[0].rows[0]
    assert row.numbers["black box"][0] <= row.numbers["NAT"][0]
    assert row.seconds.mean > 0


@dataclass(frozen=True)
class Given(Judgement):
    numbers: dict[str, float]

    def judge(self, run: Run, config: TrainConfig) -> dict[str, float]:
        return self.numbers


def test_the_time_of_a_training_is_that_of_an_epoch_and_the_first_judgement_counts(tmp_path: Path) -> None:
    judgements = (Given({"clean": 0.5}), Given({"clean": 0.25, "AA": 0.125}))
    cell = cells.Cell("three epochs", tiny_config(tmp_path / "run"), judgements)
    outcome = cells.run_cell(cell)
    assert outcome.numbers == {"clean": 0.5, "AA": 0.125}
    first, second, third = (record["seconds"] for record in Run.open(cell.folder).metrics)
    assert outcome.seconds == pytest.approx((first + second + third) / 3)


def test_what_was_judged_otherwise_or_before_the_last_epoch_is_judged_again(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run")
    run = train(config).run
    weak, strong = (
        Transferred(TransferConfig(eps=eps, steps=2, restarts=1, images=40, protocol="all")) for eps in (0.01, 0.5)
    )
    numbers = weak.judge(run, config)
    assert strong.judge(run, config) != numbers
    assert weak.judge(run, config) == numbers
    path = run.folder / "transfer.json"
    matrix = TransferMatrix.load(path)
    replace(matrix, fooled=~matrix.fooled).save(path)
    before = checkpoints(run.checkpoints)[0].stat().st_mtime - 1
    os.utime(path, (before, before))
    assert weak.judge(run, config) == numbers


def test_the_sensitivity_figures_draw_curves(micro: str, tmp_path: Path) -> None:
    result = reproduce("fig4", micro, out=tmp_path, seeds=1, device="cpu", only=["lam = 5"])
    assert [row.row.method for row in result.blocks[0].rows] == [CEAT(lam=5.0, mu=1.0)]
    assert (tmp_path / micro / "fig4.png").is_file()


def test_the_command(micro: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--scale", micro, "--out", str(tmp_path), "--seeds", "1", "--device", "cpu", "--only", "EAT"]
    assert main(["reproduce", "table1", *options]) == 0
    captured = capsys.readouterr()
    assert "1/1 CIFAR-10 (digits), EAT, seed 0: clean" in captured.err
    assert "85.51" in captured.out
    assert all(column in captured.out for column in COLUMNS)
    assert "table1.md, .png, .json" in captured.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["table5"], "unknown experiment 'table5' (did you mean 'table"),
        (["table1", "--scale", "smal"], "unknown scale 'smal' (did you mean 'small'?)"),
        (["table1", "--only", "CEAT(1,6)"], "unknown row of table1 'CEAT(1,6)' (did you mean 'CEAT(1,5)'?)"),
        (["table1", "--seeds", "0"], "seeds must be at least 1"),
        (["table1", "--jobs", "0"], "jobs must be at least 1, got 0"),
        (["fig6", "--jobs", "0"], "jobs must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["reproduce", *options, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_several_jobs_give_the_numbers_of_one(tmp_path: Path) -> None:
    found = [
        reproduce("table4", "smoke", out=tmp_path / str(jobs), jobs=jobs, seeds=2, device="cpu", only=["1: EAT"])
        for jobs in (1, 2)
    ]
    assert found[0].blocks[0].rows[0].numbers == found[1].blocks[0].rows[0].numbers
