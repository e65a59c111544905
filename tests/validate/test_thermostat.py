"""The canonical distribution of the kinetic energy: thermostats that have it and one that has not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.md.bussi import Bussi
from ase.md.nose_hoover_chain import NoseHooverChainNVT
from ase.md.nvtberendsen import NVTBerendsen

from compactmlip.errors import InputError
from compactmlip.validate.checks import Thresholds
from compactmlip.validate.checks_dynamics import thermostat_checks
from compactmlip.validate.nve import maxwell_boltzmann
from compactmlip.validate.report import build_report
from compactmlip.validate.thermostat import KineticEnergy, compare_kinetic, nvt

from .conftest import lennard_jones

TEMPERATURE = 300.0


def gas(count: int, samples: int, temperature: float, seed: int = 0) -> np.ndarray:
    """Kinetic energies of an ideal gas: gamma distributed."""
    degrees = 3 * count
    return units.kB * temperature * np.random.default_rng(seed).gamma(degrees / 2, size=samples)


def verdicts(found: KineticEnergy | None) -> dict[str, str]:
    return {check.name: check.verdict for check in thermostat_checks(found, Thresholds())}


PASSED = {"temperature under a thermostat": "pass", "fluctuation of the kinetic energy": "pass"}


def test_ideal_gas() -> None:
    kinetic = {"Ar": gas(20, 4000, TEMPERATURE), "He": gas(12, 4000, TEMPERATURE, 1)}
    found = compare_kinetic(kinetic, {"Ar": 20, "He": 12}, TEMPERATURE)
    assert found.degrees == 96 and found.effective == pytest.approx(4000, rel=0.15)
    assert found.mean_ratio == pytest.approx(1, abs=4 * found.mean_error) and found.mean_error < 0.005
    assert found.variance_ratio == pytest.approx(1, abs=4 * found.variance_error)
    assert found.p_value > 1e-3 and verdicts(found) == PASSED
    # Three degrees of freedom less, in the gas and in what is expected.
    rest = units.kB * TEMPERATURE * np.random.default_rng(0).gamma(93 / 2, size=4000)
    still = compare_kinetic({"Ar": rest}, {"Ar": 32}, TEMPERATURE, fixed=3)
    assert still.mean_ratio == pytest.approx(1, abs=4 * still.mean_error)
    assert compare_kinetic({"Ar": rest}, {"Ar": 32}, TEMPERATURE).mean_excess > 1


def test_false_alarms() -> None:
    """Short canonical runs are hardly ever off beyond their errors."""
    runs = [gas(32, 60, TEMPERATURE, seed) for seed in range(100)]
    found = [compare_kinetic({"Ar": run}, {"Ar": 32}, TEMPERATURE) for run in runs]
    assert np.mean([f.mean_excess > 0 or f.variance_excess > 0 for f in found]) < 0.03


@pytest.mark.parametrize("off", [0.9, 1.1])
def test_another_temperature_fails(off: float) -> None:
    found = compare_kinetic({"Ar": gas(32, 1000, off * TEMPERATURE)}, {"Ar": 32}, TEMPERATURE)
    assert verdicts(found)["temperature under a thermostat"] == "fail" and found.p_value < 1e-6


def test_wrong_mass_of_one_species_fails() -> None:
    """Velocities of a run in which O had the mass of F; kinetic energies with that of O."""
    kinetic = {"Mg": gas(32, 1000, TEMPERATURE), "O": gas(32, 1000, TEMPERATURE, 1) * 15.999 / 18.998}
    found = compare_kinetic(kinetic, {"Mg": 32, "O": 32}, TEMPERATURE)
    assert verdicts(found)["temperature under a thermostat"] == "fail"
    assert found.by_species["O"] == pytest.approx(0.842, abs=0.01)
    assert found.by_species["Mg"] == pytest.approx(1, abs=0.01)


def _kinetic(atoms: Atoms, dynamics: Any, steps: int) -> np.ndarray:
    energies = []
    for _ in dynamics.irun(steps):
        energies.append(atoms.get_kinetic_energy())
    return np.array(energies[steps // 5 :])


THERMOSTATS: dict[str, Callable[[Atoms], Any]] = {
    "Bussi": lambda a: Bussi(a, units.fs, TEMPERATURE, taut=10 * units.fs, rng=np.random.RandomState(0)),
    "Nose-Hoover": lambda a: NoseHooverChainNVT(a, units.fs, TEMPERATURE, tdamp=15 * units.fs),
    "Berendsen": lambda a: NVTBerendsen(
        a, units.fs, temperature_K=TEMPERATURE, taut=10 * units.fs, fixcm=False
    ),
}


def liquid() -> tuple[Atoms, Any]:
    """Argon at high density, far from harmonic: Nose and Hoover need chaos."""
    atoms = bulk("Ar", cubic=True, a=5.3).repeat(2)
    atoms.set_masses([4.0] * 32)  # quick
    maxwell_boltzmann(atoms, 2 * TEMPERATURE, np.random.default_rng(0))
    return atoms, lennard_jones()


@pytest.mark.parametrize("name", list(THERMOSTATS))
def test_thermostats_of_ase(name: str) -> None:
    atoms, atoms.calc = liquid()
    kinetic = _kinetic(atoms, THERMOSTATS[name](atoms), 1500)
    # All three count 3N degrees of freedom, also where the centre of mass rests.
    found = compare_kinetic({"Ar": kinetic}, {"Ar": 32}, TEMPERATURE)
    if name == "Berendsen":
        assert verdicts(found)["fluctuation of the kinetic energy"] == "fail" and found.variance_ratio < 0.5
    else:
        assert verdicts(found) == PASSED


def test_langevin_in_harmonic_wells(wells: Any) -> None:
    atoms, calculator = wells(0.05)
    before = atoms.positions.copy()
    found = nvt(calculator, atoms, temperature_K=TEMPERATURE, steps=500, seed=1)
    assert found is not None and found.enough and found.steps == 501 and not found.failure
    assert verdicts(found) == PASSED and found.by_species["Cu"] == pytest.approx(found.mean_ratio)
    assert np.array_equal(atoms.positions, before) and atoms.calc is None


def test_noisy_forces_heat(wells: Any) -> None:
    atoms, calculator = wells(0.05, noise=3.0)
    found = nvt(calculator, atoms, temperature_K=TEMPERATURE, steps=400, seed=1)
    assert found is not None and found.mean_ratio > 1.1
    assert verdicts(found)["temperature under a thermostat"] == "fail"


def test_what_cannot_be_judged(wells: Any) -> None:
    atoms, calculator = wells(0.05)
    short = nvt(calculator, atoms, steps=20, warm_up=5)
    assert short is not None and not short.enough and verdicts(short) == {}
    assert verdicts(None) == {}
    broken = short.model_copy(update={"failure": "the temperature reached 90000 K at step 3."})
    assert verdicts(broken) == {"temperature under a thermostat": "fail"}
    with pytest.raises(InputError, match="no distribution"):
        compare_kinetic({"Cu": np.ones(1)}, {"Cu": 4}, TEMPERATURE)


def test_in_the_report(evidence: Any) -> None:
    certificate, data = evidence()
    found = compare_kinetic({"Ar": gas(32, 900, TEMPERATURE)}, {"Ar": 32}, TEMPERATURE)
    changed = certificate.model_copy(update={"thermostat": found})
    html = build_report(changed, data)
    assert "Constant temperature" in html and "Constant temperature" not in build_report(certificate, data)
    assert type(certificate).model_validate_json(changed.model_dump_json()) == changed
