"""Checks of data and models before a run begins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from ceat_fast.data import Dataset
from ceat_fast.ensemble import Ensemble
from ceat_fast.training.config import TrainConfig
from ceat_fast.training.distributed import Layout


def training_data(config: TrainConfig, dataset: Dataset) -> tuple[Tensor, Tensor]:
    """The images and labels to train and validate on, on the CPU.

    Raises:
        ValueError: no images, not one label for each, labels that are not int64 or outside [0, K), images that are not
            uint8 or above the data set's scale, or as many held out as there are.
    """
    images = dataset.train_images[: config.data.train_images]
    labels = dataset.train_labels[: config.data.train_images]
    name = f"data set {dataset.name!r}"
    if len(images) == 0:
        raise ValueError(f"{name}: 0 training images")
    _require_part(dataset, "training", images, labels)
    _require_part(dataset, "test", dataset.test_images, dataset.test_labels)  # rather than after hours of training
    if config.validation.images >= len(images):
        raise ValueError(
            f"validation.images={config.validation.images} leaves nothing to train on: {name} has {len(images)} images"
        )
    return images, labels


def _require_part(dataset: Dataset, part: str, images: Tensor, labels: Tensor) -> None:
    name, classes = f"data set {dataset.name!r}", dataset.num_classes
    if len(images) != len(labels):
        raise ValueError(f"{name}: {len(images)} {part} images, {len(labels)} labels")
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise ValueError(f"{name}: {part} images must be uint8 (N, C, H, W), got {images.dtype} {tuple(images.shape)}")
    if labels.dtype != torch.int64 or labels.dim() != 1:
        raise ValueError(f"{name}: {part} labels must be int64 (N,), got {labels.dtype} {tuple(labels.shape)}")
    outside = (labels < 0) | (labels >= classes)
    if outside.any():
        wrong = int(outside.nonzero()[0])
        raise ValueError(f"{name}: label {int(labels[wrong])} of {part} image {wrong} is outside [0, {classes})")
    if len(images) and images.max() > dataset.scale:
        raise ValueError(
            f"{name}: scale={dataset.scale:g} must be the value that means 1.0, and {part} images reach "
            f"{int(images.max())}"
        )


@torch.no_grad()
def require_smallest_batch_fits(
    ensemble: Ensemble, layout: Layout, images: Tensor, config: TrainConfig, dataset: Dataset
) -> None:
    """Refuse members that cannot train on one image, as BatchNorm may, where a process gets no more of the last batch.

    Raises:
        ValueError: names the member and what cuts the images like this.
    """
    ranks = layout.data_ranks
    last = len(images) % config.batch_size or config.batch_size
    if last // ranks > 1 or (ranks > 1 and config.parallel.sync_batchnorm):
        return
    x = images[:1].float() / dataset.scale
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        for number, member in zip(layout.members, ensemble.train().members, strict=True):
            copies = {name: buffer.clone() for name, buffer in member.named_buffers()}  # for the running statistics
            try:
                functional_call(member, copies, (x,))
            except Exception as error:  # whatever a model of the user's raises
                processes = "" if ranks == 1 else f" for {ranks} processes"
                raise ValueError(
                    f"batch_size={config.batch_size} cuts {len(images)} training images into batches of which the last "
                    f"has {last}{processes}, and member {number} cannot train on one image ({error}); "
                    "change batch_size or data.train_images"
                ) from error
    ensemble.eval()


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
