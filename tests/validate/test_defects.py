"""Vacancies and surfaces of pair potentials, whose unrelaxed energies count broken bonds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import Calculator, all_changes
from ase.neighborlist import neighbor_list

from compactmlip.validate.checks import Thresholds
from compactmlip.validate.checks_dynamics import defect_checks
from compactmlip.validate.defects import (
    J_PER_M2,
    Defect,
    compare_defects,
    easiest_plane,
    evaluations,
    formula,
    surface_energy,
    vacancy_energy,
)
from compactmlip.validate.report import build_report

BOND = 0.3
"""eV"""


class Bonds(Calculator):
    """Nearest neighbours in a Morse well, of ``depth`` at ``length``; nothing beyond ``reach`` times that."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def __init__(self, length: float, depth: float = BOND, reach: float = 1.2) -> None:
        super().__init__()
        self.length, self.depth, self.reach = length, depth, reach

    def calculate(self, atoms: Any = None, properties: Any = ("energy",), changes: Any = all_changes) -> None:
        super().calculate(atoms, properties, changes)
        i, r, vectors = neighbor_list("idD", self.atoms, self.reach * self.length)
        e = np.exp(-6 * (r / self.length - 1))
        energy = self.depth * (e**2 - 2 * e)
        slope = 6 / self.length * self.depth * (2 * e - 2 * e**2)
        forces = np.zeros((len(self.atoms), 3))
        np.add.at(forces, i, (slope / r)[:, None] * vectors)
        self.results = {"energy": float(energy.sum()) / 2, "forces": forces}


LENGTH = 2.6


@pytest.fixture(scope="module")
def copper() -> Atoms:
    return bulk("Cu", cubic=True, a=LENGTH * np.sqrt(2))


@pytest.fixture(scope="module")
def salt() -> Atoms:
    return bulk("NaCl", "rocksalt", a=2 * LENGTH, cubic=True)


def test_vacancy_breaks_twelve_bonds_and_gets_six_back(copper: Atoms) -> None:
    """E(N-1) - (N-1)/N E(N) = 12 bonds - 6 bonds of the crystal's atom: the cohesive energy."""
    unrelaxed, relaxed = vacancy_energy(Bonds(LENGTH), copper)
    assert unrelaxed == pytest.approx(6 * BOND)
    assert relaxed == pytest.approx(unrelaxed)  # bonds without tension: nothing moves
    tense, relaxed = vacancy_energy(Bonds(1.02 * LENGTH), copper)
    assert relaxed < tense - 1e-3 and vacancy_energy(Bonds(1.02 * LENGTH), copper, 0) == (tense, tense)


def test_schottky_defect_of_rock_salt(salt: Atoms) -> None:
    """Two vacancies break six bonds each; the pair that is put back has six."""
    unrelaxed, _ = vacancy_energy(Bonds(LENGTH), salt, 0)
    assert formula(salt) == {"Cl": 1, "Na": 1} and unrelaxed == pytest.approx((12 - 6) * BOND)
    assert formula(Atoms("Mg2Si2O6")) == {"Mg": 1, "O": 3, "Si": 1}


@pytest.mark.parametrize(
    ("plane", "broken", "area"),
    [((1, 0, 0), 4, 1 / 2), ((1, 1, 0), 6, 1 / np.sqrt(2)), ((1, 1, 1), 3, np.sqrt(3) / 4)],
)
def test_surfaces_of_fcc_break_bonds(
    copper: Atoms, plane: tuple[int, int, int], broken: int, area: float
) -> None:
    """Bonds through the cut for each atom of a face, and the area of that atom in units of a^2."""
    expected = broken * BOND / 2 / (area * 2 * LENGTH**2) * J_PER_M2
    assert surface_energy(Bonds(LENGTH), copper, plane, 0)[0] == pytest.approx(expected)


def test_cleavage_of_rock_salt(salt: Atoms) -> None:
    """(100) breaks one bond per atom; found from the conventional and from the primitive cell."""
    expected = BOND / 2 / LENGTH**2 * J_PER_M2
    primitive = bulk("NaCl", "rocksalt", a=2 * LENGTH)
    for atoms in (salt, primitive):
        plane = easiest_plane(Bonds(LENGTH), atoms)
        assert plane is not None
        unrelaxed, relaxed = surface_energy(Bonds(LENGTH), atoms, plane)
        assert unrelaxed == pytest.approx(expected) and relaxed <= unrelaxed
    assert easiest_plane(Bonds(LENGTH), salt) == (1, 0, 0)


def _verdict(found: tuple[Defect, ...]) -> str:
    (check,) = defect_checks(found, Thresholds())
    return check.verdict


def test_same_passes_and_weaker_bonds_warn(salt: Atoms) -> None:
    before = salt.positions.copy()
    same = compare_defects(Bonds(LENGTH), Bonds(LENGTH), (salt, salt), 5)
    assert [d.name for d in same] == ["Schottky defect", "surface (1 0 0)"] and _verdict(same) == "pass"
    assert all(d.error == 0 for d in same)
    weak = compare_defects(Bonds(LENGTH, 0.7 * BOND), Bonds(LENGTH), (salt, salt), 0)
    assert all(d.error == pytest.approx(30) for d in weak) and _verdict(weak) == "warn"
    assert np.array_equal(salt.positions, before)
    assert defect_checks([], Thresholds()) == []


def test_what_is_left_out(salt: Atoms) -> None:
    """Formula units of many atoms have no Schottky defect, large cells no slab."""
    large = Atoms("Li10GeP2S12", np.random.default_rng(0).uniform(0, 9, (25, 3)), cell=[9, 9, 9], pbc=True)
    large = large.repeat(2)
    assert compare_defects(Bonds(1.0), Bonds(1.0), (large, large), 0) == ()
    assert evaluations(salt) == 3 * 30 + 13


def test_in_the_report(evidence: Any, salt: Atoms) -> None:
    certificate, data = evidence()
    found = compare_defects(Bonds(LENGTH), Bonds(LENGTH), (salt, salt), 0)
    checks = (*certificate.checks, *defect_checks(found, Thresholds()))
    changed = certificate.model_copy(update={"defects": found, "checks": checks})
    html = build_report(changed, data)
    assert "Vacancies and surfaces" in html and "surface (1 0 0)" in html and ">inf<" not in html
    assert type(certificate).model_validate_json(changed.model_dump_json()) == changed
