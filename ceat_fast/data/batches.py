"""Shuffled, augmented batches of a data set that lies in memory (or on the GPU) as uint8."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ceat_fast.choices import require_choice


class _Augmentation(NamedTuple):
    padding: int  # zero pixels added on each side before the random crop back to the original size
    flip: bool  # horizontal, with probability 1/2


_AUGMENTATIONS = {
    "none": _Augmentation(0, False),
    "shift": _Augmentation(1, False),
    "crop": _Augmentation(4, False),
    "crop_flip": _Augmentation(4, True),
}
AUGMENTATIONS = tuple(_AUGMENTATIONS)


def iterate_batches(
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    generator: torch.Generator | None = None,
    *,
    augment: str = "none",
    scale: float = 255.0,
    drop_last: bool = False,
    skip: int = 0,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (float images in [0, 1], labels, sample indices) over the whole set once.

    Args:
        images: (N, C, H, W) uint8, on any device; batches are made where it lies.
        labels: (N,) int64 on the same device.
        batch_size: at least 1; the last batch is smaller unless `drop_last`.
        generator: shuffles and augments. All numbers of a pass are drawn before its first batch, so the generator's
            state at the start of a pass determines it, whatever the device. None: in order, not augmented.
        augment: "none"; "shift" (random crop after 1 pixel of zero padding, for 8x8 images); "crop" (4 pixels);
            "crop_flip" (4 pixels and a horizontal flip with probability 1/2, for natural images).
        scale: the uint8 value that means 1.0 (`Dataset.scale`).
        drop_last: leave out a last batch that is not full.
        skip: leave out so many of the first batches; the others are what they are without it.

    Raises:
        ValueError: an unknown augmentation, an augmentation without generator, or a batch size below 1.
    """
    require_choice("augmentation", augment, AUGMENTATIONS)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if generator is None and augment != "none":
        raise ValueError(f"augment={augment!r} needs a generator")
    return _batches(images, labels, batch_size, generator, _AUGMENTATIONS[augment], scale, drop_last, skip)


def _batches(
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    generator: torch.Generator | None,
    augmentation: _Augmentation,
    scale: float,
    drop_last: bool,
    skip: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    count, device = len(images), images.device
    order = torch.arange(count, device=device)
    shift = torch.zeros(count, 2, dtype=torch.int64, device=device)
    flip = torch.zeros(count, dtype=torch.bool, device=device)
    if generator is not None:
        source = generator.device
        order = torch.randperm(count, generator=generator, device=source).to(device)
        if augmentation.padding:
            sizes = 2 * augmentation.padding + 1
            shift = torch.randint(sizes, (count, 2), generator=generator, device=source).to(device)
        if augmentation.flip:
            flip = torch.randint(2, (count,), generator=generator, device=source).to(device).bool()
    end = count - count % batch_size if drop_last else count
    for start in range(skip * batch_size, end, batch_size):
        index = order[start : min(start + batch_size, end)]
        batch = images[index]
        if augmentation.padding:
            batch = crop_flip(batch, augmentation.padding, shift[index], flip[index])
        yield batch.float() / scale, labels[index], index


def crop_flip(images: Tensor, padding: int, shift: Tensor, flip: Tensor) -> Tensor:
    """Crop each zero-padded image at its own offset and mirror it where `flip` says so.

    images: (B, C, H, W); shift: (B, 2) int64 row and column offsets in [0, 2 * padding]; flip: (B,) bool.
    """
    batch, channels, height, width = images.shape
    device = images.device
    padded = F.pad(images, (padding,) * 4)
    rows = shift[:, :1] + torch.arange(height, device=device)
    columns = torch.arange(width, device=device)
    columns = shift[:, 1:] + torch.where(flip[:, None], width - 1 - columns, columns)
    return padded[
        torch.arange(batch, device=device)[:, None, None, None],
        torch.arange(channels, device=device)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]
