"""Which modules are alike: same classes, settings and tensor shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def group_members(members: Sequence[nn.Module]) -> list[list[int]]:
    """Indices of members that can share one vmapped execution, grouped; every member is in exactly one group."""
    groups: list[list[int]] = []
    for index, member in enumerate(members):
        for group in groups:
            others = [members[i] for i in group]
            if _same_architecture(others[0], member) and not any(_share_tensors(other, member) for other in others):
                group.append(index)
                break
        else:
            groups.append([index])
    return groups


def _same_architecture(a: nn.Module, b: nn.Module) -> bool:
    modules_a, modules_b = dict(a.named_modules()), dict(b.named_modules())
    return (
        list(modules_a) == list(modules_b)
        and all(same_configuration(modules_a[name], modules_b[name]) for name in modules_a)
        and _layout(a) == _layout(b)
    )


def same_configuration(a: nn.Module, b: nn.Module) -> bool:
    """Same class and, beside tensors and submodules, the same attributes but for `runtime_attributes` of the class."""
    extra_a, extra_b = _attributes(a), _attributes(b)
    return (
        type(a) is type(b) and extra_a.keys() == extra_b.keys() and all(map(_equal, extra_a.values(), extra_b.values()))
    )


def _attributes(module: nn.Module) -> dict[str, Any]:
    without = _MODULE_ATTRIBUTES | getattr(type(module), "runtime_attributes", frozenset())
    return {name: value for name, value in vars(module).items() if name not in without}


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    try:
        return type(a) is type(b) and bool(a == b)
    except (RuntimeError, TypeError, ValueError):  # arrays and foreign objects: what has no == counts as different
        return False


def _layout(module: nn.Module) -> list[tuple[Any, ...]]:
    """Every tensor's name, kind and format; a tensor with two names comes once, so differently tied members differ."""
    parameters = [("parameter", name, t.shape, t.dtype, t.device) for name, t in module.named_parameters()]
    return parameters + [("buffer", name, t.shape, t.dtype, t.device) for name, t in module.named_buffers()]


def _share_tensors(a: nn.Module, b: nn.Module) -> bool:
    tensors = {id(t) for t in (*a.parameters(), *a.buffers())}
    return any(id(t) in tensors for t in (*b.parameters(), *b.buffers()))


def has_hooks(module: nn.Module) -> bool:
    """Whether a forward or backward hook is registered on this module itself."""
    return any(getattr(module, hooks) for hooks in _HOOKS)
