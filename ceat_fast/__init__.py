"""Collaborative ensemble adversarial training (CEAT) in PyTorch: exact, fused and fast.

from ceat_fast.loss import CEATLoss         the loss, in a training loop of your own
from ceat_fast import Ensemble              members in one batched pass
from ceat_fast.attacks import PGD           attacks on an ensemble, its members, or any model
ceat-fast COMMAND                           train, evaluate, transfer, report, compare, export, reproduce, info
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from ceat_fast.ensemble import Ensemble
from ceat_fast.ops.build import build_info

try:
    __version__ = version("ceat-fast")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+unknown"

__all__ = ["Ensemble", "__version__", "build_info"]
