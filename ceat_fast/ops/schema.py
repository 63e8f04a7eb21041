"""Signatures and fake kernels of the ops, the same for every backend that registers them with torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ceat_fast.ops.reference import REDUCTIONS, compute_dtype

CEAT_LOSS_SIGNATURE = (
    "(Tensor adv, Tensor nat, Tensor target, float ce_coefficient, float nat_coefficient, float adv_coefficient,"
    " float nat_exponent, float adv_exponent, float max_weight, int pair_reduction, int reduction, bool detach_nat,"
    " bool need_grad, bool need_parts) -> (Tensor, Tensor, Tensor, Tensor)"
)
ENSEMBLE_CROSS_ENTROPY_SIGNATURE = "(Tensor logits, Tensor target, int reduction, bool need_grad) -> (Tensor, Tensor)"
PGD_STEP_SIGNATURE = "(Tensor x_adv, Tensor grad, Tensor x, float alpha, float eps) -> Tensor"
SCALE_GRADIENTS_SIGNATURE = "(Tensor adv_grad, Tensor nat_grad, Tensor loss_grad) -> (Tensor, Tensor)"


def fake_ceat_loss(
    adv: Tensor,
    nat: Tensor,
    target: Tensor,
    ce_coefficient: float,
    nat_coefficient: float,
    adv_coefficient: float,
    nat_exponent: float,
    adv_exponent: float,
    max_weight: float,
    pair_reduction: int,
    reduction: int,
    detach_nat: bool,
    need_grad: bool,
    need_parts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    members, samples, classes = adv.shape
    loss_dtype, grad_dtype = compute_dtype(adv.dtype), gradient_dtype(adv.dtype)
    loss_shape = (members, samples) if REDUCTIONS[reduction] == "none" else (members,)
    grad_shape = (members, samples, classes) if need_grad else (0,)
    return (
        adv.new_empty(loss_shape, dtype=loss_dtype),
        adv.new_empty(grad_shape, dtype=grad_dtype),
        adv.new_empty(grad_shape, dtype=grad_dtype),
        adv.new_empty((7, members, samples) if need_parts else (0,), dtype=loss_dtype),
    )


def fake_ensemble_cross_entropy(
    logits: Tensor, target: Tensor, reduction: int, need_grad: bool
) -> tuple[Tensor, Tensor]:
    loss_shape = (logits.shape[1],) if REDUCTIONS[reduction] == "none" else ()
    return (
        logits.new_empty(loss_shape, dtype=compute_dtype(logits.dtype)),
        logits.new_empty(logits.shape if need_grad else (0,), dtype=gradient_dtype(logits.dtype)),
    )


def fake_pgd_step(x_adv: Tensor, grad: Tensor, x: Tensor, alpha: float, eps: float) -> Tensor:
    return torch.empty_like(x)


def fake_scale_gradients(adv_grad: Tensor, nat_grad: Tensor, loss_grad: Tensor) -> tuple[Tensor, Tensor]:
    return adv_grad.new_empty(adv_grad.shape), nat_grad.new_empty(nat_grad.shape)


def gradient_dtype(logits: torch.dtype) -> torch.dtype:
    """fp16 cannot hold a gradient divided by the batch size, so it stays in fp32 until the loss scale is known."""
    return torch.float32 if logits == torch.float16 else logits


def define_ops(backend: str) -> None:
    """Define `ceat_fast::<op>_<backend>` with the common schemas and fake kernels."""
    for op, signature, fake in (
        ("ceat_loss", CEAT_LOSS_SIGNATURE, fake_ceat_loss),
        ("ensemble_cross_entropy", ENSEMBLE_CROSS_ENTROPY_SIGNATURE, fake_ensemble_cross_entropy),
        ("pgd_step", PGD_STEP_SIGNATURE, fake_pgd_step),
        ("scale_gradients", SCALE_GRADIENTS_SIGNATURE, fake_scale_gradients),
    ):
        torch.library.define(f"ceat_fast::{op}_{backend}", signature)
        torch.library.register_fake(f"ceat_fast::{op}_{backend}", fake)
