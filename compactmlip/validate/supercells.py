"""Cells of a useful size."""

from __future__ import annotations

import numpy as np
from ase import Atoms

from compactmlip.validate.parity import Array

MIN_LENGTH = 8.0
"""Angstrom; smallest distance between opposite faces of the cell that is simulated."""

MAX_ATOMS = 256
"""A supercell is not made larger than this."""


def supercell(atoms: Atoms, min_length: float = MIN_LENGTH, max_atoms: int = MAX_ATOMS) -> Atoms:
    """Repeat a periodic structure until opposite faces are ``min_length`` apart, within ``max_atoms``.

    Directions that are not periodic are left alone.  Constraints and calculator are dropped.
    """
    repeats = np.ones(3, dtype=int)
    heights = face_distances(atoms)
    while True:
        lengths = np.where(atoms.pbc, heights * repeats, np.inf)
        axis = int(np.argmin(lengths))
        grown = repeats + (np.arange(3) == axis)
        if lengths[axis] >= min_length or len(atoms) * int(grown.prod()) > max_atoms:
            break
        repeats = grown
    result = atoms.repeat(tuple(int(r) for r in repeats))
    result.set_constraint()
    result.calc = None
    return result


def face_distances(atoms: Atoms) -> Array:
    """Distances between opposite faces of the cell in Angstrom, (3,); infinite where not periodic."""
    if not atoms.pbc.any():
        return np.full(3, np.inf)
    cell = atoms.cell.complete()
    return np.where(atoms.pbc, 1.0 / np.linalg.norm(np.linalg.inv(cell.array), axis=0), np.inf)


def near_size(atoms: Atoms, target: int) -> Atoms:
    """Repeat a periodic structure to about ``target`` atoms, as cubic as it gets."""
    if not atoms.pbc.any():
        return atoms.copy()
    best, repeats = (1, 1, 1), np.ones(3, dtype=int)
    lengths = np.where(atoms.pbc, np.maximum(atoms.cell.lengths(), 1e-6), np.inf)
    while len(atoms) * int(repeats.prod()) < target:
        repeats = repeats + (np.arange(3) == int(np.argmin(lengths * repeats)))
        if _off(len(atoms) * int(repeats.prod()), target) <= _off(len(atoms) * int(np.prod(best)), target):
            best = (int(repeats[0]), int(repeats[1]), int(repeats[2]))
    result = atoms.repeat(best)
    result.set_constraint()
    return result


def _off(size: int, target: int) -> float:
    return abs(float(np.log(size / target)))
