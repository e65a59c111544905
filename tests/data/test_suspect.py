"""Suspected units, from labels beside the predictions of a model that is a little wrong."""

from __future__ import annotations

import numpy as np
import pytest
from ase import units

from compactmlip.data.suspect import suspected_energies, suspected_forces, suspected_stresses

COUNTS = np.array(
    [[4, 4], [2, 2], [4, 2], [1, 3], [4, 4], [6, 2], [2, 2], [3, 3], [4, 4], [8, 8]], dtype=float
)


@pytest.fixture
def energies(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Labels and predictions, eV, with other energies of atoms and 10 % disagreement."""
    size = COUNTS.sum(axis=1)
    strain = rng.normal(0, 0.1, len(size))
    predictions = COUNTS @ [-1.0, -4.0] + strain * size
    labels = COUNTS @ [-200.0, -430.0] + 1.1 * strain * size + rng.normal(0, 0.01, len(size)) * size
    return labels, predictions


@pytest.mark.parametrize(
    ("unit", "size"),
    [("Hartree", units.Hartree), ("kcal/mol", units.kcal / units.mol), ("kJ/mol", units.kJ / units.mol)],
)
def test_energy_units(energies: tuple[np.ndarray, np.ndarray], unit: str, size: float) -> None:
    labels, predictions = energies
    (found,) = suspected_energies(labels / size, predictions, COUNTS)
    assert found.check == "units" and f"--energy-unit {unit}" in found.message


def test_energies_in_eV_are_not_suspected(energies: tuple[np.ndarray, np.ndarray]) -> None:
    assert suspected_energies(*energies, COUNTS) == []


def test_energies_per_atom(energies: tuple[np.ndarray, np.ndarray]) -> None:
    labels, predictions = energies
    (found,) = suspected_energies(labels / COUNTS.sum(axis=1), predictions, COUNTS)
    assert "energies per atom" in found.message and "energy_per_atom=true" in found.message


def test_energies_per_atom_of_structures_of_one_size_may_also_be_hartree(rng: np.random.Generator) -> None:
    counts = np.full((12, 1), 27.0)
    strain = 27 * rng.normal(0, 0.1, 12)
    (found,) = suspected_energies(-5.0 + 1.05 * strain / 27, -100 + strain, counts)
    assert "look like Hartree" in found.message and "look like energies per atom" in found.message


def test_energies_converted_twice(energies: tuple[np.ndarray, np.ndarray]) -> None:
    labels, predictions = energies
    (found,) = suspected_energies(labels * units.Hartree, predictions, COUNTS)
    assert "Hartree twice" in found.message


def test_too_few_or_constant_energies_say_nothing(energies: tuple[np.ndarray, np.ndarray]) -> None:
    labels, predictions = energies
    assert suspected_energies(labels[:4] / 27.2, predictions[:4], COUNTS[:4]) == []
    assert suspected_energies(labels / 27.2, COUNTS @ [-1.0, -4.0], COUNTS) == []


@pytest.mark.parametrize(
    ("unit", "size"),
    [
        ("Hartree/Bohr", units.Hartree / units.Bohr),
        ("kcal/mol/Angstrom", units.kcal / units.mol),
        ("Rydberg/Bohr", units.Rydberg / units.Bohr),
        ("meV/Angstrom", 1e-3),
    ],
)
def test_force_units(rng: np.random.Generator, unit: str, size: float) -> None:
    predictions = rng.normal(0, 1, (40, 3))
    labels = 1.2 * predictions + rng.normal(0, 0.2, (40, 3))
    assert suspected_forces(labels, predictions) == []
    (found,) = suspected_forces(labels / size, predictions)
    assert f"--forces-unit {unit}" in found.message


def test_gradients_and_pressures(rng: np.random.Generator) -> None:
    x = rng.normal(0, 1, (40, 3))
    (found,) = suspected_forces(-x, x)
    assert "gradients=true" in found.message
    (found,) = suspected_stresses(-x / units.GPa, x)
    assert "--stress-unit GPa" in found.message
    (found,) = suspected_stresses(-x, x)
    assert "compression_positive=true" in found.message


def test_labels_that_the_model_cannot_predict_are_not_judged(rng: np.random.Generator) -> None:
    assert suspected_forces(rng.normal(0, 0.02, (200, 3)), rng.normal(0, 1, (200, 3))) == []
    assert suspected_forces(np.zeros((40, 3)), rng.normal(0, 1, (40, 3))) == []
