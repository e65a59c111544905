"""What keeps atoms apart: the energy while two neighbours come together.

Models are trained on structures in which atoms keep their distance, and are free to be wrong below it.  Where
the energy falls again on the way inwards, two atoms that come over the barrier collapse; a simulation that is
hot or long enough finds it.  The two atoms move towards their midpoint, all others stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.data import covalent_radii
from ase.neighborlist import neighbor_list
from pydantic import BaseModel, ConfigDict

from compactmlip.errors import CompactMLIPError
from compactmlip.progress import Track
from compactmlip.validate.parity import Array

CLOSEST = 0.4
"""Where a path ends, in units of the sum of the covalent radii (Cordero et al. 2008, as ASE has them); the
true energy is tens of eV there."""

NO_BOND = 0.72
"""In the same units; no bond is shorter (N2 has 0.77, CO 0.79), so that below it the energy must rise."""

NOISE = 0.05
"""eV; a smaller fall is not taken for a hole."""

SAFE_BARRIER = 25.0
"""Barrier over kB T at which a collapse is not to be expected: 10^4 pairs that try 10^13 times a second for
ten nanoseconds try 10^9 times, and exp(-25) is 10^-11."""


class Approach(BaseModel):
    """How far two species are kept apart.

    Attributes
    ----------
    pair
        "Mg-O".
    start
        Distance in Angstrom from which the two atoms come together.
    barrier
        eV: from the lowest point of the path to where the energy begins to fall, or, without a hole, to the
        end of the path.
    hole
        Distance in Angstrom below which the energy falls; None if it rises to the end of the path.
    teacher_barrier, teacher_hole
        The same for the teacher; None where it was not evaluated.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
    pair: str
    start: float
    barrier: float
    hole: float | None
    teacher_barrier: float | None = None
    teacher_hole: float | None = None


@dataclass(frozen=True)
class Curve:
    """Energies along a path.

    Attributes
    ----------
    pair
        "Mg-O".
    distances
        (n,) Angstrom, falling.
    energies
        By calculator, (n,) eV relative to the start; NaN from where a calculator refused on.
    """

    pair: str
    distances: Array
    energies: dict[str, Array]


def approach(
    calculators: Mapping[str, Any], atoms: Atoms, cutoff: float, points: int = 40, *, progress: bool = False
) -> tuple[list[Approach], list[Curve]]:
    """Let the nearest pair of each two species come together.

    Parameters
    ----------
    calculators
        ASE calculators: "model", and "teacher" if it is to be compared.
    atoms
        The structure; it is not changed.
    cutoff
        Angstrom; pairs farther apart are left out.
    points
        Energies per path.
    progress
        Show a progress bar.

    Returns
    -------
    One summary and one curve for each pair of species; none if there are no two atoms within the cutoff.
    """
    pairs = nearest_pairs(atoms, cutoff)
    curves, found = [], []
    with Track("Short distances", len(pairs) * points * len(calculators), enabled=progress) as track:
        for (first, second), (i, j, vector) in pairs.items():
            radii = sum(float(covalent_radii[atoms.numbers[k]]) for k in (i, j))
            start = float(np.linalg.norm(vector))
            distances = np.linspace(start, min(CLOSEST * radii, 0.9 * start), points)
            energies = {}
            for name, calculator in calculators.items():
                energies[name] = _energies(calculator, atoms, (i, j, vector), distances)
                track.advance(points)
            curve = Curve(f"{first}-{second}", distances, energies)
            reference = energies.get("teacher")
            own = barrier(distances, energies["model"], NO_BOND * radii, reference)
            other = None if reference is None else barrier(distances, reference, NO_BOND * radii)
            curves.append(curve)
            found.append(
                Approach(
                    pair=curve.pair,
                    start=start,
                    barrier=own[0],
                    hole=own[1],
                    teacher_barrier=other[0] if other else None,
                    teacher_hole=other[1] if other else None,
                )
            )
    return found, curves


def nearest_pairs(atoms: Atoms, cutoff: float) -> dict[tuple[str, str], tuple[int, int, Array]]:
    """The nearest two atoms of each two species, with the vector between them; images of one do not count.

    Parameters
    ----------
    cutoff
        Angstrom; pairs farther apart are left out.
    """
    symbols = atoms.get_chemical_symbols()
    first, second, lengths, vectors = neighbor_list("ijdD", atoms, cutoff)
    found: dict[tuple[str, str], tuple[int, int, Array]] = {}
    for k in np.argsort(lengths, kind="stable"):
        i, j = int(first[k]), int(second[k])
        key = (symbols[i], symbols[j])
        if i != j and key[0] <= key[1] and key not in found:
            found[key] = (i, j, vectors[k])
    return dict(sorted(found.items()))


def barrier(
    distances: Array, energies: Array, no_bond: float, reference: Array | None = None
) -> tuple[float, float | None]:
    """Height of what keeps two atoms apart, and where the energy begins to fall.

    Parameters
    ----------
    distances, energies
        (n,) Angstrom, falling, and eV; NaN ends the path.
    no_bond
        Angstrom; below it the energy must rise, above it it may fall (two atoms may form a bond).
    reference
        (n,) energies of the teacher; above ``no_bond`` energies may then fall only where these do.

    Returns
    -------
    The barrier in eV, see :class:`Approach`, and the distance of the hole or None.
    """
    known = len(energies) if np.isfinite(energies).all() else int(np.argmin(np.isfinite(energies)))
    if not known:
        return 0.0, float(distances[0])
    r, e = distances[:known], energies[:known]
    highest = np.maximum.accumulate(e)
    forbidden = r < no_bond
    if reference is not None:
        other = reference[:known]
        forbidden |= other >= np.maximum.accumulate(other) - NOISE  # false for NaN
    fallen = np.flatnonzero(forbidden & (e < highest - NOISE))
    if not fallen.size:
        return float(e.max() - e.min()), None
    top = int(np.argmax(e[: fallen[0] + 1]))
    return float(e[top] - e[: top + 1].min()), float(r[top])


def safe_temperature(height: float) -> float:
    """Temperature in K up to which a barrier in eV keeps atoms apart, see :data:`SAFE_BARRIER`."""
    return max(height, 0.0) / (SAFE_BARRIER * units.kB)


def _energies(calculator: Any, atoms: Atoms, pair: tuple[int, int, Array], distances: Array) -> Array:
    i, j, vector = pair
    length = float(np.linalg.norm(vector))
    energies = np.full(len(distances), np.nan)
    for k, distance in enumerate(distances):
        moved = atoms.copy()
        moved.set_constraint()
        shift = 0.5 * (1 - distance / length) * vector
        moved.positions[i] += shift
        moved.positions[j] -= shift
        moved.calc = calculator
        try:
            energies[k] = moved.get_potential_energy()
        except CompactMLIPError:  # not finite: the simulation would stop here and say so
            break
    return np.asarray(energies - energies[0])
