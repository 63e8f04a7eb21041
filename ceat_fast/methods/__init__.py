"""Training methods by name: `make_method("CEAT", lam=1, mu=5)`."""

from __future__ import annotations

from typing import Any

from ceat_fast.choices import unknown_name
from ceat_fast.methods.adp import ADP
from ceat_fast.methods.at import AT
from ceat_fast.methods.base import Attack, Batch, Epoch, Method, StepOutput
from ceat_fast.methods.calibrated import CalibratedDistance
from ceat_fast.methods.ceat import CEAT
from ceat_fast.methods.dverge import DVERGE
from ceat_fast.methods.eat import EAT
from ceat_fast.methods.fasten import FASTEN
from ceat_fast.methods.gal import GAL
from ceat_fast.methods.lafed import LAFED
from ceat_fast.methods.mart import MART
from ceat_fast.methods.score import SCORE
from ceat_fast.methods.standard import Standard
from ceat_fast.methods.trs import TRS

__all__ = [
    "ADP",
    "AT",
    "CEAT",
    "DVERGE",
    "EAT",
    "FASTEN",
    "GAL",
    "LAFED",
    "MART",
    "METHODS",
    "SCORE",
    "TRS",
    "Attack",
    "Batch",
    "CalibratedDistance",
    "Epoch",
    "Method",
    "Standard",
    "StepOutput",
    "make_method",
]

METHODS: dict[str, type[Method]] = {
    method.__name__: method for method in (Standard, AT, EAT, CEAT, ADP, GAL, TRS, DVERGE, LAFED, FASTEN, SCORE, MART)
}


def make_method(name: str, **settings: Any) -> Method:
    """The method of that name with these settings.

    Raises:
        ValueError: unknown name (names the nearest one).
        TypeError: a setting that the method does not have.
    """
    if name not in METHODS:
        raise ValueError(unknown_name("method", name, METHODS))
    return METHODS[name](**settings)
