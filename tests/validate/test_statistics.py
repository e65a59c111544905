"""Errors of means and variances of correlated samples, against a process that is known in closed form."""

from __future__ import annotations

import numpy as np
import pytest

from compactmlip.validate.statistics import (
    Estimate,
    chance_limit,
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
    assert mean(np.full(8, 2.0)) == Estimate(2.0, 0.0, 7.0)


def test_differences() -> None:
    relative = relative_difference(Estimate(11, 0.3), Estimate(10, 0.4))
    assert relative.value == pytest.approx(0.1)
    assert relative.error == pytest.approx(np.hypot(0.03, 1.1 * 0.04))
    assert relative_difference(Estimate(1, 1), Estimate(0, 1)).error == np.inf
    assert Estimate(1.4, 0.1).excess(1.0) == pytest.approx(0.1) and Estimate(1.2, 0.1).excess(1.0) == 0


def test_few_samples_need_more_errors() -> None:
    """Student's t: one comparison in 370 goes beyond, whatever the number of samples."""
    assert Estimate(0, 1).certain == 3 and Estimate(0, 1, 1e9).certain == pytest.approx(3, abs=1e-6)
    assert Estimate(0, 1, 4).certain == pytest.approx(6.62, abs=0.01)  # tables of t at 0.27 %, both sides
    assert Estimate(5.0, 0.0, 0.0).excess(1.0) == 4 and Estimate(5.0, 1.0, 0.0).excess(1.0) == 0
    random = np.random.default_rng(0)
    found = [mean(random.normal(0, 1, 6)) for _ in range(4000)]
    beyond = np.mean([Estimate(e.value, e.error, 5).excess(0) > 0 for e in found])
    assert beyond < 0.006 < np.mean([abs(e.value) > 3 * e.error for e in found])


def test_degrees_of_a_difference() -> None:
    """Welch and Satterthwaite: those of both where the errors are equal, of the worse where one dominates."""
    equal = relative_difference(Estimate(10, 0.5, 4), Estimate(10, 0.5, 4))
    assert equal.degrees == pytest.approx(8)
    assert relative_difference(Estimate(10, 0.5, 4), Estimate(10, 1e-6, 900)).degrees == pytest.approx(4)
    assert relative_difference(Estimate(10, 0.5), Estimate(10, 0.5)).degrees == np.inf
    assert relative_difference(Estimate(10, 0.5, 0), Estimate(10, 0.5, 9)).excess(5.0) == 0


@pytest.mark.parametrize("dimensions", [1, 3, 40])
def test_chance_is_exceeded_by_fewer_than_one_in_a_hundred(dimensions: int) -> None:
    random = np.random.default_rng(dimensions)

    def size(difference: np.ndarray) -> float:
        return float(np.abs(difference).sum())

    trials = random.normal(0, 1, (3000, 6, dimensions))
    beyond = [size(trial.mean(axis=0)) > chance_limit(trial, size) for trial in trials]
    assert np.mean(beyond) < 0.015
    shifted = trials[:100] + 4.0
    assert np.mean([size(t.mean(axis=0)) > chance_limit(t, size) for t in shifted]) > 0.6
    # What all runs have in common does not count as chance.
    assert chance_limit(shifted[0], size) == pytest.approx(chance_limit(trials[0], size), rel=1e-9)
