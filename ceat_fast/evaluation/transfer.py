"""How adversarial inputs transfer: among the members of an ensemble, and from surrogate models.

An attack with R restarts is made of R searches, each with a seed of its own, and a target is misled where one of them
misleads it (Yang et al., 2020): the search that is worst for the source need not be worst for the target.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from ceat_fast.attacks import MDI2, MIM, PGD, Budget, parse_budget
from ceat_fast.attacks.inputs import require_eval_mode, require_inputs
from ceat_fast.choices import require_choice
from ceat_fast.ensemble import Ensemble
from ceat_fast.evaluation.fingerprint import describe_attack
from ceat_fast.evaluation.progress import EvaluationProgress
from ceat_fast.evaluation.transfer_result import BlackBoxResult, TransferMatrix
from ceat_fast.evaluation.verdicts import ENSEMBLE, MEMBERS, Attack, judge, perturb, subject_logits, subjects_of

PROTOCOLS = ("all_correct", "source_correct", "all")


def transferability(
    ensemble: Ensemble,
    images: Tensor,
    labels: Tensor,
    attack: Attack | None = None,
    *,
    protocol: str = "all_correct",
    samples: int | None = None,
    batch_size: int = 500,
    index: Tensor | None = None,
    about: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> TransferMatrix:
    """Attack each member, and show the result to every member and to the ensemble.

    Args:
        ensemble: in eval mode.
        images: (N, C, H, W) floats in [0, 1].
        labels: (N,) int64 in [0, K).
        attack: a dataclass as for `evaluate`, aimed at each member; default: that of Yang et al. (DVERGE, 2020), PGD-50
            with 5 restarts, eps 0.03 and alpha eps / 5.
        protocol: which samples count: "all_correct", those that every member classifies correctly (Yang et al.);
            "source_correct", for each source those that it classifies correctly; "all", every sample, so that a clean
            error is a success.
        samples: use only the first so many that count.
        batch_size: images per pass; the result does not depend on it.
        index: (N,) int64, the number of each sample that keys the attack's noise; default 0 to N-1.
        about: further facts for the result.
        console: shows the progress; None shows nothing.

    Raises:
        ValueError: input outside these ranges, a model in train mode, NaN logits, or no sample that counts.
        TypeError: `ensemble` is no `Ensemble`, or `attack` no dataclass.
    """
    if not isinstance(ensemble, Ensemble):
        raise TypeError(f"transferability needs an Ensemble, got {type(ensemble).__name__}")
    require_choice("protocol", protocol, PROTOCOLS)
    attack = PGD(eps=0.03, alpha=0.006, steps=50, restarts=5, seed=0) if attack is None else attack
    settings = describe_attack(attack)
    began = time.perf_counter()
    batches = _Batches(ensemble, images, labels, index, batch_size)
    chosen, counted = _count(batches.clean_verdicts(ensemble, MEMBERS), protocol, samples)
    fooled = []
    with EvaluationProgress(console, len(chosen)) as progress:
        progress.begin("transfer between members")
        for x, y, keys in batches.of(chosen):
            flags = _misled(ensemble, attack, x, y, keys)
            fooled.append(flags.cpu())
            progress.advance(len(x), int((~flags[0, -1]).sum()), True)
        progress.end()
    names = subjects_of(ensemble)
    return TransferMatrix(
        names[MEMBERS],
        [*names[MEMBERS], *names[ENSEMBLE]],
        torch.cat(fooled, dim=2),
        counted[:, chosen],
        batches.index[chosen],
        protocol,
        settings,
        time.perf_counter() - began,
        dict(about or {}),
    )


def step_size(eps: Budget, alpha: Budget | None) -> Budget:
    """alpha, or eps / 5 if not given; ValueError where that is 0."""
    if alpha is not None:
        return alpha
    radius = parse_budget("eps", eps)
    if radius == 0:
        raise ValueError(f"eps must be above 0 where alpha, a fifth of it, is not given; got {eps!r}")
    return radius / 5


def surrogate_attacks(
    eps: Budget = 0.03,
    alpha: Budget | None = None,
    *,
    steps: int = 100,
    restarts: int = 3,
    seed: int = 0,
    precision: str = "fp32",
) -> dict[str, Attack]:
    """The attacks on surrogates: PGD, momentum PGD and M-DI2, each on the cross-entropy and on the margin ("CW").

    Args:
        eps, alpha: Linf radius and step size; alpha is eps / 5 if not given.
        steps: gradient steps of each.
        restarts: random starts of PGD and momentum PGD; M-DI2 starts at the image.
        seed: keys the noise.
        precision: what the searches compute in.
    """
    alpha = step_size(eps, alpha)
    common: dict[str, Any] = {"eps": eps, "alpha": alpha, "steps": steps, "seed": seed, "precision": precision}
    made: dict[str, Attack] = {}
    for label, loss in (("CE", "ce"), ("CW", "margin")):
        made[f"PGD-{label}"] = PGD(**common, loss=loss, restarts=restarts)
        made[f"M-PGD-{label}"] = MIM(**common, loss=loss, restarts=restarts, random_start=True)
        made[f"M-DI2-{label}"] = MDI2(**common, loss=loss)
    return made


def black_box(
    model: nn.Module,
    surrogates: Mapping[str, nn.Module],
    images: Tensor,
    labels: Tensor,
    attacks: Mapping[str, Attack] | None = None,
    *,
    members: bool = True,
    batch_size: int = 500,
    index: Tensor | None = None,
    about: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> BlackBoxResult:
    """Attack surrogate models, and show the result to `model`, whose gradients are not used.

    Args:
        model: an `Ensemble`, or any module that maps images to logits; in eval mode.
        surrogates: name -> model in eval mode, on the same device, with the same classes.
        images: (N, C, H, W) floats in [0, 1].
        labels: (N,) int64 in [0, K).
        attacks: name -> attack as for `evaluate`; default: `surrogate_attacks()`.
        members: judge each member of an `Ensemble` too.
        batch_size, index, about, console: as for `transferability`.

    Raises:
        ValueError: input outside these ranges, a model in train mode, NaN logits, no surrogate or attack, or a
            surrogate with another number of classes.
        TypeError: an attack is no dataclass.
    """
    attacks = surrogate_attacks() if attacks is None else dict(attacks)
    for name, given in (("surrogates", surrogates), ("attacks", attacks)):
        if not given:
            raise ValueError(f"{name} must hold at least one, got none")
    settings = {name: describe_attack(attack) for name, attack in attacks.items()}
    batches = _Batches(model, images, labels, index, batch_size)
    for name, surrogate in surrogates.items():
        _require_surrogate(name, surrogate, batches)
    goals = subjects_of(model, members)
    clean = torch.cat([batches.clean_verdicts(model, goal) for goal in goals])
    correct: dict[tuple[str, str], Tensor] = {}
    seconds: dict[tuple[str, str], float] = {}
    with EvaluationProgress(console, len(images)) as progress:
        for row in ((surrogate, attack) for surrogate in surrogates for attack in attacks):
            began = time.perf_counter()
            progress.begin(" / ".join(row))
            verdicts = []
            for x, y, keys in batches.of(torch.arange(len(images))):
                flags = torch.ones(len(clean), len(x), dtype=torch.bool, device=x.device)
                for search in _searches(attacks[row[1]]):
                    x_adv = perturb(search, surrogates[row[0]], ENSEMBLE, x, y, keys)
                    flags &= torch.cat([judge(model, goal, x_adv, y, keys)[0] for goal in goals])
                verdicts.append(flags.cpu())
                progress.advance(len(x), int(flags[0].sum()), True)
            progress.end()
            correct[row], seconds[row] = torch.cat(verdicts, dim=1), time.perf_counter() - began
    subjects = [name for names in goals.values() for name in names]
    return BlackBoxResult(subjects, correct, clean, settings, seconds, dict(about or {}))


class _Batches:
    """Checked samples, in batches on the model's device."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, index: Tensor | None, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        require_inputs(images, labels, index)
        require_eval_mode(model)
        if len(images) == 0:
            raise ValueError("images must hold at least one, got none")
        self._images, self._labels, self._batch_size = images, labels, batch_size
        self.index = torch.arange(len(images)) if index is None else index.cpu()
        self.device = next((p.device for p in model.parameters()), images.device)
        self.classes = self.classes_of(model)
        if int(labels.max()) >= self.classes:
            raise ValueError(f"labels must lie in [0, {self.classes}), got {int(labels.max())}")

    def of(self, samples: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(images, labels, index) of these samples (n,), batch by batch."""
        parts = [samples[first : first + self._batch_size] for first in range(0, len(samples), self._batch_size)]
        x, y, keys = self._images, self._labels, self.index
        return [(x[part].to(self.device), y[part].to(self.device), keys[part].to(self.device)) for part in parts]

    def clean_verdicts(self, model: nn.Module, goal: str) -> Tensor:
        """(S, N) bool: which subjects of the goal are right on which sample."""
        everything = self.of(torch.arange(len(self._images)))
        return torch.cat([judge(model, goal, x.unsqueeze(0), y, keys)[0].cpu() for x, y, keys in everything], dim=1)

    def classes_of(self, model: nn.Module) -> int:
        return subject_logits(model, ENSEMBLE, self._images[None, :1].to(self.device)).shape[-1]


def _count(clean: Tensor, protocol: str, samples: int | None) -> tuple[Tensor, Tensor]:
    """(samples to attack (n,), which count for which source (S, N)) from the members' clean verdicts (S, N)."""
    if samples is not None and samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    counted = {
        "all_correct": clean.all(0).expand_as(clean),
        "source_correct": clean,
        "all": torch.ones_like(clean),
    }[protocol]
    chosen = counted.any(0).nonzero().squeeze(1)[:samples]
    without = (~counted[:, chosen].any(1)).nonzero().squeeze(1).tolist()
    if without:
        raise ValueError(f"protocol={protocol!r} leaves no sample for member {without[0]}: it has to be right on one")
    return chosen, counted


def _misled(ensemble: Ensemble, attack: Attack, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    """(S, T, B) bool: the targets, members and then ensemble, that err on a search against the source."""
    sources = len(ensemble.members)
    labels, keys = y.repeat(sources), index.repeat(sources)
    wrong = torch.zeros(sources + 1, sources * len(x), dtype=torch.bool, device=x.device)
    for search in _searches(attack):
        shown = perturb(search, ensemble, MEMBERS, x, y, index).flatten(0, 1).unsqueeze(0)
        wrong |= ~torch.cat([judge(ensemble, goal, shown, labels, keys)[0] for goal in (MEMBERS, ENSEMBLE)])
    return wrong.view(sources + 1, sources, len(x)).transpose(0, 1)


def _searches(attack: Any) -> list[Attack]:
    """The restarts of an attack as attacks of their own."""
    restarts = getattr(attack, "restarts", 1) or 1  # None: as many as the attack's own protocol has
    if restarts == 1:
        return [attack]
    seeds = [None if attack.seed is None else attack.seed + number for number in range(restarts)]
    return [replace(attack, restarts=1, seed=seed) for seed in seeds]


def _require_surrogate(name: str, surrogate: nn.Module, batches: _Batches) -> None:
    try:
        require_eval_mode(surrogate)
    except ValueError as error:
        raise ValueError(f"surrogates[{name!r}]: {error}") from error
    if (classes := batches.classes_of(surrogate)) != batches.classes:
        raise ValueError(f"surrogates[{name!r}] has {classes} classes, the model {batches.classes}")
