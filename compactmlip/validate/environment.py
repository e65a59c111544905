"""Errors of forces by the surroundings of atoms: species and number of neighbours.

Mean errors hide what is rare: surfaces, defects and sparse parts of a liquid, which have fewer neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms
from pydantic import BaseModel, ConfigDict

from compactmlip.data.graph import neighbor_list
from compactmlip.validate.parity import MILLI, Array, Labels

REACH = 6.0
"""Angstrom; atoms without another one so close have no neighbours."""


class EnvironmentErrors(BaseModel):
    """Atoms of one species with one number of neighbours.

    Attributes
    ----------
    neighbors
        Effective coordination number, rounded.
    atoms
        How many there are in all structures.
    forces, forces_error
        Mean absolute error of a component in meV/Angstrom, and its standard error (atoms as independent; None
        for a single one).
    mean_force
        Mean size of a component of the reference, meV/Angstrom.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
    species: str
    neighbors: int
    atoms: int
    forces: float
    forces_error: float | None
    mean_force: float


def errors_by_environment(
    frames: Sequence[Atoms], reference: Labels, predicted: Labels
) -> tuple[EnvironmentErrors, ...]:
    """Errors of the forces on all atoms, by species and rounded effective coordination number."""
    symbols = np.array([s for atoms in frames for s in atoms.get_chemical_symbols()])
    counts = np.rint(np.concatenate([effective_coordination(atoms) for atoms in frames])).astype(int)
    true = MILLI * np.concatenate(reference.forces)
    errors = np.abs(MILLI * np.concatenate(predicted.forces) - true).mean(axis=1)
    rows = []
    for symbol, count in sorted({(str(s), int(n)) for s, n in zip(symbols, counts, strict=True)}):
        chosen = (symbols == symbol) & (counts == count)
        number = int(chosen.sum())
        row = EnvironmentErrors(
            species=symbol,
            neighbors=count,
            atoms=number,
            forces=float(errors[chosen].mean()),
            forces_error=float(errors[chosen].std(ddof=1) / np.sqrt(number)) if number > 1 else None,
            mean_force=float(np.abs(true[chosen]).mean()),
        )
        rows.append(row)
    return tuple(rows)


def effective_coordination(atoms: Atoms) -> Array:
    """Effective coordination numbers (N,): neighbours count the less, the farther they are.

    ECoN = sum_j exp(1 - (d_j / d)^6) with the mean distance d, in which each is weighted by
    exp(1 - (d_j / d_min)^6) (Hoppe, Z. Kristallogr. 150, 23 (1979)).  It needs no radii and changes
    continuously; 12 in fcc, 6 in rock salt, 4 in diamond.
    """
    centers, _, _, vectors = neighbor_list(atoms, REACH)
    lengths = np.linalg.norm(vectors, axis=1)
    nearest = np.full(len(atoms), np.inf)
    np.minimum.at(nearest, centers, lengths)
    weights = np.exp(1 - (lengths / nearest[centers]) ** 6)
    total = np.bincount(centers, weights, len(atoms))
    mean = np.bincount(centers, weights * lengths, len(atoms)) / np.where(total > 0, total, 1.0)
    shares = np.exp(1 - (lengths / mean[centers]) ** 6)
    return np.asarray(np.bincount(centers, shares, len(atoms)), dtype=float)
