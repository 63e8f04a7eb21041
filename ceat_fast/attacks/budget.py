"""Radii and step sizes as people write them: 0.031, Fraction(8, 255) or "8/255"."""

from __future__ import annotations

import math
from fractions import Fraction

Budget = float | Fraction | str


def parse_budget(name: str, value: Budget) -> float:
    """The finite, non-negative number that `value` means.

    Args:
        name: the argument's name, for the error.
        value: a number, a Fraction, or text such as "0.031" or "8/255".

    Raises:
        ValueError: text that is no number or fraction, a zero denominator, NaN, infinite or negative.
        TypeError: another type.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | Fraction | str):
        raise TypeError(f"{name} must be a number or text such as '8/255', got {value!r}")
    try:
        number = _number(value) if isinstance(value, str) else float(value)
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"{name} must be a number or a fraction such as '8/255', got {value!r}") from error
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{name} must be finite and not negative, got {value!r}")
    return number


def _number(text: str) -> float:
    numerator, slash, denominator = text.partition("/")
    return float(numerator) / float(denominator) if slash else float(numerator)
