"""Energy conservation against closed forms, and what must be caught."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.lj import LennardJones
from ase.constraints import FixAtoms

from compactmlip.errors import CompactMLIPError, InputError
from compactmlip.validate import Thresholds
from compactmlip.validate.checks import nve_checks, overall
from compactmlip.validate.nve import (
    BLOCKS,
    MIN_STEPS_FOR_DRIFT,
    affordable_steps,
    equilibrate,
    fit_drift,
    maxwell_boltzmann,
    nve,
)
from compactmlip.validate.speed import measure_speed
from compactmlip.validate.supercells import MIN_LENGTH, face_distances, near_size, supercell


def _verdict(summary):
    return overall(nve_checks(summary, Thresholds()))


def test_harmonic_wells_conserve_and_fluctuate_as_velocity_verlet_must(wells):
    omega, timestep = 0.05, 2.0
    atoms, calculator = wells(omega)
    found = nve(calculator, atoms, timestep_fs=timestep, steps=2000, seed=1)
    drift = found.summary.drift
    assert found.summary.stable and drift is not None
    assert abs(drift.slope) < 4 * drift.slope_error + 1e-4
    # The conserved quantity of velocity Verlet is K + V (1 - (omega dt)^2 / 4).
    assert drift.fluctuation_ratio == pytest.approx((omega * timestep) ** 2 / 4, rel=0.03)
    assert _verdict(found.summary) == "pass"
    shadow = found.trace.total - found.trace.potential * (omega * timestep) ** 2 / 4
    assert np.ptp(shadow) < 1e-9


def test_fluctuation_is_second_order_in_the_time_step():
    crystal = bulk("Ar", cubic=True, a=5.3).repeat(2)
    calculator = LennardJones(sigma=3.4, epsilon=0.0104, rc=8.0, ro=6.5, smooth=True)
    start = equilibrate(calculator, crystal, temperature_K=40, timestep_fs=8.0, steps=40, seed=3)
    fluctuations = []
    for timestep, steps in ((10.0, 240), (20.0, 120)):
        run = nve(calculator, start, timestep_fs=timestep, steps=steps, temperature_K=40)
        rows = run.trace
        drift = fit_drift(rows.time_ps, rows.total / 32, (rows.total - rows.potential) / 32)
        assert abs(drift.slope) < 0.05
        fluctuations.append(drift.fluctuation)
    assert fluctuations[1] / fluctuations[0] == pytest.approx(4.0, rel=0.15)


def test_forces_with_a_curl_are_caught_as_drift(wells):
    atoms, calculator = wells(0.05, swirl=0.01)
    found = nve(calculator, atoms, steps=1500)
    assert found.summary.drift is not None
    assert found.summary.drift.slope > 0.1 + 2 * found.summary.drift.slope_error
    (drift, _) = nve_checks(found.summary, Thresholds())
    assert drift.verdict == "fail"


def test_noisy_forces_are_caught(wells):
    atoms, calculator = wells(0.05, noise=1.0)
    assert _verdict(nve(calculator, atoms, steps=1000).summary) == "fail"


def test_forces_of_the_wrong_size_show_as_fluctuation(wells):
    atoms, calculator = wells(0.05, scale=1.2)
    found = nve(calculator, atoms, steps=1500)
    drift, fluctuation = nve_checks(found.summary, Thresholds())
    assert drift.verdict == "pass"
    assert fluctuation.verdict == "fail"


def test_explosion_ends_the_run_and_fails(wells):
    atoms, calculator = wells(0.05)
    found = nve(calculator, atoms, timestep_fs=60.0, steps=1000, equilibration_steps=0)
    assert not found.summary.stable and found.summary.drift is None
    assert found.summary.steps < 1000 and "temperature reached" in found.summary.reason
    (check,) = nve_checks(found.summary, Thresholds())
    assert check.verdict == "fail" and check.value is None
    with pytest.raises(CompactMLIPError, match="equilibration at 300 K failed"):
        equilibrate(calculator, atoms, timestep_fs=60.0, steps=1000)


def test_a_calculator_that_gives_up_ends_the_run(wells):
    atoms, calculator = wells()
    original = calculator.calculate

    def calculate(*args, **kwargs):
        if calculator.calls > 30:
            raise InputError("not finite")
        original(*args, **kwargs)

    calculator.calculate = calculate
    found = nve(calculator, atoms, steps=300, equilibration_steps=10)
    assert not found.summary.stable and "not finite" in found.summary.reason
    assert 15 < found.summary.steps < 22


def test_forces_that_are_not_finite_end_the_run(wells):
    atoms, calculator = wells()
    ready = equilibrate(calculator, atoms, steps=5)
    calculator.noise = float("nan")
    found = nve(calculator, ready, steps=300)
    assert not found.summary.stable and "not finite" in found.summary.reason


def test_short_runs_give_a_warning_and_no_drift(wells):
    atoms, calculator = wells()
    found = nve(calculator, atoms, steps=MIN_STEPS_FOR_DRIFT - 1, equilibration_steps=0)
    assert found.summary.stable and found.summary.drift is None
    assert _verdict(found.summary) == "warn"
    with pytest.raises(InputError, match="at least two atoms"):
        nve(calculator, Atoms("Ar"), steps=10)


def test_time_limit_ends_the_run_without_blame(wells):
    atoms, calculator = wells()
    found = nve(calculator, atoms, steps=10**6, equilibration_steps=0, max_seconds=0.05)
    assert found.summary.stable and 0 < found.summary.steps < 10**6


def test_same_seed_same_run_and_constraints_do_not_matter(wells):
    atoms, calculator = wells()
    fixed = atoms.copy()
    fixed.set_constraint(FixAtoms([0, 1]))
    first = nve(calculator, atoms, steps=20, seed=7).trace
    second = nve(calculator, fixed, steps=20, seed=7).trace
    np.testing.assert_array_equal(first.total, second.total)
    assert np.any(nve(calculator, atoms, steps=20, seed=8).trace.total != first.total)
    assert atoms.calc is None and not atoms.get_momenta().any()


def test_given_momenta_are_kept(wells):
    atoms, calculator = wells()
    ready = equilibrate(calculator, atoms, steps=30, seed=2)
    found = nve(calculator, ready, steps=3)
    assert found.trace.temperature_K[0] == pytest.approx(ready.get_temperature())


def test_equilibration_reaches_the_temperature_without_total_momentum(wells):
    atoms, calculator = wells()
    temperatures = [
        equilibrate(calculator, atoms, temperature_K=500, steps=150, seed=s).get_temperature()
        for s in range(6)
    ]
    # 6 x 32 atoms: standard error of the mean 500 K sqrt(2 / 576) = 30 K.
    assert np.mean(temperatures) == pytest.approx(500, abs=90)
    maxwell_boltzmann(atoms, 300, np.random.default_rng(0))
    assert np.abs(atoms.get_momenta().sum(axis=0)).max() < 1e-10


def _correlated(rng: np.random.Generator, size: int) -> np.ndarray:
    """Noise with a correlation time of 20 samples and unit variance."""
    noise = rng.normal(size=size + 200)
    for k in range(1, len(noise)):
        noise[k] = 0.95 * noise[k - 1] + np.sqrt(1 - 0.95**2) * noise[k]
    return noise[200:]


def test_slope_and_its_error_are_right_for_correlated_noise():
    rng = np.random.default_rng(4)
    times = np.arange(2001) * 1e-3
    found = [
        fit_drift(times, 1e-3 * (0.3 * times + 0.1 * _correlated(rng, 2001)), _correlated(rng, 2001) * 1e-2)
        for _ in range(40)
    ]
    slopes, errors = np.array([f.slope for f in found]), np.array([f.slope_error for f in found])
    assert abs(slopes.mean() - 0.3) < 4 * slopes.std() / np.sqrt(40)
    assert 0.65 < errors.mean() / slopes.std() < 1.5
    assert np.mean([f.fluctuation for f in found]) == pytest.approx(0.1, rel=0.1)
    assert np.mean([f.fluctuation_ratio for f in found]) == pytest.approx(0.01, rel=0.15)


def test_transient_at_the_start_is_no_drift():
    times = np.arange(2001) * 1e-3
    energy = 5e-3 * np.exp(-times / 0.02)
    assert abs(fit_drift(times, energy, np.sin(times)).slope) < 1e-3
    assert abs(np.polyfit(times, 1e3 * energy, 1)[0]) > 0.1
    with pytest.raises(InputError, match="too few"):
        fit_drift(times[:BLOCKS], energy[:BLOCKS], energy[:BLOCKS])


def test_verdict_needs_significance():
    def summary(slope, error):
        atoms = bulk("Cu")
        run = nve(LennardJones(), atoms.repeat((2, 1, 1)), steps=1, temperature_K=1, equilibration_steps=0)
        drift = {"slope": slope, "slope_error": error, "fluctuation": 0.1, "fluctuation_ratio": 0.0}
        return run.summary.model_validate({**run.summary.model_dump(), "stable": True, "drift": drift})

    assert _verdict(summary(0.05, 0.01)) == "pass"
    assert _verdict(summary(-0.05, 0.05)) == "warn"
    assert _verdict(summary(-0.15, 0.05)) == "warn"
    assert _verdict(summary(-0.25, 0.05)) == "fail"
    assert _verdict(summary(float("nan"), 0.05)) == "fail"


def test_supercell_is_long_enough_or_as_large_as_allowed():
    primitive = bulk("MgO", "rocksalt", a=4.21)
    grown = supercell(primitive)
    assert face_distances(grown).min() >= MIN_LENGTH
    assert face_distances(primitive) == pytest.approx([4.21 / np.sqrt(3)] * 3)
    assert len(supercell(primitive, max_atoms=10)) <= 10
    slab = bulk("MgO", "rocksalt", a=4.21, cubic=True)
    slab.pbc = (True, True, False)
    assert supercell(slab).cell.lengths() == pytest.approx([8.42, 8.42, 4.21])
    assert len(supercell(molecule("CH4"))) == 5


@pytest.mark.parametrize(("target", "expected"), [(1, 8), (8, 8), (64, 64), (216, 216), (200, 216)])
def test_near_size(target, expected):
    crystal = bulk("MgO", "rocksalt", a=4.21, cubic=True)
    assert len(near_size(crystal, target)) == expected
    assert len(near_size(molecule("CH4"), 64)) == 5


def test_steps_that_fit_a_budget():
    assert affordable_steps(0.01, 10.0, longest=5000) == 1000
    assert affordable_steps(0.01, 100.0, longest=5000) == 5000
    assert affordable_steps(10.0, 1.0, longest=5000) == 0
    assert affordable_steps(10.0, 1.0, longest=5, shortest=10) == 5


def test_speed_takes_turns_and_never_answers_from_a_cache(wells):
    atoms, fast = wells()
    _, slow = wells()
    order: list[str] = []
    for name, calculator in (("model", fast), ("teacher", slow)):
        original = calculator.calculate

        def calculate(*args, name=name, original=original, **kwargs):
            order.append(name)
            original(*args, **kwargs)

        calculator.calculate = calculate
    (row,) = measure_speed({"model": fast, "teacher": slow}, [atoms], repeats=3)
    assert order == ["model"] * 2 + ["teacher"] * 2 + ["model", "teacher"] * 3
    assert row.repeats == 3 and row.atoms == 32
    assert row.atoms_per_second["model"] == pytest.approx(32 / row.seconds["model"])
    assert row.ratio() == pytest.approx(row.seconds["teacher"] / row.seconds["model"])


def test_speed_leaves_out_what_cannot_keep_the_budget(wells):
    import time

    atoms, fast = wells()
    _, slow = wells()
    original = slow.calculate

    def calculate(*args, **kwargs):
        time.sleep(0.002 * len(slow.centres))
        original(*args, **kwargs)

    slow.calculate = calculate
    big = atoms.repeat((1, 1, 2))
    rows = measure_speed({"teacher": slow}, [atoms], repeats=50, max_seconds=0.3)
    assert rows[0].repeats < 10
    fast.centres = np.concatenate([fast.centres, fast.centres])
    rows = measure_speed({"teacher": slow}, [atoms], repeats=1, max_seconds=0.01)
    assert rows[0].atoms_per_second.keys() == {"teacher"}
    slow.centres = big.positions
    rows = measure_speed({"teacher": slow}, [big, big.repeat((1, 1, 4))], repeats=1, max_seconds=0.2)
    assert len(rows) == 1 and rows[0].ratio() is None


def test_temperature_agrees_with_ase(wells):
    atoms, calculator = wells()
    run = nve(calculator, atoms, steps=5, seed=1)
    kinetic = run.trace.total - run.trace.potential
    np.testing.assert_allclose(run.trace.temperature_K, 2 * kinetic / (3 * 32 * units.kB))
