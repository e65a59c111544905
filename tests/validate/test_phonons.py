"""Phonons of a crystal whose frequencies are known in closed form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import Calculator, all_changes
from ase.neighborlist import neighbor_list

from compactmlip.validate import phonons
from compactmlip.validate.checks import Thresholds, phonon_checks
from compactmlip.validate.phonons import Phonons, compare_phonons, displacements, frequencies, heat_capacity
from compactmlip.validate.report import build_report

LATTICE = 4.05


class Springs(Calculator):
    """Springs between nearest neighbours of an fcc crystal; eV/Angstrom^2."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def __init__(self, stiffness: float) -> None:
        super().__init__()
        self.stiffness = stiffness

    def calculate(self, atoms: Any = None, properties: Any = ("energy",), changes: Any = all_changes) -> None:
        super().calculate(atoms, properties, changes)
        length = LATTICE / np.sqrt(2)
        i, d, vectors = neighbor_list("idD", self.atoms, 1.2 * length)
        forces = np.zeros((len(self.atoms), 3))
        np.add.at(forces, i, self.stiffness * ((d - length) / d)[:, None] * vectors)
        self.results = {"energy": float(self.stiffness / 4 * ((d - length) ** 2).sum()), "forces": forces}


@pytest.fixture(scope="module")
def aluminium() -> Atoms:
    return bulk("Al", "fcc", a=LATTICE, cubic=True)


def exact(atoms: Atoms, stiffness: float, q: np.ndarray) -> np.ndarray:
    """Frequencies in THz of D(q) = k/m sum_R (1 - cos q.R) R R^T / R^2 over the twelve neighbours."""
    half = LATTICE / 2
    neighbors = [
        np.roll([0.0, a * half, b * half], shift) for a in (1, -1) for b in (1, -1) for shift in range(3)
    ]
    matrix = sum((1 - np.cos(q @ r)) * np.outer(r, r) / (r @ r) for r in neighbors)
    omega = np.sqrt(np.linalg.eigvalsh(stiffness * matrix / atoms.get_masses()[0]).clip(0))
    return np.asarray(omega * units.s / (2 * np.pi * 1e12))


def test_frequencies_of_springs(aluminium: Atoms) -> None:
    """All wave vectors of the mesh, and with them longitudinal sqrt(8 k/m) at X."""
    k = 1.7
    found, primitive = frequencies(Springs(k), aluminium, (2, 2, 2))
    assert found.shape == (phonons.MESH**3, 3) and np.linalg.det(primitive) == pytest.approx(0.25)
    cell = primitive.T @ aluminium.cell.array
    grid = np.stack(np.meshgrid(*[np.arange(phonons.MESH) / phonons.MESH] * 3, indexing="ij"), -1).reshape(
        -1, 3
    )
    expected = np.array([exact(aluminium, k, 2 * np.pi * np.linalg.inv(cell) @ q) for q in grid])
    order = lambda table: np.sort(np.round(table, 3).ravel())  # noqa: E731
    assert np.allclose(order(found), order(expected), atol=0.02)
    highest = np.sqrt(8 * k / aluminium.get_masses()[0]) * units.s / (2 * np.pi * 1e12)
    assert found.max() == pytest.approx(highest, rel=2e-3)


def test_comparison(aluminium: Atoms) -> None:
    """A crystal 21 % stiffer has frequencies 10 % higher."""
    found, spectra = compare_phonons(Springs(1.21), Springs(1.0), (aluminium, aluminium))
    assert found.highest == pytest.approx(1.1 * found.teacher_highest, rel=1e-3)
    assert found.mean_error == pytest.approx(0.1 * np.abs(spectra.teacher).mean(), rel=1e-2)
    assert found.largest_error == pytest.approx(0.1 * found.teacher_highest, rel=1e-2)
    assert found.heat_capacity < found.teacher_heat_capacity < 3
    verdicts = [c.verdict for c in phonon_checks(found, Thresholds())]
    assert "fail" in verdicts or "warn" in verdicts
    same, _ = compare_phonons(Springs(1.0), Springs(1.0), (aluminium, aluminium))
    assert {c.verdict for c in phonon_checks(same, Thresholds())} == {"pass"}


def test_bands_along_lines_of_symmetry(aluminium: Atoms) -> None:
    """At X, L and on the way there: the frequencies in closed form, and names at their distances."""
    _, spectra = compare_phonons(Springs(1.21), Springs(1.0), (aluminium, aluminium))
    bands = spectra.bands
    assert bands is not None and bands.model == pytest.approx(1.1 * bands.teacher, abs=0.02)
    assert {"G", "X", "L", "K,U"} <= {name for _, name in bands.ticks}
    assert np.all(np.diff(bands.distances) >= 0)
    (start, first), (x, second) = bands.ticks[:2]
    assert (start, first, second) == (0, "G", "X") and x == pytest.approx(2 * np.pi / LATTICE)
    at_x = int(np.argmin(np.abs(bands.distances - x)))
    assert bands.teacher[at_x] == pytest.approx(
        exact(aluminium, 1.0, np.array([0, 0, 2 * np.pi / LATTICE])), abs=0.02
    )
    half = int(np.argmin(np.abs(bands.distances - x / 2)))
    q = np.array([0, 0, bands.distances[half]])
    assert bands.teacher[half] == pytest.approx(exact(aluminium, 1.0, q), abs=0.02)


def test_number_of_displacements(aluminium: Atoms) -> None:
    """Symmetry leaves one displacement; lower symmetry needs more."""
    assert displacements(aluminium) == (1, 4 * 8)
    moved = aluminium.copy()
    moved.rattle(0.1, seed=1)
    assert displacements(moved)[0] >= 12


def test_heat_capacity() -> None:
    """Einstein's formula, Dulong and Petit, and modes that are left out."""
    einstein = np.full((5, 3), 8.0)
    x = 4.135667696e-15 * 8e12 / (8.617333262e-5 * 300)
    expected = 3 * x**2 * np.exp(x) / (np.exp(x) - 1) ** 2
    assert heat_capacity(einstein, 300) == pytest.approx(expected, rel=1e-6)
    assert heat_capacity(einstein, 1e5) == pytest.approx(3, rel=1e-5)
    assert heat_capacity(einstein, 1.0) == pytest.approx(0, abs=1e-12)
    mixed = np.concatenate([einstein.ravel(), [-2.0, 0.0]])
    assert heat_capacity(mixed, 300) == pytest.approx(expected, rel=1e-6)
    assert np.isnan(heat_capacity(np.array([-1.0]), 300))


def _phonons(**changes: float) -> Phonons:
    given = {"atoms": 64, "mean_error": 0.1, "largest_error": 0.3, "highest": 20.0, "lowest": 0.0}
    teacher = {"teacher_highest": 20.0, "teacher_lowest": 0.0, "temperature_K": 300.0}
    return Phonons(**(given | teacher | {"heat_capacity": 2.5, "teacher_heat_capacity": 2.5} | changes))


def test_imaginary_modes_fail_unless_the_teacher_has_them() -> None:
    def verdict(**changes: float) -> str:
        checks = {c.name: c.verdict for c in phonon_checks(_phonons(**changes), Thresholds())}
        return checks["imaginary phonon modes"]

    assert verdict() == "pass" and verdict(lowest=-0.1) == "pass"
    assert verdict(lowest=-1.0) == "fail"
    assert verdict(lowest=-1.0, teacher_lowest=-1.1) == "pass"
    assert phonon_checks(None, Thresholds()) == []


def test_in_the_report(evidence: Any, aluminium: Atoms) -> None:
    found, spectra = compare_phonons(Springs(1.05), Springs(1.0), (aluminium, aluminium))
    certificate, data = evidence()
    from dataclasses import replace

    html = build_report(certificate.model_copy(update={"phonons": found}), replace(data, spectra=spectra))
    assert "Phonons" in html and "figure-phonons" in html
