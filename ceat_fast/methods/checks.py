"""Checks of settings, with one wording."""

from __future__ import annotations

import math


def require_number(name: str, value: float, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    """Raise ValueError unless `value` is finite and in [low, high], or above `low` with `open_low`."""
    fits = math.isfinite(value) and low <= value <= high and not (open_low and value == low)
    if fits:
        return
    lower = f"above {low:g}" if open_low else f"at least {low:g}"
    upper = "finite" if high == math.inf else f"at most {high:g}"
    raise ValueError(f"{name} must be {lower} and {upper}, got {value!r}")
