"""Means, variances and their errors from samples that follow each other in time.

Samples of one run are correlated; an error that takes them as independent is too small.  The integrated
correlation time says how many of them count as one (Sokal, in Functional Integration, Springer 1997).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from compactmlip.validate.parity import Array

WINDOW = 6.0
"""Correlations are summed up to this many correlation times; beyond is mostly noise."""

CERTAIN = 3.0
"""Standard errors that a deviation must exceed before it counts: by chance one in 370 does."""


class Estimate(NamedTuple):
    """A value and its standard error."""

    value: float
    error: float

    def excess(self, expected: float) -> float:
        """By how much the value is off beyond :data:`CERTAIN` errors; 0 where chance may explain it."""
        return max(0.0, abs(self.value - expected) - CERTAIN * self.error)


def correlation_time(samples: Array) -> float:
    """Integrated correlation time in samples: 0.5 for independent ones, and never less.

    Parameters
    ----------
    samples
        (T,) of a stationary run.
    """
    count = len(samples)
    centred = np.asarray(samples, dtype=float) - np.mean(samples)
    variance = float(centred @ centred) / max(count, 1)
    if count < 2 or variance <= 1e-24 * float(np.mean(samples)) ** 2:
        return 0.5
    spectrum = np.abs(np.fft.rfft(centred, 2 * count)) ** 2
    correlations = np.fft.irfft(spectrum)[:count] / (variance * count)
    times = 0.5 + np.cumsum(correlations[1:])
    beyond = np.arange(1, count) >= WINDOW * times
    last = int(np.argmax(beyond)) if beyond.any() else count - 2
    return float(max(times[last], 0.5))


def effective_samples(samples: Array) -> float:
    """How many independent samples say as much about the mean."""
    return len(samples) / (2 * correlation_time(samples))


def mean(samples: Array) -> Estimate:
    """Mean of a stationary run, with the standard error that its correlation leaves."""
    value = float(np.mean(samples))
    if len(samples) < 2:
        return Estimate(value, math.inf)
    return Estimate(value, float(np.std(samples, ddof=1)) / math.sqrt(effective_samples(samples)))


def variance(samples: Array) -> Estimate:
    """Variance of a stationary run, with its standard error."""
    squares = (np.asarray(samples, dtype=float) - np.mean(samples)) ** 2
    found = mean(squares)
    # The mean itself is estimated, which takes one independent sample away.
    count = effective_samples(samples)
    factor = count / (count - 1) if count > 1 else math.inf
    return Estimate(factor * found.value, factor * found.error)


def relative_difference(one: Estimate, other: Estimate) -> Estimate:
    """(one - other) / other of two independent estimates, to first order in the errors."""
    if other.value == 0:
        return Estimate(math.inf, math.inf)
    ratio = one.value / other.value
    error = math.hypot(one.error, ratio * other.error) / abs(other.value)
    return Estimate(ratio - 1, error)
