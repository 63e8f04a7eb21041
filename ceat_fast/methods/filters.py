"""The filter functions of eq. 10, 11, 13 and 14 of the CEAT paper: which samples the peers of a member agree on.

With S_j^+ the samples that member j classifies correctly and S_j^- the others, for member a and its peers b, c:

    F1 = S_b^+ and S_c^-        F2 = S_b^- and S_c^+        F3 = S_b^+ and S_c^+        F4 = S_b^- and S_c^-

For any number of peers: F3 where all are right, F4 where all are wrong, and of the rest F1 where the first peer is
right and F2 where it is wrong. Without peers (M = 1) every sample counts as F3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ceat_fast.choices import require_choice

FILTERS = ("all", "consistent", "inconsistent", "F1", "F2", "F3", "F4")


def peer_filter(logits: Tensor, labels: Tensor, samples: str) -> Tensor:
    """Which samples each member's peers put into a set.

    Args:
        logits: (M, B, K) on the input that the verdicts are about.
        labels: (B,) int64.
        samples: "all", "consistent" (F3 or F4), "inconsistent" (F1 or F2), or one of "F1" to "F4".

    Returns:
        (M, B) bool.
    """
    require_choice("samples", samples, FILTERS)
    correct = logits.argmax(-1) == labels
    members = len(correct)
    if samples == "all" or members == 1:
        return torch.full_like(correct, samples in ("all", "consistent", "F3"))
    # Made on the device, for the sake of CUDA graphs: row m counts from 0 and leaves m out.
    numbers = torch.arange(members, device=correct.device)
    peers = numbers[:-1] + (numbers[:-1] >= numbers[:, None])
    verdicts = correct[peers]  # (M, M - 1, B)
    right, wrong, first = verdicts.all(1), ~verdicts.any(1), verdicts[:, 0]
    mixed = ~right & ~wrong
    sets = {
        "consistent": right | wrong,
        "inconsistent": mixed,
        "F1": mixed & first,
        "F2": mixed & ~first,
        "F3": right,
        "F4": wrong,
    }
    return sets[samples]
