"""One batch: inputs made by an attack, and what each subject answers to them, judged in fp32.

The ensemble's output (eq. 1) is judged on inputs made against the ensemble (eq. 3), every member on inputs made against
itself (eq. 2).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ceat_fast.attacks import parse_budget
from ceat_fast.attacks.outputs import plain_logits
from ceat_fast.attacks.result import AttackResult
from ceat_fast.ensemble import is_ensemble
from ceat_fast.ops import reference

Attack = Callable[..., Tensor]  # attack(model, x, y, index=...) -> x_adv, a dataclass of its settings
Tell = Callable[[str, float, float], None]  # (part of an attack, share of the batch that is misled, of the work done)
ENSEMBLE, MEMBERS = "ensemble", "members"  # what an attack aims at

_LARGEST = torch.finfo(torch.float32).max


class Attacked(NamedTuple):
    """What an attack made, and what it tells of how."""

    inputs: Tensor  # (S, B, ...)
    found_by: Sequence[Sequence[str | None]] = ()  # (S, B), which part of the attack misled the model; empty if untold
    forwards: int = 0  # passes of the model, summed over subjects and samples; 0 if untold
    backwards: int = 0
    flags: Sequence[str] = ()  # the attack's own remarks on the model


class Verdicts(NamedTuple):
    """What S subjects answer to B samples; each (S, B), on the CPU."""

    correct: Tensor  # bool
    prediction: Tensor  # int64
    margin: Tensor  # fp32, the label's logit minus the largest other one
    norm: Tensor  # fp32, distance from the clean input


def subjects_of(model: nn.Module, members: bool = True) -> dict[str, list[str]]:
    """Names of the subjects that are judged on the inputs of each goal."""
    if not is_ensemble(model):
        return {ENSEMBLE: ["model"]}
    names = {ENSEMBLE: ["ensemble"], MEMBERS: [f"member {m}" for m in range(len(model.members))]}
    return names if members else {ENSEMBLE: names[ENSEMBLE]}


def perturb(attack: Attack, model: nn.Module, goal: str, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    """Inputs (S, B, ...) against the S subjects of the goal; ValueError as in `run_attack`."""
    return run_attack(attack, model, goal, x, y, index).inputs


def run_attack(
    attack: Attack,
    model: nn.Module,
    goal: str,
    x: Tensor,
    y: Tensor,
    index: Tensor,
    tell: Tell | None = None,
) -> Attacked:
    """Inputs against each of the S subjects of the goal, and how they were found; `tell` hears how far a call is.

    Raises:
        ValueError: the attack left its ball or [0, 1], so that its result would mean nothing.
    """
    if goal == MEMBERS and not _has(attack, "goal"):
        assert is_ensemble(model)
        count = len(model.members)
        attacked = [
            _attack(attack, member, x, y, index, within(tell, m / count, 1 / count))
            for m, member in enumerate(model.members)
        ]
    else:
        aimed = attack if goal == ENSEMBLE else replace(attack, goal=goal)  # type: ignore[type-var]
        attacked = [_attack(aimed, model, x, y, index, tell)]
    inputs = [part.inputs for part in attacked]
    joined = Attacked(
        inputs[0] if len(inputs) == 1 and goal == MEMBERS and _has(attack, "goal") else torch.stack(inputs),
        [row for part in attacked for row in part.found_by],
        sum(part.forwards for part in attacked),
        sum(part.backwards for part in attacked),
        sorted({flag for part in attacked for flag in part.flags}),
    )
    _require_in_ball(attack, x, joined.inputs)
    return joined


def within(tell: Tell | None, before: float, part: float) -> Tell | None:
    """For a part of the work, before which that much was done."""
    if tell is None:
        return None
    return lambda name, misled, done: tell(name, misled, before + part * done)


def _attack(attack: Attack, model: nn.Module, x: Tensor, y: Tensor, index: Tensor, tell: Tell | None) -> Attacked:
    """One call; what the attack tells beyond the inputs, where it does."""
    if not hasattr(attack, "run"):
        return Attacked(attack(model, x.clone(), y, index=index))  # which may write to its input

    def observe(part: str, samples: Tensor, result: AttackResult) -> None:
        if tell is not None:
            tell(part, int(result.fooled.sum()) / len(x), result.progress)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its remarks are in the result too
        found: AttackResult = attack.run(model, x.clone(), y, index, observer=observe)
    names = [found.attacks[place] if place >= 0 else None for place in found.fooled_by.tolist()]
    forwards, backwards = (int(passes.clamp(min=0).sum()) for passes in (found.forwards, found.backwards))
    return Attacked(found.x_adv, [names], forwards, backwards, found.flags)


def judge(model: nn.Module, goal: str, x: Tensor, y: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(correct, prediction, margin), each (S, B), of the subjects of the goal at their inputs x (S or 1, B, ...).

    Raises:
        ValueError: NaN or infinite logits; counts them and names the first sample.
    """
    logits = subject_logits(model, goal, x)
    broken = (logits.isnan() | (logits == torch.inf)).any(-1).any(0)
    if broken.any():
        raise ValueError(
            f"the model gives NaN logits for {int(broken.sum())} samples of a batch, "
            f"the first is sample {int(index[broken][0])}"
        )
    label = y.expand(logits.shape[:2]).unsqueeze(-1)
    others = logits.scatter(-1, label, -torch.inf).amax(-1)
    margin = (logits.gather(-1, label).squeeze(-1) - others).nan_to_num(posinf=_LARGEST, neginf=-_LARGEST)
    prediction = logits.argmax(-1)
    return prediction == y, prediction, margin.float()


@torch.no_grad()
def subject_logits(model: nn.Module, goal: str, x: Tensor) -> Tensor:
    """(S, B, K) of the subjects of the goal; x is (S, B, ...), or (1, B, ...) for all."""
    if goal == MEMBERS and is_ensemble(model):
        shared = len(x) == 1
        logits: Tensor = model.member_logits(x[0] if shared else x, per_member=not shared)
    elif is_ensemble(model):
        # Called, it would take a batch of M volumes (M, C, D, H, W) for an input per member.
        logits = model.combine(model.member_logits(x[0], per_member=False)).unsqueeze(0)
    else:
        logits = plain_logits(model, x[0]).unsqueeze(0)
    if logits.shape[-1] < 2:
        raise ValueError(f"model must return logits of at least 2 classes, got {tuple(logits.shape[1:])}")
    return logits.to(reference.compute_dtype(logits.dtype))


def judge_batch(
    model: nn.Module,
    attack: Attack | None,
    goal: str,
    x: Tensor,
    y: Tensor,
    index: Tensor,
    tell: Tell | None = None,
) -> tuple[Attacked, Verdicts]:
    """(attacked inputs, verdicts on them); without an attack, on x itself."""
    attacked = Attacked(x.unsqueeze(0)) if attack is None else run_attack(attack, model, goal, x, y, index, tell)
    correct, prediction, margin = judge(model, goal, attacked.inputs, y, index)
    norm = distance(attacked.inputs, x, norm_of(attack)).expand(correct.shape)
    return attacked, Verdicts(*(tensor.cpu() for tensor in (correct, prediction, margin, norm)))


def distance(x_adv: Tensor, x: Tensor, norm: str) -> Tensor:
    """Distance of x_adv (S, B, ...) from x (B, ...) in the norm "Linf", "L2" or "L1": (S, B) fp32."""
    order = {"Linf": torch.inf, "L2": 2, "L1": 1}[norm]
    lengths: Tensor = torch.linalg.vector_norm((x_adv - x).flatten(2), order, dim=2)
    return lengths.float()


def norm_of(attack: Attack | None) -> str:
    return str(getattr(attack, "norm", "Linf"))


def radius_of(attack: Attack | None) -> float | None:
    """eps as a number, if the attack has one."""
    eps = getattr(attack, "eps", None)
    return None if eps is None else parse_budget("eps", eps)


def _require_in_ball(attack: Attack, x: Tensor, x_adv: Tensor) -> None:
    name = type(attack).__name__
    if x_adv.shape[1:] != x.shape or x_adv.dtype != x.dtype:
        raise ValueError(f"{name} returned {x_adv.dtype} {tuple(x_adv.shape[1:])} for {x.dtype} {tuple(x.shape)}")
    if not bool(((x_adv >= 0) & (x_adv <= 1)).all()):
        raise ValueError(f"{name} left [0, 1] or returned NaN; its accuracy would mean nothing")
    radius = radius_of(attack)
    if radius is not None and x_adv.numel():
        farthest = distance(x_adv, x, norm_of(attack)).max().item()
        if farthest > radius * (1 + 1e-5) + 1e-6:
            raise ValueError(
                f"{name} left its ball: {norm_of(attack)} distance {farthest:.6g}, eps {radius:.6g}; "
                "its accuracy would mean nothing"
            )


def _has(attack: Any, name: str) -> bool:
    return is_dataclass(attack) and any(setting.name == name for setting in fields(attack))
