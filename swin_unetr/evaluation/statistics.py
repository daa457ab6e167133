"""Means over cases with bootstrap confidence intervals, of one run and of the difference of two.

Cases are resampled, not voxels: the interval says how much the mean would move with other patients of the same kind.
Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993; intervals by percentiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

MEAN = "mean"
"""Name of the row that averages a case over its classes."""


@dataclass(frozen=True)
class Estimate:
    """A mean over cases.

    Attributes:
        cases: number of cases; those without a score (NaN) do not count.
        mean, median, std: of the cases; NaN without cases, `std` (that of a sample) also with one.
        low, high: ends of the confidence interval of the mean; NaN with fewer than two cases.
    """

    cases: int
    mean: float
    median: float
    std: float
    low: float
    high: float


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made.

    Attributes:
        resamples: sets of cases drawn.
        confidence: fraction of the distribution inside the interval.
        seed: seed of the draws.
    """

    resamples: int = 9999
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resamples < 100:
            raise ValueError(f"resamples is {self.resamples}; accepted is 100 or more")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence is {self.confidence}; accepted is 0 < confidence < 1")


def estimate(values: Sequence[float], how: Bootstrap) -> Estimate:
    """The mean of `values`, one per case, with its interval."""
    known = np.array([value for value in values if not math.isnan(value)], dtype=float)
    if len(known) == 0:
        return Estimate(0, *[math.nan] * 5)
    low = high = std = math.nan
    if len(known) > 1:
        std = known.std(ddof=1)
        interval = bootstrap(
            (known,),
            np.mean,
            n_resamples=how.resamples,
            confidence_level=how.confidence,
            method="percentile",
            batch=max(1, 10**6 // len(known)),  # bounds the memory
            rng=np.random.default_rng(how.seed),
        ).confidence_interval
        low, high = interval.low, interval.high
    return Estimate(len(known), *(float(value) for value in (known.mean(), np.median(known), std, low, high)))


def summary(by_case: Mapping[str, Mapping[str, float]], how: Bootstrap) -> dict[str, Estimate]:
    """Estimates of one metric by class, and, as `MEAN`, that of the cases' means over their classes.

    Args:
        by_case: scores by case and class.
    """
    names = dict.fromkeys(name for case in by_case.values() for name in case)
    columns = {name: [case[name] for case in by_case.values() if name in case] for name in names}
    if len(columns) > 1:
        columns[MEAN] = [mean(case.values()) for case in by_case.values()]
    return {name: estimate(values, how) for name, values in columns.items()}


def differences(
    ours: Mapping[str, Mapping[str, float]], theirs: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """`ours` minus `theirs` by case and class, where both have a score: the paired differences that `summary`
    resamples."""
    return {
        case: {name: ours[case][name] - theirs[case][name] for name in ours[case] if name in theirs[case]}
        for case in ours
        if case in theirs
    }


def mean(values: Iterable[float]) -> float:
    """The mean of those `values` that are not NaN; NaN if there are none."""
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan
