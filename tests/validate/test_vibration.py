"""Several runs of a crystal whose displacements are known in closed form, in model and teacher."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk

from compactmlip.validate.checks import Thresholds
from compactmlip.validate.checks_dynamics import sampling_checks, vibration_checks
from compactmlip.validate.ensemble import RUNS, Ensembles, Sampling, compare_ensembles
from compactmlip.validate.report import build_report
from compactmlip.validate.vibration import Vibration, compare_vibrations

from .conftest import Wells

OMEGA = 0.05
"""Of the wells in 1/fs: a period of 126 fs."""

SAMPLING = Sampling(method="runs", atoms=4, runs=RUNS, steps=80, temperature_K=300, timestep_fs=1)


@pytest.fixture(scope="module")
def crystal() -> Atoms:
    return bulk("Cu", cubic=True, a=3.6).repeat((3, 2, 2))


def wells(crystal: Atoms, stiffness: float = 1.0) -> Wells:
    return Wells(crystal.positions, OMEGA * np.sqrt(stiffness))


def run(crystal: Atoms, model: Any, teacher: Any, **how: Any) -> Ensembles:
    options = {"steps": 200, "warm_up": 80, "timestep_fs": 4.0, "seed": 3, **how}
    found = compare_ensembles(model, teacher, crystal, **options)
    assert found is not None
    return found


def verdicts(found: tuple[Vibration, ...]) -> list[str]:
    return [check.verdict for check in vibration_checks(found, Thresholds())]


@pytest.fixture(scope="module")
def softer(crystal: Atoms) -> Ensembles:
    """Springs of the model are 20 % softer."""
    return run(crystal, wells(crystal, 0.8), wells(crystal))


def test_equipartition(softer: Ensembles, crystal: Atoms) -> None:
    """<u^2> = 3 kB T / k, in both."""
    (row,) = compare_vibrations(softer)
    stiffness = crystal.get_masses()[0] * (OMEGA / units.fs) ** 2
    expected = 3 * units.kB * 300 / stiffness
    # The centre of mass rests, which takes 1/N.
    assert row.teacher == pytest.approx(expected, rel=max(0.05, 3 * row.teacher_error / expected))
    assert row.model == pytest.approx(expected / 0.8, rel=max(0.05, 3 * row.model_error / expected))
    assert row.debye_waller[1] == pytest.approx(8 * np.pi**2 * row.teacher / 3)


def test_softer_springs_are_seen(softer: Ensembles, crystal: Atoms) -> None:
    """1/0.8 - 1 = 25 %; runs with the same random numbers scatter together, and the difference little."""
    found = compare_vibrations(softer)
    assert found[0].difference == pytest.approx(25, abs=max(4, 4 * found[0].difference_error))
    assert found[0].difference_error < 0.7 * 100 * found[0].teacher_error / found[0].teacher * np.sqrt(2)
    assert verdicts(found) in (["warn"], ["fail"])
    much = run(crystal, wells(crystal, 0.5), wells(crystal), steps=100)
    assert verdicts(compare_vibrations(much)) == ["fail"]


def test_same_potential(crystal: Atoms) -> None:
    """Equal with the same random numbers, and passed with others."""
    one = run(crystal, wells(crystal), wells(crystal), steps=100)
    assert np.array_equal(one.model, one.teacher) and one.sampling.runs == RUNS
    assert verdicts(compare_vibrations(one)) == ["pass"]
    other = run(crystal, wells(crystal), wells(crystal), steps=100, seed=4)
    (row,) = compare_vibrations(replace(one, model=other.model))
    assert row.difference != 0 and verdicts((row,)) == ["pass"]
    # Runs have states of their own.
    assert len({float(positions.std()) for positions in one.model}) == RUNS
    assert one.model.shape == (RUNS, 10, len(crystal), 3)


def test_false_alarms() -> None:
    """Runs that differ in how much energy they happened to get."""
    atoms, random = bulk("Cu", cubic=True, a=3.6), np.random.default_rng(0)
    excess = []
    for _ in range(400):
        spread = random.normal(0.1, 0.02, (2, RUNS, 1, 1, 1))
        both = atoms.positions + spread * random.normal(0, 1, (2, RUNS, 8, 4, 3))
        found = Ensembles(SAMPLING, atoms, *both, None)
        excess += [row.excess for row in compare_vibrations(found)]
    assert len(excess) == 400 and np.mean(np.array(excess) > 0) < 0.0125


def test_drift_and_liquids_do_not_count(softer: Ensembles, crystal: Atoms) -> None:
    still = compare_vibrations(softer)
    wind = np.random.default_rng(0).normal(0, 5, (*softer.model.shape[:2], 1, 3))
    blown = compare_vibrations(replace(softer, model=softer.model + wind))
    assert blown[0].model == pytest.approx(still[0].model)
    melted = softer.teacher + np.random.default_rng(1).normal(0, 1, softer.model.shape)
    assert compare_vibrations(replace(softer, teacher=melted)) == ()
    free = crystal.copy()
    free.pbc = False
    assert compare_vibrations(replace(softer, cell=free)) == ()


def test_runs_that_break(crystal: Atoms) -> None:
    """The model's failure is a verdict, the teacher's is not, and nothing is compared."""
    good, bad = wells(crystal), Wells(crystal.positions, OMEGA, scale=-1.0)
    broken = run(crystal, bad, good)
    assert not broken.sampling.comparable and not broken.model.size and compare_vibrations(broken) == ()
    (check,) = sampling_checks(broken.sampling)
    assert check.verdict == "fail" and "temperature" in check.reason
    assert sampling_checks(run(crystal, good, bad).sampling) == []
    assert sampling_checks(run(crystal, bad, bad).sampling) == []
    assert sampling_checks(None) == [] and vibration_checks((), Thresholds()) == []


def test_teacher_that_tells_energies(crystal: Atoms) -> None:
    """To first order 10 % softer springs of the model move 10 % more; the teacher does not run."""
    teacher = wells(crystal)
    found = run(crystal, wells(crystal, 0.9), teacher, energies_only=True)
    assert found.teacher is None and found.differences is not None and found.sampling.method == "energies"
    assert teacher.calls == found.differences.size == RUNS * 20
    # Energies differ by a ninth of those of 3N oscillators.
    expected = np.sqrt(1.5 * len(crystal)) / 9
    assert found.sampling.spread == pytest.approx(expected, rel=0.25) and found.sampling.comparable
    (row,) = compare_vibrations(found)
    assert row.difference == pytest.approx(11, abs=max(3, 3 * row.difference_error))
    same = run(crystal, wells(crystal), wells(crystal), steps=20, energies_only=True)
    assert same.sampling.spread == pytest.approx(0, abs=1e-9)
    assert compare_vibrations(same)[0].difference == pytest.approx(0, abs=1e-9)


def test_states_that_the_teacher_does_not_share(crystal: Atoms) -> None:
    far = run(crystal, wells(crystal, 0.3), wells(crystal), steps=20, energies_only=True)
    assert not far.sampling.comparable
    (check,) = sampling_checks(far.sampling)
    assert check.verdict == "warn" and check.value == far.sampling.spread
    broken = run(crystal, Wells(crystal.positions, OMEGA, scale=-1.0), wells(crystal), energies_only=True)
    assert [c.verdict for c in sampling_checks(broken.sampling)] == ["fail"] and broken.differences is None


def test_time_that_is_over(crystal: Atoms) -> None:
    assert compare_ensembles(wells(crystal), wells(crystal), crystal, steps=20, max_seconds=-1.0) is None


def test_in_the_report(evidence: Any, softer: Ensembles, crystal: Atoms) -> None:
    certificate, data = evidence()
    found = compare_vibrations(softer)
    changed = certificate.model_copy(update={"vibration": found, "sampling": softer.sampling})
    html = build_report(changed, data)
    assert "Vibration" in html and "Vibration" not in build_report(certificate, data)
    assert type(certificate).model_validate_json(changed.model_dump_json()) == changed
