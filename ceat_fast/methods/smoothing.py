"""Label smoothing, for methods whose loss has the cross-entropy of one forward pass.

    CE_s = (1 - s) CE(z, y) + s mean_k(-log p_k) = CE(z, y) + s (log p_y - mean_k log p_k)

The second form is added to a loss that holds the cross-entropy already.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ceat_fast.checks import require_number
from ceat_fast.methods.base import Method
from ceat_fast.methods.terms import widened


@dataclass
class LabelSmoothing(Method):
    """Base of such methods.

    Args:
        label_smoothing: share s of the target that is spread evenly over all classes, in [0, 1].
    """

    label_smoothing: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        require_number("label_smoothing", self.label_smoothing, 0, 1)

    def smoothed(self, losses: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Losses (M,) that hold the mean cross-entropy of logits (M, B, K), with smoothed labels (B,) instead."""
        if self.label_smoothing == 0:
            return losses
        log_prob = widened(logits).log_softmax(-1)
        true = log_prob.gather(-1, labels.expand(len(logits), -1)[..., None]).squeeze(-1)
        return losses + self.label_smoothing * (true - log_prob.mean(-1)).mean(1)
