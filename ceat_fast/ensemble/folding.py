"""Copies of modules in which batch normalisation, in eval mode, is folded into the convolution before it.

With s = gamma / sqrt(var + eps), BatchNorm(W * x + b) = (s W) * x + s (b - mean) + beta. torch.fx finds the
convolutions whose output goes to one BatchNorm and nowhere else. The copy keeps the module's own class and forward,
with an identity in place of each folded BatchNorm.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from ceat_fast.ensemble.architecture import has_hooks, same_configuration
from ceat_fast.ensemble.tracer import Tracer

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class NotCopyableError(Exception):
    """The module has to run itself; the message says why."""


class Pair(NamedTuple):
    """Names of a convolution and of the BatchNorm that follows it."""

    convolution: str
    norm: str


class FoldedCopy:
    """A copy of `source`, in eval mode and without parameter gradients; `refresh` brings its weights up to date.

    Args:
        source: the module to copy; it is not changed.
        dtype: floating-point type of the copy; that of the source if None.
        memory_format: of its 4-dimensional parameters.
        batch_statistics: leave every BatchNorm as it is, in train mode: it normalises by the batch that it sees.

    Attributes:
        module: the copy.
        unfolded: "name: reason" for each BatchNorm layer that is not folded.

    Raises:
        NotCopyableError: hooks, a forward that changes the module, or attributes that cannot be copied or compared.
    """

    def __init__(
        self,
        source: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
        batch_statistics: bool = False,
    ) -> None:
        module = _copied(source)
        norms = [name for name, child in module.named_modules() if isinstance(child, _NORMS)]
        self._pairs: list[Pair] = []
        reason = "no convolution feeds it alone, or the forward reads a tensor of theirs"
        if batch_statistics:
            reason = "it normalises by batch statistics"
            for name in norms:
                module.get_submodule(name).train()
        elif norms:
            try:
                tracer = Tracer()
                self._pairs = _pairs(tracer.trace(module), module, tracer.read)
            except Exception as error:  # whatever a forward does with the tracer's proxies
                reason = f"torch.fx cannot trace the forward ({type(error).__name__})"
            _require_unchanged(module, source)
        if self._pairs:
            self._eps = _all_eps([module.get_submodule(pair.norm) for pair in self._pairs])
        self._norms = {pair.norm: module.get_submodule(pair.norm) for pair in self._pairs}
        for pair in self._pairs:
            _remove_norm(module, pair)
        self._dtype = dtype
        self.module = module.to(dtype=dtype).to(memory_format=memory_format)
        gone = {pair.norm for pair in self._pairs}
        self.unfolded = [f"{name}: {reason}" for name in norms if name not in gone]
        folded = {f"{pair.convolution}.{kind}" for pair in self._pairs for kind in ("weight", "bias")}
        self._names = [name for name in _tensors(self.module) if name not in folded]
        self._released: list[tuple[torch.UntypedStorage, int]] = []
        self._refusal: RemovableHandle | None = None

    def is_current(self, source: nn.Module) -> bool:
        """Whether `source` still has the structure, settings, shapes, types and devices that were copied."""
        ours, theirs = dict(self.module.named_modules()) | self._norms, dict(source.named_modules())
        if ours.keys() != theirs.keys() or any(map(has_hooks, theirs.values())):
            return False
        if not all(same_configuration(ours[name], theirs[name]) for name in ours):
            return False
        if not all(_can_fold(theirs[pair.convolution], theirs[pair.norm]) for pair in self._pairs):
            return False
        here, there = _tensors(self.module), _tensors(source)
        names = [*self._names, *(f"{pair.convolution}.weight" for pair in self._pairs)]
        return all(name in there and self._is_alike(here[name], there[name]) for name in names)

    def _is_alike(self, own: Tensor, other: Tensor) -> bool:
        same_type = self._dtype is not None or own.dtype == other.dtype
        return same_type and own.shape == other.shape and own.device == other.device

    @torch.no_grad()
    def refresh(self, source: nn.Module) -> None:
        """Take over the present weights and statistics of `source`."""
        self._restore()
        ours, theirs = _tensors(self.module), _tensors(source)
        if self._names:
            torch._foreach_copy_([ours[name] for name in self._names], [theirs[name] for name in self._names])
        if self._pairs:
            weights, biases = _fold(source, self._pairs, self._eps)
            torch._foreach_copy_([ours[f"{pair.convolution}.weight"] for pair in self._pairs], weights)
            torch._foreach_copy_([ours[f"{pair.convolution}.bias"] for pair in self._pairs], biases)

    def release(self) -> None:
        """Give back the memory of all tensors on the CPU until `refresh`. On a GPU, graphs know its address."""
        for tensor in _tensors(self.module).values():
            storage = tensor.untyped_storage()
            if tensor.device.type == "cpu" and storage.size():
                self._released.append((storage, storage.size()))
                storage.resize_(0)
        if self._refusal is None and self._released:
            self._refusal = self.module.register_forward_pre_hook(refuse)

    def _restore(self) -> None:
        for storage, size in self._released:
            storage.resize_(size)
            storage.fill_(0)  # type: ignore[attr-defined]  # what weights are padded with
        self._released.clear()
        if self._refusal is not None:
            self._refusal.remove()
            self._refusal = None


def refuse(*_: object) -> None:
    """Raise RuntimeError: a view has weights only within its block."""
    raise RuntimeError("a frozen view was called outside of its `with` block")


def require_copyable(source: nn.Module) -> None:
    """Raise NotCopyableError where a glance shows that a copy would not act as the source does."""
    for name, child in source.named_modules():
        where = name or type(source).__name__
        if has_hooks(child):
            raise NotCopyableError(f"{where} has hooks")
        if "forward" in vars(child):
            raise NotCopyableError(f"{where} has a forward of its own instance")
        if isinstance(child, torch.jit.ScriptModule):
            raise NotCopyableError(f"{where} is a ScriptModule")


def _copied(source: nn.Module) -> nn.Module:
    require_copyable(source)
    try:
        module = copy.deepcopy(source)
    except Exception as error:  # any attribute may refuse
        raise NotCopyableError(f"it cannot be copied ({error})") from error
    _require_unchanged(module, source)
    return module.requires_grad_(False).eval()


def _require_unchanged(module: nn.Module, source: nn.Module) -> None:
    """A copy that differs has state of its own, or was changed by its forward: it would not act as the source does."""
    pairs = zip(module.named_modules(), source.modules(), strict=True)
    different = next((name or type(source).__name__ for (name, a), b in pairs if not same_configuration(a, b)), None)
    if different is not None:
        raise NotCopyableError(f"{different} has attributes that cannot be compared, or its forward changes them")


def _pairs(graph: fx.Graph, module: nn.Module, read: Set[int]) -> list[Pair]:
    """What can be folded; `read`: ids of tensors that the forward reads by itself, which must stay what they are."""
    modules = dict(module.named_modules())
    calls = Counter(modules[str(node.target)] for node in graph.nodes if node.op == "call_module")
    pairs = []
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        convolution, norm = modules[str(before.target)], modules[str(node.target)]
        is_read = any(id(tensor) in read for part in (convolution, norm) for tensor in _tensors(part).values())
        if calls[convolution] == calls[norm] == 1 and _can_fold(convolution, norm) and not is_read:
            pairs.append(Pair(str(before.target), str(node.target)))
    return pairs


def _can_fold(convolution: nn.Module, norm: nn.Module) -> bool:
    # Exact types: a subclass, a parametrization too, may compute its weight or output in another way.
    if type(convolution) not in _CONVOLUTIONS or type(norm) not in _NORMS:
        return False
    return norm.running_mean is not None and norm.running_var is not None


def _remove_norm(module: nn.Module, pair: Pair) -> None:
    convolution: Any = module.get_submodule(pair.convolution)
    # New parameters: the convolution's own may be tied to another module's.
    convolution.weight = nn.Parameter(convolution.weight.detach().clone(), requires_grad=False)
    convolution.bias = nn.Parameter(convolution.weight.new_empty(convolution.out_channels), requires_grad=False)
    parent, _, name = pair.norm.rpartition(".")
    setattr(module.get_submodule(parent), name, nn.Identity().eval())


def _all_eps(norms: Sequence[Any]) -> Tensor:
    return torch.cat([torch.full_like(norm.running_var, norm.eps) for norm in norms])


def _fold(source: nn.Module, pairs: Sequence[Pair], eps: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Folded weights and biases of all pairs, in a few operations whatever their number."""
    convolutions: list[Any] = [source.get_submodule(pair.convolution) for pair in pairs]
    norms: list[Any] = [source.get_submodule(pair.norm) for pair in pairs]
    sizes = [norm.num_features for norm in norms]
    mean, var = (torch.cat([getattr(norm, name) for norm in norms]) for name in ("running_mean", "running_var"))
    scale = (var + eps).rsqrt()
    gamma, beta = (
        torch.cat([_vector(getattr(norm, name), norm.running_mean, value) for norm in norms])
        for name, value in (("weight", 1.0), ("bias", 0.0))
    )
    scale = scale * gamma
    shift = -mean
    if any(c.bias is not None for c in convolutions):
        shift = (
            torch.cat([_vector(c.bias, n.running_mean, 0.0) for c, n in zip(convolutions, norms, strict=True)]) - mean
        )
    scales = [
        part.view(-1, *[1] * (c.weight.dim() - 1))
        for part, c in zip(torch.split(scale, sizes), convolutions, strict=True)
    ]
    weights = list(torch._foreach_mul([c.weight for c in convolutions], scales))
    return weights, list(torch.split(scale * shift + beta, sizes))


def _vector(tensor: Tensor | None, like: Tensor, value: float) -> Tensor:
    return torch.full_like(like, value) if tensor is None else tensor


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
