"""Structure in dynamics: radial distribution functions of model and teacher.

Allen and Tildesley, Computer Simulation of Liquids, 2nd ed., section 2.6.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ase import Atoms
from pydantic import BaseModel, ConfigDict

from compactmlip.data.neighbors import VerletList
from compactmlip.validate.ensemble import Ensembles
from compactmlip.validate.parity import Array
from compactmlip.validate.statistics import chance_limit

RANGE = 6.0
"""Angstrom"""

WIDTH = 0.05
"""Angstrom; of a bin."""


class Peak(BaseModel):
    """First peak of a radial distribution function.

    Attributes
    ----------
    position, height
        Angstrom and dimensionless, of the parabola through the highest bin of the first shell.
    coordination
        Neighbours of the second species around one of the first, up to the minimum behind the peak.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
    position: float
    height: float
    coordination: float


class Distribution(BaseModel):
    """One pair of species in model and teacher.

    Attributes
    ----------
    pair
        "Mg-O".
    model, teacher
        First peaks.
    error
        Integral of the absolute difference over that of the teacher's function, percent.
    chance
        What ``error`` reaches between such runs of one potential in fewer than one of a hundred cases.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
    pair: str
    model: Peak
    teacher: Peak
    error: float
    chance: float

    @property
    def excess(self) -> float:
        """Percent by which the error is beyond chance, at least 0."""
        return max(0.0, self.error - self.chance)


@dataclass(frozen=True)
class Functions:
    """Radial distribution functions: distances (bins,), and by pair (bins,) of model and teacher."""

    distances: Array
    model: dict[str, Array]
    teacher: dict[str, Array]


def compare_structure(runs: Ensembles) -> tuple[tuple[Distribution, ...], Functions] | None:
    """Compare radial distribution functions in several runs, an even number of at least four.

    Returns
    -------
    Summaries by pair, and the functions; None where the structure is not periodic in all directions.
    """
    atoms = runs.cell
    if not atoms.pbc.all() or not runs.model.size:
        return None
    distances, pairs = _names(atoms)

    def observe(positions: Array) -> Array:
        _, found = radial_distributions(atoms, positions.reshape(-1, *positions.shape[2:]))
        functions = np.stack([found[pair] for pair in pairs], axis=1)
        return functions.reshape(*positions.shape[:2], *functions.shape[1:])

    own, other = runs.averages(observe)
    found = []
    for k, pair in enumerate(pairs):
        ours, theirs = own[:, k], other[:, k]
        reference, mine = theirs.mean(axis=0), ours.mean(axis=0)
        if not reference.any():
            continue
        total = _area(reference)
        density = atoms.get_chemical_symbols().count(pair.split("-")[1]) / atoms.get_volume()
        found.append(
            Distribution(
                pair=pair,
                model=first_peak(distances, mine, density),
                teacher=first_peak(distances, reference, density),
                error=100 * _area(mine - reference) / total,
                chance=100 * chance_limit(ours - theirs, _area) / total,
            )
        )
    means = ({pair: table[:, k].mean(axis=0) for k, pair in enumerate(pairs)} for table in (own, other))
    return tuple(found), Functions(distances, *means)


def radial_distributions(atoms: Atoms, positions: Array) -> tuple[Array, dict[str, Array]]:
    """Radial distribution functions of each frame.

    Parameters
    ----------
    atoms
        Species and cell, periodic in all directions.
    positions
        (frames, N, 3) Angstrom.

    Returns
    -------
    Middles of the bins (bins,), and by pair "A-B" with A <= B (frames, bins); 1 in an ideal gas.
    """
    symbols = np.array(atoms.get_chemical_symbols())
    edges = np.arange(0.0, RANGE + WIDTH / 2, WIDTH)
    shells = 4 / 3 * np.pi * np.diff(edges**3)
    middles, names = _names(atoms)
    found = {name: np.zeros((len(positions), len(shells))) for name in names}
    system, search = atoms.copy(), VerletList(RANGE, skin=0.5)
    for k, frame in enumerate(positions):
        system.positions = frame
        centers, neighbors, vectors = search.edges(system)
        lengths = np.linalg.norm(vectors, axis=1)
        for name in names:
            a, b = name.split("-")
            chosen = (symbols[centers] == a) & (symbols[neighbors] == b)
            counts, _ = np.histogram(lengths[chosen], edges)
            expected = (symbols == a).sum() * (symbols == b).sum() / atoms.get_volume() * shells
            found[name][k] = counts / expected
    return middles, found


def _names(atoms: Atoms) -> tuple[Array, list[str]]:
    """Middles of the bins in Angstrom, and pairs of species "A-B" with A <= B."""
    kinds = sorted(set(atoms.get_chemical_symbols()))
    count = round(RANGE / WIDTH)
    middles = np.asarray(WIDTH * (np.arange(count) + 0.5), dtype=float)
    return middles, [f"{a}-{b}" for k, a in enumerate(kinds) for b in kinds[k:]]


def first_peak(distances: Array, function: Array, density: float) -> Peak:
    """First peak of a radial distribution function.

    Parameters
    ----------
    distances, function
        (bins,) evenly spaced Angstrom, and g(r).
    density
        Atoms of the second species per Angstrom^3.
    """
    smooth = np.convolve(function, [0.25, 0.5, 0.25], mode="same")
    # The first shell ends at the first minimum below half of its peak, or at the lowest point behind it.
    top = int(np.argmax(smooth))
    rising = 0
    for k in range(1, len(smooth) - 1):
        rising = k if smooth[k] > smooth[rising] else rising
        if smooth[rising] > 0.5 and smooth[k] < 0.5 * smooth[rising] and smooth[k] <= smooth[k + 1]:
            top = rising
            break
    end = top + 1
    while end < len(smooth) - 1 and smooth[end] > smooth[end + 1]:
        end += 1
    shells = 4 * np.pi * distances**2 * (distances[1] - distances[0])
    coordination = float((density * function * shells)[: end + 1].sum())
    position, height = _vertex(distances, smooth, top)
    return Peak(position=position, height=height, coordination=coordination)


def _vertex(x: Array, y: Array, k: int) -> tuple[float, float]:
    """Highest point of the parabola through three points."""
    if not 0 < k < len(x) - 1:
        return float(x[k]), float(y[k])
    left, here, right = y[k - 1], y[k], y[k + 1]
    curvature = left - 2 * here + right
    if curvature >= 0:
        return float(x[k]), float(here)
    shift = 0.5 * (left - right) / curvature
    return float(x[k] + shift * (x[1] - x[0])), float(here - 0.25 * (left - right) * shift)


def _area(function: Array) -> float:
    return float(np.abs(function).sum())
