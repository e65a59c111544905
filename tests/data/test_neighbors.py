"""Neighbour lists against brute force over explicit lattice sums, and reuse of a list with a skin."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from compactmlip.data.graph import neighbor_list
from compactmlip.data.neighbors import VerletList
from compactmlip.errors import InputError


def brute_force(atoms: Atoms, cutoff: float) -> list[tuple[int, ...]]:
    """All (centre, neighbour, shifts) closer than the cutoff; zero cell vectors only where not periodic."""
    cell = atoms.cell.complete().array
    heights = 1 / np.linalg.norm(np.linalg.inv(cell), axis=0)
    spread = np.ptp(atoms.positions @ np.linalg.inv(cell), axis=0)
    reach = np.ceil(spread + cutoff / heights).astype(int) + 1
    pairs = []
    for shift in itertools.product(
        *(range(-n, n + 1) if p else (0,) for n, p in zip(reach, atoms.pbc, strict=True))
    ):
        delta = atoms.positions[None] - atoms.positions[:, None] + np.array(shift) @ cell
        near = np.linalg.norm(delta, axis=-1) < cutoff
        if not any(shift):
            np.fill_diagonal(near, False)
        pairs += [(int(i), int(j), *shift) for i, j in np.argwhere(near)]
    return sorted(pairs)


def random_atoms(rng: np.random.Generator) -> Atoms:
    """One to six atoms, also outside the cell, in a triclinic cell with any periodicity."""
    while True:
        cell = rng.normal(size=(3, 3)) * rng.uniform(1, 6)
        if abs(np.linalg.det(cell)) > 3 and np.linalg.cond(cell) < 20:
            break
    pbc = rng.integers(0, 2, 3).astype(bool)
    if rng.random() < 0.5:
        cell[~pbc] = 0.0
    positions = rng.normal(size=(rng.integers(1, 7), 3)) * rng.choice([1, 5, 20])
    return Atoms("H" * len(positions), positions, cell=cell, pbc=pbc)


@pytest.mark.parametrize("seed", range(60))
def test_neighbor_list_is_complete(seed: int) -> None:
    rng = np.random.default_rng(seed)
    atoms, cutoff = random_atoms(rng), rng.uniform(2, 5)
    centers, neighbors, shifts, vectors = neighbor_list(atoms, cutoff)
    found = sorted(tuple(map(int, row)) for row in np.column_stack([centers, neighbors, shifts]))
    assert found == brute_force(atoms, cutoff)
    expected = atoms.positions[neighbors] - atoms.positions[centers] + shifts @ atoms.cell.array
    np.testing.assert_allclose(vectors, expected, atol=1e-10)
    assert (np.diff(centers) >= 0).all()


@pytest.mark.parametrize("distance", [6.0, 1e4, 1e9])
def test_atoms_far_apart_need_no_grid(distance: float) -> None:
    atoms = Atoms("H3", [[0, 0, 0], [0, 0, 1.0], [distance, distance, distance]])
    centers, *_ = neighbor_list(atoms, 5.0)
    assert centers.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("cell", "pbc"),
    [
        (None, True),
        ([3.0, 0.0, 0.0], (True, True, False)),
        ([[3.0, 0, 0], [6.0, 0, 0], [0, 0, 3.0]], (True, True, False)),
        ([[3.0, 0, 0], [0, 3.0, 0], [3.0, 3.0, 0]], True),
    ],
)
def test_periodic_cell_without_volume(cell: list[float] | None, pbc: bool | tuple[bool, ...]) -> None:
    with pytest.raises(InputError, match="no volume"):
        neighbor_list(Atoms("H", cell=cell, pbc=pbc), 5.0)


@pytest.mark.parametrize("cell", [None, [0.0, 0.0, 1e-5], [[3.0, 0, 0], [6.0, 0, 0], [0, 0, 3.0]]])
def test_cell_without_periodicity_means_nothing(cell: list[float] | None) -> None:
    centers, neighbors, *_ = neighbor_list(Atoms("H2", [[0, 0, 0], [0, 0, 1.0]], cell=cell), 5.0)
    assert (centers.tolist(), neighbors.tolist()) == ([0, 1], [1, 0])


def same_edges(verlet: VerletList, atoms: Atoms) -> None:
    """The list gives the edges of a new search, vectors included."""
    centers, neighbors, _, vectors = neighbor_list(atoms, verlet.cutoff)
    found = verlet.edges(atoms)
    rows = [
        Counter(map(tuple, np.column_stack([i, j, np.round(v, 7) + 0.0]).tolist()))
        for i, j, v in ((centers, neighbors, vectors), found)
    ]
    assert rows[0] == rows[1]
    assert (np.diff(found[0]) >= 0).all()


@pytest.mark.parametrize("pbc", [(1, 1, 1), (1, 0, 1), (0, 0, 1), (0, 0, 0)])
def test_skin_list_equals_new_search(pbc: tuple[int, int, int], rng: np.random.Generator) -> None:
    """Random walk with strain, drift, rotation and wrapping: never a missing or surplus pair."""
    atoms = Atoms(
        "H12", rng.uniform(0, 5, (12, 3)), cell=[[5, 0, 0], [1.0, 4.5, 0], [0.3, 0.7, 5.5]], pbc=pbc
    )
    verlet = VerletList(cutoff=3.0, skin=0.6)
    steps = 120
    for step in range(steps):
        atoms.positions += rng.normal(scale=0.02, size=atoms.positions.shape) + 0.1
        strain = np.eye(3) + rng.normal(scale=0.003, size=(3, 3))
        atoms.set_cell(atoms.cell.array @ strain, scale_atoms=bool(step % 2))
        if step % 17 == 0:
            atoms.wrap()
        same_edges(verlet, atoms)
    assert 3 <= verlet.num_searches < steps / 2


def test_pair_enters_at_the_last_moment() -> None:
    """Two atoms approach head-on: the list is reused until both have used up half the skin."""
    atoms = Atoms("H2", [[0, 0, 0], [3.59, 0, 0]])
    verlet = VerletList(cutoff=3.0, skin=0.5)
    assert len(verlet.edges(atoms)[0]) == 0  # beyond cutoff + skin: not in the list
    for step in range(1, 40):
        atoms.positions = [[0.01 * step, 0, 0], [3.59 - 0.01 * step, 0, 0]]
        same_edges(verlet, atoms)
    assert verlet.num_searches == 2


def test_compressed_cell_is_searched_again() -> None:
    """Atoms that follow the cell do not move in fractional coordinates; the strain alone counts."""
    atoms = bulk("Cu", cubic=True)
    verlet = VerletList(cutoff=3.0, skin=0.3)
    before = len(verlet.edges(atoms)[0])
    for _ in range(40):
        atoms.set_cell(atoms.cell.array * 0.99, scale_atoms=True)
        same_edges(verlet, atoms)
    assert len(verlet.edges(atoms)[0]) > before
    assert 4 <= verlet.num_searches <= 8


def test_rotation_and_translation_of_a_crystal_need_no_search(rng: np.random.Generator) -> None:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=1)
    verlet = VerletList(cutoff=4.0, skin=0.3)
    for angle in (0, 20, 45, 90, 170):
        atoms.rotate(angle, (1, 2, 3), rotate_cell=True)
        atoms.translate([10.0, -3.0, 0.5])
        same_edges(verlet, atoms)
    assert verlet.num_searches == 1


def test_other_atoms_or_periodicity_are_searched_again() -> None:
    atoms = bulk("Cu", cubic=True)
    verlet = VerletList(cutoff=4.0, skin=0.5)
    same_edges(verlet, atoms)
    atoms.pbc = (True, True, False)
    same_edges(verlet, atoms)
    atoms.append("H")
    atoms.positions[-1] = [0.9, 0.9, 0.9]
    same_edges(verlet, atoms)
    del atoms[0]
    same_edges(verlet, atoms)
    assert verlet.num_searches == 4


def test_without_skin_every_call_searches() -> None:
    atoms = bulk("Cu", cubic=True)
    verlet = VerletList(cutoff=4.0, skin=0.0)
    for _ in range(3):
        same_edges(verlet, atoms)
    assert verlet.num_searches == 3


def test_list_survives_an_error() -> None:
    atoms = bulk("Cu", cubic=True)
    verlet = VerletList(cutoff=4.0, skin=0.5)
    same_edges(verlet, atoms)
    good = atoms.positions.copy()
    atoms.positions[1] = atoms.positions[0]
    with pytest.raises(InputError, match="atoms 0 and 1 lie on top"):
        verlet.edges(atoms)
    atoms.positions[1] = np.nan
    with pytest.raises(InputError, match="atom 1 is not finite"):
        verlet.edges(atoms)
    atoms.positions = good
    same_edges(verlet, atoms)


@pytest.mark.parametrize(("cutoff", "skin"), [(3.0, -0.1), (3.0, np.nan), (0.0, 0.5), (np.inf, 0.5)])
def test_unusable_numbers(cutoff: float, skin: float) -> None:
    with pytest.raises(InputError, match="skin"):
        VerletList(cutoff, skin)
