from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, fcc111, molecule
from ase.data import covalent_radii
from ase.geometry import find_mic
from springs import FORCE_CONSTANT, LENGTH, RANGE, Springs

from compactmlip.data.graph import build_graph, energy_and_derivatives
from compactmlip.data.md import stiffness, trajectory
from compactmlip.data.perturb import (
    BREATHING,
    compact_supercells,
    deformed,
    displaced,
    periodic_heights,
    random_deformation,
    shortest_ratio,
    thermal_sigma,
    with_vacancy,
)


@pytest.fixture
def springs(make_spec: Callable[..., Any]) -> Springs:
    return Springs(make_spec(num_layers=1, cutoff=RANGE))


@pytest.fixture
def rocksalt() -> Atoms:
    return bulk("MgO", "rocksalt", a=2 * LENGTH, cubic=True)


# Force constants and thermal displacements


def test_stiffness_of_springs(springs: Springs, rocksalt: Atoms, rng: np.random.Generator) -> None:
    """18 springs, each k along one direction: the mean diagonal force constant is 18 k / 3."""
    crystal = rocksalt.repeat(2)
    values = np.array([stiffness(crystal, springs, rng) for _ in range(20)])
    assert values.mean() == pytest.approx(FORCE_CONSTANT, rel=0.04)
    assert values.mean(axis=1).std() < 0.2 * FORCE_CONSTANT, "one estimate of a crystal is already good"


def test_displacements_have_the_energy_of_their_temperature(
    springs: Springs, rocksalt: Atoms, rng: np.random.Generator
) -> None:
    """Independent displacements carry 3/2 kB T per atom in the harmonic limit (equipartition)."""
    crystal = rocksalt.repeat(3)
    for temperature in (50.0, 200.0):
        sigma = thermal_sigma(np.full(len(crystal), FORCE_CONSTANT), temperature)
        energy = 0.0
        for _ in range(4):
            moved = displaced(crystal, sigma, rng)
            energy += energy_and_derivatives(springs, build_graph(moved, springs.spec)).energies.item() / 4
        assert energy == pytest.approx(1.5 * units.kB * temperature * len(crystal), rel=0.08)


def test_amplitude_grows_with_temperature_and_is_bounded() -> None:
    k = np.array([4.0, 16.0, 64.0])
    cold, hot = thermal_sigma(k, 300.0), thermal_sigma(k, 1200.0)
    assert hot == pytest.approx(2 * cold)
    assert cold[0] == pytest.approx(2 * cold[1])
    assert cold[0] == pytest.approx(np.sqrt(0.025852 / 4.0), rel=1e-4)
    assert thermal_sigma(np.array([-5.0, 0.0, 1e9]), 300.0) == pytest.approx([0.3, 0.3, 0.01])
    assert not thermal_sigma(k, 0.0).any()


# Geometry


@pytest.mark.parametrize("pbc", [(True, True, True), (True, True, False), (False, False, True)])
def test_deformation_acts_along_periodic_directions_only(
    pbc: tuple[bool, bool, bool], rng: np.random.Generator
) -> None:
    atoms = Atoms("MgO", [[0, 0, 0], [1, 2, 3]], cell=[[4, 0.3, 0], [0.2, 5, 0.5], [1, 0.1, 6]], pbc=pbc)
    periodic = atoms.cell.array[atoms.pbc]
    normal = np.linalg.svd(periodic)[2][len(periodic) :]
    for _ in range(20):
        gradient = random_deformation(atoms, 0.04, 0.03, rng)
        assert gradient == pytest.approx(gradient.T)
        assert normal @ gradient == pytest.approx(normal)
        assert np.abs(np.linalg.eigvalsh(gradient) - 1).max() < 0.04 + 3 * 0.03
        moved = deformed(atoms, gradient)
        if all(pbc):
            assert moved.get_scaled_positions() == pytest.approx(atoms.get_scaled_positions())
    assert np.abs(gradient - np.eye(3)).max() > 1e-3


def test_volume_strain_is_isotropic_without_shear(rocksalt: Atoms, rng: np.random.Generator) -> None:
    strains = [random_deformation(rocksalt, 0.04, 0.0, rng) - np.eye(3) for _ in range(200)]
    assert np.allclose(strains, [np.eye(3) * e[0, 0] for e in strains])
    assert -0.04 <= min(e[0, 0] for e in strains) < -0.03
    assert 0.03 < max(e[0, 0] for e in strains) <= 0.04


def test_supercells_are_compact_and_small_enough() -> None:
    primitive = bulk("Si")
    cells = compact_supercells(primitive, 24)
    assert (2, 2, 3) in cells and (1, 1, 12) not in cells and (1, 1, 1) not in cells
    heights = [periodic_heights(primitive.repeat(r)).min() for r in cells]
    assert np.diff(heights).max() < 1e-5
    assert all(np.prod(r) * 2 <= 24 for r in cells)
    slab = fcc111("Al", (1, 1, 3), vacuum=8)
    assert all(r[2] == 1 for r in compact_supercells(slab, 24)) and compact_supercells(slab, 24)
    assert compact_supercells(molecule("H2O"), 300) == []
    assert compact_supercells(bulk("Si"), 3) == []


def test_shortest_ratio(rocksalt: Atoms) -> None:
    pair = Atoms("MgO", [[0, 0, 0], [0, 0, 1.0]])
    assert shortest_ratio(pair) == pytest.approx(1.0 / (covalent_radii[12] + covalent_radii[8]))
    pair.set_cell([10, 10, 1.5])
    pair.pbc = (False, False, True)
    assert shortest_ratio(pair) == pytest.approx(0.5 / (covalent_radii[12] + covalent_radii[8]))
    assert shortest_ratio(Atoms("O")) == 1.0
    assert shortest_ratio(Atoms("O2", [[0, 0, 0]] * 2)) == 0.0


# MD


def test_md_keeps_its_temperature(springs: Springs, rocksalt: Atoms, rng: np.random.Generator) -> None:
    """Mean potential energy of the harmonic solid stays near equipartition: 3N/2 kB T."""
    crystal = rocksalt.repeat((2, 1, 1))
    start = displaced(crystal, thermal_sigma(np.full(len(crystal), FORCE_CONSTANT), 100.0), rng)
    frames = trajectory(start, springs, 100.0, steps=600, interval=10, rng=rng)
    assert len(frames) == 60
    energies = [energy_and_derivatives(springs, build_graph(f, springs.spec)).energies.item() for f in frames]
    assert np.mean(energies) == pytest.approx(1.5 * units.kB * 100.0 * len(crystal), rel=0.3)
    assert all(a.calc is None and "momenta" not in a.arrays for a in frames)


def test_exploding_md_is_cut_short(springs: Springs, rocksalt: Atoms, rng: np.random.Generator) -> None:
    unstable = Springs(springs.spec, spring=-20.0)
    start = displaced(rocksalt, np.full(8, 0.1), rng)
    frames = trajectory(start, unstable, 300.0, steps=400, interval=5, rng=rng)
    assert len(frames) < 40
    assert all(shortest_ratio(f) > 0.6 for f in frames)


def test_atoms_around_a_vacancy_move_along_the_radius(rng: np.random.Generator) -> None:
    """By an amount that falls off as 1/r^2, at most a tenth of the shortest distance, either way."""
    crystal = bulk("MgO", "rocksalt", a=4.2, cubic=True).repeat(3)
    largest = []
    for index in (0, 77, 150):
        out = with_vacancy(crystal, index, rng)
        perfect = crystal[[k for k in range(len(crystal)) if k != index]]
        vectors, lengths = find_mic(perfect.positions - crystal.positions[index], crystal.cell, True)
        moved = out.positions - perfect.positions
        along = np.einsum("ij,ij->i", moved, vectors) / lengths
        np.testing.assert_allclose(moved, along[:, None] * vectors / lengths[:, None], atol=1e-12)
        np.testing.assert_allclose(along * lengths**2, along[0] * lengths[0] ** 2, rtol=1e-6)
        largest.append(np.abs(along).max() / 2.1)
        assert out.symbols.count(crystal.symbols[index]) == 107
    assert len(crystal) == 216 and 0 < max(largest) <= BREATHING
