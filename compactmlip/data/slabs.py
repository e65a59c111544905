"""Slabs of a crystal, and which crystals can sensibly be cleaved."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from ase import Atoms
from ase.build import surface
from ase.data import covalent_radii
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import breadth_first_order, connected_components

from compactmlip.data.graph import neighbor_list

BOND_RATIO = 1.25
"""Two atoms are bonded if they are closer than this times the sum of their covalent radii."""

Plane = tuple[int, int, int]


def is_network(atoms: Atoms) -> bool:
    """Whether bonds connect every atom with its images in all three directions.

    True for ionic and covalent crystals and metals.  False for molecules, layers, and crystals and liquids
    of molecules, which are neither cleaved through their molecules nor lose single atoms.
    """
    if not atoms.pbc.all():
        return False
    radii = covalent_radii[atoms.numbers]
    i, j, shifts, vectors = neighbor_list(atoms, float(2 * BOND_RATIO * radii.max()))
    bonded = np.linalg.norm(vectors, axis=1) < BOND_RATIO * (radii[i] + radii[j])
    i, j, shifts = i[bonded], j[bonded], shifts[bonded]
    bonds = csr_matrix((np.ones(len(i)), (i, j)), shape=(len(atoms), len(atoms)))
    count, labels = connected_components(bonds, directed=False)
    return all(_rank(int(np.argmax(labels == k)), bonds, (i, j, shifts)) == 3 for k in range(count))


def _rank(start: int, bonds: csr_matrix, edges: tuple[np.ndarray, np.ndarray, np.ndarray]) -> int:
    """Number of independent lattice vectors along which bonds lead from an atom to its images.

    Along a spanning tree every atom gets the cell in which the tree finds it; each other bond closes a loop
    that ends in an image of its start.
    """
    i, j, shifts = edges
    order, before = breadth_first_order(bonds, start, directed=False)
    first = {(int(a), int(b)): shift for a, b, shift in zip(i, j, shifts, strict=True)}
    cells = np.zeros((bonds.shape[0], 3), dtype=int)
    for atom in order[1:]:
        cells[atom] = cells[before[atom]] + first[int(before[atom]), int(atom)]
    reached = np.isin(i, order)
    loops = np.unique((cells[i] + shifts - cells[j])[reached], axis=0)
    return int(np.linalg.matrix_rank(loops)) if len(loops) else 0


def low_index_planes() -> list[Plane]:
    """Miller indices of -1, 0 and 1, one of each pair of opposites."""
    planes: list[Plane] = [(h, k, l) for h, k, l in itertools.product((1, 0, -1), repeat=3)]
    return [plane for plane in planes if next((index for index in plane if index), 0) > 0]


def cleavage_gap(atoms: Atoms, plane: Sequence[int]) -> tuple[float, float]:
    """Widest gap between the layers of atoms along a plane's normal.

    Crystals tend to cleave and to grow where it is wide (Donnay and Harker, Am. Mineral. 22, 446 (1937)).

    Returns
    -------
    width, middle
        In Angstrom, and where it is in units of the spacing of lattice planes.
    """
    indices = np.array(plane)
    spacing = 1 / np.linalg.norm(atoms.cell.reciprocal().array.T @ indices)
    heights = np.sort((atoms.get_scaled_positions() @ indices) % 1.0)
    gaps = np.diff(np.append(heights, heights[0] + 1))
    widest = int(np.argmax(gaps > gaps.max() - 1e-3))  # the first of those that differ by rounding
    return float(gaps[widest] * spacing), float(heights[widest] + gaps[widest] / 2)


def slab(atoms: Atoms, plane: Sequence[int], vacuum: float, thickness: float) -> Atoms:
    """Slab with the crystal's composition, cut where the gap between its layers is widest.

    Parameters
    ----------
    atoms
        A crystal, periodic in three directions.
    plane
        Miller indices with respect to its cell.
    vacuum
        Angstrom that are added between the slab and its image; the third cell vector is normal to the
        surface.
    thickness
        Angstrom, at least: layers of lattice planes are added until it is reached.
    """
    bare = Atoms(atoms.numbers, cell=atoms.cell, pbc=True)
    indices = np.array(plane)
    # ASE cuts at height 0.
    middle = cleavage_gap(atoms, plane)[1]
    bare.set_scaled_positions(atoms.get_scaled_positions() - middle * indices / (indices @ indices))
    spacing = _height(surface(bare, tuple(plane), 1, periodic=True))
    layers = max(1, math.ceil(thickness / spacing - 1e-6))
    system = surface(bare, tuple(plane), layers, periodic=True)
    cell = system.cell.array.copy()
    cell[2, 2] += vacuum  # it is normal to the others
    system.set_cell(cell)
    system.positions[:, 2] += vacuum / 2
    return system


def _height(system: Atoms) -> float:
    """Angstrom along the normal of the first two vectors of a cell."""
    return float(system.get_volume() / np.linalg.norm(np.cross(system.cell[0], system.cell[1])))
