"""Networks of several depths that a CPU trains in seconds, in the place of ResNet-20, 26 and 32."""

from __future__ import annotations

from torch import nn

from ceat_fast.models.resnet import CIFAR10_STATISTICS, DIGITS_STATISTICS, ResNet

_BLOCKS = {4: (0, 1), 6: (1, 1), 8: (1, 2)}
_WIDTHS = (16, 32)


def digits_resnet_6(num_classes: int, in_channels: int) -> ResNet:
    """Depth 6: one block more than `digits_resnet`, which has depth 4 as ResNet-20 has 20."""
    return _digits(6, num_classes, in_channels)


def digits_resnet_8(num_classes: int, in_channels: int) -> ResNet:
    """Depth 8."""
    return _digits(8, num_classes, in_channels)


def cifar_resnet_4(num_classes: int, in_channels: int) -> nn.Module:
    """The network of the digits for 32x32 images in colour, of which each 2x2 pixels become one of 12 channels."""
    return _cifar(4, num_classes, in_channels)


def cifar_resnet_6(num_classes: int, in_channels: int) -> nn.Module:
    """Depth 6."""
    return _cifar(6, num_classes, in_channels)


def cifar_resnet_8(num_classes: int, in_channels: int) -> nn.Module:
    """Depth 8."""
    return _cifar(8, num_classes, in_channels)


def _digits(depth: int, num_classes: int, in_channels: int) -> ResNet:
    if in_channels != 1:
        raise ValueError(f"in_channels must be 1, for the digits, got {in_channels}")
    return ResNet(_BLOCKS[depth], _WIDTHS, num_classes, DIGITS_STATISTICS)


def _cifar(depth: int, num_classes: int, in_channels: int) -> nn.Module:
    if in_channels != 3:
        raise ValueError(f"in_channels must be 3, for CIFAR-10, got {in_channels}")
    mean, std = ([value for value in values for _ in range(4)] for values in CIFAR10_STATISTICS)
    return nn.Sequential(nn.PixelUnshuffle(2), ResNet(_BLOCKS[depth], _WIDTHS, num_classes, (mean, std)))
