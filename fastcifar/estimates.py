"""Mean, deviation and interval of a few measured values, such as one accuracy a seed.

Pure functions of their arguments; this module touches nothing.

    found = estimate([0.93, 0.94, 0.95])
    found.mean, found.interval95            # 0.94, (0.915.., 0.964..)
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

__all__ = ["Estimate", "estimate", "interval_text"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What `count` values say of the mean they were drawn around.

    `deviation` is the sample's standard deviation (over count - 1), `interval95` the ends of Student's 95 %
    interval of the mean. One value says nothing of its own error: both are None then.
    """

    count: int
    mean: float
    deviation: float | None
    interval95: tuple[float, float] | None


def estimate(values: Sequence[float]) -> Estimate | None:
    """Estimate a mean from independent values.

    Half the interval is t * deviation / sqrt(count), with t the 0.975 quantile of Student's distribution of
    count - 1 degrees of freedom (Student 1908, The probable error of a mean).

    Returns:
        None where there is no value.
    """
    if not values:
        return None
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Estimate(count=1, mean=mean, deviation=None, interval95=None)
    deviation = statistics.stdev(values)
    half = float(stdtrit(len(values) - 1, 0.975)) * deviation / math.sqrt(len(values))
    return Estimate(count=len(values), mean=mean, deviation=deviation, interval95=(mean - half, mean + half))


def interval_text(found: Estimate | None, form: Callable[[float], str]) -> str:
    """The interval as "0.92 to 0.96", each end as `form` writes it; empty where there is none."""
    return " to ".join(map(form, found.interval95)) if found and found.interval95 else ""
