"""torch.fx's tracer, in one thread at a time, which notes the tensors that a forward reads by itself."""

from __future__ import annotations

from collections.abc import Callable
from threading import RLock, get_ident
from typing import Any

from torch import Tensor, fx, nn

_one_at_a_time = RLock()


class Tracer(fx.Tracer):
    """While it traces, torch.fx sees the calls of modules in all threads; those of the others pass through.

    Attributes:
        read: ids of the parameters and buffers that the forward asks modules for, beside calling them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read: set[int] = set()
        self._thread = get_ident()

    def trace(self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """The graph of a forward; see torch.fx."""
        with _one_at_a_time:
            return super().trace(root, concrete_args)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What a call of a module gives."""
        if get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """What an attribute of a module gives."""
        if get_ident() != self._thread:
            return attr_val
        if isinstance(attr_val, Tensor):
            self.read.add(id(attr_val))
        return super().getattr(attr, attr_val, parameter_proxy_cache)
