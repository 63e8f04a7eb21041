"""Which executions are the fastest here: measured once on the real shapes, then remembered in a file.

Two kinds of work are timed. What an attack does at each step: the frozen members' forward pass and the gradient for the
input. And what training does: a forward pass in train mode and the gradients of all weights.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ceat_fast.ensemble.ensemble import Ensemble
from ceat_fast.ensemble.execution import Execution, Tuned, default_execution
from ceat_fast.ensemble.frozen import DTYPES, frozen, resolve_precision, unfolded
from ceat_fast.ensemble.graphs import beside, capture
from ceat_fast.environment import cache_folder, device_name, library_versions
from ceat_fast.files import write_json
from ceat_fast.ops import triton_backend, winograd

# A network of the size in question compiles in about a minute: not worth it for a job that is shorter.
COMPILE_PAYS_AFTER = 600.0  # seconds
_ROUNDS = 5
_ROUND_SECONDS = 0.02
_log = logging.getLogger(__name__)


class Work(NamedTuple):
    """What the members will have to do; see `tune`."""

    precision: str
    training_precision: str
    captured: bool
    passes: int
    updates: int

    def count(self, kind: str) -> int:
        """How many passes of that kind."""
        return self.passes if kind == "attack" else self.updates


def tune(
    ensemble: Ensemble,
    x: Tensor,
    *,
    precision: str = "fp32",
    training_precision: str = "fp32",
    captured: bool = False,
    passes: int = 0,
    updates: int = 0,
    remember: bool = True,
) -> Tuned:
    """Let `ensemble` run in the executions that are the fastest for inputs such as `x`; returns them.

    It concerns ensembles with backend "auto"; another backend is obeyed, and nothing is measured.

    Args:
        ensemble: its members, weights and modes stay as they are.
        x: (B, ...) inputs of the shape, type and device to come.
        precision: that of the attacks, as in `frozen`.
        training_precision: of the passes that are trained: "fp32", "bf16" or "fp16", by autocast.
        captured: whether both will be parts of a captured step, where launches take no time.
        passes: about how many forward and backward passes of attacks will follow. Compiled executions are measured only
            where these would take longer than ten minutes without.
        updates: the same for training passes, each of one batch.
        remember: look up the choice in the cache file first, and write it there.

    Raises:
        RuntimeError: no execution can attack these members; says why.
    """
    if ensemble.backend != "auto":
        return Tuned(*[ensemble.execution(x.device)] * 2)
    work = Work(resolve_precision(precision, ensemble), training_precision, captured, passes, updates)
    record = describe_problem(ensemble, x, work)
    entry = (_load() if remember else {}).get(_key(record), record)
    missing = [kind for kind in _PASSES if not _is_answered(entry.get(kind), work.count(kind))]
    if missing:
        entry = {**entry, "unfolded": unfolded(ensemble)}
        # What members draw themselves, for dropout, leaves the caller's generators as they were.
        with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
            entry |= {kind: _measure(kind, ensemble, x, work) for kind in missing}
        if remember:
            _store(_key(record), entry)
    ensemble.tuned = Tuned(*(Execution.parse(entry[kind]["choice"]) for kind in _PASSES))
    return ensemble.tuned


def _is_answered(measured: dict[str, Any] | None, count: int) -> bool:
    if measured is None:
        return False
    return measured["compiled_measured"] or min(measured["seconds"].values(), default=0) * count <= COMPILE_PAYS_AFTER


def remembered() -> list[dict[str, Any]]:
    """All choices of the cache file: the problem, the seconds of each candidate, and what was chosen."""
    return list(_load().values())


def cache_path() -> Path:
    """Where choices are remembered; the environment variable CEAT_FAST_CACHE names another folder."""
    return cache_folder() / "executions.json"


def describe_problem(ensemble: Ensemble, x: Tensor, work: Work) -> dict[str, Any]:
    """What a choice depends on, as plain JSON values."""
    layout = [(name, tuple(t.shape), str(t.dtype)) for name, t in ensemble.state_dict().items()]
    return {
        "members": [type(member).__name__ for member in ensemble.members],
        "architecture": hashlib.sha256(f"{ensemble.members} {layout}".encode()).hexdigest()[:16],
        "batch": len(x),
        "shape": list(x.shape[1:]),
        "dtype": str(x.dtype).removeprefix("torch."),
        "precision": work.precision,
        "training_precision": work.training_precision,
        "captured": work.captured,
        "device": device_name(x.device),
        "threads": torch.get_num_threads() if x.device.type == "cpu" else None,
        "versions": library_versions(),
    }


def candidates(
    device: torch.device, kind: str, captured: bool = False, training_precision: str = "fp32"
) -> list[Execution]:
    """The executions without torch.compile that exist on `device`; graphs of attacks, unless the step is one."""
    ways = [Execution("loop"), Execution("loop", channels_last=True), Execution("vmap")]
    if device.type == "cpu" and winograd.missing() is None:
        ways += [Execution("loop", channels_last=True, winograd=True), *[Execution("fused")] * (kind == "attack")]
    if device.type == "cuda":
        ways += [Execution("streams"), Execution("streams", channels_last=True)]
        if triton_backend.missing("cuda") is None and (kind == "attack" or training_precision == "bf16"):
            ways.append(Execution("fused"))
        ways += [replace(way, graph=True) for way in ways if kind == "attack" and not captured]
    return ways


def _measure(kind: str, ensemble: Ensemble, x: Tensor, work: Work) -> dict[str, Any]:
    """The choice for one kind of work, the seconds of every candidate, and why others cannot do it."""
    times, failed = _race(kind, ensemble, x, work, candidates(x.device, kind, work.captured, work.training_precision))
    if not times and work.captured:  # members that no graph can hold: the step will run without one
        return _measure(kind, ensemble, x, work._replace(captured=False))
    compiled_measured = bool(times) and min(times.values()) * work.count(kind) > COMPILE_PAYS_AFTER
    if compiled_measured:
        best = Execution.parse(min(times, key=times.__getitem__))
        layers = "loop" if best.members == "fused" else best.members
        contenders = [best, Execution(layers, best.channels_last or best.members == "fused", compile=True)]
        times_again, failed_again = _race(kind, ensemble, x, work, contenders)
        times, failed = times | times_again, failed | failed_again
    if not times and kind == "attack":
        raise RuntimeError(f"no execution can run this ensemble: {failed}")
    # Members that cannot be copied, or have nothing to train, cannot be measured in training.
    return {
        "choice": min(times, key=times.__getitem__) if times else str(default_execution(x.device)),
        "seconds": times,
        "failed": failed,
        "compiled_measured": compiled_measured,
    }


def _race(
    kind: str, ensemble: Ensemble, x: Tensor, work: Work, executions: Sequence[Execution]
) -> tuple[dict[str, float], dict[str, str]]:
    """(median seconds of each execution over interleaved rounds, why others cannot run).

    What takes twice as long as another at the first measurement does not take part in the rounds.
    """
    calls: dict[str, Callable[[], object]] = {}
    failed: dict[str, str] = {}
    for execution in executions:
        try:
            call = _PASSES[kind](ensemble, str(execution), x, work)
            _timed(call, 1, x.device)
            if work.captured:
                beside(call, x.device)
                call = capture(call)
            calls[str(execution)] = call
        except torch.OutOfMemoryError as error:
            failed[str(execution)] = f"out of memory: {error}"
        except Exception as error:  # what vmap or a compiler cannot do with a foreign module
            failed[str(execution)] = f"{type(error).__name__}: {error}".splitlines()[0]
    once = {name: _timed(call, 1, x.device) for name, call in calls.items()}
    samples = {name: [seconds] for name, seconds in once.items()}
    close = [name for name, seconds in once.items() if seconds < 2 * min(once.values())]
    for _ in range(_ROUNDS):
        for name in close:
            repeats = max(1, round(_ROUND_SECONDS / once[name]))
            samples[name].append(_timed(calls[name], repeats, x.device) / repeats)
    return {name: statistics.median(times) for name, times in samples.items()}, failed


def _attack_passes(ensemble: Ensemble, backend: str, x: Tensor, work: Work) -> Callable[[], object]:
    contender = Ensemble(list(ensemble.members), backend, ensemble.average)

    def call() -> object:
        with torch.enable_grad(), frozen(contender, work.precision) as view:
            assert isinstance(view, Ensemble)
            point = x.detach().requires_grad_()
            return torch.autograd.grad(view.member_logits(point, per_member=False).float().logsumexp(-1).sum(), point)

    return call


def _training_passes(ensemble: Ensemble, backend: str, x: Tensor, work: Work) -> Callable[[], object]:
    # On copies: a pass in train mode moves running statistics.
    contender = Ensemble(copy.deepcopy(list(ensemble.members)), backend, ensemble.average).train()
    weights = [parameter for parameter in contender.parameters() if parameter.requires_grad]

    dtype = DTYPES[work.training_precision]

    def call() -> object:
        with torch.enable_grad(), torch.autocast(x.device.type, dtype, enabled=dtype is not None):
            logits = contender.member_logits(x, per_member=False)
            return torch.autograd.grad(logits.float().logsumexp(-1).sum(), weights, allow_unused=True)

    return call


_PASSES: dict[str, Callable[[Ensemble, str, Tensor, Work], Callable[[], object]]] = {
    "attack": _attack_passes,
    "training": _training_passes,
}


def _timed(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _key(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def _load() -> dict[str, dict[str, Any]]:
    try:
        entries = json.loads(cache_path().read_text())
        return {key: entry for key, entry in entries.items() if {"attack", "training"} <= set(entry)}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        _log.warning("%s cannot be read (%s): executions are measured anew", cache_path(), error)
        return {}


def _store(key: str, entry: dict[str, Any]) -> None:
    try:
        cache_path().parent.mkdir(parents=True, exist_ok=True)
        write_json(cache_path(), _load() | {key: entry})
    except OSError as error:
        _log.warning("the choice of an execution cannot be remembered in %s: %s", cache_path(), error)
