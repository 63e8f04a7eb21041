"""Which attacks an evaluation consists of: the columns of the paper's Table 1, and sweeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ceat_fast import attacks as library
from ceat_fast.attacks import parse_budget
from ceat_fast.choices import require_choice
from ceat_fast.evaluation.verdicts import Attack

if TYPE_CHECKING:
    from ceat_fast.training import AttackConfig


@dataclass
class EvaluationConfig:
    """What a model is judged by, and how that is computed.

    Args:
        attacks: columns beside the clean accuracy: PGD, MIM, CW (PGD on the margin loss), Square, AA (AutoAttack,
            standard version). Square and AA take eps alone, and far longer than all others together; where
            the attack's precision is not "fp32" they search in mixed precision, and are called "Square mixed" and
            "AA mixed".
        eps_sweep: radii of further PGD columns; their step size keeps its ratio to eps.
        step_sweep: numbers of steps of further PGD columns, for example [50, 100, 500].
        members: judge each member of an ensemble too, on inputs made against itself.
        images: judge only the first so many test images.
        seed: of the attacks' noise, keyed by the image.
        batch_size: images per pass.
        sanity_samples: images that the sanity report's probes look at; 0 leaves the probes out.
        keep_adversarials: keep the attacked images, in fp32, beside the journal.
        device: "auto" (CUDA if there is one), "cpu", "cuda" or "cuda:1".
    """

    attacks: list[str] = field(default_factory=lambda: ["PGD", "MIM", "CW"])
    eps_sweep: list[float | str] = field(default_factory=list)
    step_sweep: list[int] = field(default_factory=list)
    members: bool = True
    images: int | None = None
    seed: int = 0
    batch_size: int = 500
    sanity_samples: int = 64
    keep_adversarials: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in self.attacks:
            require_choice("attack", name, ATTACKS)
        for radius in self.eps_sweep:
            if parse_budget("eps_sweep", radius) == 0:
                raise ValueError(f"eps_sweep must hold radii above 0, got {radius!r}: that is the clean column")
        for name, least in (("images", 1), ("batch_size", 1), ("sanity_samples", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")


def columns(budget: AttackConfig, config: EvaluationConfig) -> dict[str, Attack]:
    """Name -> attack, with the budget given: first `config.attacks`, then the sweeps."""
    found: dict[str, Attack] = {}
    for name in config.attacks:
        label, attack = ATTACKS[name](budget, config)
        found[label] = attack
    label, main = ATTACKS["PGD"](budget, config)
    for steps in config.step_sweep:
        found.setdefault(_label("PGD", steps, budget.restarts), replace(main, steps=steps))
    for eps in config.eps_sweep:
        radius = parse_budget("eps_sweep", eps)
        if main.radius == 0:
            raise ValueError(f"eps_sweep needs attack.eps above 0, to keep its ratio to alpha; got {budget.eps!r}")
        if radius != main.radius:
            found[f"{label} eps {eps}"] = replace(main, eps=eps, alpha=main.step_size * radius / main.radius)
    if config.eps_sweep:
        found.setdefault(label, main)
    return found


def _fixed_step(name: str) -> Callable[[AttackConfig, EvaluationConfig], tuple[str, Any]]:
    def build(budget: AttackConfig, config: EvaluationConfig) -> tuple[str, Any]:
        settings = dict(vars(budget))
        if name == "MIM" and budget.restarts == 1:
            del settings["random_start"]  # MIM as published starts at the image
        attack = getattr(library, name)(**settings, seed=config.seed)
        return _label(name, budget.steps, budget.restarts), attack

    return build


def _judged(name: str, label: str) -> Callable[[AttackConfig, EvaluationConfig], tuple[str, Any]]:
    def build(budget: AttackConfig, config: EvaluationConfig) -> tuple[str, Any]:
        precision = "fp32" if budget.precision == "fp32" else "mixed"
        attack = getattr(library, label)(eps=budget.eps, seed=config.seed, precision=precision)
        return name if precision == "fp32" else f"{name} {precision}", attack

    return build


def _label(name: str, steps: int, restarts: int) -> str:
    return f"{name}-{steps}" + (f"x{restarts}" if restarts > 1 else "")


ATTACKS: dict[str, Callable[[AttackConfig, EvaluationConfig], tuple[str, Any]]] = {
    **{name: _fixed_step(name) for name in ("PGD", "MIM", "CW")},
    "Square": _judged("Square", "Square"),
    "AA": _judged("AA", "AutoAttack"),
}
