"""The ops under autograd: the forward pass already holds the gradient, the backward pass only scales it.

Two classes per op share one backward. `autograd.Function` with `setup_context` is what torch.func and torch.compile
need; the older form with `ctx` in `forward` is what eager training uses, since it costs a third of the time per call.
There is no double backward: eager torch raises. Within two levels of torch.func's derivatives, or one in a graph of
eager torch, the specification computes the loss; but for what torch.compile compiles, which knows nothing of levels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ceat_fast.ops import dispatch, reference
from ceat_fast.ops.reference import REDUCTIONS, CeatSettings, reduce_batch

Gradients = tuple[Tensor | None, ...]


def _is_transformed() -> bool:
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _ceat_backward(ctx: Any, loss_grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = ctx.saved_tensors[-2:]
    # `loss.sum().backward()` hands back ones. On the CPU a look is cheap, and saves reading and writing both gradients.
    if not (loss_grad.is_cpu and loss_grad.dim() == 1 and loss_grad.tolist() == [1.0] * len(loss_grad)):
        grads = dispatch.module(ctx.backend).scale_gradients(*grads, loss_grad)
    adv_grad, nat_grad = grads
    if adv_grad.dtype != ctx.dtype:
        adv_grad, nat_grad = adv_grad.to(ctx.dtype), nat_grad.to(ctx.dtype)
    return adv_grad, nat_grad, None, None, None, None


class _Once(torch.autograd.Function):
    """Gradients as they are, as a function of what they depend on, which cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[-count:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError("the fused loss can be differentiated once; impl='torch' as often as you like")


def _once(backward: Callable[[Any, Tensor], Gradients], ctx: Any, inputs: int, loss_grad: Tensor) -> Gradients:
    """The gradients of that backward; where a graph of them is built, whoever differentiates them gets an error.

    The first `inputs` of the saved tensors are the function's. `once_differentiable` raises only where the incoming
    gradient has a graph itself, which that of a sum has not.
    """
    if not torch.is_grad_enabled():
        return backward(ctx, loss_grad)
    with torch.no_grad():
        grads = backward(ctx, loss_grad)
    wanted = [grad for grad in grads if grad is not None]
    guarded = iter(_Once.apply(len(wanted), *ctx.saved_tensors[:inputs], loss_grad, *wanted))
    return tuple(None if grad is None else next(guarded) for grad in grads)


def _is_differentiated_twice(*logits: Tensor) -> bool:
    """Whether torch.func is to take derivatives of derivatives, or forward-mode ones."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    kinds = [level.key() for level in torch._C._functorch.get_interpreter_stack() or ()]
    forward = kinds.count(torch._C._functorch.TransformType.Jvp)
    backward = kinds.count(torch._C._functorch.TransformType.Grad)
    return forward > 0 or backward > 1 or (backward == 1 and any(map(_is_in_graph, logits)))


def _is_in_graph(tensor: Tensor) -> bool:
    """Whether eager torch would differentiate it, inside of all levels."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.requires_grad


class _EagerCeatLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        adv: Tensor,
        nat: Tensor,
        target: Tensor,
        settings: CeatSettings,
        backend: str,
        sink: list[Tensor] | None,
    ) -> Tensor:
        loss, adv_grad, nat_grad, parts = dispatch.module(backend).ceat_loss(
            adv, nat, target, settings, True, sink is not None
        )
        if sink is not None:
            sink.append(parts)
        ctx.save_for_backward(adv, nat, adv_grad, nat_grad)
        ctx.backend, ctx.dtype = backend, adv.dtype
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor) -> tuple[Tensor | None, ...]:
        return _once(_ceat_backward, ctx, 2, loss_grad)


class _CeatLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        adv: Tensor, nat: Tensor, target: Tensor, settings: CeatSettings, backend: str, parts: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        loss, adv_grad, nat_grad, parts_out = dispatch.module(backend).ceat_loss(
            adv, nat, target, settings, True, parts
        )
        return loss, parts_out, adv_grad, nat_grad

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, parts_out, adv_grad, nat_grad = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(parts_out, adv_grad, nat_grad)
        ctx.save_for_backward(adv_grad, nat_grad)
        ctx.dtype = inputs[0].dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if loss_grad is None:
            return (None,) * 6
        # A plain product is fused by the compiler and batched by vmap.
        factor = loss_grad.reshape(*loss_grad.shape, *[1] * (3 - loss_grad.dim()))
        return *((grad * factor).to(ctx.dtype) for grad in ctx.saved_tensors), None, None, None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        adv: Tensor,
        nat: Tensor,
        target: Tensor,
        settings: CeatSettings,
        backend: str,
        parts: bool,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Samples are independent: V mapped batches of B samples are one batch of V * B, reduced apart."""
        size = info.batch_size
        adv, nat = (_fold(t, dim, size, 1) for t, dim in zip((adv, nat), in_dims[:2], strict=True))
        target = _fold(target, in_dims[2], size, 0)
        samples = adv.shape[1] // size
        unreduced = settings._replace(reduction=REDUCTIONS.index("none"))
        loss, parts_out, *grads = _CeatLoss.apply(adv, nat, target, unreduced, backend, parts)
        loss = reduce_batch(loss.unflatten(1, (size, samples)), settings.reduction)
        scale = 1 / samples if REDUCTIONS[settings.reduction] == "mean" else 1
        grads = [(grad * scale).unflatten(1, (size, samples)) for grad in grads]
        parts_out = parts_out.unflatten(2, (size, samples)) if parts else parts_out.new_empty(0, size)
        return (loss, parts_out, *grads), (1, 2 if parts else 1, 1, 1)


def _fold(t: Tensor, dim: int | None, size: int, batch_dim: int) -> Tensor:
    """Fold the mapped dimension of `t` (or a repetition, where it is not mapped) into its batch dimension."""
    mapped = t.unsqueeze(batch_dim).expand(*t.shape[:batch_dim], size, *t.shape[batch_dim:])
    if dim is not None:
        mapped = t.movedim(dim, batch_dim)
    return mapped.flatten(batch_dim, batch_dim + 1)


def ceat_loss(
    backend: str, adv: Tensor, nat: Tensor, target: Tensor, settings: CeatSettings, need_parts: bool
) -> tuple[Tensor, Tensor | None]:
    """(loss, parts): loss (M,) or (M, B), differentiable once in `adv` and `nat`; parts (7, M, B) if needed."""
    if _is_differentiated_twice(adv, nat):
        loss, named = reference.ceat_loss(adv, nat, target, settings)
        parts = torch.stack(named) if need_parts else None
    elif _is_transformed():
        loss, parts, *_ = _CeatLoss.apply(adv, nat, target, settings, backend, need_parts)
    elif torch.is_grad_enabled() and (adv.requires_grad or nat.requires_grad):
        # Gradient-free outputs of a Function are expensive, so the parts leave by the back door.
        sink: list[Tensor] | None = [] if need_parts else None
        loss = _EagerCeatLoss.apply(adv, nat, target, settings, backend, sink)
        parts = sink[0] if sink else None
    else:
        loss, _, _, parts = dispatch.module(backend).ceat_loss(adv, nat, target, settings, False, need_parts)
    return loss, parts


class _EagerEnsembleCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, reduction: int, backend: str) -> Tensor:
        loss, grad = dispatch.module(backend).ensemble_cross_entropy(logits, target, reduction, True)
        ctx.save_for_backward(logits, grad)
        ctx.dtype = logits.dtype
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor) -> tuple[Tensor | None, ...]:
        return _once(_eager_ensemble_backward, ctx, 1, loss_grad)


class _EnsembleCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(logits: Tensor, target: Tensor, reduction: int, backend: str) -> tuple[Tensor, Tensor]:
        loss, grad = dispatch.module(backend).ensemble_cross_entropy(logits, target, reduction, True)
        return loss, grad

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.dtype = inputs[0].dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        return _ensemble_backward(ctx.saved_tensors[0], ctx.dtype, loss_grad), None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], logits: Tensor, target: Tensor, reduction: int, backend: str
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        """As for the CEAT loss: the mapped batches become one batch."""
        size = info.batch_size
        logits, target = _fold(logits, in_dims[0], size, 1), _fold(target, in_dims[1], size, 0)
        samples = logits.shape[1] // size
        loss, grad = _EnsembleCrossEntropy.apply(logits, target, REDUCTIONS.index("none"), backend)
        scale = 1 / samples if REDUCTIONS[reduction] == "mean" else 1
        loss = reduce_batch(loss.unflatten(0, (size, samples)), reduction)
        return (loss, (grad * scale).unflatten(1, (size, samples))), (0, 1)


def _eager_ensemble_backward(ctx: Any, loss_grad: Tensor) -> Gradients:
    return _ensemble_backward(ctx.saved_tensors[-1], ctx.dtype, loss_grad), None, None, None


def _ensemble_backward(grad: Tensor, dtype: torch.dtype, loss_grad: Tensor) -> Tensor:
    return (grad * loss_grad.unsqueeze(-1)).to(dtype) if loss_grad.dim() else (grad * loss_grad).to(dtype)


def ensemble_cross_entropy(backend: str, logits: Tensor, target: Tensor, reduction: int) -> Tensor:
    """() or (B,) losses of eq. 1, differentiable once in `logits`."""
    if _is_differentiated_twice(logits):
        return reference.ensemble_cross_entropy(logits, target, reduction)
    if _is_transformed():
        loss, _ = _EnsembleCrossEntropy.apply(logits, target, reduction, backend)
    elif torch.is_grad_enabled() and logits.requires_grad:
        loss = _EagerEnsembleCrossEntropy.apply(logits, target, reduction, backend)
    else:
        loss, _ = dispatch.module(backend).ensemble_cross_entropy(logits, target, reduction, False)
    return loss  # type: ignore[no-any-return]
