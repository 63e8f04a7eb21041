"""The specification (`reference`) under the backend contract: values with gradients from autograd, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from ceat_fast.ops import reference
from ceat_fast.ops.reference import CeatSettings
from ceat_fast.ops.schema import gradient_dtype


def missing(device_type: str) -> str | None:
    """Plain torch runs wherever torch does."""
    return None


def ceat_loss(
    adv: Tensor, nat: Tensor, target: Tensor, settings: CeatSettings, need_grad: bool, need_parts: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.set_grad_enabled(need_grad):
        leaves = [t.detach().to(reference.compute_dtype(t.dtype)).requires_grad_(need_grad) for t in (adv, nat)]
        loss, parts = reference.ceat_loss(leaves[0], leaves[1], target, settings)
        grads = torch.autograd.grad(loss.sum(), leaves) if need_grad else (adv.new_empty(0), adv.new_empty(0))
    adv_grad, nat_grad = (grad.to(gradient_dtype(adv.dtype)) for grad in grads)
    return loss.detach(), adv_grad, nat_grad, torch.stack(parts) if need_parts else loss.new_empty(0)


def ensemble_cross_entropy(logits: Tensor, target: Tensor, reduction: int, need_grad: bool) -> tuple[Tensor, Tensor]:
    with torch.set_grad_enabled(need_grad):
        leaf = logits.detach().to(reference.compute_dtype(logits.dtype)).requires_grad_(need_grad)
        loss = reference.ensemble_cross_entropy(leaf, target, reduction)
        grad = torch.autograd.grad(loss.sum(), leaf)[0] if need_grad else logits.new_empty(0)
    return loss.detach(), grad.to(gradient_dtype(logits.dtype))


def pgd_step(x_adv: Tensor, grad: Tensor, x: Tensor, alpha: float, eps: float) -> Tensor:
    return reference.pgd_step(x_adv, grad, x, alpha, eps)


def scale_gradients(adv_grad: Tensor, nat_grad: Tensor, loss_grad: Tensor) -> tuple[Tensor, Tensor]:
    factor = loss_grad.reshape(*loss_grad.shape, *[1] * (3 - loss_grad.dim()))
    return (adv_grad * factor).to(adv_grad.dtype), (nat_grad * factor).to(nat_grad.dtype)
