"""A journal survives crashes, damage and full disks, and refuses to mix evaluations."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ceat_fast.attacks import PGD
from ceat_fast.ensemble import Ensemble
from ceat_fast.evaluation import EvaluationResult, JournalMismatchError, evaluate, load_adversarials
from ceat_fast.evaluation.journal import Journal
from ceat_fast.evaluation.verdicts import Attack

SAMPLES, BATCH = 24, 4
ATTACKS = {"PGD": PGD(eps=0.1, alpha=0.04, steps=2, seed=3), "PGD-5": PGD(eps=0.1, alpha=0.04, steps=5, seed=3)}
IDENTITY = {"weights": "a1", "data": "b2"}
SETTINGS = {"PGD": {"eps": 0.1, "steps": 2}}


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4))


def task() -> tuple[Ensemble, Tensor, Tensor]:
    ensemble = Ensemble([network(seed) for seed in range(2)], backend="loop").eval()
    images = torch.rand(SAMPLES, 1, 4, 4, generator=torch.Generator().manual_seed(9))
    labels = ensemble(images).argmax(1).detach()
    return ensemble, images, (labels + (torch.arange(SAMPLES) % 5 == 0)) % 4


def judged(journal: Path | None, attacks: Mapping[str, Attack] = ATTACKS, **options: Any) -> EvaluationResult:
    return evaluate(*task(), attacks, journal=journal, sanity_samples=0, batch_size=BATCH, **options)


def numbers(result: EvaluationResult) -> list[dict[str, Any]]:
    scores: list[dict[str, Any]] = result.to_dict()["scores"]
    return scores


class Counting(PGD):
    """Counts the samples that it attacks."""

    attacked = 0

    def __call__(self, model: nn.Module, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        Counting.attacked += len(x)
        return super().__call__(model, x, *arguments, **options)


def attacked(journal: Path) -> int:
    """How many (goal, sample) pairs an evaluation with that journal attacks."""
    Counting.attacked = 0
    judged(journal, {"PGD": Counting(eps=0.1, alpha=0.04, steps=2, seed=3)})
    return Counting.attacked


def test_a_journal_changes_no_number_and_spares_the_second_call_all_work(tmp_path: Path) -> None:
    expected = numbers(judged(None))
    assert numbers(judged(tmp_path / "j")) == expected
    assert numbers(judged(tmp_path / "j")) == expected
    assert attacked(tmp_path / "other") == 2 * SAMPLES + 8  # the 8 examples are attacked again
    assert attacked(tmp_path / "other") == 8


def test_every_line_is_json_and_says_what_was_found(tmp_path: Path) -> None:
    result = judged(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "part-0.jsonl").read_text().splitlines()]
    assert list(lines[0]["header"]) == ["weights", "data", "ceat_fast version"]
    assert [line["column"] for line in lines if "column" in line] == ["clean", "PGD", "PGD-5"]
    records = [line for line in lines if "sample" in line]
    assert len(records) == 3 * 3 * SAMPLES  # columns, subjects, samples
    (record,) = [r for r in records if (r["attack"], r["subject"], r["sample"]) == ("PGD", "member 1", 7)]
    score = result.score("member 1", "PGD")
    assert record["correct"] is bool(score.correct[7])
    assert record["prediction"] == int(score.prediction[7])
    assert record["margin"] == score.margin[7].item()
    assert record["norm"] == pytest.approx(0.1, abs=1e-6)


SCRIPT = """
import sys, time
from dataclasses import asdict
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_journal
from ceat_fast.attacks import PGD
class Slow(PGD):
    def __call__(self, *arguments, **options):
        time.sleep(0.05)
        return super().__call__(*arguments, **options)
Slow.__name__ = "PGD"
attacks = {{name: Slow(**asdict(attack)) for name, attack in test_journal.ATTACKS.items()}}
print("ready", flush=True)
test_journal.judged(Path({journal!r}), attacks)
"""


def test_after_kill_9_the_numbers_are_those_of_an_uninterrupted_run(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    script = SCRIPT.format(tests=str(Path(__file__).parent), journal=str(journal))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE)
    part = journal / "part-0.jsonl"
    deadline = time.monotonic() + 60
    while not (part.exists() and b'"attack":"PGD","subject"' in part.read_bytes()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    verdicts = part.read_bytes().count(b'"sample":')
    assert 3 * SAMPLES < verdicts < 9 * SAMPLES  # it was in the middle
    assert numbers(judged(journal)) == numbers(judged(None))


@pytest.mark.parametrize("cut", [1, 30, 150], ids=["the newline", "half a line", "a line and a half"])
def test_a_torn_last_line_is_computed_again(tmp_path: Path, cut: int) -> None:
    judged(tmp_path)
    part = tmp_path / "part-0.jsonl"
    part.write_bytes(part.read_bytes()[: -cut - 90])
    assert numbers(judged(tmp_path)) == numbers(judged(None))
    assert b"\n\n" not in part.read_bytes()
    assert all(json.loads(line) for line in part.read_bytes().splitlines())


def find_line(part: Path, *words: str) -> int:
    return next(i for i, line in enumerate(part.read_text().splitlines()) if all(word in line for word in words))


def damage(part: Path, number: int) -> None:
    lines = part.read_text().splitlines(keepends=True)
    lines[number] = lines[number].replace("0", "1").replace("true", "false")
    part.write_text("".join(lines))


def test_a_damaged_line_is_reported_and_its_batch_computed_again(tmp_path: Path) -> None:
    assert attacked(tmp_path) > 0
    part = tmp_path / "part-0.jsonl"
    number = find_line(part, '"attack":"PGD","subject":"member 1","sample":5')
    before = part.read_text()
    damage(part, number)
    with pytest.warns(UserWarning, match=f"part-0.jsonl line {number + 1} is damaged; what it held is computed again"):
        assert attacked(tmp_path) == BATCH + 8
    after = part.read_text()
    assert after.count('"sample":') == before.count('"sample":') + 1  # one verdict was missing, one was added
    with pytest.warns(UserWarning, match="damaged"):
        result = judged(tmp_path, {"PGD": Counting(eps=0.1, alpha=0.04, steps=2, seed=3)})
    assert numbers(result) == numbers(judged(None, {"PGD": ATTACKS["PGD"]}))


def test_a_damaged_header_loses_nothing(tmp_path: Path) -> None:
    assert attacked(tmp_path) > 0
    part = tmp_path / "part-0.jsonl"
    damage(part, 0)
    with pytest.warns(UserWarning, match="line 1 is damaged"):
        assert attacked(tmp_path) == 8
    damage(part, 1)
    damage(part, 2)
    with pytest.raises(JournalMismatchError, match="the record of PGD in line"), Journal(tmp_path, {}, SETTINGS):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": 1e-3}, r"weights: \w+ there, \w+ here"),
        ({"images": 0.5}, r"data: \w+ there, \w+ here"),
        ({"attack": PGD(eps=0.2, alpha=0.04, steps=2, seed=3)}, "PGD eps: 0.1 there, 0.2 here"),
        ({"attack": PGD(eps=0.1, alpha=0.04, steps=2, seed=4)}, "PGD seed: 3 there, 4 here"),
        ({"version": "9.9"}, r"ceat_fast version: \S+ there, 9.9 here"),
    ],
    ids=["weights", "data", "eps", "seed", "version"],
)
def test_another_evaluation_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged(tmp_path)
    before = (tmp_path / "part-0.jsonl").read_bytes()
    model, images, labels = task()
    if "version" in change:
        monkeypatch.setattr("ceat_fast.__version__", change["version"])
    with torch.no_grad():
        model.members[0][1].weight[0, 0] += change.get("weights", 0)
    attacks = {**ATTACKS, "PGD": change.get("attack", ATTACKS["PGD"])}
    with pytest.raises(JournalMismatchError, match=message):
        evaluate(model, images * change.get("images", 1), labels, attacks, journal=tmp_path, sanity_samples=0)
    assert (tmp_path / "part-0.jsonl").read_bytes() == before


class Scaled(nn.Module):
    """Its scale is in no fingerprint."""

    def __init__(self, scale: float, noise: float = 0.0) -> None:
        super().__init__()
        self.model, self.scale, self.noise = network(0), scale, noise

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.scale * self.model(x)
        return logits + self.noise * torch.randn_like(logits)


def test_the_same_weights_with_other_answers_are_refused(tmp_path: Path) -> None:
    _, images, labels = task()
    evaluate(Scaled(1.0).eval(), images, labels, ATTACKS, journal=tmp_path, sanity_samples=0)
    evaluate(Scaled(1.01).eval(), images, labels, ATTACKS, journal=tmp_path, sanity_samples=0)  # may be rounding
    with pytest.raises(JournalMismatchError, match=r"the clean margin of sample 0 was .*choose another folder"):
        evaluate(Scaled(3.0).eval(), images, labels, ATTACKS, journal=tmp_path, sanity_samples=0)


def test_answers_at_random_are_not_taken_for_those_of_another_model(tmp_path: Path) -> None:
    _, images, labels = task()
    first, again = (
        evaluate(Scaled(1.0, noise=1.0).eval(), images, labels, ATTACKS, journal=tmp_path, sanity_samples=0)
        for _ in range(2)
    )
    assert numbers(first) == numbers(again)


def test_attacks_can_be_added_later(tmp_path: Path) -> None:
    judged(tmp_path, {"PGD-5": ATTACKS["PGD-5"]})
    assert numbers(judged(tmp_path)) == numbers(judged(None))


def test_the_first_samples_are_not_judged_again_with_the_others(tmp_path: Path) -> None:
    few = judged(tmp_path, samples=10)
    assert all(len(score.correct) == 10 for score in few.scores)
    assert numbers(judged(tmp_path)) == numbers(judged(None))
    assert numbers(judged(tmp_path, samples=10)) == numbers(few)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, room = os.write, 40_000

    def limited(file: int, data: bytes) -> int:
        nonlocal room
        count = write(file, data[:room])
        room -= count
        if count < len(data) and not count:
            raise OSError(28, "No space left on device")
        return count

    with monkeypatch.context() as patch:
        patch.setattr("ceat_fast.evaluation.journal.os.write", limited)
        with pytest.raises(OSError, match="what it holds is intact: make room and run again"):
            judged(tmp_path)
    text = (tmp_path / "part-0.jsonl").read_text()
    assert text.endswith("}\n")
    assert 0 < text.count('"sample":') < 9 * SAMPLES
    assert text.count('"sample":') % BATCH == 0  # the batch that did not fit is gone as a whole
    assert numbers(judged(tmp_path)) == numbers(judged(None))


def test_two_writers_of_one_part_are_refused(tmp_path: Path) -> None:
    with Journal(tmp_path, IDENTITY, SETTINGS), pytest.raises(OSError, match="another process is writing"):
        judged(tmp_path)


def test_all_parts_are_read(tmp_path: Path) -> None:
    for part in (0, 1):
        with Journal(tmp_path, IDENTITY, SETTINGS, part) as journal:
            journal.append("PGD", [{"sample": part}])
    with Journal(tmp_path, IDENTITY, SETTINGS, 5) as journal:
        assert [record["sample"] for record in journal.records()] == [0, 1]
    with (
        pytest.raises(JournalMismatchError, match="data: b2 there, c3 here"),
        Journal(tmp_path, {**IDENTITY, "data": "c3"}, SETTINGS, 7),
    ):
        pass


def test_adversarials_are_kept_unrounded(tmp_path: Path) -> None:
    ensemble, images, labels = task()
    result = judged(tmp_path, keep_adversarials=True)
    inputs, samples = load_adversarials(tmp_path, "PGD")
    assert inputs.dtype == torch.float32
    assert samples.tolist() == list(range(SAMPLES))
    index = torch.arange(BATCH, 2 * BATCH)
    rows = slice(BATCH, 2 * BATCH)
    assert torch.equal(inputs[rows], ATTACKS["PGD"](ensemble, images[rows], labels[rows], index))
    member, _ = load_adversarials(tmp_path, "PGD-5", "member 1")
    assert torch.equal(ensemble.members[1](member).argmax(1) == labels, result.score("member 1", "PGD-5").correct)
    with pytest.raises(ValueError, match="keeps no inputs of 'CW' against 'ensemble'"):
        load_adversarials(tmp_path, "CW")
    with pytest.raises(ValueError, match="keeps no inputs of 'PGD' against 'member 2'"):
        load_adversarials(tmp_path, "PGD", "member 2")


def test_adversarials_that_are_wanted_later_are_made_then(tmp_path: Path) -> None:
    judged(tmp_path)
    judged(tmp_path, keep_adversarials=True)
    inputs, _ = load_adversarials(tmp_path, "PGD")
    assert len(inputs) == SAMPLES
    next((tmp_path / "adversarials").rglob("ensemble-0000004-*.safetensors")).unlink()
    assert numbers(judged(tmp_path, keep_adversarials=True)) == numbers(judged(None))
    assert len(load_adversarials(tmp_path, "PGD")[0]) == SAMPLES
