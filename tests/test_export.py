"""Exported files: members that load without ceat_fast, a program of the ensemble, and a card that tells the truth."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import VALIDATED, Judge, tiny_config, train
from torch import Tensor, nn

from ceat_fast.cli import main
from ceat_fast.data import load_dataset
from ceat_fast.ensemble import Ensemble
from ceat_fast.evaluation import evaluate_run
from ceat_fast.export import export_program, export_run
from ceat_fast.training import Run

# A program of somebody who has torch and safetensors only.
STRANGER = """
import sys, torch
from safetensors.torch import load_file
sys.modules["ceat_fast"] = None
from torch import nn

class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.BatchNorm2d(1), nn.Linear(64, 10)
    def forward(self, x):
        return self.fc(self.norm(x).flatten(1))

folder, x = sys.argv[1], torch.load(sys.argv[2])
members = []
for number in range(3):
    member = Mine().eval()
    member.load_state_dict(load_file(f"{folder}/member-{number}.safetensors"))
    members.append(member)
program = torch.export.load(f"{folder}/ensemble.pt2").module()
with torch.no_grad():
    mean = torch.stack([member(x).softmax(1) for member in members]).mean(0)
    torch.save([mean.log(), program(x), program(x[:1])], sys.argv[3])
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Its best weights are those of the second epoch."""
    config = tiny_config(tmp_path_factory.mktemp("export") / "run", epochs=3, validation=VALIDATED)
    return train(config, callbacks=[Judge(0.1, 0.3, 0.2)]).run


def test_a_stranger_gets_the_ensembles_answers(run: Run, tmp_path: Path) -> None:
    folder = export_run(run, tmp_path / "out")
    digits = load_dataset("digits")
    x = digits.test_images[:9].float() / digits.scale
    torch.save(x, tmp_path / "x.pt")
    command = [sys.executable, "-c", STRANGER, str(folder), str(tmp_path / "x.pt"), str(tmp_path / "y.pt")]
    subprocess.run(command, check=True, cwd=tmp_path, env={"OMP_NUM_THREADS": "1"})
    with torch.no_grad():
        expected = run.load_ensemble(digits, "cpu")(x)
    by_hand, by_program, one = torch.load(tmp_path / "y.pt")
    torch.testing.assert_close(by_hand, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(by_program, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one, expected[:1], rtol=1e-5, atol=1e-5)


def test_the_card_holds_settings_checksums_and_no_results_of_other_weights(run: Run, tmp_path: Path) -> None:
    folder = export_run(run, tmp_path / "out", program=False)
    card = json.loads((folder / "card.json").read_text())
    assert sorted(card["files"]) == [f"member-{number}.safetensors" for number in range(3)]
    for name, digest in card["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert card["settings"]["attack"]["eps"] == 0.1
    assert card["settings"]["method"]["init_args"]["mu"] == 5.0
    assert card["members"][0] == {"model": "tiny_training:tiny", "parameters": 64 * 10 + 10 + 2}
    assert card["results"] is None
    text = (folder / "README.md").read_text()
    assert text.startswith("# CEAT(lam=1, mu=5, impl=torch), 3 members, digits\n")
    assert "have not been judged" in text
    assert "ensemble.pt2" not in text


def test_results_are_shown_for_the_weights_that_were_judged(run: Run, tmp_path: Path) -> None:
    result = evaluate_run(run)
    folder = export_run(run, tmp_path / "last", program=False)
    card = json.loads((folder / "card.json").read_text())
    clean = next(
        entry for entry in card["results"]["accuracies"] if (entry["subject"], entry["attack"]) == ("ensemble", "clean")
    )
    assert clean["accuracy"] == pytest.approx(result.score("ensemble").accuracy)
    assert f"| clean | {100 * clean['accuracy']:.1f} (" in (folder / "README.md").read_text()
    best = export_run(run, tmp_path / "best", checkpoint="best", program=False)
    assert json.loads((best / "card.json").read_text())["results"] is None
    for exported, checkpoint in ((folder, "last"), (best, "best")):
        member = run.load_ensemble(load_dataset("digits"), "cpu", checkpoint=checkpoint).members[0]
        assert torch.equal(load_file(exported / "member-0.safetensors")["fc.weight"], member.fc.weight)


def test_the_command(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "out")
    assert main(["export", str(run.folder), "--out", out, "--program", "false"]) == 0
    assert f"written: {out}" in capsys.readouterr().out
    assert not (tmp_path / "out" / "ensemble.pt2").exists()
    assert main(["export", str(run.folder), "--out", out]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert main(["export", str(run.folder), "--out", "."]) == 2
    assert "out='.' must not be the working directory" in capsys.readouterr().err
    options = ["--checkpoint", "best", "--program", "false", "--data.root", "no/where"]  # digits need no files
    assert main(["export", str(run.folder), "--out", "new", *options]) == 0
    assert json.loads(Path("new/card.json").read_text())["checkpoint"] == "best"
    assert main(["export", str(tmp_path / "nowhere")]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_the_program_averages_as_the_ensemble_does() -> None:
    torch.manual_seed(0)
    ensemble = Ensemble([nn.Linear(4, 3) for _ in range(2)], average="logit").eval()
    x = 3 * torch.randn(5, 4)
    torch.testing.assert_close(export_program(ensemble, x[:1]).module()(x), ensemble(x))
    export_program(ensemble.train(), x[:1])
    assert all(module.training for module in ensemble.modules())


def test_a_model_that_cannot_be_traced_is_named() -> None:
    class Wild(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x.flatten(1)[:, :10] if x.sum().item() > 0 else x.flatten(1)[:, 1:11]

    with pytest.raises(ValueError, match=r"cannot trace this ensemble \(Wild\): .*--program false"):
        export_program(Ensemble([Wild()]), torch.rand(1, 1, 8, 8))
