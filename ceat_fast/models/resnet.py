"""Residual networks for small images: the CIFAR family of depth 6n+2 and a tiny one for the 8x8 digits.

Inputs are images in [0, 1]; the normalisation is the first layer, so that attacks work in pixel space. The shortcut is
of type B: a 1x1 convolution with batch normalisation wherever the stride or the width changes, the identity elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Statistics = tuple[Sequence[float], Sequence[float]]

CIFAR10_STATISTICS: Statistics = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
DIGITS_STATISTICS: Statistics = ((0.3053,), (0.3762,))


class Normalize(nn.Module):
    """(x - mean) / std per channel of an image batch (B, C, H, W)."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std, default=0.0) <= 0:
            raise ValueError(f"mean and std need one value per channel and std > 0, got mean={mean}, std={std}")
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a type-B shortcut: (B, width_in, H, W) -> (B, width_out, H/stride, W/stride)."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width_out:
            projection = nn.Conv2d(width_in, width_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(width_out))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """3x3 stem, stages of basic blocks (stride 2 from the second stage on), average pool, linear head.

    Args:
        blocks: number of blocks of each stage.
        widths: channels of each stage.
        num_classes: K, at least 2.
        statistics: (mean, std), one value per input channel; their number is the number of input channels.

    Maps images (B, C, H, W) in [0, 1] of any size to logits (B, K).
    """

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int],
        num_classes: int,
        statistics: Statistics,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        self.normalize = Normalize(*statistics)
        self.conv1 = nn.Conv2d(len(statistics[0]), widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stages = nn.ModuleList()
        width_in = widths[0]
        for stage, (depth, width) in enumerate(zip(blocks, widths, strict=True)):
            layers = nn.Sequential()
            for block in range(depth):
                layers.append(BasicBlock(width_in, width, stride=2 if stage > 0 and block == 0 else 1))
                width_in = width
            self.stages.append(layers)
        self.fc = nn.Linear(width_in, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(self.normalize(x))))
        for stage in self.stages:
            x = stage(x)
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def _statistics(in_channels: int, normalize: Statistics | None, default: Statistics) -> Statistics:
    if in_channels < 1:
        raise ValueError(f"in_channels must be at least 1, got {in_channels}")
    if normalize is None:
        return default if len(default[0]) == in_channels else ((0.5,) * in_channels, (0.5,) * in_channels)
    if len(normalize[0]) != in_channels:
        raise ValueError(f"normalize gives {len(normalize[0])} channel means for in_channels={in_channels}")
    return normalize


def _cifar_resnet(blocks: int, num_classes: int, in_channels: int, normalize: Statistics | None) -> ResNet:
    return ResNet(
        (blocks,) * 3,
        (16, 32, 64),
        num_classes,
        _statistics(in_channels, normalize, CIFAR10_STATISTICS),
    )


def resnet20(num_classes: int = 10, in_channels: int = 3, normalize: Statistics | None = None) -> ResNet:
    """CIFAR ResNet-20: 272,474 parameters at K=10.

    normalize: (mean, std) per channel. Default: the CIFAR-10 statistics for 3 channels, mean = std = 0.5 otherwise.
    """
    return _cifar_resnet(3, num_classes, in_channels, normalize)


def resnet26(num_classes: int = 10, in_channels: int = 3, normalize: Statistics | None = None) -> ResNet:
    """CIFAR ResNet-26: 369,690 parameters at K=10; arguments as in `resnet20`."""
    return _cifar_resnet(4, num_classes, in_channels, normalize)


def resnet32(num_classes: int = 10, in_channels: int = 3, normalize: Statistics | None = None) -> ResNet:
    """CIFAR ResNet-32: 466,906 parameters at K=10; arguments as in `resnet20`."""
    return _cifar_resnet(5, num_classes, in_channels, normalize)


def digits_resnet(num_classes: int = 10, in_channels: int = 1, normalize: Statistics | None = None) -> ResNet:
    """A small ResNet for 8x8 images, made to train in seconds on a CPU; arguments as in `resnet20`.

    Default normalisation: the statistics of the digits for 1 channel, mean = std = 0.5 otherwise.
    """
    return ResNet(
        (0, 1),
        (16, 32),
        num_classes,
        _statistics(in_channels, normalize, DIGITS_STATISTICS),
    )
