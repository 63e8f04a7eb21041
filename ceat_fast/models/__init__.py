"""Models by name: `build_model("resnet20", num_classes=10)`, or a function of your own as "module:function"."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ceat_fast.choices import unknown_name
from ceat_fast.imports import call_function
from ceat_fast.models.resnet import ResNet, digits_resnet, resnet20, resnet26, resnet32

__all__ = [
    "MODELS",
    "ResNet",
    "build_model",
    "digits_resnet",
    "resnet20",
    "resnet26",
    "resnet32",
]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet20": resnet20,
    "resnet26": resnet26,
    "resnet32": resnet32,
    "digits_resnet": digits_resnet,
}


def build_model(name: str, num_classes: int, in_channels: int = 3) -> nn.Module:
    """Build a freshly initialised model that maps images (B, in_channels, H, W) in [0, 1] to logits (B, num_classes).

    Args:
        name: a key of `MODELS`, or "package.module:function" for your own, which is imported and called as
            `function(num_classes=..., in_channels=...)`; the import runs that module's code.
        num_classes: K, at least 2.
        in_channels: C, at least 1.

    Raises:
        ValueError: unknown name (names the nearest one), a "module:function" that is not there or does not take these
            arguments, or that returned something else than an `nn.Module`.
    """
    if name in MODELS:
        return MODELS[name](num_classes=num_classes, in_channels=in_channels)
    if ":" not in name:
        raise ValueError(unknown_name("model", name, MODELS) + '; for your own write "module:function"')
    model = call_function("model", name, num_classes=num_classes, in_channels=in_channels)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {name!r} must return an nn.Module, got {type(model).__name__}")
    return model
