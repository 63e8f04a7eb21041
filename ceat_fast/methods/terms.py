"""Terms that several methods share. Shapes: M members, B samples, K classes; logits are (M, B, K)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ceat_fast.ensemble import Ensemble
from ceat_fast.loss import disparity
from ceat_fast.ops.reference import compute_dtype


def widened(logits: Tensor) -> Tensor:
    """Half precision as fp32; fp32 and fp64 as they are."""
    return logits.to(compute_dtype(logits.dtype))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(M, B, K), (B,) -> (M, B) cross-entropies."""
    labels = labels.expand(logits.shape[0], -1)
    losses = F.cross_entropy(widened(logits).flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view_as(labels)


def true_class_disparity(ce: Tensor) -> Tensor:
    """Leave-one-out disparity (eq. 18) from cross-entropies without gradient, since p[y] = e^-CE: (M, B) -> (M, B)."""
    return disparity((-ce).exp())


def input_gradients(ensemble: Ensemble, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """g_m = dCE(z_m(x), y)/dx of every member and sample, differentiable in the parameters and in x.

    The cross-entropies are summed over the batch before they are differentiated, so that a sample's gradient does not
    depend on the batch size. (In train mode BatchNorm still couples the samples of a batch.)

    Args:
        x: (B, ...), shared by the members; may require a gradient.

    Returns:
        (M, B, K) logits of that pass, (M, B, ...) gradients.
    """
    own = x.expand(len(ensemble.members), *x.shape)
    if not own.requires_grad:
        own = own.detach().requires_grad_()
    logits = _differentiable_twice(ensemble, x.device).member_logits(own, per_member=True)
    (gradients,) = torch.autograd.grad(cross_entropy(logits, labels).sum(), own, create_graph=True)
    return logits, gradients


def _differentiable_twice(ensemble: Ensemble, device: torch.device) -> Ensemble:
    """Compiled members and CUDA graphs know first derivatives only: without them, and without moving any tensor."""
    execution = ensemble.execution(device)
    if execution.compile or execution.graph:
        return Ensemble(list(ensemble.members), backend="loop")
    return ensemble


def cosines(gradients: Tensor) -> Tensor:
    """Cosine similarities of every pair i < j of members: (M, B, ...) -> (M (M - 1) / 2, B).

    Independent of the scale of a gradient, however small. A gradient of zeros has cosine 0 and no derivative.
    """
    flat = gradients.flatten(2)
    largest = flat.detach().abs().amax(-1, keepdim=True)
    flat = flat / torch.where(largest > 0, largest, 1.0)
    norm = torch.linalg.vector_norm(flat, dim=-1, keepdim=True)
    unit = flat / torch.where(norm > 0, norm, 1.0)
    i, j = torch.triu_indices(len(unit), len(unit), offset=1, device=unit.device)
    return (unit[i] * unit[j]).sum(-1)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) from log-probabilities (..., K) -> (...)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)
