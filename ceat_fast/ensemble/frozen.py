"""The view in which an attack sees a model: eval mode, no parameter gradients, BatchNorm folded, a chosen precision."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ceat_fast.choices import require_choice
from ceat_fast.ensemble.convolutions import is_transformed, winograd_convolutions
from ceat_fast.ensemble.ensemble import Ensemble, is_ensemble
from ceat_fast.ensemble.execution import AUTO, default_execution
from ceat_fast.ensemble.folding import FoldedCopy, NotCopyableError, refuse, require_copyable
from ceat_fast.ensemble.fused import FusedMembers
from ceat_fast.ensemble.memory_format import ChannelsLast
from ceat_fast.ensemble.traced import NotFusableError
from ceat_fast.ops import winograd

PRECISIONS = ("fp32", "bf16", "fp16", "auto")
BN_MODES = ("eval", "batch")
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def frozen(model: nn.Module, precision: str = "fp32", *, bn_mode: str = "eval") -> Iterator[nn.Module]:
    """The module to attack in place of `model`, within a `with` block.

    It is a copy with the present weights, in eval mode, without parameter gradients, each BatchNorm folded into its
    convolution where that is possible; entering the block brings its weights up to date. What cannot be copied (a
    module with hooks, one whose forward changes it, a compiled one) takes part itself, and is in eval mode and without
    parameter gradients while the block lasts. Modes, `requires_grad` flags and running statistics of `model` are
    afterwards as before, also after an exception.

    Args:
        model: an `Ensemble`, which yields an `Ensemble`, or any module.
        precision: what the copy computes in. "fp32" leaves the model's own type; "bf16" and "fp16" cast weights and
            inputs, and give fp32 logits; "auto" is bf16 where the device has instructions for it and the model can be
            copied, else "fp32".
        bn_mode: "eval" normalises by the running statistics, "batch" by those of the attacked batch.

    Raises:
        ValueError: an unknown precision or bn_mode, or one that needs a copy of what cannot be copied.
    """
    require_choice("bn_mode", bn_mode, BN_MODES)
    with _in_use(model, resolve_precision(precision, model), bn_mode) as view, _at_rest(view.own_modules(model)):
        yield view.module or model


def resolve_precision(precision: str, model: nn.Module) -> str:
    """`precision`, or what "auto" means for `model` where it is now."""
    require_choice("precision", precision, PRECISIONS)
    if precision != "auto":
        return precision
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.dtype != torch.float32:
        return "fp32"
    return "bf16" if _has_bf16(parameter.device) and _can_be_copied(model, "bf16") else "fp32"


def _can_be_copied(model: nn.Module, precision: str) -> bool:
    key = precision, BN_MODES[0]
    views = _views.of.setdefault(model, {})
    try:
        require_copyable(model)
        if key not in views:  # what could be copied once can be copied again, but for what a glance shows
            views[key] = _View(model, *key)
            views[key].release()
    except (NotCopyableError, ValueError):
        return False
    return True


def unfolded(model: nn.Module) -> list[str]:
    """What attacks on `model` run as it is and why, a line for each BatchNorm or module."""
    with _in_use(model, "fp32", "eval") as view:
        return list(view.unfolded)


class _View:
    """What stands in for a model. On a CPU its tensors take memory only while it is in use.

    Attributes:
        users: blocks that use it now.
        module: the module to attack; None if it is the model itself (the view must not keep the model alive).
        unfolded: what runs as it is and why.
    """

    def __init__(self, model: nn.Module, precision: str, bn_mode: str) -> None:
        self.unfolded: list[str] = []
        self.users = 0
        self._ensemble_settings = _ensemble_settings(model)
        dtype = DTYPES[precision]
        batch_statistics = bn_mode == "batch"
        self._copies = [
            self._copy(name, part, dtype, _memory_format(model, dtype), batch_statistics)
            for name, part in _parts(model)
        ]
        self.module: nn.Module | None = None
        if any(self._copies):
            modules = [
                part if c is None else c.module for (_, part), c in zip(_parts(model), self._copies, strict=True)
            ]
            self.module = _assemble(model, modules, dtype)

    def _copy(
        self, name: str, part: nn.Module, dtype: torch.dtype | None, memory_format: torch.memory_format, batch: bool
    ) -> FoldedCopy | None:
        try:
            if isinstance(part, Ensemble):  # who attacks its members has to find them
                raise NotCopyableError("it is an Ensemble of another kind")
            folded = FoldedCopy(part, dtype=dtype, memory_format=memory_format, batch_statistics=batch)
        except NotCopyableError as error:
            if dtype is not None or batch:
                wanted = "bn_mode='batch'" if batch else f"precision {dtype}"
                raise ValueError(f"{wanted} needs a copy of the model, but {name} cannot be copied: {error}") from error
            self.unfolded.append(f"{name}: {error}")
            return None
        self.unfolded += [f"{name}: {line}" for line in folded.unfolded]
        return folded

    def own_modules(self, model: nn.Module) -> list[nn.Module]:
        """The parts of the model that take part themselves."""
        if self.module is None:
            return [model]
        return [part for (_, part), c in zip(_parts(model), self._copies, strict=True) if c is None]

    def is_current(self, model: nn.Module) -> bool:
        if self.module is None:
            return True
        parts = _parts(model)
        if self._ensemble_settings != _ensemble_settings(model) or len(parts) != len(self._copies):
            return False
        current = [self.module]
        if _is_copied_by_member(model) and isinstance(self.module, Ensemble):
            current = list(self.module.members)
        return all(
            c.is_current(part) if c is not None else part is own
            for (_, part), own, c in zip(parts, current, self._copies, strict=True)
        )

    def refresh(self, model: nn.Module) -> None:
        for (_, part), folded in zip(_parts(model), self._copies, strict=True):
            if folded is not None:
                folded.refresh(part)
        if isinstance(self.module, Ensemble | _Module):
            self.module.weights_changed()

    def release(self) -> None:
        """Give back the memory of what `refresh` wrote, on a CPU."""
        for folded in self._copies:
            if folded is not None:
                folded.release()
        on_cpu = all(parameter.device.type == "cpu" for parameter in self.module.parameters()) if self.module else False
        if on_cpu and isinstance(self.module, Ensemble | _Module):
            self.module.release()


class _Views(threading.local):
    """Those of a thread: another one may change the weights meanwhile, and refresh its own."""

    def __init__(self) -> None:
        self.of: WeakKeyDictionary[nn.Module, dict[tuple[str, str], _View]] = WeakKeyDictionary()


_views = _Views()


@contextmanager
def _in_use(model: nn.Module, precision: str, bn_mode: str) -> Iterator[_View]:
    """The view of the model as it is now; the last one who leaves releases it."""
    view = _current_view(model, precision, bn_mode)
    view.users += 1
    try:
        yield view
    finally:
        view.users -= 1
        if not view.users:
            view.release()


def _current_view(model: nn.Module, precision: str, bn_mode: str) -> _View:
    views = _views.of.setdefault(model, {})
    view = views.get((precision, bn_mode))
    if view is None or not view.is_current(model):
        view = views[precision, bn_mode] = _View(model, precision, bn_mode)
    view.refresh(model)
    return view


def _parts(model: nn.Module) -> Sequence[tuple[str, nn.Module]]:
    """What is copied by itself, with a name for messages."""
    if _is_copied_by_member(model):
        return [(f"member {m}", member) for m, member in enumerate(model.members)]
    return [(type(model).__name__, model)]


def _is_copied_by_member(model: nn.Module) -> TypeGuard[Ensemble]:
    """A subclass may compute its output in a way of its own."""
    return type(model) is Ensemble and is_ensemble(model) and "combine" not in vars(model)


def _ensemble_settings(model: nn.Module) -> tuple[Any, ...]:
    return (model.backend, model.average, model.tuned) if isinstance(model, Ensemble) else ()


def _memory_format(model: nn.Module, dtype: torch.dtype | None) -> torch.memory_format:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    execution = default_execution(device, dtype)
    if isinstance(model, Ensemble) and (model.tuned is not None or model.backend != AUTO):
        execution = model.execution(device, training=False)
    return torch.channels_last if execution.channels_last else torch.contiguous_format


def _assemble(model: nn.Module, modules: Sequence[nn.Module], dtype: torch.dtype | None) -> nn.Module:
    if not _is_copied_by_member(model):
        return _Module(modules[0], dtype)
    if dtype is None:
        view = Ensemble(modules, model.backend, model.average)
    else:
        view = _LowPrecisionEnsemble(modules, model.backend, model.average, dtype)
    view.tuned = model.tuned
    view.is_view = True
    view.training = view.members.training = False
    return view


class _Module(nn.Module):
    """A module that computes with our kernels on a CPU, where they were built and take it.

    Args:
        dtype: a lower precision that it computes in, with fp32 inputs and outputs; None for its own type.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.module = module
        self.dtype = dtype
        self.training = False
        self._fused: FusedMembers | None = None
        self._is_fusable = winograd.missing() is None
        self._is_released = False
        self._format = ChannelsLast()

    def forward(self, x: Tensor) -> Tensor:
        if self._is_released:
            refuse()
        return self._run(x) if self.dtype is None else self._run(x.to(self.dtype)).float()

    def _run(self, x: Tensor) -> Tensor:
        on_cpu = x.device.type == "cpu" and winograd.missing() is None
        if on_cpu and self._is_fusable and x.numel() and not is_transformed("cpu"):
            try:
                self._fused = self._fused or FusedMembers([self.module], x[:1])
                return self._fused(x)
            except NotFusableError:
                self._is_fusable = False
        with winograd_convolutions(on_cpu, x.device):
            logits: Tensor = self._format.run(lambda rows: self.module(*rows), [x], self.module, own=True)
        return logits

    def weights_changed(self) -> None:
        self._is_released = False
        if self._fused is not None:
            self._fused.refresh()

    def release(self) -> None:
        self._is_released = True
        if self._fused is not None:
            self._fused.release()


class _LowPrecisionEnsemble(Ensemble):
    """Members of lower precision with fp32 inputs and outputs."""

    def __init__(self, members: Sequence[nn.Module], backend: str, average: str, dtype: torch.dtype) -> None:
        super().__init__(members, backend, average)
        self.view_dtype = dtype

    def member_logits(self, x: Tensor, per_member: bool | None = None) -> Tensor:
        return super().member_logits(x.to(self.view_dtype), per_member).float()


@contextmanager
def _at_rest(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Every submodule in eval mode and no parameter requiring a gradient, for a while."""
    training = [module for root in modules for module in root.modules() if module.training]
    trainable = [p for root in modules for p in root.parameters() if p.requires_grad]
    try:
        for module in training:
            module.training = False
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)


def _has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 natively; emulated, it is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
