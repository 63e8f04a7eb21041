"""The evaluation of a model: every attack on every sample, one batch after the other, resumable and shardable.

Batches have fixed boundaries. A batch of which a verdict is missing is computed whole, so that rounding, which may
depend on the neighbours in a batch, is that of an uninterrupted run; only the missing verdicts are taken from it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from ceat_fast.attacks import PGD
from ceat_fast.attacks.fixed_step import FixedStepAttack
from ceat_fast.attacks.inputs import require_eval_mode
from ceat_fast.attacks.result import CLEAN
from ceat_fast.evaluation.adversarials import AdversarialStore
from ceat_fast.evaluation.examples import Examples
from ceat_fast.evaluation.fingerprint import describe_attack, identity
from ceat_fast.evaluation.journal import Journal, JournalMismatchError
from ceat_fast.evaluation.progress import EvaluationProgress
from ceat_fast.evaluation.result import EvaluationResult
from ceat_fast.evaluation.sanity import check_scores, probe_model
from ceat_fast.evaluation.shards import Shard, current_shard
from ceat_fast.evaluation.table import VerdictTable
from ceat_fast.evaluation.verdicts import (
    ENSEMBLE,
    Attack,
    Tell,
    judge,
    judge_batch,
    perturb,
    radius_of,
    subject_logits,
    subjects_of,
    within,
)
from ceat_fast.files import PathLike

_ROUNDING = 0.05  # of a clean margin, and of 1: far above what another device or batch size makes of it


@contextmanager
def _ordinary_arithmetic() -> Iterator[None]:
    """With gradients, and in the types that tensors have, whatever the caller is within."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield


@_ordinary_arithmetic()
def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    attacks: Mapping[str, Attack] | None = None,
    *,
    members: bool = True,
    batch_size: int = 500,
    index: Tensor | None = None,
    samples: int | None = None,
    journal: PathLike | None = None,
    keep_adversarials: bool = False,
    sanity_samples: int = 64,
    about: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> EvaluationResult:
    """Judge `model` on clean images and under each attack.

    Args:
        model: an `Ensemble`, or any module that maps images to logits; in eval mode.
        images: (N, C, H, W) floats in [0, 1].
        labels: (N,) int64 in [0, K).
        attacks: name -> attack on the whole model, with a seed; default: the paper's PGD-20 (eps 0.031, alpha 0.007,
            section 4.1). Any dataclass with `attack(model, x, y, index=...) -> x_adv`.
        members: judge each member of an `Ensemble` too, by the same attacks aimed at itself.
        batch_size: images per pass.
        index: (N,) int64, the number of each sample that keys the attacks' noise; default 0 to N-1.
        samples: judge only the first so many; a later call with the same journal can go on to the others.
        journal: folder that keeps the verdicts as they come, so that the same call continues after a crash. Processes
            that torchrun started share the work through it; each of them returns the whole result.
        keep_adversarials: keep the attacked inputs there too (`load_adversarials`).
        sanity_samples: how many samples the sanity report's probes look at; 0 leaves them out.
        about: further facts for the result, for example where the model came from.
        console: shows the progress; None shows nothing.

    Raises:
        ValueError: NaN logits, images outside [0, 1], labels out of range, shapes that disagree, a model in train mode,
            an attack without seed, one that leaves its ball, or a journal of another evaluation.
        TypeError: an attack that is no dataclass.
        OSError: the journal cannot be written; what it holds stays as it is.
    """
    attacks = {"PGD-20": PGD(eps=0.031, alpha=0.007, steps=20, seed=0)} if attacks is None else dict(attacks)
    index = torch.arange(len(images)) if index is None else index.cpu()
    images, labels, index = (t.clone() if t.is_inference() else t for t in (images, labels, index))
    device = next((p.device for p in model.parameters()), images.device)
    classes = _require_judgeable(model, images, labels, index, device)
    _require_settings(attacks, batch_size, samples, sanity_samples, journal, keep_adversarials)
    prints = identity(model, images, labels, index)
    images, labels, index = images[:samples], labels[:samples], index[:samples]
    session = _Session(model, images, labels, index, attacks, members, device, batch_size, prints)
    with current_shard() as shard:
        if shard.count > 1 and journal is None:
            raise ValueError(f"{shard.count} processes need a journal: the folder through which they share verdicts")
        session.run(shard, journal, keep_adversarials, console)
    result = session.result({"classes": classes, **(about or {})})
    if sanity_samples:
        x, y, keys = (tensor[:sanity_samples].to(device) for tensor in (images, labels, index))
        result.checks = probe_model(model, x, y, keys, attacks, members)
    result.checks += check_scores(result)
    result.examples = _hardest(model, images, labels, index, result, attacks, device)
    return result


class _Session:
    """What one process does for an evaluation."""

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        index: Tensor,
        attacks: Mapping[str, Attack],
        members: bool,
        device: torch.device,
        batch_size: int,
        prints: Mapping[str, str],
    ) -> None:
        self.model, self.images, self.labels, self.index = model, images, labels, index
        self.device, self.batch_size = device, batch_size
        self.columns: dict[str, Attack | None] = {CLEAN: None, **attacks}
        self.settings = {name: _describe(attack) for name, attack in self.columns.items()}
        self.goals = subjects_of(model, members)
        self.identity = dict(prints)
        self.table = self._empty_table()

    def run(self, shard: Shard, folder: PathLike | None, keep_adversarials: bool, console: Console | None) -> None:
        """Judge this process's share; with others, wait for them and take in what they found."""
        share = sum(len(batch) for batch in shard.batches(len(self.images), self.batch_size))
        with ExitStack() as stack:
            journal = None
            if folder is not None:
                journal = stack.enter_context(Journal(folder, self.identity, self.settings, shard.rank))
                self._replay(journal)
                _tell_damage(journal, console)
                self._require_same_answers(journal)
            progress = stack.enter_context(EvaluationProgress(console if shard.rank == 0 else None, share))
            store = AdversarialStore(folder) if keep_adversarials and folder is not None else None
            for name in self.columns:
                progress.begin(name)
                for batch in shard.batches(len(self.images), self.batch_size):
                    computed = self._judge_batch(name, batch, journal, store, partial(progress.tell, len(batch)))
                    progress.advance(len(batch), self.table.correct(name, self.main, batch), computed)
                progress.end()
            shard.wait_for_all()
            if journal is not None and shard.count > 1:
                self.table = self._empty_table()
                self._replay(journal)

    def result(self, about: Mapping[str, Any]) -> EvaluationResult:
        """The result without checks."""
        attacks = {
            name: {"settings": self.settings[name], **self.table.effort(name, nominal_passes(attack))}
            for name, attack in self.columns.items()
        }
        facts = {"samples": len(self.images), "batch_size": self.batch_size, "arithmetic": _arithmetic(self.device)}
        facts |= {"fingerprint": self.identity, **about}
        return EvaluationResult(list(self.table.scores()), attacks, self.labels.cpu(), about=facts)

    @property
    def main(self) -> str:
        return self.goals[ENSEMBLE][0]

    def _judge_batch(
        self, name: str, batch: range, journal: Journal | None, store: AdversarialStore | None, tell: Tell
    ) -> bool:
        """Judge all subjects on a batch; returns whether there was something to do."""
        total = sum(map(len, self.goals.values()))
        before, computed = 0, False
        for goal, subjects in self.goals.items():
            told = within(tell, before / total, len(subjects) / total)
            computed |= self._judge(name, goal, batch, journal, store, told)
            before += len(subjects)
        return computed

    def _judge(
        self,
        name: str,
        goal: str,
        batch: range,
        journal: Journal | None,
        store: AdversarialStore | None,
        tell: Tell | None,
    ) -> bool:
        """Judge the subjects of a goal on a batch unless that is done; returns whether there was something to do."""
        subjects, attack = self.goals[goal], self.columns[name]
        places = self.table.missing(name, subjects, batch)
        keep = store if attack is not None and journal is not None else None
        key = "" if journal is None else journal.keys[name]
        if not places and (keep is None or keep.holds(name, key, goal, batch)):
            return False
        began = time.perf_counter()
        rows = slice(batch.start, batch.stop)
        x, y, index = (tensor[rows].to(self.device) for tensor in (self.images, self.labels, self.index))
        attacked, verdicts = judge_batch(self.model, attack, goal, x, y, index, tell)
        if keep is not None:
            keep.add(name, key, goal, batch, attacked.inputs)
        records = self.table.add(name, subjects, batch, verdicts, attacked.found_by, places)
        effort = {"attack": name, "seconds": time.perf_counter() - began, "images": len(batch) * len(subjects)}
        effort |= {"forwards": attacked.forwards, "backwards": attacked.backwards, "flags": list(attacked.flags)}
        self.table.read(effort)
        if journal is not None:
            journal.append(name, [*records, effort])
        return True

    def _require_same_answers(self, journal: Journal) -> None:
        """Refuse a journal whose clean verdicts are another model's with the same weights, by those of the first batch.

        Raises:
            JournalMismatchError: names a sample.
        """
        batch = range(min(self.batch_size, len(self.images)))
        known = self.table.margins(CLEAN, self.main, batch)
        if not known:
            return
        recorded = torch.tensor(list(known.values()))
        now = self._clean_margins(batch)[list(known)]
        differs = (now - recorded).abs() > _ROUNDING * (1 + recorded.abs())
        if not differs.any() or not torch.equal(now, self._clean_margins(batch)[list(known)]):
            return  # the second: a model that answers at random, which the sanity report tells
        place = int(differs.nonzero()[0])
        raise JournalMismatchError(
            f"{str(journal.folder)!r} belongs to another evaluation: the weights are the same, but the clean margin of "
            f"sample {list(known)[place]} was {recorded[place]:.4g} and is {now[place]:.4g}; something that is no "
            "parameter or buffer differs; choose another folder for this one"
        )

    def _clean_margins(self, batch: range) -> Tensor:
        """(B,) on the CPU, of the model as a whole."""
        x, y, index = (t[: len(batch)].to(self.device) for t in (self.images, self.labels, self.index))
        return judge(self.model, ENSEMBLE, x.unsqueeze(0), y, index)[2][0].cpu()

    def _replay(self, journal: Journal) -> None:
        for record in journal.records():
            self.table.read(record)

    def _empty_table(self) -> VerdictTable:
        subjects = [subject for names in self.goals.values() for subject in names]
        return VerdictTable(list(self.columns), subjects, len(self.images))


def _tell_damage(journal: Journal, console: Console | None) -> None:
    """As lines on the console, or else as warnings."""
    for sentence in journal.damage:
        text = f"{journal.folder}: {sentence}"
        if console is None:
            warnings.warn(text, stacklevel=2)
        else:
            console.print(text, highlight=False, soft_wrap=True)


def nominal_passes(attack: Attack | None) -> tuple[float, float] | None:
    """Forward and backward passes per image and subject that the settings ask for; None if they do not say."""
    if attack is None:
        return 1, 0
    if not isinstance(attack, FixedStepAttack):
        return None
    return attack.restarts * (attack.steps + (attack.restarts > 1)), attack.restarts * attack.steps


def _hardest(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    index: Tensor,
    result: EvaluationResult,
    attacks: Mapping[str, Attack],
    device: torch.device,
    count: int = 8,
) -> Examples | None:
    """The samples that are right when clean and whose margin under the first attack is lowest, attacked again.

    None without an attack that has an eps, or where the inputs are no images with 1 or 3 channels.
    """
    name = next((name for name, attack in attacks.items() if radius_of(attack)), None)
    if name is None or images.dim() != 4 or images.shape[1] not in (1, 3):
        return None
    clean = result.score(result.main_subject, CLEAN)
    margin = result.score(result.main_subject, name).margin.masked_fill(~clean.correct, torch.inf)
    samples = margin.argsort(stable=True)[:count]
    x, y, keys = (tensor[samples].to(device) for tensor in (images, labels, index))
    adversarial = perturb(attacks[name], model, ENSEMBLE, x, y, keys)
    before, after = (judge(model, ENSEMBLE, inputs, y, keys)[1][0].cpu() for inputs in (x.unsqueeze(0), adversarial))
    radius = radius_of(attacks[name]) or 0.0
    return Examples(name, radius, x.cpu().float(), adversarial[0].cpu().float(), y.cpu(), before, after, samples)


def _arithmetic(device: torch.device) -> str:
    """What convolutions of fp32 models are computed in."""
    rounds = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "TF32" if device.type == "cuda" and rounds else "fp32"


def _describe(attack: Attack | None) -> dict[str, Any]:
    return {} if attack is None else describe_attack(attack)


def _require_settings(
    attacks: Mapping[str, Attack],
    batch_size: int,
    samples: int | None,
    sanity_samples: int,
    journal: PathLike | None,
    keep_adversarials: bool,
) -> None:
    if CLEAN in attacks:
        raise ValueError(f"attacks: the name {CLEAN!r} is taken by the images without attack")
    for name, attack in attacks.items():
        describe_attack(attack)
        if getattr(attack, "seed", 0) is None:
            raise ValueError(f"attacks[{name!r}] has seed=None: give it a seed, or its result cannot be repeated")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if samples is not None and samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if sanity_samples < 0:
        raise ValueError(f"sanity_samples must be at least 0, got {sanity_samples}")
    if keep_adversarials and journal is None:
        raise ValueError("keep_adversarials=True needs a journal, the folder to keep them in")
    if journal is not None and Path(journal).exists() and not Path(journal).is_dir():
        raise ValueError(f"journal={str(journal)!r} must be a folder")


def _require_judgeable(model: nn.Module, images: Tensor, labels: Tensor, index: Tensor, device: torch.device) -> int:
    """The number of classes; ValueError where a number would be meaningless."""
    require_eval_mode(model)
    if not images.is_floating_point() or images.ndim < 2:
        raise ValueError(f"images must be floats (N, ...), got {images.dtype} {tuple(images.shape)}")
    for what, tensor in (("labels", labels), ("index", index)):
        if len(images) == 0 or tensor.shape != images.shape[:1] or tensor.dtype != torch.int64:
            raise ValueError(
                f"{what} must be int64, one for each of at least one image, got {tensor.dtype} "
                f"{tuple(tensor.shape)} for images {tuple(images.shape)}"
            )
    outside = ~((images >= 0) & (images <= 1)).flatten(1).all(1)
    if outside.any():
        raise ValueError(
            f"images must lie in [0, 1]; {int(outside.sum())} do not, the first is {int(outside.nonzero()[0])}"
        )
    try:
        classes = subject_logits(model, ENSEMBLE, images[None, :1].to(device)).shape[-1]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(f"the model cannot take an image of shape {tuple(images.shape[1:])}: {error}") from error
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"labels must lie in [0, {classes}); {int(wrong.sum())} do not, label {first} is {int(labels[first])}"
        )
    return classes
