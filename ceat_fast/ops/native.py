"""The compiled backend: loads the libraries and calls their ops."""

from __future__ import annotations

import ctypes
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from ceat_fast.ops.reference import CeatSettings
from ceat_fast.ops.schema import define_ops

LIBRARY_DIR = Path(__file__).parent.parent / "_lib"
_CPU_LIBRARY = LIBRARY_DIR / "libceat_fast_cpu.so"
_CUDA_LIBRARY = LIBRARY_DIR / "libceat_fast_cuda.so"
# Written by setup.py where it builds nothing, with the reason.
SKIPPED_RECORD = LIBRARY_DIR / "skipped.txt"


def _load(library: Path, what: str) -> str | None:
    """Load a library; None, or the reason why its ops are missing."""
    if SKIPPED_RECORD.exists():
        return SKIPPED_RECORD.read_text().strip()
    if not library.exists():
        return f"the {what} library was not built"
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"{library.name} does not load: {error}"
    return None


def _load_cuda() -> str | None:
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    if not _CUDA_LIBRARY.exists() and _MISSING["cpu"] is None:
        return f"CUDA kernels {build_record()['cuda']}"
    return _load(_CUDA_LIBRARY, "CUDA")


def build_record() -> dict[str, str]:
    """How the libraries were built; empty where nothing was."""
    try:
        host = import_module("ceat_fast._lib._host")
    except ImportError:
        return {}
    return dict(host.build_record())


def cpu_isa() -> str | None:
    """The instruction set whose kernels this CPU uses: "portable", "avx2", "avx512" or "avx512_bf16"."""
    if _MISSING["cpu"] is not None:
        return None
    name = ctypes.CDLL(str(_CPU_LIBRARY)).ceat_fast_cpu_isa
    name.restype = ctypes.c_char_p
    return str(name().decode())


define_ops("native")
# The overloads themselves: looking them up takes as long as a small kernel.
_ceat_loss = torch.ops.ceat_fast.ceat_loss_native.default
_ensemble_cross_entropy = torch.ops.ceat_fast.ensemble_cross_entropy_native.default
_pgd_step = torch.ops.ceat_fast.pgd_step_native.default
_scale_gradients = torch.ops.ceat_fast.scale_gradients_native.default

_MISSING: dict[str, str | None] = {}
_MISSING["cpu"] = _load(_CPU_LIBRARY, "CPU")
_MISSING["cuda"] = _load_cuda()


def missing(device_type: str) -> str | None:
    """None where the ops run on this device type, else the reason in one line."""
    return _MISSING.get(device_type, f"there are no native kernels for {device_type!r}")


def ceat_loss(
    adv: Tensor, nat: Tensor, target: Tensor, settings: CeatSettings, need_grad: bool, need_parts: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out: tuple[Tensor, Tensor, Tensor, Tensor]
    out = _ceat_loss(adv, nat, target, *settings, need_grad, need_parts)
    return out


def ensemble_cross_entropy(logits: Tensor, target: Tensor, reduction: int, need_grad: bool) -> tuple[Tensor, Tensor]:
    out: tuple[Tensor, Tensor] = _ensemble_cross_entropy(logits, target, reduction, need_grad)
    return out


def pgd_step(x_adv: Tensor, grad: Tensor, x: Tensor, alpha: float, eps: float) -> Tensor:
    out: Tensor = _pgd_step(x_adv, grad, x, alpha, eps)
    return out


def scale_gradients(adv_grad: Tensor, nat_grad: Tensor, loss_grad: Tensor) -> tuple[Tensor, Tensor]:
    out: tuple[Tensor, Tensor] = _scale_gradients(adv_grad, nat_grad, loss_grad)
    return out
