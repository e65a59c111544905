"""Radial distribution functions of structures for which they are known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from compactmlip.validate.checks import Thresholds, structure_checks
from compactmlip.validate.ensemble import Ensembles, Sampling
from compactmlip.validate.report import build_report
from compactmlip.validate.structure import (
    RANGE,
    Distribution,
    compare_structure,
    first_peak,
    radial_distributions,
)


def thermal(atoms: Atoms, frames: int, amplitude: float, seed: int, scale: float = 1.0) -> np.ndarray:
    """Independent displacements about (scaled) sites."""
    random = np.random.default_rng(seed)
    return np.array(
        [scale * atoms.positions + random.normal(0, amplitude, (len(atoms), 3)) for _ in range(frames)]
    )


def runs(atoms: Atoms, amplitude: float, seed: int, scale: float = 1.0, frames: int = 8) -> np.ndarray:
    """Six of them, of which each has an amplitude of its own, as vibrations that keep their energies do."""
    spread = np.random.default_rng((seed, 1)).normal(1.0, 0.05, 6)
    return np.stack([thermal(atoms, frames, amplitude * spread[k], 10 * seed + k, scale) for k in range(6)])


SAMPLING = Sampling(method="runs", atoms=64, runs=6, steps=80, temperature_K=300, timestep_fs=1)


def compared(atoms: Atoms, model: np.ndarray, teacher: np.ndarray) -> tuple[Distribution, ...]:
    found = compare_structure(Ensembles(SAMPLING, atoms, model, teacher, None))
    assert found is not None
    return found[0]


@pytest.fixture(scope="module")
def crystal() -> Atoms:
    return bulk("MgO", "rocksalt", a=4.21, cubic=True).repeat(2)


def test_ideal_gas() -> None:
    """One everywhere, also beyond half of the box."""
    random = np.random.default_rng(0)
    atoms = Atoms("Ar150He150", cell=[10, 11, 12], pbc=True)
    frames = random.uniform(0, 1, (60, 300, 3)) @ atoms.cell.array
    r, found = radial_distributions(atoms, frames)
    assert set(found) == {"Ar-Ar", "Ar-He", "He-He"} and r[-1] == pytest.approx(RANGE - 0.025)
    far = r > 1.5
    assert found["Ar-He"][:, far].mean() == pytest.approx(1, abs=0.01)
    assert found["Ar-Ar"][:, far].mean() == pytest.approx(149 / 150, abs=0.01)
    assert np.std(found["Ar-He"].mean(axis=0)[far]) < 0.1


def test_shells_of_rock_salt(crystal: Atoms) -> None:
    r, found = radial_distributions(crystal, thermal(crystal, 20, 0.05, 0))
    density = 32 / crystal.get_volume()
    opposite = first_peak(r, found["Mg-O"].mean(axis=0), density)
    assert opposite.position == pytest.approx(4.21 / 2, abs=0.02)
    assert opposite.coordination == pytest.approx(6, abs=0.02)
    same = first_peak(r, found["Mg-Mg"].mean(axis=0), density)
    assert same.position == pytest.approx(4.21 / np.sqrt(2), abs=0.02)
    assert same.coordination == pytest.approx(12, abs=0.02)


def test_peak_height_of_a_gaussian_shell() -> None:
    """A shell of n atoms, of Gaussian width s at r0, has the height n / (rho 4 pi r0^2 s sqrt(2 pi))."""
    r = np.arange(0.025, 6, 0.05)
    n, r0, s, density = 4.0, 2.7, 0.15, 0.03
    shell = n / (density * 4 * np.pi * r**2) * np.exp(-((r - r0) ** 2) / 2 / s**2) / (s * np.sqrt(2 * np.pi))
    found = first_peak(r, shell + (r > 3.6) * 1.0, density)
    assert found.position == pytest.approx(r0 - 2 * s**2 / r0, abs=0.005)
    assert found.height == pytest.approx(n / (density * 4 * np.pi * r0**2 * s * np.sqrt(2 * np.pi)), rel=0.05)
    assert found.coordination == pytest.approx(n, rel=0.02)


def test_same_potential_is_noise_and_another_is_not(crystal: Atoms) -> None:
    teacher = runs(crystal, 0.08, 1)
    same = compared(crystal, runs(crystal, 0.08, 2), teacher)
    for row in same:
        assert 0 < row.error < row.chance and row.excess == 0
    assert [c.verdict for c in structure_checks(same, Thresholds())] == ["pass"]
    hotter = compared(crystal, runs(crystal, 0.16, 3), teacher)
    assert all(row.excess > 20 for row in hotter)
    assert [c.verdict for c in structure_checks(hotter, Thresholds())] == ["fail"]
    assert all(row.model.height < 0.7 * row.teacher.height for row in hotter)
    assert max(row.excess for row in compared(crystal, runs(crystal, 0.08, 3, scale=1.02), teacher)) > 5


def test_false_alarms(crystal: Atoms) -> None:
    """Runs in one potential hardly ever differ by more than chance, though they scatter more than frames."""
    excess = []
    for seed in range(12):
        both = (runs(crystal, 0.08, 2 * seed, frames=3), runs(crystal, 0.08, 2 * seed + 1, frames=3))
        excess += [row.excess for row in compared(crystal, *both)]
    assert np.mean(np.array(excess) > 0) < 0.03


def test_teacher_that_tells_energies(crystal: Atoms) -> None:
    """Independent wells: springs of the teacher are 10 % stiffer, and peaks 5 % narrower."""
    states, stiffness = runs(crystal, 0.08, 4, frames=40), 8.617e-5 * 300 / 0.08**2
    squares = ((states - crystal.positions) ** 2).sum(axis=(2, 3))
    sampling = SAMPLING.model_copy(update={"method": "energies"})
    none = compare_structure(Ensembles(sampling, crystal, states, None, 0 * squares + 3.0))
    assert none is not None and all(row.error < 1e-9 and row.excess == 0 for row in none[0])
    found = compare_structure(Ensembles(sampling, crystal, states, None, 0.05 * stiffness * squares))
    assert found is not None
    narrower = runs(crystal, 0.08 / np.sqrt(1.1), 5, frames=40)
    for row, direct in zip(found[0], compared(crystal, states, narrower), strict=True):
        assert row.model == direct.model and row.teacher.height > 1.02 * row.model.height
        assert row.teacher.height == pytest.approx(direct.teacher.height, rel=0.04)


def test_not_periodic_or_nothing_there(crystal: Atoms) -> None:
    slab = crystal.copy()
    slab.pbc = (True, True, False)
    some = runs(crystal, 0.05, 0, frames=1)
    assert compare_structure(Ensembles(SAMPLING, slab, some, some, None)) is None
    assert compare_structure(Ensembles(SAMPLING, crystal, some[:, :0], some[:, :0], None)) is None
    assert structure_checks((), Thresholds()) == []


@pytest.mark.parametrize("method", ["runs", "energies"])
def test_in_the_report(evidence: Any, crystal: Atoms, method: str) -> None:
    found = compare_structure(
        Ensembles(SAMPLING, crystal, runs(crystal, 0.05, 0), runs(crystal, 0.05, 1), None)
    )
    assert found is not None and isinstance(found[0][0], Distribution)
    certificate, data = evidence()
    sampling = SAMPLING.model_copy(update={"method": method, "spread": 0.3})
    changed = certificate.model_copy(update={"structure": found[0], "sampling": sampling})
    html = build_report(changed, replace(data, functions=found[1]))
    assert "Structure in dynamics" in html and "figure-rdf" in html
    assert ("too slow to run" in html) == (method == "energies")
