"""Refusals of settings that are out of range, all in the same words."""

from __future__ import annotations

import math


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise ValueError "NAME must be ALLOWED, got VALUE" unless the condition holds."""
    if not condition:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def require_positive(owner: object, prefix: str, *names: str) -> None:
    """Each of these attributes is a positive finite number, or None."""
    for name in names:
        value = getattr(owner, name)
        require(value is None or (math.isfinite(value) and value > 0), prefix + name, value, "positive and finite")
