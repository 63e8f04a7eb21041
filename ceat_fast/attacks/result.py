"""What an attack found, sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

CLEAN = "clean"


@dataclass
class AttackResult:
    """The outcome of one attack, or of a sequence of them, on B samples. Verdicts are the model's own, in fp32.

    Attributes:
        attacks: names in the order of their running; the first is "clean", the input itself.
        x_adv: (B, ...) a misclassified point in the ball where one was found (x itself where that is misclassified);
            elsewhere the point with the largest margin that the attacks evaluated.
        fooled: (B,) bool, whether x_adv is misclassified.
        fooled_by: (B,) int64, the place in `attacks` of what misled the model; -1 where nothing did.
        prediction: (B,) int64, the model's answer at x_adv.
        margin: (B,) max_{k != y} z_k - z_y at x_adv, above 0 where it is misclassified.
        norm: (B,) distance of x_adv from x, in the norm of the attack.
        forwards, backwards: (B,) int64, passes of the model spent on the sample; -1 where nobody counted.
        progress: the part of the work that is behind, in [0, 1], as far as settings and verdicts tell: for observers.
        seconds: wall-clock time of each of `attacks`.
        precision: "fp32", or "mixed (...)" naming what searched; verdicts are fp32's in either case.
        flags: remarks on the model that cast doubt on the verdicts, such as zero gradients.
    """

    attacks: list[str]
    x_adv: Tensor
    fooled: Tensor
    fooled_by: Tensor
    prediction: Tensor
    margin: Tensor
    norm: Tensor
    forwards: Tensor
    backwards: Tensor
    seconds: dict[str, float]
    precision: str
    flags: list[str] = field(default_factory=list)
    progress: float = 0.0

    @property
    def robust_accuracy(self) -> float:
        """Share of samples that nothing fooled."""
        return 1 - self.fooled.double().mean().item()

    def accuracy_after(self, attack: str) -> float:
        """Share of samples that nothing up to and including `attack` fooled.

        Raises:
            ValueError: `attack` is none of `attacks`.
        """
        if attack not in self.attacks:
            raise ValueError(f"attack must be one of {self.attacks}, got {attack!r}")
        return 1 - (self.fooled & (self.fooled_by <= self.attacks.index(attack))).double().mean().item()


# observer(attack, samples, result): the attack is done with these samples (n,), their entries in result are up to date.
# During long work it is called about once a second with no samples, for `result.progress`.
Observer = Callable[[str, Tensor, AttackResult], None]
