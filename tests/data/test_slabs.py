"""Slabs, the gaps between layers that are known in closed form, and what counts as a network of bonds."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111, graphene, molecule

from compactmlip.data.slabs import cleavage_gap, is_network, low_index_planes, slab

LENGTH = 2.6


@pytest.fixture(scope="module")
def salt() -> Atoms:
    return bulk("NaCl", "rocksalt", a=2 * LENGTH, cubic=True)


def _molecules() -> Atoms:
    """Water molecules on a lattice; hydrogen bonds of 1.9 Angstrom do not count as bonds."""
    atoms = molecule("H2O")
    atoms.set_cell([3.0, 3.1, 2.9])
    atoms.pbc = True
    return atoms


def _graphite() -> Atoms:
    layer = graphene(vacuum=3.4)
    layer.pbc = True
    return layer


@pytest.mark.parametrize(
    ("atoms", "expected"),
    [
        (bulk("NaCl", "rocksalt", a=5.64), True),
        (bulk("NaCl", "rocksalt", a=5.64, cubic=True), True),
        (bulk("CsCl", "cesiumchloride", a=4.12), True),
        (bulk("Cu"), True),
        (bulk("Li"), True),
        (bulk("Si").repeat((1, 2, 1)), True),
        (bulk("ZnO", "wurtzite", a=3.25, c=5.2), True),
        (_molecules(), False),
        (_graphite(), False),
        (fcc111("Cu", (1, 1, 3), vacuum=5.0, periodic=True), False),
        (fcc111("Cu", (1, 1, 3), vacuum=5.0), False),
        (molecule("C6H6"), False),
        (Atoms("Ar", cell=[5.3] * 3, pbc=True), False),
    ],
)
def test_networks(atoms: Atoms, expected: bool) -> None:
    assert is_network(atoms) is expected


def test_guests_are_no_part_of_a_network() -> None:
    """One molecule in the large pores of a framework."""
    frame = bulk("Po", "sc", a=3.3).repeat(4)
    hollow = frame[[not all(0 < f < 0.7 for f in x) for x in frame.get_scaled_positions()]]
    assert is_network(hollow)
    guest = molecule("N2")
    guest.translate(hollow.cell.array.sum(axis=0) / 2 - guest.positions.mean(axis=0) - [0.8, 0.8, 0.8])
    assert not is_network(hollow + guest)


@pytest.mark.parametrize(
    ("plane", "gap"), [((1, 0, 0), 1.0), ((0, -1, 0), 1.0), ((1, 1, 0), 1 / 2**0.5), ((1, 1, 1), 1 / 3**0.5)]
)
def test_gaps_of_rock_salt(salt: Atoms, plane: tuple[int, int, int], gap: float) -> None:
    assert cleavage_gap(salt, plane)[0] == pytest.approx(gap * LENGTH)
    shifted = salt.copy()
    shifted.positions += [0.3, -0.7, 1.1]
    assert cleavage_gap(shifted, plane)[0] == pytest.approx(gap * LENGTH)


def test_gaps_of_diamond() -> None:
    """Between the double layers of (111): sqrt(3)/4 a."""
    found = max(cleavage_gap(bulk("Si", a=5.43), plane)[0] for plane in low_index_planes())
    assert found == pytest.approx(3**0.5 / 4 * 5.43)


def test_planes_are_named_once() -> None:
    planes = low_index_planes()
    assert len(planes) == len(set(planes)) == 13
    assert not {tuple(-i for i in plane) for plane in planes} & set(planes)


def test_slab(salt: Atoms) -> None:
    """Cut between layers, wherever the atoms lie in the cell; stoichiometric; vacuum as asked for."""
    rattled = salt.copy()
    rattled.rattle(1e-4, seed=1)
    rattled.positions -= 0.3
    for atoms in (salt, rattled):
        system = slab(atoms, (1, 0, 0), vacuum=9.0, thickness=8.0)
        heights = np.sort(system.positions[:, 2])
        assert system.symbols.count("Na") == system.symbols.count("Cl") == len(system) / 2
        assert np.ptp(heights) == pytest.approx(3 * LENGTH, abs=0.01)
        gap = system.cell.lengths()[2] - np.ptp(heights)
        assert gap == pytest.approx(9.0 + LENGTH, abs=0.01)
        assert np.allclose(system.cell[2][:2], 0, atol=1e-9)
    assert len(slab(salt, (1, 0, 0), 9.0, 4.0)) == 8
