"""Statistics of an epoch, accumulated on the device: one transfer to the host per epoch, none per step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ceat_fast.methods import StepOutput

DISPARITY_BINS = 20  # equal bins over [0, 1]; reduction "sum" can exceed 1 and then counts in the last one


class EpochMetrics:
    """Sums over the samples of an epoch: losses, parts, disparity histograms, correct predictions; and maxima."""

    def __init__(self, combine: Callable[[Tensor], Tensor]) -> None:
        """`combine` maps member logits (M, B, K) to the ensemble's output (B, K)."""
        self.combine = combine
        self.samples = 0
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}

    def update(self, output: StepOutput, labels: Tensor) -> None:
        """Add one batch."""
        batch = labels.shape[0]
        self.samples += batch
        self._add("loss", output.losses.detach().double() * batch)
        for name, part in output.parts.items():
            self._add(name, part.double().sum(1))
            self._maximum(name, part.amax())
            if name.endswith("_disparity"):
                self._add(name + "_histogram", histogram(part))
        for kind, logits in (("adv", output.adv_logits), ("nat", output.nat_logits)):
            if logits is not None:
                self._add(kind + "_correct_members", (logits.argmax(-1) == labels).sum(1))
                self._add(kind + "_correct", (self.combine(logits).argmax(-1) == labels).sum())

    def running_accuracy(self) -> float:
        """Accuracy of the ensemble on the adversarial inputs so far (reads the device)."""
        return self._sums["adv_correct"].item() / self.samples

    def running_maximum(self, suffix: str) -> float | None:
        """Largest value so far among the parts with that suffix (reads the device); None if there are none."""
        values = [value.item() for name, value in self._maxima.items() if name.endswith(suffix)]
        return max(values, default=None)

    def result(self) -> dict[str, Any]:
        """Plain values: `loss` (mean over members) and `loss_members`; per part its mean over members and samples and,
        for weights and disparities, the maximum; histograms as counts; accuracies of ensemble and members."""
        means = {name: (value / self.samples).tolist() for name, value in self._sums.items() if "histogram" not in name}
        losses = means.pop("loss")
        result: dict[str, Any] = {"loss": sum(losses) / len(losses), "loss_members": losses}
        for kind in ("adv", "nat"):
            if kind + "_correct" in means:
                result[f"train_{kind}_accuracy"] = means.pop(kind + "_correct")
                result[f"train_{kind}_accuracy_members"] = means.pop(kind + "_correct_members")
        for name, values in means.items():
            result[name] = sum(values) / len(values)
            if name in self._maxima and name.endswith(("_weight", "_disparity")):
                result[name + "_max"] = self._maxima[name].item()
        for name, value in self._sums.items():
            if "histogram" in name:
                result[name] = value.long().tolist()
        return result

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def _maximum(self, name: str, value: Tensor) -> None:
        self._maxima[name] = torch.maximum(self._maxima[name], value) if name in self._maxima else value


def histogram(values: Tensor, bins: int = DISPARITY_BINS) -> Tensor:
    """Counts (bins,) of values in [0, 1] in equal bins; what is above 1 counts in the last one.

    scatter_add instead of `torch.histc` or `bincount`, which synchronise with the host on CUDA.
    """
    index = (values.flatten() * bins).long().clamp_(0, bins - 1)
    ones = torch.ones(index.shape, dtype=torch.float64, device=values.device)
    return torch.zeros(bins, dtype=torch.float64, device=values.device).scatter_add_(0, index, ones)
