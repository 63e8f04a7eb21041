"""Several processes against one: losses, weights, statistics, resume, failures; and the pieces that make it so."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_training import AVERAGES, SCENARIOS, STEPS, config, given_ensemble
from tiny_training import train
from torch import Tensor, nn
from torch.nn import functional as F

from ceat_fast.ensemble import Ensemble
from ceat_fast.loss import ceat_loss, ensemble_cross_entropy
from ceat_fast.training import ParallelConfig, Run
from ceat_fast.training.checkpoint import checkpoints, load_weights
from ceat_fast.training.distributed import Layout, SpreadEnsemble, SynchronisedBatchNorm
from ceat_fast.training.distributed.layout import split
from ceat_fast.training.distributed.members import logits_of

TESTS = Path(__file__).parent
PROGRAM = str(TESTS / "distributed_training.py")
TIMES = ("seconds", "images_per_second")


def torchrun(processes: int, *program: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), *sys.path])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)


def alone(name: str, folder: Path) -> Run:
    """The scenario in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return train(config(folder / name, **(SCENARIOS[name] | {"parallel": ParallelConfig()}))).run
    finally:
        torch.set_num_threads(threads)


def largest_difference(a: Run, b: Run) -> float:
    """Over all numbers of all records, and all weights of the last checkpoint."""
    differences = [0.0]
    for ours, theirs in zip(a.metrics, b.metrics, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - set(TIMES):
            x, y = torch.tensor(ours[name], dtype=torch.float64), torch.tensor(theirs[name], dtype=torch.float64)
            if name.endswith("_histogram"):
                continue  # a disparity on the edge of a bin may fall to either side
            differences.append((x - y).abs().max().item())
    ours, theirs = (load_weights(checkpoints(run.checkpoints)[0]) for run in (a, b))
    assert ours.keys() == theirs.keys()
    differences += [(ours[name].double() - theirs[name].double()).abs().max().item() for name in ours]
    return max(differences)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two processes."""
    folder = tmp_path_factory.mktemp("two")
    names = [
        "data",
        "data_vmap",
        "data_local_statistics",
        "members",
        "members_eat",
        "members_filtered",
        "members_bf16",
        "interrupted",
    ]
    names += ["counted_data", "counted_members", *AVERAGES]
    result = torchrun(2, PROGRAM, str(folder), *names, "failing")
    assert result.stdout.count("all others have ended") == 2, result.stderr
    assert result.returncode != 0
    (folder / "output").write_text(result.stdout)
    (folder / "errors").write_text(result.stderr)
    return folder


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four processes, and one of which the second was killed."""
    folder = tmp_path_factory.mktemp("four")
    result = torchrun(4, PROGRAM, str(folder), "mesh", "killed")
    assert result.returncode != 0
    (folder / "output").write_text(result.stdout)
    (folder / "errors").write_text(result.stderr)
    return folder


# Two processes split 45 images into 23 and 22, and 3 members into 2 and 1.
@pytest.mark.parametrize("name", ["data", "data_vmap", "members", "members_eat", "members_filtered", "members_bf16"])
def test_two_processes_train_like_one(name: str, two: Path, tmp_path: Path) -> None:
    """Every logged number (losses by member and part, weights, disparities, accuracies) and the averaged weights, over
    20 steps of fp32 for "data" and "members", over 5 for the variants."""
    run = Run.open(two / name)
    assert len(run.metrics) == SCENARIOS[name].get("epochs", STEPS)
    assert run.metrics[-1]["loss"] < (0.97 if len(run.metrics) == STEPS else 1.0) * run.metrics[0]["loss"]
    assert largest_difference(alone(name, tmp_path), run) < 1e-5


@pytest.mark.parametrize("name", AVERAGES)
def test_all_processes_take_the_given_ensemble_of_the_first(name: str, two: Path, tmp_path: Path) -> None:
    settings = config(tmp_path / name, **(SCENARIOS[name] | {"parallel": ParallelConfig()}))
    run = train(settings, ensemble=given_ensemble(0, AVERAGES[name])).run
    assert largest_difference(run, Run.open(two / name)) < 1e-5


def test_without_synchronised_statistics_the_losses_differ(two: Path) -> None:
    ours, theirs = Run.open(two / "data").metrics, Run.open(two / "data_local_statistics").metrics
    assert abs(ours[0]["loss"] - theirs[0]["loss"]) > 1e-3


def test_four_processes_in_a_mesh_train_like_one(four: Path, tmp_path: Path) -> None:
    """By the command line."""
    assert (four / "output").read_text().count("next: ceat-fast evaluate") == 1
    assert (four / "mesh" / "figures" / "loss-mean-over-members.png").is_file()
    assert largest_difference(alone("mesh", tmp_path), Run.open(four / "mesh")) < 1e-5


def test_one_process_continues_what_two_began(two: Path, tmp_path: Path) -> None:
    shutil.copytree(two / "members", tmp_path / "begun" / "members")
    last, before = checkpoints(tmp_path / "begun" / "members" / "checkpoints")
    assert before.name == f"step-{10:09d}"
    shutil.rmtree(last)
    settings = config(tmp_path / "begun" / "members", parallel=ParallelConfig(members=1), resume=True)
    assert largest_difference(train(settings).run, Run.open(two / "members")) < 1e-5


def test_a_signal_to_one_process_saves_and_ends_all(two: Path, tmp_path: Path) -> None:
    output = (two / "output").read_text()
    assert "process 0 ends with 143" in output
    assert "process 1 ends with 143" in output
    run = Run.open(two / "interrupted")
    assert len(run.metrics) == 7  # they agree at the end of the epoch
    assert checkpoints(run.checkpoints)[0].name == f"step-{7:09d}"
    shutil.copytree(run.folder, tmp_path / "run")
    finished = train(config(tmp_path / "run", resume=True)).run
    assert largest_difference(finished, Run.open(two / "members")) < 1e-5


def test_a_process_that_fails_ends_the_job_and_shows_its_error(two: Path) -> None:
    assert "the second process fails" in (two / "errors").read_text()
    assert len(Run.open(two / "failing").metrics) == 2


def test_a_process_that_is_killed_ends_the_job_and_is_named(four: Path) -> None:
    errors = (four / "errors").read_text()
    assert re.search(r"rank +: 1 .*exitcode +: -9", errors, re.DOTALL), errors
    assert checkpoints(four / "killed" / "checkpoints") == []
    assert len(Run.open(four / "killed").metrics) == 2


def test_what_is_sent_is_what_the_documentation_computes(two: Path, repository: Path, monkeypatch: Any) -> None:
    """Members "small" and "other" have BatchNorms of 6 and 8, 5 and 8 channels; the first process holds one of each."""
    monkeypatch.syspath_prepend(str(repository / "bench"))
    wire = importlib.import_module("wire")
    small = 6 * 9 + 2 * 6 + 6 * 8 * 9 + 2 * 8 + 8 * 10 + 10
    of_small = wire.Setting(2, 1, 1, 8, 64, 10, 3, (6, 8), small, batched=False)
    of_other = dataclasses.replace(of_small, channels=(5, 8), parameters=small - 9 - 2 - 8 * 9)
    by_member = [wire.traffic(of_small), wire.traffic(of_other), wire.traffic(of_small)]
    messages = 1 + sum(statistics.messages for _, statistics in by_member)
    size = sum(gradients.size + statistics.size for gradients, statistics in by_member)
    members = wire.traffic(dataclasses.replace(of_small, data_ranks=1, member_ranks=2, members=3, batch=16))
    expected = {
        "counted_data": (messages, size),
        "counted_members": (sum(item.messages for item in members), sum(item.size for item in members)),
    }
    for name, (messages, size) in expected.items():
        for rank in range(2):
            counted = json.loads((two / name / f"messages-{rank}.json").read_text())
            assert counted == {"messages": messages, "bytes": size}, name


@pytest.fixture(scope="module")
def group() -> Iterator[Any]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 7), (2, 3, 4, 5), (2, 3, 2, 2, 2)], ids=str)
def test_batch_norm_is_torchs_to_the_second_derivative(shape: tuple[int, ...], group: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    direction = torch.randn(shape, dtype=torch.float64)
    results = []
    for context in (SynchronisedBatchNorm(group), torch.enable_grad()):
        mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        with context:
            y = F.batch_norm(x, mean, var, weight, bias, training=True, momentum=0.3, eps=1e-3)
        first = torch.autograd.grad((y * direction).sum(), (x, weight, bias), create_graph=True)
        second = torch.autograd.grad(first[0].pow(3).sum(), (x, weight))
        results.append([y, mean, var, *first, *second])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_batch_norm_keeps_types_eval_mode_and_other_calls(group: Any) -> None:
    norm = nn.BatchNorm1d(3)
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    with SynchronisedBatchNorm(group), torch.autocast("cpu", torch.bfloat16):
        assert norm.train()(x.bfloat16()).dtype == torch.bfloat16
        assert norm.num_batches_tracked.item() == 1
        statistics = norm.running_mean.clone()
        torch.testing.assert_close(
            norm.eval()(x), F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        )
        assert torch.equal(norm.running_mean, statistics)
        free = F.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(free, F.batch_norm(x, None, None, training=True))


def members_of(logits: Tensor) -> list[nn.Module]:
    class Fixed(nn.Module):
        def __init__(self, logits: Tensor) -> None:
            super().__init__()
            self.logits = nn.Parameter(logits)

        def forward(self, x: Tensor) -> Tensor:
            return self.logits + 0 * x.flatten(1).sum(1, keepdim=True)

    return [Fixed(rows) for rows in logits]


@pytest.mark.parametrize("scale", [1.0, 30.0])  # 30: probabilities at the ends of fp32
def test_true_class_probabilities_are_all_that_the_losses_need(scale: float) -> None:
    """Members 0 and 1 keep their logits; those of 2 and 3 are replaced by any with the same p[y]."""
    generator = torch.Generator().manual_seed(0)
    adv, nat = scale * torch.randn(2, 4, 7, 5, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 1])

    def replaced(logits: Tensor) -> Tensor:
        h = logits[2:].log_softmax(-1).gather(-1, labels.expand(2, -1)[..., None])
        return torch.cat([logits[:2], logits_of(h, labels, 5)])

    whole = ceat_loss(adv, nat, labels, impl="torch")
    torch.testing.assert_close(ceat_loss(replaced(adv), replaced(nat), labels, impl="torch")[:2], whole[:2])
    gradients = []
    for logits in (adv, replaced(adv)):
        z = logits.clone().requires_grad_()
        ensemble_cross_entropy(z, labels, impl="torch").backward()
        gradients.append(z.grad[:2])
    torch.testing.assert_close(*gradients)


def test_a_spread_ensemble_of_one_process_is_the_ensemble(group: Any) -> None:
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    local = Ensemble(members_of(logits), backend="loop")
    spread = SpreadEnsemble(local, [0, 1, 2], 3, group)
    x = torch.zeros(4, 1, 2, 2)
    assert torch.equal(spread.member_logits(x), logits)
    torch.testing.assert_close(spread(x), local(x))
    with spread.exchanging(torch.tensor([0, 1, 2, 3])):
        assert torch.equal(spread.member_logits(x), logits)
    with pytest.raises(NotImplementedError, match="one input for all"):
        spread.member_logits(x.expand(3, *x.shape), per_member=True)


def test_members_and_batches_are_split_evenly() -> None:
    assert split(5, 3) == [[0, 1], [2, 3], [4]]
    assert split(4, 4) == [[0], [1], [2], [3]]


def test_what_cannot_be_arranged_is_refused() -> None:
    device = torch.device("cpu")
    with pytest.raises(ValueError, match=r"parallel\.members=2 must divide the number of processes, 1"):
        Layout(device, 3, 2)
    layout = Layout(device, 3)
    layout.data_ranks = 4
    with pytest.raises(ValueError, match="batch_size=32 cuts 98 training images into batches of which one has 2"):
        layout.require_batches(98, 32)
    layout.require_batches(100, 32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: True)
        patch.setattr(dist, "get_rank", lambda: 0)
        patch.setattr(dist, "get_world_size", lambda: 4)
        with pytest.raises(ValueError, match=r"parallel\.members=4 needs at least as many members, got 3"):
            Layout(device, 3, 4)
