"""Ways of running the members: equal results, measured choice, remembered choice."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from ceat_fast import Ensemble
from ceat_fast.ensemble import Execution, Tuned, frozen, tune, tuning
from ceat_fast.ensemble.execution import default_execution
from ceat_fast.models import digits_resnet
from ceat_fast.ops import winograd

EXECUTIONS = ["loop", "loop+channels_last", "vmap"]
if winograd.missing() is None:
    EXECUTIONS.append("loop+channels_last+winograd")
CANDIDATES = {"attack": [*EXECUTIONS, *["fused"] * (winograd.missing() is None)], "training": EXECUTIONS}
COMPILED = ["loop+compile", "loop+channels_last+compile", "vmap+compile"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CEAT_FAST_CACHE", str(tmp_path / "cache"))


def ensemble(backend="auto", members=2):
    torch.manual_seed(0)
    return Ensemble([digits_resnet().double() for _ in range(members)], backend)


def images(batch=4):
    return torch.rand(batch, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_text_and_execution_say_the_same():
    assert str(Execution("loop", channels_last=True, compile=True)) == "loop+channels_last+compile"
    assert Execution.parse("vmap+compile") == Execution("vmap", compile=True)
    for text in ("loop", "streams+channels_last"):
        assert str(Execution.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lop", r"unknown backend 'lop' \(did you mean 'loop'\?\)"),
        ("loop+compil", r"unknown option of backend 'loop\+compil' 'compil' \(did you mean 'compile'\?\)"),
        ("compile", "unknown backend 'compile'"),
        ("", "unknown backend ''"),
        (None, "unknown backend None"),
    ],
)
def test_unknown_executions_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Ensemble([digits_resnet()], text)


@pytest.mark.parametrize("backend", [*EXECUTIONS, *(pytest.param(c, marks=pytest.mark.slow) for c in COMPILED)])
@pytest.mark.parametrize("training", [True, False])
def test_executions_agree(backend, training):
    expected, got = ensemble("loop").train(training), ensemble(backend).train(training)
    for ens in (expected, got):
        ens.member_logits(images()).square().sum().backward()
    for (name, a), b in zip(expected.named_parameters(), got.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-10, atol=1e-12, msg=name)
    for a, b in zip(expected.buffers(), got.buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
    x = images().requires_grad_()
    grads = []
    for ens in (expected, got):
        with frozen(ens) as view:
            grads += torch.autograd.grad(view(x)[:, 0].sum(), x)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-10, atol=1e-14)


def test_streams_need_a_gpu():
    with pytest.raises(RuntimeError, match="backend='streams' needs inputs on a CUDA device, got cpu"):
        ensemble("streams")(images())


def test_graphs_need_a_gpu():
    with pytest.raises(RuntimeError, match=r"backend='vmap\+graph': CUDA graphs need inputs on a CUDA device, got cpu"):
        ensemble("vmap+graph")(images())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["loop+graph", "vmap+graph", "streams", "streams+channels_last+graph"])
def test_executions_agree_on_a_gpu(backend):
    expected, got = ensemble("loop").cuda(), ensemble(backend).cuda()
    for turn in range(3):  # the second replays what the first captured, on other inputs and, in the third, weights
        x = images().cuda().add(turn).requires_grad_()
        grads = []
        for ens in (expected, got):
            if turn == 2:
                torch.nn.init.ones_(ens.members[0].fc.weight)
            with frozen(ens) as view:
                logits = view(x)
                grads.append(torch.autograd.grad(logits[:, 0].sum(), x)[0])
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-12)
    with torch.no_grad(), frozen(got) as view:
        torch.testing.assert_close(view(x), expected.eval()(x), rtol=1e-9, atol=1e-9)


def measured_as(seconds):
    """A race with this outcome for each kind of work."""
    return lambda kind, *_: (seconds[kind], {})


def test_the_fastest_is_chosen_remembered_and_used(monkeypatch):
    seconds = {
        "attack": {"loop": 3.0, "loop+channels_last": 2.0, "vmap": 1.0},
        "training": {"loop": 2.0, "loop+channels_last": 3.0, "vmap": 4.0},
    }
    monkeypatch.setattr(tuning, "_race", measured_as(seconds))
    ens, cpu = ensemble(), torch.device("cpu")
    assert ens.execution(cpu) == default_execution(cpu)
    assert tune(ens, images()) == Tuned(attack=Execution("vmap"), training=Execution("loop"))
    assert ens.train().execution(cpu) == Execution("loop")
    assert ens.eval().execution(cpu) == Execution("vmap")
    with frozen(ens.train()) as view:
        assert view.execution(cpu) == Execution("vmap")
    monkeypatch.setattr(tuning, "_race", lambda *_: pytest.fail("measured again"))
    assert tune(ensemble(), images()) == ens.tuned
    (entry,) = tuning.remembered()
    for kind, choice in (("attack", "vmap"), ("training", "loop")):
        assert entry[kind]["choice"] == choice
        assert entry[kind]["seconds"] == seconds[kind]
    assert (entry["members"], entry["batch"], entry["shape"]) == (["ResNet", "ResNet"], 4, [1, 8, 8])


def test_a_choice_is_for_one_problem():
    problems = [(ensemble(), images()), (ensemble(members=3), images()), (ensemble(), images(5))]
    for ens, x in problems:
        tune(ens, x)
    assert len(tuning.remembered()) == 3


def test_measuring_is_real_and_changes_nothing():
    ens = ensemble().train()
    before = {name: tensor.clone() for name, tensor in ens.state_dict().items()}
    state = torch.get_rng_state()
    choices = tune(ens, images())
    (entry,) = tuning.remembered()
    for kind, choice in choices._asdict().items():
        seconds = entry[kind]["seconds"]
        assert set(seconds) == set(EXECUTIONS)
        assert seconds[str(choice)] == min(seconds.values()) > 0
    assert all(module.training for module in ens.modules())
    assert all(parameter.grad is None for parameter in ens.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in ens.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_members_with_nothing_to_train_are_measured_in_attacks_only():
    ens = ensemble().requires_grad_(False)
    assert tune(ens, images()).training == default_execution(torch.device("cpu"))
    (entry,) = tuning.remembered()
    assert entry["training"]["seconds"] == {}
    assert set(entry["training"]["failed"]) == set(entry["attack"]["seconds"])


def test_a_choice_by_hand_is_obeyed(monkeypatch):
    monkeypatch.setattr(tuning, "_race", lambda *_: pytest.fail("measured"))
    ens = ensemble("vmap")
    assert tune(ens, images()) == Tuned(Execution("vmap"), Execution("vmap"))
    assert ens.tuned is None


def test_compiled_candidates_only_for_long_jobs(monkeypatch):
    raced = []

    def race(kind, ensemble, x, precision, executions):
        raced.append((kind, [str(e) for e in executions]))
        return {str(e): 0.5 if e.compile else 1.0 for e in executions}, {}

    monkeypatch.setattr(tuning, "_race", race)
    for counts, expected in (
        ((600, 600), ("loop", "loop")),
        ((601, 0), ("loop+compile", "loop")),
        ((0, 601), ("loop+compile", "loop+compile")),
        ((0, 0), ("loop+compile", "loop+compile")),
        ((10**6, 10**6), ("loop+compile", "loop+compile")),  # nothing is measured again
    ):
        choices = tune(ensemble(), images(), passes=counts[0], updates=counts[1])
        assert tuple(map(str, choices)) == expected
    compiled = ["loop", "loop+compile"]
    again = [(kind, raced) for kind, ways in CANDIDATES.items() for raced in (ways, compiled)]
    assert raced == [*CANDIDATES.items(), *again]


def test_graphs_are_candidates_for_attacks_only():
    device = torch.device("cuda")
    attack, training = (tuning.candidates(device, kind) for kind in ("attack", "training"))
    assert training == [way for way in attack if not way.graph and way.members != "fused"]
    assert [way.graph for way in attack].count(True) == len(attack) / 2


def test_what_cannot_run_is_recorded():
    class Branching(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = digits_resnet()

        def forward(self, x):
            logits = self.net(x)
            return logits if logits.sum().item() > 0 else 2 * logits

    tune(Ensemble([Branching(), Branching()]), images().float())
    (entry,) = tuning.remembered()
    assert list(entry["training"]["failed"]) == ["vmap"]
    assert list(entry["attack"]["failed"]) == ["vmap", *CANDIDATES["attack"][len(EXECUTIONS) :]]


def test_where_no_pass_can_be_captured_the_measuring_goes_on_without(monkeypatch):
    def refuse(call):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(tuning, "capture", refuse)
    ensemble = Ensemble([digits_resnet() for _ in range(2)])
    tuned = tune(ensemble, torch.rand(4, 1, 8, 8), captured=True, remember=False)
    assert ensemble.tuned == tuned


def test_a_broken_or_unwritable_cache_costs_a_warning(tmp_path, monkeypatch, caplog):
    path = tuning.cache_path()
    path.parent.mkdir()
    path.write_text("{")
    with caplog.at_level(logging.WARNING):
        tune(ensemble(), images())
    assert "cannot be read" in caplog.text
    assert len(json.loads(path.read_text())) == 1
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CEAT_FAST_CACHE", str(tmp_path / "file" / "below"))
    with caplog.at_level(logging.WARNING):
        tune(ensemble(), images())
    assert "cannot be remembered" in caplog.text


def test_where_a_pass_cannot_be_captured_the_search_goes_on_without(monkeypatch):
    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    ens = Ensemble([digits_resnet() for _ in range(2)]).eval()
    ens.is_view = True
    monkeypatch.setattr(Ensemble, "_can_capture", lambda *_: True)
    x = images().float()
    right = ens.member_logits(x)
    captured = []
    with ens.replaying(torch.device("cuda")):
        assert ens.execution(torch.device("cuda")).graph
        monkeypatch.setattr(type(ens._graphs), "__call__", lambda *_: captured.append(1) or refuse())
        kept = ens._graphs
        torch.testing.assert_close(ens.member_logits(x), right)
        assert captured
        assert ens._graphs is not kept  # what was captured before is given back
        assert not ens.execution(torch.device("cuda")).graph
    with ens.replaying(torch.device("cpu")):
        assert not ens.replays
