"""Geometric perturbations of a structure: supercells, strain, thermal displacement, vacancies."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from ase.geometry import find_mic
from ase.units import kB

from compactmlip.data.graph import neighbor_list
from compactmlip.errors import InputError

SHORTEST_DISTANCE_RATIO = 0.6
"""Two atoms closer than this times the sum of their covalent radii are not a sensible structure."""

SIGMA_RANGE = (0.01, 0.3)
"""Angstrom; bounds of the thermal displacement per Cartesian direction."""

MAX_ASPECT = 2.5
"""Largest ratio of a supercell's heights along periodic directions, unless the input's is larger."""

BREATHING = 0.1
"""Of the distance: relaxations around vacancies in oxides, semiconductors and metals are smaller."""

Repeats = tuple[int, int, int]


def bare(atoms: Atoms) -> Atoms:
    """Copy of species, positions, cell and periodicity alone."""
    return Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)


def periodic_heights(atoms: Atoms) -> np.ndarray:
    """Distance in Angstrom between the cell's opposite faces, for each periodic direction."""
    return np.asarray(1.0 / np.linalg.norm(np.linalg.pinv(atoms.cell.array[atoms.pbc]), axis=0))


def compact_supercells(atoms: Atoms, max_atoms: int) -> list[Repeats]:
    """Repeats along periodic directions that give at most ``max_atoms`` atoms and no needle or plate.

    Sorted by the shortest height, longest first; (1, 1, 1) is not among them.
    """
    most = max_atoms // len(atoms)
    if not atoms.pbc.any() or most < 2:
        return []
    heights = periodic_heights(atoms)
    aspect = max(MAX_ASPECT, heights.max() / heights.min())
    found: list[tuple[float, Repeats]] = []
    for repeats in _repeats(atoms.pbc, most):
        scaled = heights * np.array(repeats)[atoms.pbc]
        if math.prod(repeats) > 1 and scaled.max() <= aspect * scaled.min() + 1e-6:
            found.append((round(float(scaled.min()), 6), repeats))
    return [repeats for _, repeats in sorted(found, key=lambda x: (-x[0], math.prod(x[1]), x[1]))]


def _repeats(pbc: np.ndarray, most: int) -> Iterator[Repeats]:
    """All repeats along periodic directions whose product is at most ``most``."""
    for a in range(1, most + 1 if pbc[0] else 2):
        for b in range(1, most // a + 1 if pbc[1] else 2):
            for c in range(1, most // (a * b) + 1 if pbc[2] else 2):
                yield a, b, c


def thermal_sigma(stiffness: np.ndarray, temperature: float) -> np.ndarray:
    """Displacement per Cartesian direction in Angstrom, sigma = sqrt(kB T / k), bounded.

    With k the mean diagonal force constant of an atom, independent displacements of this size have the
    mean harmonic energy 3/2 kB T per atom (equipartition), whatever the coupling between atoms is.

    Parameters
    ----------
    stiffness
        Force constant k of each atom in eV/Angstrom^2.
    temperature
        Kelvin; zero gives zero.
    """
    if temperature <= 0:
        return np.zeros_like(stiffness)
    low, high = SIGMA_RANGE
    # A floor on k gives atoms without restoring force the upper bound.
    return np.maximum(np.sqrt(kB * temperature / np.maximum(stiffness, kB * temperature / high**2)), low)


def displaced(atoms: Atoms, sigma: np.ndarray, rng: np.random.Generator) -> Atoms:
    """Move every atom by normal displacements of standard deviation ``sigma`` (N,), Angstrom."""
    out = bare(atoms)
    out.positions += sigma[:, None] * rng.standard_normal((len(atoms), 3))
    return out


def random_deformation(atoms: Atoms, strain: float, shear: float, rng: np.random.Generator) -> np.ndarray:
    """Symmetric deformation gradient (3, 3) that acts along the periodic directions only.

    The same linear strain along all periodic directions, uniform in +-``strain``, plus a traceless part
    with diagonal and off-diagonal elements uniform in +-``shear``.
    """
    part = rng.uniform(-shear, shear, (3, 3))
    part = np.triu(part) + np.triu(part, 1).T
    part -= np.eye(3) * np.trace(part) / 3
    part += np.eye(3) * rng.uniform(-strain, strain)
    vectors = atoms.cell.array[atoms.pbc]
    span = np.linalg.pinv(vectors) @ vectors  # projector onto the periodic directions
    return np.asarray(np.eye(3) + span @ part @ span)


def deformed(atoms: Atoms, deformation: np.ndarray) -> Atoms:
    """Apply a deformation gradient to cell and atoms."""
    out = bare(atoms)
    out.set_cell(atoms.cell.array @ deformation.T, scale_atoms=False)
    out.positions = atoms.positions @ deformation.T
    return out


def with_vacancy(atoms: Atoms, index: int, rng: np.random.Generator) -> Atoms:
    """Remove one atom and let the others come closer, or withdraw.

    Around a point defect in an isotropic elastic solid atoms move along the radius by an amount that falls
    off as 1/r^2; that of the nearest neighbours is uniform in +-:data:`BREATHING` of their distance.
    """
    out = bare(atoms)
    del out[index]
    vectors, lengths = find_mic(out.positions - atoms.positions[index], out.cell, out.pbc)
    nearest = lengths.min()
    amplitude = rng.uniform(-BREATHING, BREATHING) * nearest
    out.positions += amplitude * (nearest**2 / lengths**3)[:, None] * vectors
    return out


def shortest_ratio(atoms: Atoms) -> float:
    """Smallest distance divided by the sum of covalent radii, over all pairs; at most 1."""
    radii = covalent_radii[atoms.numbers]
    try:
        i, j, _, vectors = neighbor_list(atoms, float(2 * radii.max()))
    except InputError:  # on top of each other, or not finite
        return 0.0
    return min(1.0, float((np.linalg.norm(vectors, axis=1) / (radii[i] + radii[j])).min(initial=1.0)))
