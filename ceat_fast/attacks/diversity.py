"""Random resizing and padding of images (Xie et al., 2019), a linear map of each image.

An image is shrunk to h x w by bilinear interpolation (pixel centres at half integers) and laid on zeros at a random
place. Both axes separate: out = R x C^T with two small matrices per image, which gives the gradient without the atomic
additions of a sampling kernel, so that it is reproducible on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor


def resize_and_pad(x: Tensor, uniform: Tensor, probability: float, least_size: float) -> Tensor:
    """Images of the same shape, some of them smaller.

    Args:
        x: (..., B, C, H, W).
        uniform: (B, 4) numbers in [0, 1): whether to change the image, its size, its vertical and horizontal place.
        probability: share of the images to change.
        least_size: sizes h are the integers from max(1, floor(least_size * H)) to H - 1, and w alike.

    Raises:
        ValueError: x has no (C, H, W).
    """
    if x.dim() < 4:
        raise ValueError(f"input diversity needs images (B, C, H, W), got {tuple(x.shape)}")
    changed, size, top, left = uniform.to(x.dtype).unbind(1)
    changed = changed < probability
    rows = _resize_matrix(x.shape[-2], changed, size, top, least_size)
    columns = _resize_matrix(x.shape[-1], changed, size, left, least_size)
    return rows.unsqueeze(1) @ x @ columns.unsqueeze(1).mT


def _resize_matrix(length: int, changed: Tensor, size: Tensor, place: Tensor, least_size: float) -> Tensor:
    """(B, length, length): entry (i, k) is the share of old pixel k in new pixel i; the identity where not changed."""
    least = min(max(1, int(least_size * length)), length)
    kept = torch.where(changed, least + (size * (length - least)).floor(), length)[:, None]
    first = (place[:, None] * (length - kept + 1)).floor()
    pixels = torch.arange(length, dtype=size.dtype, device=size.device)
    source = (pixels - first + 0.5) * (length / kept) - 0.5
    shares = (1 - (source.clamp(0, length - 1)[:, :, None] - pixels).abs()).clamp(min=0)
    inside = (pixels >= first) & (pixels < first + kept)
    return shares * inside[:, :, None]
