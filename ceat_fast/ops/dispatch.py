"""Choice of the backend, and the ops without autograd as the attacks use them."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from torch import Tensor

from ceat_fast.choices import require_choice

# Best first: "auto" takes the first that runs on the device.
BACKENDS = ("native", "triton", "torch")
_MODULES = {
    "native": "ceat_fast.ops.native",
    "triton": "ceat_fast.ops.triton_backend",
    "torch": "ceat_fast.ops.torch_backend",
}


_loaded: dict[str, ModuleType] = {}
_chosen: dict[tuple[str, str], str] = {}


def module(name: str) -> ModuleType:
    """The module of a backend that `backend_name` has chosen before."""
    return _loaded[name]


def missing(impl: str, device_type: str) -> str | None:
    """None where backend `impl` runs on `device_type`, else the reason in one line."""
    if impl not in _loaded:
        _loaded[impl] = import_module(_MODULES[impl])
    reason: str | None = _loaded[impl].missing(device_type)
    return reason


def backend_name(impl: str, device_type: str) -> str:
    """The backend that `impl` means on a device type. One asked for by name is that one, or an error."""
    name = _chosen.get((impl, device_type))
    if name is None:
        name = _chosen[impl, device_type] = _choose(impl, device_type)
    return name


def _choose(impl: str, device_type: str) -> str:
    require_choice("impl", impl, ("auto", *BACKENDS))
    if impl == "auto":
        return next(name for name in BACKENDS if missing(name, device_type) is None)
    reason = missing(impl, device_type)
    if reason is not None:
        raise RuntimeError(f"impl={impl!r} cannot run on {device_type!r}: {reason}")
    return impl


def ensemble_cross_entropy(logits: Tensor, target: Tensor, reduction: int) -> tuple[Tensor, Tensor]:
    """Value and gradient of the cross-entropy of eq. 1; see the package docstring."""
    chosen = module(backend_name("auto", logits.device.type))
    loss, grad = chosen.ensemble_cross_entropy(logits, target, reduction, True)
    return loss, grad


def pgd_step(x_adv: Tensor, grad: Tensor, x: Tensor, alpha: float, eps: float, impl: str = "auto") -> Tensor:
    """The next PGD iterate, in fresh memory: ascend by alpha * sign(grad), project to the eps ball and [0, 1]."""
    stepped: Tensor = module(backend_name(impl, x.device.type)).pgd_step(x_adv, grad, x, alpha, eps)
    return stepped
