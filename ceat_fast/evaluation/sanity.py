"""The sanity report: why the accuracies of an evaluation may be too good.

What would make a number meaningless is an error where it happens (`evaluate`, `verdicts`). What weakens it is a flag.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from ceat_fast.attacks import PGD
from ceat_fast.attacks.result import CLEAN
from ceat_fast.evaluation.probes import MASKED, Probe, tolerance
from ceat_fast.evaluation.result import FLAG, NOT_RUN, OK, Check, EvaluationResult, Score

PGD_GAP = 0.10  # AutoAttack below PGD-20 by more than this is rare for models whose gradients are honest
_SQUARE_GAIN = 0.002  # AutoAttack's own threshold
_TARGETED_CLASSES = 9  # that the targeted attacks of AutoAttack aim at


def reference_attack(attacks: Mapping[str, Any]) -> PGD:
    """What the probes compare with: the first PGD among the attacks, or else the paper's."""
    found = (attack for attack in attacks.values() if type(attack) is PGD and attack.radius > 0 and attack.steps > 0)
    return next(found, PGD(eps=0.031, alpha=0.007, steps=20, seed=0))


def probe_model(
    model: nn.Module, x: Tensor, y: Tensor, index: Tensor, attacks: Mapping[str, Any], members: bool
) -> list[Check]:
    """The checks that need the model, on the samples given."""
    return list(Probe(model, x, y, index, reference_attack(attacks), members).run())


def check_scores(result: EvaluationResult) -> list[Check]:
    """The checks that follow from the scores alone."""
    return [
        _improvement(result),
        _monotonic(result, "steps"),
        _monotonic(result, "eps"),
        _black_box(result),
        _square_in_autoattack(result),
        _autoattack_gap(result),
        _classes(result),
        _precision(result),
        *_remarks(result),
    ]


def curve(result: EvaluationResult, over: str) -> list[str]:
    """Names of the attacks, in rising order, that differ in "eps" (and the step size) or in "steps" alone.

    The longest such group, at least two; empty if there is none.
    """
    groups: dict[str, list[str]] = {}
    ignored = {"steps": {"steps"}, "eps": {"eps", "eps_as_given", "eps_255", "alpha", "alpha_as_given"}}[over]
    for name in result.attacks:
        settings = result.settings(name)
        if over in settings:
            groups.setdefault(repr({k: v for k, v in settings.items() if k not in ignored}), []).append(name)
    longest = max(groups.values(), key=len, default=[])
    rising = sorted(longest, key=lambda name: result.settings(name)[over])
    return rising if len(rising) > 1 else []


def _improvement(result: EvaluationResult) -> Check:
    worst, where = 0.0, ""
    for score in result.scores:
        if score.attack != CLEAN:
            clean = result.score(score.subject)
            share = (score.margin > clean.margin + 1e-4).float().mean().item()
            if share > worst:
                worst, where = share, f" ({score.subject}, {score.attack})"
    return _flag_if(
        worst > 0.05,
        "attacks make progress",
        f"the margin rises under attack for at most {worst:.1%} of the samples{where}",
        MASKED,
    )


def _monotonic(result: EvaluationResult, over: str) -> Check:
    name = {"steps": "more steps, all samples", "eps": "larger eps"}[over]
    names = curve(result, over)
    if not names:
        return Check(name, NOT_RUN, f"no two attacks differ in {over} alone")
    worst, finding = -1.0, ""
    for subject in result.subjects:
        for weak, strong in pairwise(result.score(subject, attack) for attack in names):
            excess = strong.accuracy - weak.accuracy
            if excess > worst:
                worst, finding = excess, f"{subject}: {_quote(weak)}, {_quote(strong)}"
    return _flag_if(worst > tolerance(len(result.labels)), name, finding, MASKED)


def _black_box(result: EvaluationResult) -> Check:
    name = "Square not stronger than white-box"
    square = [n for n in result.attacks if result.settings(n).get("attack") == "Square"]
    pairs = [(s, w) for s in square for w in result.attacks if _is_white_box(result, w) and _same_ball(result, s, w)]
    if not pairs:
        return Check(name, NOT_RUN, "no Square beside a gradient attack with the same eps")
    worst, finding = -1.0, ""
    for subject in result.subjects:
        for black in square:
            score = result.score(subject, black)
            whites = [(_without_square(result, subject, w), w) for s, w in pairs if s == black]
            accuracy, white = min(whites, default=(0.0, ""))
            if accuracy - score.accuracy > worst:
                worst = accuracy - score.accuracy
                finding = f"{subject}: gradients leave {accuracy:.1%} ({white}), {_quote(score)}"
    return _flag_if(worst * len(result.labels) > _square_gain(result), name, finding, MASKED)


def _square_gain(result: EvaluationResult) -> float:
    """How many samples Square may mislead that gradients did not: 0.2 %, or one; half a sample is rounding's."""
    return max(_SQUARE_GAIN * len(result.labels), 1) + 0.5


def _without_square(result: EvaluationResult, subject: str, attack: str) -> float:
    """The accuracy under an attack, less what the Square Attack within it found."""
    found = result.attacks[attack].get("found_by", {}).get(subject, {})
    return result.score(subject, attack).accuracy + float(found.get("square", 0)) / len(result.labels)


def _autoattack_gap(result: EvaluationResult) -> Check:
    name = "PGD to AutoAttack"
    autos = [n for n in result.attacks if result.settings(n).get("attack") == "AutoAttack"]
    pairs = [
        (p, a)
        for a in autos
        for p in result.attacks
        if result.settings(p).get("attack") == "PGD" and _same_ball(result, p, a)
    ]
    if not pairs:
        return Check(name, NOT_RUN, "no AutoAttack beside PGD with the same eps: the accuracies are upper bounds")
    gaps = []
    for subject in result.subjects:
        for pgd, auto in ((result.score(subject, p), result.score(subject, a)) for p, a in pairs):
            gaps.append((pgd.accuracy - auto.accuracy, f"{subject}: {_quote(pgd)}, {_quote(auto)}"))
    lowest, highest = min(gaps), max(gaps)
    if lowest[0] < -tolerance(len(result.labels)):
        return Check(name, FLAG, lowest[1], "AutoAttack should not be weaker than PGD: quote the worse of both")
    return _flag_if(highest[0] > PGD_GAP, name, highest[1], f"more than {PGD_GAP:.0%} apart: quote AutoAttack's only")


def _classes(result: EvaluationResult) -> Check:
    name = "enough classes"
    targeted = [n for n in result.attacks if result.settings(n).get("attack") in ("AutoAttack", "APGD", "FAB")]
    if not targeted:
        return Check(name, NOT_RUN, "no attack aims at target classes")
    classes = int(result.about.get("classes", 0))
    return _flag_if(
        classes <= _TARGETED_CLASSES,
        name,
        f"{classes} classes; targeted attacks aim at up to {_TARGETED_CLASSES}",
        "with fewer classes the targeted attacks try fewer targets than the standard protocol",
    )


def _precision(result: EvaluationResult) -> Check:
    name = "searched in fp32"
    if result.about.get("arithmetic", "fp32") != "fp32":
        advice = "set torch.backends.cudnn.allow_tf32 = False, or say so with the number"
        return Check(name, FLAG, "convolutions were rounded to TF32", advice)
    low = [n for n in result.attacks if result.settings(n).get("precision", "fp32") != "fp32"]
    finding = (
        f"{', '.join(low)}: searched in lower precision where the device has it"
        if low
        else "all searches and verdicts are in fp32"
    )
    advice = "quote the precision with the number: a search in fp32 may find more"
    return _flag_if(bool(low), name, finding, advice)


def _remarks(result: EvaluationResult) -> list[Check]:
    """What attacks said of the model, batch by batch: one flag for remarks that differ in numbers alone."""
    remarks: dict[tuple[str, str], str] = {}
    for name, attack in result.attacks.items():
        for remark in attack.get("flags", []):
            # Square's share is that of a batch, where one sample is much; `_square_in_autoattack` has that of all.
            if "square lowers" not in remark:
                remarks.setdefault((name, re.sub(r"[\d.]+", "", remark)), remark)
    return [Check(f"remark of {name}", FLAG, remark, MASKED) for (name, _), remark in remarks.items()]


def _square_in_autoattack(result: EvaluationResult) -> Check:
    name = "Square within AutoAttack"
    samples = len(result.labels)
    most, finding = 0, ""
    for attack, facts in result.attacks.items():
        for subject, found in facts.get("found_by", {}).items():
            if _is_white_box(result, attack) and found.get("square", 0) >= most:
                most = found.get("square", 0)
                finding = f"{attack} on {subject}: Square misled {most} of {samples} samples that gradients did not"
    if not finding:
        return Check(name, NOT_RUN, "no AutoAttack")
    return _flag_if(most > _square_gain(result), name, finding, MASKED)


def _is_white_box(result: EvaluationResult, attack: str) -> bool:
    """Whether it looks at gradients, and that first."""
    settings = result.settings(attack)
    return settings.get("attack") not in (None, "Square") and list(settings.get("attacks") or ())[:1] != ["square"]


def _same_ball(result: EvaluationResult, one: str, other: str) -> bool:
    a, b = result.settings(one), result.settings(other)
    return bool(a.get("eps") == b.get("eps") and a.get("norm", "Linf") == b.get("norm", "Linf"))


def _quote(score: Score) -> str:
    return f"{score.attack} leaves {score.accuracy:.1%}"


def _flag_if(wrong: bool, name: str, finding: str, advice: str) -> Check:
    return Check(name, FLAG, finding, advice) if wrong else Check(name, OK, finding)
