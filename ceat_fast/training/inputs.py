"""Checks of data and models before a run begins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ceat_fast.data import Dataset
from ceat_fast.ensemble import Ensemble
from ceat_fast.training.config import TrainConfig


def training_data(config: TrainConfig, dataset: Dataset) -> tuple[Tensor, Tensor]:
    """The images and labels to train and validate on, on the CPU.

    Raises:
        ValueError: no images, not one label for each, labels outside [0, K), images that are not uint8, or as many held
            out as there are.
    """
    images = dataset.train_images[: config.data.train_images]
    labels = dataset.train_labels[: config.data.train_images]
    name, classes = f"data set {dataset.name!r}", dataset.num_classes
    if len(images) == 0 or len(images) != len(labels):
        raise ValueError(f"{name}: {len(images)} training images, {len(labels)} labels")
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise ValueError(f"{name}: images must be uint8 (N, C, H, W), got {images.dtype} {tuple(images.shape)}")
    if labels.min() < 0 or labels.max() >= classes:
        wrong = int(((labels < 0) | (labels >= classes)).nonzero()[0])
        raise ValueError(f"{name}: label {int(labels[wrong])} of training image {wrong} is outside [0, {classes})")
    if config.validation.images >= len(images):
        raise ValueError(
            f"validation.images={config.validation.images} leaves nothing to train on: {name} has {len(images)} images"
        )
    return images, labels


@torch.no_grad()
def require_members_fit(ensemble: Ensemble, indices: Sequence[int], images: Tensor, dataset: Dataset) -> None:
    """Refuse members that do not map images to one logit per class; `indices` are their places for the message.

    Raises:
        ValueError: names the member and what it returns.
    """
    x = images[:2].float() / dataset.scale
    for number, member in zip(indices, ensemble.eval().members, strict=True):
        try:
            output = member(x)
        except Exception as error:  # whatever a model of the user's raises
            raise ValueError(f"member {number} cannot run on images {tuple(x.shape)}: {error}") from error
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        if shape != (len(x), dataset.num_classes):
            raise ValueError(
                f"member {number} must return logits {(len(x), dataset.num_classes)} for images {tuple(x.shape)} of "
                f"data set {dataset.name!r}, got {shape}"
            )
