"""Held-out images, judged while training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ceat_fast.attacks import PGD
from ceat_fast.ensemble import Ensemble
from ceat_fast.training.distributed import Layout, frozen_view, perturb_with
from ceat_fast.training.seeds import stream_seed
from ceat_fast.training.settings import ValidationConfig

BATCH = 500


def hold_out(count: int, images: int) -> tuple[Tensor, Tensor]:
    """Sorted indices (kept for training, held out) of a data set of `count`; the same ones for every seed of a run."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(stream_seed(0, "validation")))
    return order[images:].sort().values, order[:images].sort().values


class Validation:
    """Judges an ensemble on images (N, C, H, W) uint8 with labels (N,); each process takes its part of them."""

    def __init__(self, config: ValidationConfig, images: Tensor, labels: Tensor, scale: float, layout: Layout) -> None:
        if len(images) < layout.data_ranks:
            raise ValueError(
                f"validation.images={len(images)} must be at least the number of parts of a batch, {layout.data_ranks}"
            )
        self.config, self.layout, self.scale = config, layout, scale
        self.images, self.labels = images, labels
        self._attack = perturb_with(PGD(**vars(config.attack), seed=0))

    def due(self, epoch: int, epochs: int) -> bool:
        """Whether that epoch, counted from 1, ends with a judgement."""
        return epoch % self.config.every == 0 or epoch == epochs

    def judge(self, ensemble: Ensemble) -> dict[str, Any]:
        """Clean and robust accuracy of the ensemble, clean accuracy of the members; modes stay as they are."""
        own = self.layout.part(torch.arange(len(self.images), device=self.images.device))
        correct = [self._judge_part(ensemble, rows) for rows in torch.split(own, BATCH)]
        shares = (self.layout.data_sum(torch.stack(correct).sum(0)) / len(self.images)).tolist()
        return {"val_nat_accuracy": shares[0], "val_adv_accuracy": shares[1], "val_nat_accuracy_members": shares[2:]}

    def _judge_part(self, ensemble: Ensemble, rows: Tensor) -> Tensor:
        """Counts (2 + M,) of correct answers: clean, under attack, and clean of each member."""
        x, y = self.images[rows].float() / self.scale, self.labels[rows]
        adversarial = self._attack(ensemble, x, y, rows)
        with torch.no_grad(), frozen_view(ensemble) as view:
            clean, attacked = view.member_logits(x, per_member=False), view(adversarial)
            predictions = [view.combine(clean).argmax(-1), attacked.argmax(-1), *clean.argmax(-1)]
        return (torch.stack(predictions) == y).double().sum(1)
