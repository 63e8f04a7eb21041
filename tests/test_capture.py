"""Training steps and whole searches as CUDA graphs: what is captured, and that replays do what plain calls do."""

from __future__ import annotations

import contextlib
import os
import signal
import unittest.mock

import pytest
import torch
from tiny_training import At, everything_config, tiny_config, train, without_time

from ceat_fast import Ensemble
from ceat_fast.attacks import MIM, PGD, captured, fixed_step
from ceat_fast.ensemble import graphs
from ceat_fast.methods import ADP, AT, CEAT, EAT, CalibratedDistance, Standard
from ceat_fast.methods.base import Batch
from ceat_fast.models import digits_resnet
from ceat_fast.training import SGD, Adam, AdamW, AttackConfig, Cosine, TrainingInterrupted, capture, step
from ceat_fast.training.capture import CapturedStep, obstacle

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def recorder(made):
    """Stands in for a capture without a GPU: a replay makes the call again, on its tensors, and counts in `made`."""

    def record(call):
        made.append(0)

        def replay():
            made[-1] += 1
            return call()

        return replay

    return record


@pytest.fixture
def recorded(monkeypatch):
    """Captures of steps; the number of replays of each."""
    made = []
    monkeypatch.setattr(capture, "capture", recorder(made))
    monkeypatch.setattr(step, "obstacle", lambda method, device, *rest: obstacle(method, CUDA, *rest))
    return made


METHODS = {
    "CEAT": CEAT(impl="torch"),
    "EAT": EAT(),
    "EAT + L^D": EAT(plus_ceat=CalibratedDistance(impl="torch")),
    "AT": AT(),
    "Standard": Standard(),
}
OPTIMIZERS = {"SGD": SGD(lr=0.05), "clipped": SGD(lr=0.05, grad_clip=0.5), "Adam": Adam(lr=0.01), "AdamW": AdamW()}


def weights(trainer):
    return torch.cat([parameter.detach().flatten().cpu() for parameter in trainer.ensemble.parameters()])


@pytest.mark.parametrize("method", METHODS)
def test_replayed_steps_train_like_plain_ones(tmp_path, recorded, method):
    config = {"method": METHODS[method], "epochs": 4}
    plain = train(tiny_config(tmp_path / "plain", cuda_graph="off", **config))
    assert recorded == []
    graphed = train(tiny_config(tmp_path / "graphed", **config))
    # Two full batches an epoch: three steps to warm up, the others are replays.
    assert recorded == [5]
    assert torch.equal(weights(graphed), weights(plain))
    assert without_time(graphed.records) == without_time(plain.records)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_and_a_rate_that_changes_at_every_step(tmp_path, recorded, optimizer):
    config = {"optimizer": OPTIMIZERS[optimizer], "schedule": Cosine(), "epochs": 4}
    plain = train(tiny_config(tmp_path / "plain", cuda_graph="off", **config))
    graphed = train(tiny_config(tmp_path / "graphed", **config))
    assert recorded == [5]
    torch.testing.assert_close(weights(graphed), weights(plain), rtol=1e-5, atol=1e-7)


def test_all_of_a_run_and_a_resume(tmp_path, recorded):
    """Averages, validation, dropout, a rising radius; cut off in the middle and continued."""
    plain = train(everything_config(tmp_path / "plain", cuda_graph="off"))
    whole = train(everything_config(tmp_path / "whole"))
    # Four full batches an epoch, the first epoch with a rising radius.
    assert recorded == [2 * 4 - capture.WARM_UPS]
    assert torch.equal(weights(whole), weights(plain))
    with pytest.raises(TrainingInterrupted):
        train(everything_config(tmp_path / "cut"), callbacks=[At(12, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    resumed = train(everything_config(tmp_path / "cut", resume=True))
    assert torch.equal(weights(resumed), weights(plain))
    assert without_time(resumed.records) == without_time(plain.records)


def test_restarts_and_low_precision(tmp_path, recorded):
    attack = AttackConfig(eps=0.1, alpha=0.05, steps=2, restarts=2)
    config = {"attack": attack, "precision": "bf16"}
    plain = train(tiny_config(tmp_path / "plain", cuda_graph="off", **config))
    graphed = train(tiny_config(tmp_path / "graphed", **config))
    assert recorded == [3]
    assert torch.equal(weights(graphed), weights(plain))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"method": ADP()}, "ADP looks at values on the host"),
        ({"precision": "fp16"}, "the loss scale of precision 'fp16' is adapted on the host"),
    ],
)
def test_what_cannot_be_captured_runs_without_or_is_refused(tmp_path, recorded, changes, text):
    train(tiny_config(tmp_path / "auto", **changes))
    assert recorded == []
    with pytest.raises(ValueError, match=f"cuda_graph='on': a step cannot be captured: {text}"):
        train(tiny_config(tmp_path / "on", cuda_graph="on", **changes))


def test_refused_without_a_gpu_and_with_an_unknown_word(tmp_path):
    with pytest.raises(ValueError, match="it needs a CUDA device, got 'cpu'"):
        train(tiny_config(tmp_path, cuda_graph="on"))
    with pytest.raises(ValueError, match=r"unknown cuda_graph 'of' \(did you mean 'off'\?\)"):
        tiny_config(tmp_path, cuda_graph="of")


def test_several_processes_are_not_captured():
    assert obstacle(CEAT(), CUDA, "fp32", False) == "several processes exchange gradients"
    assert obstacle(CEAT(), CUDA, "bf16", True) is None


def test_a_step_that_waits_for_the_device(monkeypatch):
    def refuse(call):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(capture, "capture", refuse)
    batch = Batch(torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64), torch.arange(2))
    seeds = []

    def make(attack, batch):
        seeds.append(attack.seed)

    steps = CapturedStep(make, required=False)
    for seed in range(3):
        steps(PGD(seed=seed), batch)
    with pytest.warns(UserWarning, match="cannot be captured as a CUDA graph .operation not permitted when stream is"):
        steps(PGD(seed=3), batch)
    steps(PGD(seed=4), batch)
    assert seeds == [0, 1, 2, 3, 4]
    steps = CapturedStep(make, required=True)
    for seed in range(3):
        steps(PGD(seed=seed), batch)
    with pytest.raises(RuntimeError, match="cuda_graph='on': the training step cannot be captured"):
        steps(PGD(seed=3), batch)


def test_a_capture_that_fails_leaves_its_stream_and_pool(monkeypatch):
    stream, left = unittest.mock.Mock(device_index=0), []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "set_stream", left.append)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *of: left.append(of), raising=False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: contextlib.nullcontext())

    def wait():
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        graphs.capture(wait)
    assert left == [stream, (0, "pool")]


@on_gpu
@pytest.mark.parametrize("backend", ["loop", "vmap", "streams", "streams+channels_last", "vmap+graph", "fused"])
@pytest.mark.parametrize("method", METHODS)
def test_graphs_on_cuda(tmp_path, monkeypatch, backend, method):
    # A search follows signs: what a library's choice of another algorithm rounds differently grows from step to step.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    method = CEAT() if method == "CEAT" else METHODS[method]
    # Not the tiny models: torch 2.11 cannot vmap a BatchNorm in train mode over inputs that all members share.
    models = ["digits_resnet"] * 3
    config = {"method": method, "models": models, "epochs": 4, "device": "cuda", "backend": backend}
    plain = train(tiny_config(tmp_path / "plain", cuda_graph="off", **config))
    graphed = train(tiny_config(tmp_path / "graphed", cuda_graph="on", **config))
    torch.testing.assert_close(weights(graphed), weights(plain), rtol=1e-3, atol=1e-4)
    assert graphed.records[-1]["loss"] == pytest.approx(plain.records[-1]["loss"], rel=1e-3)


@on_gpu
def test_a_whole_run_on_cuda(tmp_path):
    """Averages, validation, dropout, a rising radius."""
    config = {"device": "cuda", "backend": "streams"}
    plain = train(everything_config(tmp_path / "plain", cuda_graph="off", **config))
    graphed = train(everything_config(tmp_path / "graphed", cuda_graph="on", **config))
    torch.testing.assert_close(weights(graphed), weights(plain), rtol=1e-3, atol=1e-4)


@pytest.fixture
def searches(monkeypatch):
    """Captures of whole searches; the number of replays of each."""
    made = []
    monkeypatch.setattr(captured, "capture", recorder(made))
    monkeypatch.setattr(fixed_step, "can_capture", lambda view, x: True)
    return made


@pytest.mark.parametrize("goal", ["ensemble", "members"])
@pytest.mark.parametrize("attack", [PGD, MIM])
def test_replayed_searches_find_what_plain_ones_find(searches, monkeypatch, goal, attack):
    torch.manual_seed(0)
    ensemble = Ensemble([digits_resnet() for _ in range(2)], "loop")
    batches = [(torch.rand(6, 1, 8, 8), torch.randint(10, (6,)), torch.arange(6) + 10 * k) for k in range(5)]
    found = []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(fixed_step, "can_capture", lambda view, x: False)
        for seed, (x, y, index) in enumerate(batches):
            found.append(attack(0.1, 0.03, 3, goal=goal, seed=seed).perturb(ensemble, x, y, index))
            with torch.no_grad():
                ensemble.members[0].fc.weight.mul_(1.1)
        with torch.no_grad():
            ensemble.members[0].fc.weight.div_(1.1 ** len(batches))
    # Two to warm up, three replays, of one search for all seeds and weights.
    assert searches == [3]
    for replayed, right in zip(found[:5], found[5:], strict=True):
        torch.testing.assert_close(replayed, right, rtol=0, atol=1e-6)


def test_restarts_own_radii_and_targets_are_searched_without_a_graph(searches):
    ensemble = Ensemble([digits_resnet() for _ in range(2)], "loop").eval()
    x, y = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    for _ in range(4):
        PGD(0.1, 0.03, 2, seed=0, restarts=2).perturb(ensemble, x, y)
        PGD(0.1, 0.03, 2, seed=0).perturb(ensemble, x, y, target=y + 1)
        PGD(0.1, 0.03, 2, seed=0).perturb(ensemble, x, y, eps=torch.full((4,), 0.1))
        PGD(0.1, 0.03, 2).perturb(ensemble, x, y)
        PGD(0.1, 0.03, 2, seed=0)(ensemble, x, y)
    assert searches == []
