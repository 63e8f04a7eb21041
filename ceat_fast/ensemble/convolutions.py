"""Runs modules with their 3x3 convolutions by the Winograd kernel, where it takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ceat_fast.ops.winograd import missing, suits, winograd_convolution

_PARAMETERS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def winograd_convolutions(wanted: bool, device: torch.device) -> AbstractContextManager[object]:
    """A `with` block in which modules on `device` convolve by the Winograd kernel, if that is wanted.

    Raises:
        RuntimeError: it is wanted on another device than the CPU, or was not built; says why.
    """
    if not wanted or torch.compiler.is_compiling():
        return nullcontext()
    reason = f"it is for inputs on the CPU, got {device}" if device.type != "cpu" else missing()
    if reason is not None:
        raise RuntimeError(f"execution 'loop+winograd' cannot run: {reason}")
    return WinogradConvolutions()


class WinogradConvolutions(TorchFunctionMode):
    """Within a `with` block, calls of `torch.conv2d` go to `winograd_convolution` where it computes the same.

    That is a 3x3 convolution of stride 1 and padding 1 on fp32 images on the CPU. All others, and all within autocast
    or a transform of torch.func, go where they would go anyway.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.conv2d and _all_plain(types) and not is_transformed("cpu"):
            given = _DEFAULTS | dict(zip(_PARAMETERS, args, strict=False)) | kwargs
            if _is_same_convolution(given) and suits(given["input"], given["weight"]):
                return winograd_convolution(given["input"], given["weight"], given["bias"])
        return func(*args, **kwargs)


def _all_plain(types: Iterable[type]) -> bool:
    """No tensor subclasses, which have their own meaning of a convolution."""
    return all(t in (Tensor, torch.nn.Parameter) for t in types)


def is_transformed(device_type: str) -> bool:
    """Whether autocast, a transform of torch.func or a compiler is at work: our kernels leave these to torch's own."""
    return torch.is_autocast_enabled(device_type) or is_traced()


def is_traced() -> bool:
    """Whether a transform of torch.func or a compiler is at work."""
    transforms: bool = torch._C._are_functorch_transforms_active()
    return transforms or torch.compiler.is_compiling()


def _is_same_convolution(given: Mapping[str, Any]) -> bool:
    return (
        given["padding"] in (1, (1, 1), [1, 1], "same")
        and all(given[name] in (1, (1,), (1, 1), [1], [1, 1]) for name in ("stride", "dilation"))
        and given["groups"] == 1
    )
