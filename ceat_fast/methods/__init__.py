"""Training methods by name: `make_method("CEAT", lam=1, mu=5)`."""

from __future__ import annotations

from typing import Any

from ceat_fast.choices import unknown_name
from ceat_fast.methods.base import Attack, Batch, Method, StepOutput
from ceat_fast.methods.ceat import CEAT
from ceat_fast.methods.eat import EAT

__all__ = ["CEAT", "EAT", "METHODS", "Attack", "Batch", "Method", "StepOutput", "make_method"]

METHODS: dict[str, type[Method]] = {"EAT": EAT, "CEAT": CEAT}


def make_method(name: str, **settings: Any) -> Method:
    """The method of that name with these settings.

    Raises:
        ValueError: unknown name (names the nearest one).
        TypeError: a setting that the method does not have.
    """
    if name not in METHODS:
        raise ValueError(unknown_name("method", name, METHODS))
    return METHODS[name](**settings)
