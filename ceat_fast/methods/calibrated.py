"""The calibrated distance as an addition to any method's loss (eq. 17 to 21 of the CEAT paper; its Table 2).

    L_m += lam * e^(lam * D_nat_m) * ||p_nat_m - onehot(y)||^2 + mu * e^(mu * D_adv_m) * ||p_adv_m - p_nat_m||^2

p_adv_m are member m's probabilities on the adversarial input that it is trained on: one for all members or, where the
attack is aimed at each member, its own. `ceat_fast.loss` says what carries a gradient.

The parts of Table 4 are numbers: lam = 0 leaves L_nat out, mu = 0 leaves L_adv out, and exponents of 0 leave e^D out.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from ceat_fast.choices import require_choice
from ceat_fast.loss import CEATLoss, calibrated_distance
from ceat_fast.methods.filters import FILTERS, peer_filter
from ceat_fast.methods.labels import settings_label


@dataclass
class DistanceSettings:
    """Settings of lam * L_nat^D + mu * L_adv^D; `ceat_fast.loss.ceat_loss` says more about each.

    Args:
        lam: coefficient of the clean distance and, unless lam_exponent is given, exponent of its weight, >= 0.
        mu: the same for the adversarial distance, >= 0.
        lam_exponent: exponent of the clean weight, if it is not lam.
        mu_exponent: exponent of the adversarial weight, if it is not mu.
        pair_reduction: how the disparities of several peer pairs become one: "max", "mean" or "sum".
        distance_reduction: squared distances are a "sum" or a "mean" over classes.
        detach_nat: no gradient through the clean probabilities of the adversarial distance.
        max_weight: upper bound of the exponential weights, >= 1; none by default.
        samples: keep both distances only where the member's peers, on the adversarial input, are "consistent",
            "inconsistent", or in "F1", "F2", "F3" or "F4" (eq. 10 to 14); "all" keeps them everywhere.
        impl: backend of the loss: "auto", "native", "triton" or "torch".
    """

    lam: float = 1.0
    mu: float = 5.0
    lam_exponent: float | None = None
    mu_exponent: float | None = None
    pair_reduction: str = "max"
    distance_reduction: str = "sum"
    detach_nat: bool = False
    max_weight: float | None = None
    samples: str = "all"
    impl: str = "auto"

    def __post_init__(self) -> None:
        CEATLoss(**self.loss_settings)  # refuses what is out of range
        require_choice("samples", self.samples, FILTERS)

    @property
    def loss_settings(self) -> dict[str, Any]:
        """The settings that `ceat_fast.loss` takes."""
        return {f.name: getattr(self, f.name) for f in fields(DistanceSettings) if f.name != "samples"}

    def distances(self, adv_logits: Tensor, nat_logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The regularisation of each member, and what is logged about it.

        Args:
            adv_logits, nat_logits: (M, B, K).
            labels: (B,) int64.

        Returns:
            (M,) means over the whole batch, and the pieces by name, each (M, B), without gradient; "selected" is 1
            where a filter keeps the sample.
        """
        reduction = "mean" if self.samples == "all" else "none"
        losses, pieces = calibrated_distance(
            adv_logits, nat_logits, labels, reduction=reduction, return_parts=True, **self.loss_settings
        )
        parts = pieces._asdict()
        if self.samples != "all":
            parts["selected"] = peer_filter(adv_logits.detach(), labels, self.samples).to(losses.dtype)
            losses = (losses * parts["selected"]).mean(1)
        return losses, parts


@dataclass
class CalibratedDistance(DistanceSettings):
    """What `plus_ceat` adds to the loss of a method.

    Args:
        lam: coefficient of the clean distance and, unless lam_exponent is given, exponent of its weight, >= 0.
        mu: the same for the adversarial distance, >= 0.
    """

    @property
    def label(self) -> str:
        """For tables, for example "L^D(lam=1, mu=5)"."""
        return settings_label("L^D", self, always=("lam", "mu"), never=("impl",))
