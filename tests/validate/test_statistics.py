"""Errors of means and variances of correlated samples, against a process that is known in closed form."""

from __future__ import annotations

import numpy as np
import pytest

from compactmlip.validate.statistics import (
    Estimate,
    correlation_time,
    effective_samples,
    mean,
    relative_difference,
    variance,
)


def autoregressive(count: int, memory: float, seed: int) -> np.ndarray:
    """x' = memory x + noise, of unit variance: correlation memory^k, integrated time 1/2 + m / (1 - m)."""
    random = np.random.default_rng(seed)
    noise = random.normal(0, np.sqrt(1 - memory**2), count)
    samples = np.empty(count)
    samples[0] = random.normal()
    for k in range(1, count):
        samples[k] = memory * samples[k - 1] + noise[k]
    return samples


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.9])
def test_correlation_time(memory: float) -> None:
    found = correlation_time(autoregressive(60_000, memory, 1))
    assert found == pytest.approx(0.5 + memory / (1 - memory), rel=0.2)


def test_errors_cover_what_chance_does() -> None:
    """The scatter of means and variances over many runs is their error in each."""
    runs = [autoregressive(2000, 0.9, seed) for seed in range(60)]
    for estimate in (mean, variance):
        found = [estimate(run) for run in runs]
        scatter = np.std([e.value for e in found], ddof=1)
        assert np.mean([e.error for e in found]) == pytest.approx(scatter, rel=0.25)
    assert np.mean([variance(run).value for run in runs]) == pytest.approx(1.0, abs=0.04)
    assert np.mean([abs(mean(run).value) > 3 * mean(run).error for run in runs]) < 0.05
    naive = np.mean([run.std() / np.sqrt(len(run)) for run in runs])
    assert np.mean([mean(run).error for run in runs]) > 3 * naive  # what independent samples would have


def test_constant_and_single_samples() -> None:
    assert correlation_time(np.full(10, 3.0)) == 0.5 and effective_samples(np.ones(8)) == 8
    assert mean(np.array([2.0])) == Estimate(2.0, np.inf)


def test_differences() -> None:
    relative = relative_difference(Estimate(11, 0.3), Estimate(10, 0.4))
    assert relative.value == pytest.approx(0.1)
    assert relative.error == pytest.approx(np.hypot(0.03, 1.1 * 0.04))
    assert relative_difference(Estimate(1, 1), Estimate(0, 1)).error == np.inf
    assert Estimate(1.4, 0.1).excess(1.0) == pytest.approx(0.1) and Estimate(1.2, 0.1).excess(1.0) == 0
