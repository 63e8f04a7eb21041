"""Processes that share an evaluation find what one process finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_journal import judged, numbers

from ceat_fast.attacks import PGD, AutoAttack
from ceat_fast.evaluation.shards import Shard

AUTO = AutoAttack(0.1, version="custom", attacks=("apgd-ce", "square"), steps=4, queries=12, seed=3)
ATTACKS = {"PGD": PGD(eps=0.1, alpha=0.04, steps=2, seed=3), "AA": AUTO}
SCRIPT = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_journal import judged
from test_shards import ATTACKS
result = judged(Path({journal!r}), ATTACKS)
result.save(Path({journal!r}) / f"result-{{os.environ['RANK']}}.json")
"""


def test_every_sample_belongs_to_one_process() -> None:
    shares = [[i for batch in Shard(rank, 3).batches(103, 10) for i in batch] for rank in range(3)]
    assert sorted(sample for share in shares for sample in share) == list(range(103))
    assert shares[1] == [*range(10, 20), *range(40, 50), *range(70, 80), *range(100, 103)]
    assert list(Shard().batches(5, 2)) == [range(2), range(2, 4), range(4, 5)]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_two_processes_find_what_one_finds_and_one_can_take_over(tmp_path: Path, repository: Path) -> None:
    journal = tmp_path / "journal"
    script = tmp_path / "evaluate.py"
    script.write_text(SCRIPT.format(tests=str(repository / "tests"), journal=str(journal)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, check=True, env=environment, timeout=120)
    expected = numbers(judged(None, ATTACKS))
    for rank in (0, 1):
        assert json.loads((journal / f"result-{rank}.json").read_text())["scores"] == expected
        lines = (journal / f"part-{rank}.jsonl").read_text().splitlines()
        samples = {json.loads(line)["sample"] for line in lines if '"sample":' in line}
        assert {sample // 4 % 2 for sample in samples} == {rank}  # batches of 4, every second one
    (journal / "part-1.jsonl").write_text("\n".join(lines[: len(lines) // 2]) + "\n")
    assert numbers(judged(journal, ATTACKS)) == expected


def test_processes_without_a_journal_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ceat_fast.evaluation.shards.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("ceat_fast.evaluation.shards.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("ceat_fast.evaluation.shards.distributed.get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="2 processes need a journal"):
        judged(None, ATTACKS)
