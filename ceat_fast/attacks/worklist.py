"""Many searches in one batch, fed from a queue.

A run is one search for one sample: from one random start, towards one class. All runs together form the queue, the
first run of every sample before the second of any. The batch holds as many as fit; a row leaves it the moment that its
sample is fooled or its budget is spent, and the next run takes its place. What a run does depends on its sample and its
number alone, and of several successful runs of a sample the one with the lowest number counts, so the outcome depends
neither on the batch size nor on which runs happened to share a batch. Passes spent on runs that turn out needless do.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ceat_fast.attacks.ball import per_sample
from ceat_fast.attacks.objective import margin

_RUN_BITS = 16  # of the noise key of a row: that many for the run, and that many for what the search adds itself
_CROWD = 32  # rows from which on a pass takes its time for each of them


class Start(NamedTuple):
    """What n new searches start from."""

    x: Tensor  # (n, ...) clean input
    y: Tensor  # (n,) label
    eps: Tensor  # (n,) radius
    clean: Tensor  # (n, K) outputs at x
    run: Tensor  # (n,) int64, number of the run
    noise_key: Tensor  # (n,) int64, of the sample and the run; keys of other runs are at least 65,536 away


@dataclass
class Rows:
    """Searches under way: entry i of every tensor belongs to search i. Attacks add tensors of their own."""

    x: Tensor  # (n, ...) clean input
    y: Tensor  # (n,) label
    eps: Tensor  # (n,) radius
    best: Tensor  # (n, ...) the point with the highest score so far, x at first
    score: Tensor  # (n,), -inf at first
    claimed: Tensor  # (n,) bool: the search takes `best` for a success
    broken: Tensor  # (n,) bool: the model returned NaN or inf

    def observe(self, points: Tensor, score: Tensor, claims: Tensor) -> Tensor:
        """Keep the points that beat the best ones, unless those are claimed; -> (n,) bool, which did."""
        better = (score > self.score) & ~self.claimed
        self.best = torch.where(per_sample(better, points.dim() - 1), points, self.best)
        self.score = torch.where(better, score, self.score)
        self.claimed = self.claimed | (better & claims)
        self.broken = self.broken | score.isnan()
        return better

    def select(self, keep: Tensor) -> None:
        """Drop all but the rows `keep` (int64 positions)."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name).index_select(0, keep))

    def extend(self, other: Rows) -> None:
        """Append the rows of another of the same class."""
        for field in fields(self):
            setattr(self, field.name, torch.cat([getattr(self, field.name), getattr(other, field.name)]))


def fresh(start: Start) -> dict[str, Tensor]:
    """The fields of `Rows` for new searches."""
    nothing = torch.zeros_like(start.y, dtype=torch.bool)
    score = torch.full_like(start.eps, -torch.inf)
    return {
        "x": start.x,
        "y": start.y,
        "eps": start.eps,
        "best": start.x,
        "score": score,
        "claimed": nothing,
        "broken": nothing,
    }


RowsT = TypeVar("RowsT", bound=Rows)


class Passes(NamedTuple):
    """Passes of the model that a step cost each row, or, as (n,) int64 on the CPU, every single row."""

    forward: int | Tensor
    backward: int | Tensor


class Search(ABC, Generic[RowsT]):
    """How an attack searches, for any number of rows at once.

    Args:
        view: the frozen model to search with.
        slack: a point counts as a success to be judged where its margin is above -slack times the range of the outputs:
            0, or a little for a view in low precision.

    Attributes:
        runs: searches per sample.
        steps: calls of `advance` that make a run.
        interval: steps between looks for rows that are done, where a look has to wait for the device.
        cost: passes of the model in a step.
        minimal: every run is carried through, and the success with the highest score counts, not the first.
    """

    runs: int
    steps: int
    interval: int = 10
    cost: int = 1
    minimal: bool = False

    def __init__(self, view: nn.Module, slack: float) -> None:
        self.view = view
        self.slack = slack

    @abstractmethod
    def begin(self, start: Start) -> RowsT:
        """New rows, without a pass of the model."""

    @abstractmethod
    def advance(self, rows: RowsT, step: Tensor) -> Passes:
        """One step of every row, in place; step: (n,) int64 on the CPU, how many steps each has behind it."""

    def flags(self) -> list[str]:
        """Remarks on the model, once all is searched."""
        return []

    def success(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(margins (n,), NaN where an output is NaN or inf; whether to claim a success (n,)) of outputs (n, K)."""
        margins = margin(outputs, labels) + 0 * outputs.amax(1)
        least = -self.slack * (outputs.amax(1) - outputs.amin(1)) if self.slack else 0.0
        return margins, margins >= least


class Samples(NamedTuple):
    """The samples of one attack call."""

    x: Tensor  # (B, ...)
    y: Tensor  # (B,)
    sample_index: Tensor  # (B,) int64, keys the noise
    eps: Tensor  # (B,)
    clean: Tensor  # (B, K) outputs at x


class Verdict(NamedTuple):
    """The model's own answer, in fp32."""

    prediction: Tensor  # (n,) int64
    margin: Tensor  # (n,)


class Ended(NamedTuple):
    """Searches that left the batch, none two of one sample, and what came of them."""

    sample: Tensor  # (n,) int64, positions in the samples
    point: Tensor  # (n, ...)
    fooled: Tensor  # (n,) bool, confirmed by the judge
    prediction: Tensor  # (n,) int64
    margin: Tensor  # (n,), -inf where the search saw no point of the ball
    priority: Tensor  # (n,), of two successes for a sample, or two failures, the higher counts


class WorkList(Generic[RowsT]):
    """Runs a search on some of the samples; iterate over it.

    Args:
        search: what to run.
        samples: all samples.
        candidates: (n,) int64 positions of those to search for.
        judge: (points, labels) -> the model's own answers; confirms what the search claims.
        judges_failures: also ask the judge about the best point of a search that claims nothing.
        batch_size: rows at a time.
        looked: is called whenever it was looked for rows that are done.

    Attributes:
        forwards, backwards: (B,) int64 on the CPU, passes spent on each sample so far.

    Raises:
        ValueError: while iterating, if the model returned NaN or inf.
    """

    def __init__(
        self,
        search: Search[RowsT],
        samples: Samples,
        candidates: Tensor,
        judge: Callable[[Tensor, Tensor], Verdict],
        judges_failures: bool,
        batch_size: int,
        looked: Callable[[], None] = lambda: None,
    ) -> None:
        self._search = search
        self._samples = samples
        self._judge = judge
        self._judges_failures = judges_failures
        self._batch_size = batch_size
        self._device = samples.x.device
        self._is_cpu = self._device.type == "cpu"
        self._looked = looked
        self._queue = deque(itertools.product(range(search.runs), candidates.tolist()))
        self._tasks = len(self._queue)
        self._rows: RowsT | None = None
        self._sample, self._run, self._step = (torch.zeros(0, dtype=torch.int64) for _ in range(3))
        self._found = torch.full((len(samples.x),), search.runs)  # lowest run that succeeded: no later one is needed
        self._begun = torch.zeros_like(self._found)  # runs that left the queue
        self.forwards = torch.zeros_like(self._found)
        self.backwards = torch.zeros_like(self._found)

    def __iter__(self) -> Iterator[Ended | Tensor]:
        """Searches that ended, and (n,) int64 positions of samples for which nothing is left to do."""
        while True:
            while tasks := self._take():
                self._begin(tasks)
            if self._rows is None or len(self._sample) == 0:
                return
            # No run ends between looks.
            remaining = int((self._search.steps - self._step).min())
            for _ in range(min(1 if self._is_cpu else self._search.interval, remaining)):
                self._advance(self._rows)
            yield from self._retire(self._rows)
            self._looked()

    @property
    def share(self) -> float:
        """The part of all steps that is behind, or is needed no more."""
        waiting = sum(run < found for (run, _), found in zip(self._queue, self._lowest(), strict=True))
        ahead = waiting * self._search.steps + int((self._search.steps - self._step).sum())
        return 1 - ahead / max(self._tasks * self._search.steps, 1)

    def _lowest(self) -> list[int]:
        """For each task in the queue, the lowest run of its sample that succeeded."""
        return list(self._found[[sample for _, sample in self._queue]].tolist()) if self._queue else []

    def _take(self) -> list[tuple[int, int]]:
        """The next tasks (run, sample) that are still needed and fit, all of one run."""
        tasks: list[tuple[int, int]] = []
        while self._queue and len(self._sample) + len(tasks) < self._batch_size:
            run, sample = self._queue[0]
            if run < int(self._found[sample]):
                if (tasks and run != tasks[0][0]) or self._should_wait(run, len(tasks)):
                    break
                tasks.append((run, sample))
            self._queue.popleft()
        return tasks

    def _should_wait(self, run: int, more: int) -> bool:
        """Whether that run should not start before the runs in the batch, which may make it needless, have ended.

        A small batch has room to spare: on a GPU always, on a CPU up to a number of rows, which wait for the calls.
        """
        crowded = self._is_cpu and len(self._sample) + more >= _CROWD
        return crowded and not self._search.minimal and bool((self._run < run).any())

    def _begin(self, tasks: list[tuple[int, int]]) -> None:
        run, sample = torch.tensor(tasks).unbind(1)
        there, run_there = sample.to(self._device), run.to(self._device)
        x, y, index, eps, clean = (tensor.index_select(0, there) for tensor in self._samples)
        key = (index << 2 * _RUN_BITS) + (run_there << _RUN_BITS)
        rows = self._search.begin(Start(x, y, eps, clean, run_there, key))
        if self._rows is None:
            self._rows = rows
        else:
            self._rows.extend(rows)
        self._sample = torch.cat([self._sample, sample])
        self._run = torch.cat([self._run, run])
        self._step = torch.cat([self._step, torch.zeros_like(run)])
        self._begun[sample] = run + 1

    def _advance(self, rows: RowsT) -> None:
        passes = self._search.advance(rows, self._step)
        self._step += 1
        self._spend(self._sample, passes)

    def _spend(self, sample: Tensor, passes: Passes) -> None:
        for counts, spent in zip((self.forwards, self.backwards), passes, strict=True):
            counts.index_add_(0, sample, torch.as_tensor(spent).expand_as(sample))

    def _retire(self, rows: RowsT) -> Iterator[Ended | Tensor]:
        """Let the judge confirm claims, and drop the rows that are done."""
        finished = self._step == self._search.steps
        claimed, broken = torch.stack([rows.claimed, rows.broken]).cpu()
        if bool(broken.any()):
            raise ValueError(
                f"model returned NaN or infinite logits on {int(broken.sum())} of {len(broken)} attacked rows"
            )
        if not bool((claimed | finished).any()):
            return
        at = (claimed & finished if self._search.minimal else claimed) | (finished & self._judges_failures)
        fooled, prediction, margins = torch.zeros_like(rows.claimed), rows.y.clone(), rows.score.clone()
        if bool(at.any()):
            there = at.nonzero().squeeze(1).to(self._device)
            verdict = self._judge(rows.best[there], rows.y[there])
            self._spend(self._sample[at], Passes(1, 0))
            fooled[there] = verdict.prediction != rows.y[there]
            prediction[there], margins[there] = verdict
            rows.claimed[there] = fooled[there]  # where a claim is rejected, the search goes on
        fooled_here = fooled.cpu()
        if not self._search.minimal:
            self._found.scatter_reduce_(0, self._sample[fooled_here], self._run[fooled_here], "amin")
        needless = self._run > self._found[self._sample]
        ended = (finished | fooled_here) & ~needless
        if not bool((ended | needless).any()):
            return
        priority = rows.score if self._search.minimal else -self._run.to(rows.score)
        priority = torch.where(fooled, priority, margins)
        values = (rows.best, fooled, prediction, margins, priority)
        parts = [self._part(ended & (self._run == run), values) for run in torch.unique(self._run[ended]).tolist()]
        left = torch.unique(self._sample[ended | needless])
        self._drop(rows, ended | needless)
        yield from parts
        complete = left[~torch.isin(left, self._sample) & (self._begun[left] >= self._found[left])]
        yield complete.to(self._device)

    def _part(self, chosen: Tensor, values: Sequence[Tensor]) -> Ended:
        there = chosen.nonzero().squeeze(1).to(self._device)
        return Ended(self._sample[chosen].to(self._device), *(value.index_select(0, there) for value in values))

    def _drop(self, rows: RowsT, done: Tensor) -> None:
        keep = (~done).nonzero().squeeze(1)
        rows.select(keep.to(self._device))
        self._sample, self._run, self._step = self._sample[keep], self._run[keep], self._step[keep]
