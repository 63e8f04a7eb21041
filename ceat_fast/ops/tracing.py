"""What the compiler must take as given instead of tracing it. Importing this file imports torch's compiler."""

from __future__ import annotations

import torch

from ceat_fast.ops import dispatch


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def backend_name(impl: str, device_type: str) -> str:
    """`dispatch.backend_name`, whose imports cannot be traced."""
    return dispatch.backend_name(impl, device_type)
