"""The tables and figures of the CEAT paper, each as one command: `ceat-fast reproduce table1 --scale small`."""

from __future__ import annotations

from ceat_fast.reproduce.experiments import EXPERIMENTS
from ceat_fast.reproduce.outcome import Reproduction
from ceat_fast.reproduce.run import reproduce
from ceat_fast.reproduce.scales import SCALES

__all__ = ["EXPERIMENTS", "SCALES", "Reproduction", "reproduce"]
