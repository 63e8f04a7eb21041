"""Which execution is the fastest here: measured once on the real shapes, then remembered in a file.

What is timed is what an attack does at each step: the frozen members' forward pass and the gradient for the input.
"""

from __future__ import annotations

import hashlib
import json
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ceat_fast.ensemble.ensemble import Ensemble
from ceat_fast.ensemble.execution import Execution
from ceat_fast.ensemble.frozen import frozen, resolve_precision, unfolded
from ceat_fast.environment import cache_folder, device_name, library_versions
from ceat_fast.files import write_json

# A network of the size in question compiles in about a minute: not worth it for a job that is shorter.
COMPILE_PAYS_AFTER = 600.0  # seconds
_ROUNDS = 5
_ROUND_SECONDS = 0.02
_log = logging.getLogger(__name__)


def tune(
    ensemble: Ensemble, x: Tensor, *, precision: str = "fp32", passes: int = 0, remember: bool = True
) -> Execution:
    """Let `ensemble` run in the execution that is the fastest for inputs such as `x`; returns it.

    It concerns ensembles with backend "auto"; another backend is obeyed, and nothing is measured.

    Args:
        ensemble: its members, weights and modes stay as they are.
        x: (B, ...) inputs of the shape, type and device to come.
        precision: that of the attacks, as in `frozen`.
        passes: about how many forward and backward passes will follow. Compiled executions are measured only where
            these would take longer than ten minutes without.
        remember: look up the choice in the cache file first, and write it there.
    """
    if ensemble.backend != "auto":
        return ensemble.execution(x.device)
    precision = resolve_precision(precision, ensemble)
    record = describe_problem(ensemble, x, precision)
    known = _load() if remember else {}
    entry = known.get(_key(record))
    if entry is None or (not entry["compiled_measured"] and _seconds(entry) * passes > COMPILE_PAYS_AFTER):
        entry = record | _measure(ensemble, x, precision, passes)
        if remember:
            _store(_key(record), entry)
    ensemble.tuned = Execution.parse(entry["choice"])
    return ensemble.tuned


def remembered() -> list[dict[str, Any]]:
    """All choices of the cache file: the problem, the seconds of each candidate, and what was chosen."""
    return list(_load().values())


def cache_path() -> Path:
    """Where choices are remembered; the environment variable CEAT_FAST_CACHE names another folder."""
    return cache_folder() / "executions.json"


def describe_problem(ensemble: Ensemble, x: Tensor, precision: str) -> dict[str, Any]:
    """What a choice depends on, as plain JSON values."""
    layout = [(name, tuple(t.shape), str(t.dtype)) for name, t in ensemble.state_dict().items()]
    return {
        "members": [type(member).__name__ for member in ensemble.members],
        "architecture": hashlib.sha256(f"{ensemble.members} {layout}".encode()).hexdigest()[:16],
        "batch": len(x),
        "shape": list(x.shape[1:]),
        "dtype": str(x.dtype).removeprefix("torch."),
        "precision": precision,
        "device": device_name(x.device),
        "threads": torch.get_num_threads() if x.device.type == "cpu" else None,
        "versions": library_versions(),
    }


def candidates(device: torch.device) -> list[Execution]:
    """The executions without torch.compile that exist on `device`."""
    ways = [Execution("loop"), Execution("loop", channels_last=True), Execution("vmap")]
    if device.type == "cuda":
        ways += [Execution("streams"), Execution("streams", channels_last=True)]
        ways += [replace(way, graph=True) for way in ways]
    return ways


def _measure(ensemble: Ensemble, x: Tensor, precision: str, passes: int) -> dict[str, Any]:
    times, failed = _race(ensemble, x, precision, candidates(x.device))
    compiled_measured = bool(times) and min(times.values()) * passes > COMPILE_PAYS_AFTER
    if compiled_measured:
        best = Execution.parse(min(times, key=times.__getitem__))
        contenders = [best, replace(best, compile=True)]
        times_again, failed_again = _race(ensemble, x, precision, contenders)
        times, failed = times | times_again, failed | failed_again
    if not times:
        raise RuntimeError(f"no execution can run this ensemble: {failed}")
    return {
        "choice": min(times, key=times.__getitem__),
        "seconds": times,
        "failed": failed,
        "compiled_measured": compiled_measured,
        "unfolded": unfolded(ensemble),
    }


def _race(
    ensemble: Ensemble, x: Tensor, precision: str, executions: Sequence[Execution]
) -> tuple[dict[str, float], dict[str, str]]:
    """(median seconds of each execution over interleaved rounds, why others cannot run)."""
    calls: dict[str, Callable[[], None]] = {}
    failed: dict[str, str] = {}
    for execution in executions:
        contender = Ensemble(list(ensemble.members), str(execution), ensemble.average)
        call = _gradient_of(contender, x, precision)
        try:
            _timed(call, 1, x.device)
            calls[str(execution)] = call
        except torch.OutOfMemoryError as error:
            failed[str(execution)] = f"out of memory: {error}"
        except Exception as error:  # what vmap or a compiler cannot do with a foreign module
            failed[str(execution)] = f"{type(error).__name__}: {error}".splitlines()[0]
    repeats = {name: max(1, round(_ROUND_SECONDS / _timed(call, 1, x.device))) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            samples[name].append(_timed(call, repeats[name], x.device) / repeats[name])
    return {name: statistics.median(times) for name, times in samples.items()}, failed


def _gradient_of(ensemble: Ensemble, x: Tensor, precision: str) -> Callable[[], None]:
    def call() -> None:
        with torch.enable_grad(), frozen(ensemble, precision) as view:
            assert isinstance(view, Ensemble)
            point = x.detach().requires_grad_()
            torch.autograd.grad(view.member_logits(point, per_member=False).float().logsumexp(-1).sum(), point)

    return call


def _timed(call: Callable[[], None], repeats: int, device: torch.device) -> float:
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


def _seconds(entry: dict[str, Any]) -> float:
    return float(min(entry["seconds"].values()))


def _load() -> dict[str, dict[str, Any]]:
    try:
        entries = json.loads(cache_path().read_text())
        return {
            key: entry for key, entry in entries.items() if {"choice", "seconds", "compiled_measured"} <= set(entry)
        }
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
