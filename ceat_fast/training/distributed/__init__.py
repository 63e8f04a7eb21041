"""Training in several processes that torchrun started: parts of the batch, members, or both (docs/scaling.md)."""

from __future__ import annotations

from ceat_fast.training.distributed.batch_norm import SynchronisedBatchNorm
from ceat_fast.training.distributed.layout import Layout, process_group
from ceat_fast.training.distributed.members import SpreadEnsemble, frozen_view, perturb_with

__all__ = ["Layout", "SpreadEnsemble", "SynchronisedBatchNorm", "frozen_view", "perturb_with", "process_group"]
