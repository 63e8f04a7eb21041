"""Checks of numbers that users give, with one wording."""

from __future__ import annotations

import math


def require_number(name: str, value: object, least: float, most: float = math.inf, *, above: bool = False) -> None:
    """Raise TypeError unless `value` is a number, ValueError unless it is finite and in [least, most].

    With `above` it must be above `least`.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and least <= value <= most) or (above and value == least):
        allowed = f"finite and {'above' if above else 'at least'} {least:g}"
        if most < math.inf:
            allowed = f"in {'(' if above else '['}{least:g}, {most:g}]"
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def require_ints(settings: object, **least: int | None) -> None:
    """Raise TypeError unless these attributes are ints, ValueError where one is below its least value."""
    for name, bound in least.items():
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if bound is not None and value < bound:
            raise ValueError(f"{name} must be at least {bound}, got {value}")
