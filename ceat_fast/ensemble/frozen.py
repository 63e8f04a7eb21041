"""The state in which an attack sees a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Every submodule in eval mode and no parameter requiring a gradient, within a `with` block.

    Running statistics stay untouched, and gradients with respect to the input cost no parameter gradients. Afterwards,
    also after an exception, each submodule's `training` and each parameter's `requires_grad` is what it was before.
    """
    training = [module for module in model.modules() if module.training]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for module in training:
            module.training = False
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield model
    finally:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)
