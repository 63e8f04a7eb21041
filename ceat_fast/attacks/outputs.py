"""The outputs of a model at inputs (N, ...), and gradients of losses of them with respect to the inputs.

On a GPU the batch is padded to one of a few sizes, so that a frozen ensemble can replay its passes as CUDA graphs,
which are captured for a size, while rows come and go.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ceat_fast.ensemble import is_ensemble
from ceat_fast.ops import reference

Loss = Callable[[Tensor], Tensor]  # outputs (N, K) -> (N,)


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """(N, ...) -> (N, K) logits, the ensemble's log-probabilities (eq. 1) for an `Ensemble`; in fp32, fp64 for fp64.

    Raises:
        ValueError: the model returns no such tensor.
    """
    return padded_outputs(model, x) if x.is_cuda else _outputs(model, x)


def padded_outputs(model: nn.Module, x: Tensor) -> Tensor:
    """`outputs` by way of a batch of `padded_size`."""
    spare = x[-1:].expand(padded_size(len(x)) - len(x), *x.shape[1:])
    return _outputs(model, torch.cat([x, spare]))[: len(x)]


def padded_size(count: int) -> int:
    """The next of 8, 12, 16, 24, 32, 48, ...; 0 for 0."""
    power = 8
    while power < count:
        power *= 2
    smaller = power // 4 * 3
    return 0 if count == 0 else smaller if 8 < count <= smaller else power


def answers(model: nn.Module, x: Tensor) -> Tensor:
    """`outputs` without history."""
    if x.is_cuda and is_ensemble(model) and model.execution(x.device).graph:
        with torch.enable_grad():  # graphs are captured for inputs that want a gradient; it costs no backward pass
            return outputs(model, x.detach().requires_grad_()).detach()
    with torch.no_grad():
        return outputs(model, x)


def _outputs(model: nn.Module, x: Tensor) -> Tensor:
    if is_ensemble(model):
        return model.combine(model.member_logits(x, per_member=False))
    logits = plain_logits(model, x)
    return logits.to(reference.compute_dtype(logits.dtype))


def plain_logits(model: nn.Module, x: Tensor) -> Tensor:
    """What the model returns, (N, K) for x (N, ...); ValueError if that is anything else."""
    result = model(x)
    if not isinstance(result, Tensor) or result.dim() != 2 or len(result) != len(x):
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"model must return logits ({len(x)}, K), got {got}")
    return result


def gradient(model: nn.Module, x: Tensor, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
    """(outputs, losses of the rows, their gradient with respect to x), all without history.

    Raises:
        ValueError: as in `outputs`, or the outputs do not depend on x in a way that autograd knows.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        result = outputs(model, x)
        require_gradient(result)
        losses = loss(result)
        (grad,) = torch.autograd.grad(losses.sum(), x)
    return result.detach(), losses.detach(), grad


def require_gradient(result: Tensor) -> None:
    """Raise ValueError where outputs have no history."""
    if not result.requires_grad:
        raise ValueError("model returned logits without a gradient with respect to x: only Square can attack it")


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """-log p_label: (N, K), (N,) -> (N,).

    In the form log(1 + exp(log sum_{k != label} e^z_k - z_label)), whose gradient keeps its digits on confident rows:
    that of a log-softmax is the difference of two numbers near 1.
    """
    others = logits.scatter(1, label[:, None], -torch.inf).logsumexp(1)
    return F.softplus(others - logits.gather(1, label[:, None]).squeeze(1))
