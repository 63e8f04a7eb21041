"""Statistics of an epoch, accumulated on the device: one transfer to the host per reading, none per step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ceat_fast.methods import StepOutput

DISPARITY_BINS = 20  # equal bins over [0, 1]; reduction "sum" can exceed 1 and then counts in the last one


class EpochMetrics:
    """Sums over the samples of an epoch: losses, parts, disparity histograms, correct predictions; and maxima.

    All sums are float64, counts too: they are added across processes in one message.
    """

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
            self._maximum(name, part.amax().double())
            if name.endswith("_disparity"):
                self._add(name + "_histogram", histogram(part))
        for kind, logits in (("adv", output.adv_logits), ("nat", output.nat_logits)):
            if logits is not None:
                self._add(kind + "_correct_members", (logits.argmax(-1) == labels).double().sum(1))
                self._add(kind + "_correct", (self.combine(logits).argmax(-1) == labels).double().sum())

    def state(self) -> dict[str, Any]:
        """Everything, as `load_state` takes it."""
        return {"samples": self.samples, "sums": dict(self._sums), "maxima": dict(self._maxima)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` gave."""
        self.samples, self._sums, self._maxima = state["samples"], dict(state["sums"]), dict(state["maxima"])

    def combined(self, total: Callable[[Tensor], Tensor], maximum: Callable[[Tensor], Tensor]) -> EpochMetrics:
        """The statistics of several processes; `total` and `maximum` reduce a flat float64 tensor over them."""
        result = EpochMetrics(self.combine)
        if not self._sums:
            return result
        sums = [torch.full_like(self._sums["loss"][:1], self.samples), *self._sums.values()]
        flat = torch.split(total(torch.cat([value.flatten() for value in sums])), [value.numel() for value in sums])
        result.samples = int(flat[0].item())
        shaped = (part.view_as(value) for part, value in zip(flat[1:], self._sums.values(), strict=True))
        result._sums = dict(zip(self._sums, shaped, strict=True))
        if self._maxima:
            largest = maximum(torch.stack(list(self._maxima.values())))
            result._maxima = dict(zip(self._maxima, largest.unbind(), strict=True))
        return result

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
