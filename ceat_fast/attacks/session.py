"""The bookkeeping of one call of APGD, FAB, Square or AutoAttack: what is attacked still, and what was found."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ceat_fast.attacks.ball import unit_l2
from ceat_fast.attacks.geometry import NORM_ORDERS, length
from ceat_fast.attacks.inputs import require_eval_mode, require_inputs
from ceat_fast.attacks.objective import margin
from ceat_fast.attacks.outputs import answers
from ceat_fast.attacks.result import CLEAN, AttackResult, Observer
from ceat_fast.attacks.worklist import Ended, Samples, Search, Verdict, WorkList
from ceat_fast.ensemble import Ensemble
from ceat_fast.ensemble.frozen import frozen, resolve_precision

if TYPE_CHECKING:
    from ceat_fast.attacks.search_attack import JudgedAttack, SearchAttack

_SLACK = 2.0**-7  # two units in the last place of bfloat16
_BATCH_SIZES = {"cpu": 250, "cuda": 1024}
_HEARTBEAT = 1.0  # seconds after which an observer hears of an attack under way
_REPETITIONS, _MOST_DRIFT = 5, 1e-4  # of the check for random answers, as in AutoAttack


class Session:
    """One call: the samples, the model to search and to judge with, and the result so far.

    Args:
        judge: the model as given; its answers are the verdicts.
        view: the frozen model to search with.
        x, y, index, eps: inputs, labels, what keys the noise, and radii.
        settings: norm, precision and batch size.
        precision: what the view computes in.
        observer: see `SearchAttack.run`.
    """

    def __init__(
        self,
        judge: nn.Module,
        view: nn.Module,
        x: Tensor,  # (B, ...)
        y: Tensor,  # (B,)
        index: Tensor,  # (B,) int64
        eps: Tensor,  # (B,)
        settings: JudgedAttack,
        precision: str,
        observer: Observer | None,
    ) -> None:
        began = time.perf_counter()
        self._judge = judge
        self._view = view
        self._settings = settings
        self._observer = observer
        self._told = began
        self._slack = 0.0 if precision == "fp32" else _SLACK
        self._batch_size = settings.batch_size or _BATCH_SIZES.get(x.device.type, _BATCH_SIZES["cpu"])
        clean = self._clean_outputs(x, y)
        self._samples = Samples(x, y, index, eps, clean)
        prediction = clean.argmax(1)
        fooled = prediction != y
        ones = torch.ones_like(y)
        self.result = AttackResult(
            attacks=[CLEAN],
            x_adv=x.clone(),
            fooled=fooled,
            fooled_by=torch.where(fooled, 0, -1),
            prediction=prediction,
            margin=margin(clean, y),
            norm=torch.zeros_like(eps),
            forwards=ones,
            backwards=torch.zeros_like(ones),
            seconds={CLEAN: time.perf_counter() - began},
            precision=precision if settings.precision == "fp32" else f"mixed ({precision} search, fp32 verdicts)",
        )
        if _is_probability(clean):
            self.result.flags.append("the model returns probabilities, not logits: gradients may vanish")
        self._priority = self.result.margin.clone()
        if len(x):
            self._notify(CLEAN, torch.arange(len(x), device=x.device))

    def attack(self, *attacks: SearchAttack) -> None:
        """Attack the samples that are still robust, by one attack after the other; adds to the result."""
        searches = [attack.search(self._view, self._slack, self._samples.clean.shape[1]) for attack in attacks]
        weights = [search.cost * search.runs * search.steps for search in searches]
        for place, (attack, search) in enumerate(zip(attacks, searches, strict=True)):
            self._run(attack.name, search, sum(weights[:place]) / sum(weights), weights[place] / sum(weights))
        self.result.progress = 1.0

    def adopt(self, attacks: Mapping[str, Callable[[Tensor, Tensor], Tensor]]) -> None:
        """Attack the samples that are still robust by foreign attacks (x, y) -> x_adv, whose passes nobody counts."""
        for name, attack in attacks.items():
            began = time.perf_counter()
            self.result.attacks.append(name)
            for sample in torch.split((~self.result.fooled).nonzero().squeeze(1), self._batch_size):
                labels = self._samples.y[sample]
                points = attack(self._samples.x[sample], labels)
                prediction, margins = self._verdict(points, labels)
                self._store(Ended(sample, points, prediction != labels, prediction, margins, margins))
                self._notify(name, sample)
            self.result.seconds[name] = time.perf_counter() - began
        for passes in (self.result.forwards, self.result.backwards):
            passes.fill_(-1)

    def check_random(self) -> None:
        """Flag a model whose answers to the first batch differ from one time to the next."""
        first = self._samples.clean[: self._batch_size]
        x, y = self._samples.x[: self._batch_size], self._samples.y[: self._batch_size]
        for _ in range(_REPETITIONS - 1):
            again = answers(self._judge, x)
            drift = (unit_l2(again, (1,)) - unit_l2(first, (1,))).norm(dim=1)
            if bool((drift > _MOST_DRIFT).any()) or bool(((again.argmax(1) == y) != (first.argmax(1) == y)).any()):
                self.result.flags.append("the model's answers are random: use version='rand'")
                return

    def _run(self, name: str, search: Search[Any], before: float, part: float) -> None:
        """Run a search, `before` which that share of all work was done, and which is that part of it."""
        began, result = time.perf_counter(), self.result
        result.attacks.append(name)
        candidates = (~result.fooled).nonzero().squeeze(1)
        nothing = candidates[:0]

        def looked() -> None:
            if time.perf_counter() - self._told > _HEARTBEAT:
                result.progress = before + part * work.share
                self._notify(name, nothing)

        work = WorkList(search, self._samples, candidates, self._verdict, self._slack > 0, self._batch_size, looked)
        for event in work:
            if isinstance(event, Ended):
                self._store(event)
            elif len(event):
                result.progress = before + part * work.share
                self._notify(name, event)
        result.forwards += work.forwards.to(result.forwards)
        result.backwards += work.backwards.to(result.backwards)
        result.flags += [f"{name}: {flag}" for flag in search.flags()]
        result.seconds[name] = time.perf_counter() - began

    def warn(self) -> None:
        """Show the flags as warnings, to the caller of the attack."""
        for flag in self.result.flags:
            warnings.warn(flag, stacklevel=3)

    def _store(self, ended: Ended) -> None:
        """Keep what is better than what is known of its sample: a success, then the higher priority."""
        result, sample = self.result, ended.sample
        known = result.fooled[sample]
        better = (ended.fooled & ~known) | ((ended.fooled == known) & (ended.priority > self._priority[sample]))
        sample = sample[better]
        self._priority[sample] = ended.priority[better]
        result.x_adv[sample] = ended.point[better]
        result.prediction[sample] = ended.prediction[better]
        result.margin[sample] = ended.margin[better]
        result.fooled[sample] = ended.fooled[better]
        result.fooled_by[sample] = torch.where(ended.fooled[better], len(result.attacks) - 1, -1)
        result.norm[sample] = length(ended.point[better] - self._samples.x[sample], NORM_ORDERS[self._settings.norm])

    def _notify(self, attack: str, samples: Tensor) -> None:
        self._told = time.perf_counter()
        if self._observer is not None:
            self._observer(attack, samples, self.result)

    def _verdict(self, points: Tensor, labels: Tensor) -> Verdict:
        logits = answers(self._judge, points)
        _require_numbers(logits)
        return Verdict(logits.argmax(1), margin(logits, labels))

    def _clean_outputs(self, x: Tensor, y: Tensor) -> Tensor:
        clean = torch.cat([answers(self._judge, part) for part in torch.split(x, self._batch_size)])
        _require_numbers(clean)
        if len(y) and int(y.max()) >= clean.shape[1]:
            raise ValueError(f"y must lie in [0, {clean.shape[1]}), got {int(y.max())}")
        return clean


@contextmanager
def session(
    settings: JudgedAttack,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    index: Tensor | None,
    eps: Tensor | None,
    observer: Observer | None,
) -> Iterator[Session]:
    """A `Session` on checked input, with the model frozen."""
    require_inputs(x, y, index, eps=eps)
    require_eval_mode(model)
    with torch.inference_mode(False), torch.no_grad():
        x, y = (tensor.clone() if tensor.is_inference() else tensor.detach() for tensor in (x, y))
        index = torch.arange(len(x), device=x.device) if index is None else index.to(x.device)
        radii = torch.full_like(y, settings.radius, dtype=x.dtype) if eps is None else eps.detach().to(x)
        precision = resolve_precision("fp32" if settings.precision == "fp32" else "auto", model)
        with frozen(model, precision) as view, _replaying(view, x.device):
            yield Session(model, view, x, y, index, radii, settings, precision, observer)


def _replaying(view: nn.Module, device: torch.device) -> AbstractContextManager[None]:
    return view.replaying(device) if isinstance(view, Ensemble) else nullcontext()


def _require_numbers(logits: Tensor) -> None:
    """Raise ValueError at NaN or inf; -inf is a class that is ruled out."""
    if bool((broken := (logits.isnan() | logits.isposinf()).any(1)).any()):
        raise ValueError(f"model returned NaN or infinite logits on {int(broken.sum())} of {len(logits)} samples")


def _is_probability(outputs: Tensor) -> bool:
    close = 1e-5
    within = (outputs >= -close) & (outputs <= 1 + close)
    return len(outputs) > 0 and bool(within.all() and ((outputs.sum(1) - 1).abs() < close).all())
