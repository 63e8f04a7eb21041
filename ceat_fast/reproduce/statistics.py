"""Mean, spread and confidence intervals over few trainings."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Two-sided 95 % quantiles of Student's t with 1, 2, ... degrees of freedom.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_NORMAL95 = 1.960  # what they come down to

LEAST_FOR_CLEAR = 3


@dataclass(frozen=True)
class Summary:
    """A number over trainings.

    Attributes:
        mean: their mean.
        deviation: their sample standard deviation; None for one training.
        half_width: of the 95 % interval of the mean by Student's t, for more than 31 trainings by the normal
            distribution; None for one training.
        count: number of trainings.
    """

    mean: float
    deviation: float | None
    half_width: float | None
    count: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0; with two trainings, which can agree by chance, never."""
        return self.half_width is not None and self.count >= LEAST_FOR_CLEAR and abs(self.mean) > self.half_width


def summarise(values: Sequence[float]) -> Summary:
    """Summary of at least one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Summary(mean, None, None, len(values))
    deviation = statistics.stdev(values)
    quantile = _T95[len(values) - 2] if len(values) - 2 < len(_T95) else _NORMAL95
    return Summary(mean, deviation, quantile * deviation / math.sqrt(len(values)), len(values))
