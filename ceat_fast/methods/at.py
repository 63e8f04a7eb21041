"""Adversarial training of every member by itself (eq. 2 and 4 of the CEAT paper; Madry et al., arXiv 1706.06083).

    L_m = CE(z_m(x + delta_m), y)

delta_m is the perturbation found against member m alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ceat_fast.methods.eat import EAT


@dataclass
class AT(EAT):
    """Cross-entropy of every member on the input that attacks that member (eq. 4)."""

    goal: ClassVar[str] = "members"
