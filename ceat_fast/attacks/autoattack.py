"""AutoAttack (Croce and Hein, ICML 2020): a fixed sequence of attacks, each on the samples that are robust so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ceat_fast.attacks.apgd import APGD, NAMES
from ceat_fast.attacks.fab import FAB
from ceat_fast.attacks.reference_attacks import reference_attacks
from ceat_fast.attacks.result import AttackResult, Observer
from ceat_fast.attacks.search_attack import JudgedAttack, SearchAttack
from ceat_fast.attacks.session import session
from ceat_fast.attacks.square import Square
from ceat_fast.checks import require_ints
from ceat_fast.choices import require_choice

VERSIONS = ("standard", "plus", "rand", "custom")
ATTACKS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
BACKENDS = ("native", "reference")
_SEQUENCES = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
_RESTARTED = ("apgd-ce", "apgd-dlr", "fab")  # the attacks that version "plus" restarts
_PLUS_RESTARTS = 5
_RAND_EOT = 20
_APGD_LOSSES = {name: loss for loss, name in NAMES.items()}
_SURPRISE = 0.002  # a loss of accuracy to Square after other attacks that casts doubt on the gradients


@dataclass(frozen=True)
class AutoAttack(JudgedAttack):
    """AutoAttack: `attack(model, x, y) -> x_adv`; `run` tells which attack fooled which sample.

    Args (those of `JudgedAttack` come first):
        version: "standard": APGD-CE, APGD-T with 9 targets, FAB-T with 9 targets, 100 iterations each, and Square with
            5,000 queries. "plus": APGD-CE, APGD-DLR and FAB with 5 restarts, Square, APGD-T and FAB-T. "rand", for
            models with random answers: APGD-CE and APGD-DLR on gradients averaged over 20 passes. "custom": what the
            arguments below say, which no other version takes.
        attacks: names, in order: "apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square".
        steps: of APGD and FAB; default 100.
        targets: of APGD-T and FAB-T; default 9. A model with K classes has K - 1 at most.
        queries: of Square; default 5,000.
        restarts: of APGD, FAB and Square; default 1.
        backend: "native"; or "reference", the attacks of the package pyautoattack (`reference_attacks`), for fp32
            inputs and one eps for all samples. Their noise depends on the batches, and passes are not counted.
    """

    version: str = "standard"
    attacks: tuple[str, ...] = ()
    steps: int | None = None
    targets: int | None = None
    queries: int | None = None
    restarts: int | None = None
    backend: str = "native"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("version", self.version, VERSIONS)
        require_choice("backend", self.backend, BACKENDS)
        for name in self.attacks:
            require_choice("attack", name, ATTACKS)
        given = [name for name in ("steps", "targets", "queries", "restarts") if getattr(self, name) is not None]
        require_ints(self, **dict.fromkeys(given, 1))
        if self.version == "custom" and not self.attacks:
            raise ValueError(f"version='custom' needs attacks, of {ATTACKS}")
        given += ["attacks"] if self.attacks else []
        if self.version != "custom" and given:
            raise ValueError(f"{given[0]} is fixed in version {self.version!r}; version='custom' takes it")
        if len(set(self.attacks)) < len(self.attacks):
            raise ValueError(f"attacks must differ, got {self.attacks}")
        if self.backend == "reference" and self.precision != "fp32":
            raise ValueError(f"backend='reference' computes in fp32, got precision={self.precision!r}")

    @property
    def label(self) -> str:
        """What a table may call the result: "AutoAttack" is the standard version in fp32 alone."""
        name = "AutoAttack" if self.version == "standard" else f"AutoAttack ({self.version})"
        if self.version == "custom":
            name = " + ".join(self.stages)
        remarks = ["mixed precision"] * (self.precision == "mixed") + ["pyautoattack"] * (self.backend == "reference")
        return ", ".join([name, *remarks])

    @property
    def stages(self) -> dict[str, SearchAttack]:
        """The attacks by name, in order. Each can be run by itself, with the same outcome on the samples it gets."""
        return {name: self._stage(name) for name in self.attacks or _SEQUENCES[self.version]}

    def run(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        index: Tensor | None = None,
        *,
        eps: Tensor | None = None,
        observer: Observer | None = None,
    ) -> AttackResult:
        with session(self, model, x, y, index, eps, observer) as current:
            if self.version != "rand":
                current.check_random()
            if self.backend == "native":
                current.attack(*self.stages.values())
            else:
                if eps is not None:
                    raise ValueError("backend='reference' takes one eps for all samples, got a tensor")
                current.adopt(reference_attacks(self.stages, model, x))
            current.result.flags += _suspicions(current.result)
        current.warn()
        return current.result

    def _stage(self, name: str) -> SearchAttack:
        common: dict[str, Any] = {
            "eps": self.eps,
            "norm": self.norm,
            "restarts": self.restarts or (_PLUS_RESTARTS if self.version == "plus" and name in _RESTARTED else 1),
            "seed": self.seed,
            "precision": self.precision,
            "batch_size": self.batch_size,
        }
        if name == "square":
            return Square(queries=self.queries or 5000, **common)
        common |= {"steps": self.steps or 100, "targets": self.targets or 9}
        if name.startswith("fab"):
            return FAB(targeted=name == "fab-t", **common)
        return APGD(loss=_APGD_LOSSES[name], eot=_RAND_EOT if self.version == "rand" else 1, **common)


def _suspicions(result: AttackResult) -> list[str]:
    """A black-box attack that finds what gradients did not."""
    if "square" not in result.attacks[2:]:
        return []
    before = result.attacks[result.attacks.index("square") - 1]
    lost = result.accuracy_after(before) - result.accuracy_after("square")
    text = f"square lowers the robust accuracy by {lost:.2%} after other attacks: the model may mask gradients"
    return [text] if lost > _SURPRISE else []
