"""Density at constant pressure: a crystal whose expansion is known, and potentials that differ."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import Calculator, all_changes

from compactmlip.errors import InputError
from compactmlip.validate.checks import Thresholds
from compactmlip.validate.checks_dynamics import density_checks
from compactmlip.validate.density import DensityComparison, Run, compare_densities, compare_runs, npt
from compactmlip.validate.report import build_report

from .conftest import Wells

V0, MODULUS = 16.0, 50.0
"""Angstrom^3 per atom and GPa."""


class Gruneisen(Calculator):
    """Einstein crystal whose springs depend on the volume, on a cell with a bulk modulus.

    E = B (V - V0)^2 / 2 V0 + k(V) sum u^2 / 2 with k = k0 (V / V0)^(-2 gamma): at zero pressure the
    springs push with 3 N gamma kB T / V.
    """

    implemented_properties = ["energy", "forces", "stress"]  # noqa: RUF012

    def __init__(self, sites: Any, gamma: float = 2.0, modulus: float = MODULUS, v0: float = V0) -> None:
        super().__init__()
        self.sites, self.gamma, self.modulus, self.v0 = np.array(sites), gamma, modulus * units.GPa, v0

    def calculate(self, atoms: Any = None, properties: Any = ("energy",), changes: Any = all_changes) -> None:
        super().calculate(atoms, properties, changes)
        volume, rest = self.atoms.get_volume(), self.v0 * len(self.atoms)
        shift = self.atoms.positions - self.sites @ self.atoms.cell.array
        stiffness = 6.0 * (volume / rest) ** (-2 * self.gamma)
        square = (shift**2).sum()
        energy = self.modulus * (volume - rest) ** 2 / 2 / rest + stiffness * square / 2
        forces = -stiffness * shift
        # dE/dV at fixed scaled positions: u scales with the length, u^2 with V^(2/3).
        slope = self.modulus * (volume - rest) / rest
        slope += stiffness * square / 2 * (2 / 3 - 2 * self.gamma) / volume
        stress = np.array([slope, slope, slope, 0.0, 0.0, 0.0])
        self.results = {"energy": float(energy), "forces": forces, "stress": stress}


HOW: dict[str, Any] = {"temperature_K": 600.0, "timestep_fs": 2.0, "steps": 300, "bulk_modulus": MODULUS}


def expected(gamma: float, modulus: float = MODULUS, v0: float = V0) -> float:
    """Volume per atom at rest: B (V - V0) / V0 = 3 gamma kB T / V, per atom."""
    pressure = 3 * gamma * units.kB * HOW["temperature_K"]
    b = modulus * units.GPa / v0
    return v0 / 2 + np.sqrt(v0**2 / 4 + pressure / b)


@pytest.fixture(scope="module")
def crystal() -> Atoms:
    edge = (4 * V0) ** (1 / 3)
    return bulk("Cu", cubic=True, a=edge).repeat(2)


def calculator(crystal: Atoms, **changes: float) -> Gruneisen:
    return Gruneisen(crystal.get_scaled_positions(), **changes)


def test_stress_is_the_derivative(crystal: Atoms) -> None:
    """The anchor itself: finite differences in the volume."""
    atoms = crystal.copy()
    atoms.rattle(0.1, seed=1)
    atoms.calc = calculator(crystal)
    stress = atoms.get_stress()[0]
    energies = []
    for strain in (1e-4, -1e-4):
        other = atoms.copy()
        other.set_cell(atoms.cell.array * (1 + strain), scale_atoms=True)
        other.calc = calculator(crystal)
        energies.append(other.get_potential_energy())
    assert stress == pytest.approx((energies[0] - energies[1]) / 2e-4 / 3 / atoms.get_volume(), rel=1e-5)


@pytest.fixture(scope="module")
def runs(crystal: Atoms) -> list[list[Run]]:
    """Twice four runs of one potential."""
    how = {"atoms": crystal, **HOW}
    return [[npt(calculator(crystal), seed=(seed, run), **how) for run in range(4)] for seed in range(2)]


def compared(crystal: Atoms, model: list[Run], teacher: list[Run]) -> DensityComparison:
    return compare_runs(crystal, model, teacher, temperature_K=600, pressure_GPa=0)


def test_thermal_expansion(runs: list[list[Run]], crystal: Atoms) -> None:
    found = compared(crystal, *runs).model
    expansion = expected(2.0) / V0 - 1
    assert 0.05 < expansion < 0.07 and not found.failure
    assert found.volume / V0 - 1 == pytest.approx(expansion, abs=max(0.006, 3 * found.volume_error / V0))
    assert found.pressure_GPa == pytest.approx(0.0, abs=0.5)
    assert found.temperature_K == pytest.approx(600, rel=0.06)
    mass = 63.546 * 1.66053907  # g/cm^3 from u/Angstrom^3
    assert found.density == pytest.approx(mass / found.volume, rel=1e-3)


def _verdicts(found: DensityComparison) -> list[str]:
    return [check.verdict for check in density_checks(found, Thresholds())]


def test_same_passes_and_another_fails(runs: list[list[Run]], crystal: Atoms) -> None:
    same = compared(crystal, *runs)
    assert _verdicts(same) == ["pass"] and 0 < abs(same.difference.value) < 1
    assert same.difference.degrees == 3
    larger = compare_densities(calculator(crystal, v0=1.08 * V0), calculator(crystal), crystal, **HOW)
    assert larger is not None and _verdicts(larger) == ["fail"]
    ratio = expected(2.0, v0=1.08 * V0) / expected(2.0)
    assert larger.model.volume / larger.teacher.volume == pytest.approx(ratio, rel=0.01)
    assert larger.difference.value == pytest.approx(100 * (1 / ratio - 1), abs=1)
    # The same velocities in both: the difference is known better than either density.
    assert larger.difference.error < 50 * larger.model.volume_error / larger.model.volume


def test_pressure_compresses(runs: list[list[Run]], crystal: Atoms) -> None:
    pressed = npt(calculator(crystal), crystal, pressure_GPa=2.0, seed=(0, 0), **HOW)
    assert pressed.pressure_GPa == pytest.approx(2.0, abs=0.5)
    ratio = pressed.volume.mean() / runs[0][0].volume.mean()
    assert ratio == pytest.approx(1 - 2.0 / MODULUS, abs=0.012)


def test_from_the_same_start(crystal: Atoms) -> None:
    before = crystal.cell.array.copy()
    short = {**HOW, "steps": 40, "runs": 2}
    found = compare_densities(calculator(crystal), calculator(crystal), crystal, **short)
    assert found is not None
    assert found.model == found.teacher and found.target_K == 600 and found.atoms == 32
    assert found.differences == (0.0, 0.0) and found.model.density_error > 0  # runs differ
    assert np.array_equal(crystal.cell.array, before) and crystal.calc is None
    assert compare_densities(calculator(crystal), calculator(crystal), crystal, max_seconds=-1) is None


def test_what_cannot_be_judged(runs: list[list[Run]], crystal: Atoms, wells: Any) -> None:
    assert density_checks(None, Thresholds()) == []
    good, failed = runs[0][:1], [Run(np.zeros(0), np.nan, np.nan, 3, "the volume changed")]
    assert _verdicts(compared(crystal, failed, good)) == ["fail"]
    assert _verdicts(compared(crystal, good, failed)) == []
    with pytest.raises(InputError, match="no stress"):
        npt(Wells(crystal.positions, 0.05), crystal)
    with pytest.raises(InputError, match="periodic"):
        npt(calculator(crystal), Atoms("Cu2", [[0, 0, 0], [0, 0, 2]]))


def test_cells_that_collapse_or_fly_apart(crystal: Atoms) -> None:
    gas = compare_densities(calculator(crystal, v0=3 * V0), calculator(crystal), crystal, **HOW)
    assert gas is not None and "the volume changed by a factor of" in gas.model.failure
    assert np.isnan(gas.model.volume) and gas.differences == () and _verdicts(gas) == ["fail"]


def test_in_the_report(evidence: Any, runs: list[list[Run]], crystal: Atoms) -> None:
    certificate, data = evidence()
    found = compared(crystal, *runs)
    changed = certificate.model_copy(update={"density": found})
    html = build_report(changed, data)
    assert "Constant pressure" in html and "Constant pressure" not in build_report(certificate, data)
    assert type(certificate).model_validate_json(changed.model_dump_json()) == changed
