"""One training of an experiment: trained and judged unless that is done, in the folder that belongs to its settings."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import active_children, get_context
from multiprocessing.synchronize import Event
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console

from ceat_fast.reproduce.judgements import Judgement
from ceat_fast.training import NonFiniteLossError, Run, TrainConfig, Trainer
from ceat_fast.training.checkpoint import checkpoints
from ceat_fast.training.config import config_to_dict
from ceat_fast.training.interrupts import SIGNALS, TrainingInterrupted, answering

_WHERE = (
    "out", "device", "backend", "cuda_graph", "resume", "checkpoint", "watch", "parallel", "tensorboard", "evaluation",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A training with one seed.

    Attributes:
        name: what the progress calls it.
        config: its settings; `out` is its folder.
        judgements: what it is judged by.
    """

    name: str
    config: TrainConfig
    judgements: tuple[Judgement, ...]

    @property
    def folder(self) -> Path:
        return Path(self.config.out)


@dataclass(frozen=True)
class Outcome:
    """What a cell gave.

    Attributes:
        numbers: what the judgements found, by name; empty if the training failed.
        seconds: training time per epoch, mean over the epochs.
        curve: robust accuracy on held-out images after every epoch; empty without such.
        failure: why there is nothing, or "".
    """

    numbers: dict[str, float]
    seconds: float
    curve: list[float] = field(default_factory=list)
    failure: str = ""


def make_cell(
    name: str, config: TrainConfig, judgements: tuple[Judgement, ...], root: Path, device: str, data_root: str | None
) -> Cell:
    """The cell of these settings; equal settings have the same folder, whichever experiment asks for them."""
    settings = {name: value for name, value in config_to_dict(config).items() if name not in _WHERE}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    method = type(config.method).__name__ + ("" if config.method.plus_ceat is None else "+LD")
    folder = root / "runs" / f"{config.data.name}-{method}-{digest}-seed{config.seed}"
    data = replace(config.data, root=data_root)
    placed = replace(config, out=str(folder), data=data, device=device, resume=True)
    return Cell(f"{name}, seed {config.seed}", placed, judgements)


def run_cells(cells: Sequence[Cell], jobs: int, console: Console) -> list[Outcome]:
    """Train and judge what is missing, `jobs` cells at a time, each in a process of its own if there are several.

    Raises:
        OSError: a process of several ended before its time.
    """
    if jobs == 1:
        return [_announced(cell, number, len(cells), console) for number, cell in enumerate(cells, start=1)]
    outcomes: list[Outcome] = []
    with _processes(jobs) as pool:
        # The processes inherit that they ignore both: Ctrl-C reaches them through this one, and only while they work.
        with answering(SIGNALS, signal.SIG_IGN):
            running = pool.map(_run_apart, cells)
        for number, (cell, outcome) in enumerate(zip(cells, running, strict=True), start=1):
            console.print(_line(cell, outcome, number, len(cells)), highlight=False, soft_wrap=True)
            outcomes.append(outcome)
    return outcomes


@contextmanager
def _processes(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that stop when this one is interrupted, each after it saved what it trains."""
    context, others = get_context("spawn"), active_children()
    stop = context.Event()
    settings = (max(1, torch.get_num_threads() // jobs), stop)
    with answering([signal.SIGTERM], _interrupt), ProcessPoolExecutor(jobs, context, _prepare, settings) as pool:
        try:
            yield pool
        except BrokenProcessPool as error:
            raise OSError(
                f"a process of jobs={jobs} was killed (too little memory for so many?); the same command continues"
            ) from error
        except BaseException:
            stop.set()
            for process in active_children():
                if process not in others:
                    process.terminate()
            raise


def _prepare(threads: int, stop: Event) -> None:
    """What a process of several does first."""
    global _stop
    torch.set_num_threads(threads)
    _stop = stop


_stop: Event | None = None  # in a process of several: set when no further cell is to begin


def _run_apart(cell: Cell) -> Outcome:
    """`run_cell` in a process of several."""
    with answering([signal.SIGTERM], _interrupt):
        if _stop is not None and _stop.is_set():
            _interrupt(signal.SIGTERM)
        return run_cell(cell)


def _interrupt(number: int, frame: FrameType | None = None) -> None:
    raise TrainingInterrupted(number, "interrupted")


def run_cell(cell: Cell) -> Outcome:
    """Train and judge one cell, or read what an earlier call left."""
    run = Run(cell.folder)
    try:
        if not _is_trained(run, cell.config):
            Trainer(cell.config, console=Console(quiet=True)).fit()
    except NonFiniteLossError as error:
        return Outcome({}, 0.0, failure=str(error))
    numbers: dict[str, float] = {}
    failure = ""
    try:
        for judgement in cell.judgements:
            for name, value in judgement.judge(run, cell.config).items():
                numbers.setdefault(name, value)  # the first judgement of clean images is on the most of them
    except ValueError as error:  # a member that is never right has no transfer rate
        failure = str(error)
    if not run.metrics:
        raise ValueError(f"{run.metrics_path} lacks the finished epochs; remove {run.folder} to repeat them")
    seconds = [record["seconds"] for record in run.metrics]
    curve = [record["val_adv_accuracy"] for record in run.metrics if "val_adv_accuracy" in record]
    return Outcome(numbers, sum(seconds) / len(seconds), curve, failure)


def _is_trained(run: Run, config: TrainConfig) -> bool:
    records = run.metrics
    return bool(records and records[-1]["epoch"] >= config.epochs and checkpoints(run.checkpoints))


def _announced(cell: Cell, number: int, total: int, console: Console) -> Outcome:
    outcome = run_cell(cell)
    console.print(_line(cell, outcome, number, total), highlight=False, soft_wrap=True)
    return outcome


def _line(cell: Cell, outcome: Outcome, number: int, total: int) -> str:
    found = outcome.failure or ", ".join(f"{name} {100 * value:.1f}" for name, value in outcome.numbers.items())
    return f"{number}/{total} {cell.name}: {found}"
