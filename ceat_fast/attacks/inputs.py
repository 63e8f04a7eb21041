"""What an attack refuses to start from."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def require_eval_mode(model: nn.Module) -> None:
    """Raise ValueError where a submodule is in train mode."""
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(f"model is in train mode ({name or type(module).__name__}): call model.eval() first")


def require_inputs(
    x: Tensor,
    y: Tensor,
    index: Tensor | None = None,
    target: Tensor | None = None,
    eps: Tensor | None = None,
) -> None:
    """Raise TypeError or ValueError unless x is a batch of floats in [0, 1] and the others fit it.

    Args:
        x: (B, ...) fp32 or fp64.
        y, target: (B,) int64 labels, not negative; a target differs from its label.
        index: (B,) int64.
        eps: (B,) floats, finite and not negative.
    """
    named = {"x": x, "y": y, "index": index, "target": target, "eps": eps}
    for name, value in named.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if x.dtype not in (torch.float32, torch.float64) or x.dim() < 2:
        raise ValueError(f"x must be float32 or float64 of shape (B, ...), got {x.dtype} {tuple(x.shape)}")
    for name, tensor in (("y", y), ("index", index), ("target", target)):
        if tensor is not None and (tensor.dtype != torch.int64 or tensor.shape != x.shape[:1]):
            raise ValueError(f"{name} must be int64 of shape ({len(x)},), got {tensor.dtype} {tuple(tensor.shape)}")
    if not bool(((x >= 0) & (x <= 1)).all()):
        extent = "NaN" if bool(x.isnan().any()) else f"values from {x.min().item():.6g} to {x.max().item():.6g}"
        raise ValueError(f"x must lie in [0, 1], got {extent}")
    for name, labels in (("y", y), ("target", target)):
        if labels is not None and len(labels) and int(labels.min()) < 0:
            raise ValueError(f"{name} must not be negative, got {int(labels.min())}")
    if target is not None and bool((same := target == y).any()):
        raise ValueError(f"target must differ from y, got the same class for {int(same.sum())} of {len(y)} samples")
    if eps is not None:
        _require_radii(eps, len(x))


def _require_radii(eps: Tensor, samples: int) -> None:
    if not eps.is_floating_point() or eps.shape != (samples,):
        raise ValueError(f"eps must be floats of shape ({samples},), got {eps.dtype} {tuple(eps.shape)}")
    wrong = ~(eps.isfinite() & (eps >= 0))
    if bool(wrong.any()):
        raise ValueError(f"eps must be finite and not negative, got {eps[wrong][0].item()}")
