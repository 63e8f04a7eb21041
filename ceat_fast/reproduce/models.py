"""Networks for the 8x8 digits of several depths, in the place of ResNet-20, 26 and 32."""

from __future__ import annotations

from ceat_fast.models.resnet import DIGITS_STATISTICS, ResNet


def digits_resnet_6(num_classes: int, in_channels: int) -> ResNet:
    """Depth 6: one block more than `digits_resnet`, which has depth 4 as ResNet-20 has 20."""
    return _digits((1, 1), num_classes, in_channels)


def digits_resnet_8(num_classes: int, in_channels: int) -> ResNet:
    """Depth 8."""
    return _digits((1, 2), num_classes, in_channels)


def _digits(blocks: tuple[int, int], num_classes: int, in_channels: int) -> ResNet:
    if in_channels != 1:
        raise ValueError(f"in_channels must be 1, for the digits, got {in_channels}")
    return ResNet(blocks, (16, 32), num_classes, DIGITS_STATISTICS)
