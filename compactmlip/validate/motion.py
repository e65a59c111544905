"""How atoms move: diffusion, of model and teacher from the same start.

The mean square displacement after a time t is 6 D t where atoms diffuse (Einstein; Frenkel and Smit,
Understanding Molecular Simulation, section 4.4), 3 kB T t^2 / m before they meet anything, and bounded by
twice the mean square displacement from the sites in a crystal, where D means nothing (see
:mod:`compactmlip.validate.vibration`).  In a periodic cell of edge L, D of a liquid is too small by
2.84 kB T / (6 pi eta L) (Yeh and Hummer, J. Phys. Chem. B 108, 15873 (2004)), for both alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from pydantic import BaseModel, ConfigDict

from compactmlip.validate.parity import Array
from compactmlip.validate.statistics import CERTAIN, Estimate, independent, relative_difference

SEGMENTS = 5
"""Parts of a run that are taken as independent; their scatter is the error."""

FEWEST_FRAMES = 10 * SEGMENTS
"""Of each run; fewer say nothing about motion."""

WINDOW = (0.4, 0.9)
"""Part of a segment over which the slope is taken: not its ballistic start, nor its noisy end."""

LINDEMANN = 0.15
"""Root mean square displacement from the site over the shortest distance between atoms (of covalent radii)
above which crystals melt (Lindemann's rule: 0.1 to 0.15)."""

BOUNDED, DIFFUSIVE = 0.4, (0.6, 1.4)
"""Exponents of bounded motion and of diffusion."""

Kind = Literal["diffuses", "vibrates", "undecided"]


class Motion(BaseModel):
    """Atoms of one species in one run.

    Attributes
    ----------
    kind
        "diffuses" where D is certain and the exponent is that of diffusion, "vibrates" where displacements
        stay bounded, "undecided" otherwise (a run too short, a gas, a few hops).
    diffusion, diffusion_error
        Slope / 6 of the mean square displacement in 10^-5 cm^2/s (0.1 Angstrom^2/ps), and standard error.
    exponent
        d ln MSD / d ln t: 2 ballistic, 1 diffusive, 0 bounded.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
    kind: Kind
    diffusion: float
    diffusion_error: float
    exponent: float


class MotionComparison(BaseModel):
    """One species in model and teacher over the time that both have.

    Attributes
    ----------
    picoseconds, atoms
        Length of the runs and number of atoms of the species.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
    species: str
    atoms: int
    picoseconds: float
    model: Motion
    teacher: Motion

    @property
    def compared(self) -> Literal["diffusion", "kind", "nothing"]:
        """What can be compared: ``kind`` where one diffuses and the other vibrates."""
        kinds = {self.model.kind, self.teacher.kind}
        if "undecided" in kinds:
            return "nothing"
        if len(kinds) == 2:
            return "kind"
        return "diffusion" if kinds == {"diffuses"} else "nothing"

    @property
    def difference(self) -> Estimate:
        """Relative difference of the diffusion coefficients, in percent."""
        own, other = (
            Estimate(one.diffusion, one.diffusion_error, SEGMENTS - 1) for one in (self.model, self.teacher)
        )
        found = relative_difference(own, other)
        return Estimate(100 * found.value, 100 * found.error, found.degrees)


@dataclass(frozen=True)
class Displacements:
    """Mean square displacements: times (lags,) ps, and by species (lags,) Angstrom^2 of model and teacher."""

    times_ps: Array
    model: dict[str, Array]
    teacher: dict[str, Array]


def compare_motion(
    atoms: Atoms, model: Array, teacher: Array, interval_ps: float
) -> tuple[tuple[MotionComparison, ...], Displacements] | None:
    """Compare two runs from one start over the time that both have.

    Parameters
    ----------
    atoms
        Species and masses.
    model, teacher
        (frames, N, 3) positions at the same times, not wrapped into the cell.
    interval_ps
        Time between frames.

    Returns
    -------
    Summaries by species, and the displacements; None where a run is too short.
    """
    length = min(len(model), len(teacher))
    if length < FEWEST_FRAMES:
        return None
    symbols = np.array(atoms.get_chemical_symbols())
    own, other = without_drift(atoms, model[:length]), without_drift(atoms, teacher[:length])
    curves = Displacements(interval_ps * np.array(segment_lags(length)), {}, {})
    rows = []
    for symbol in sorted(set(symbols.tolist())):
        chosen = symbols == symbol
        curves.model[symbol] = segment_displacements(own[:, chosen]).mean(axis=0)
        curves.teacher[symbol] = segment_displacements(other[:, chosen]).mean(axis=0)
        row = MotionComparison(
            species=symbol,
            atoms=int(chosen.sum()),
            picoseconds=(length - 1) * interval_ps,
            model=motion(own[:, chosen], interval_ps, spacing(atoms)),
            teacher=motion(other[:, chosen], interval_ps, spacing(atoms)),
        )
        rows.append(row)
    return tuple(rows), curves


def motion(positions: Array, interval_ps: float, distance: float) -> Motion:
    """Diffusion coefficient of atoms of one kind, and whether they diffuse.

    Parameters
    ----------
    positions
        (frames, N, 3) Angstrom, not wrapped, without common drift; at least :data:`FEWEST_FRAMES`.
    interval_ps
        Time between frames.
    distance
        Typical shortest distance between atoms, for Lindemann's rule.

    Notes
    -----
    The run is cut into :data:`SEGMENTS` parts; each gives one value of D from all time origins in it, and the
    standard error is that of their mean: it knows nothing of motion slower than a segment.  The exponent is
    that of the whole run, at lags from a fifth to half of it.
    """
    squares = segment_displacements(positions)
    times = interval_ps * np.array(segment_lags(len(positions)))
    first, last = (int(part * len(times)) for part in WINDOW)
    slopes = [np.polyfit(times[first:last], part[first:last], 1)[0] for part in squares]
    diffusion = independent(10 * np.array(slopes) / 6)
    exponent, farthest = _growth(positions)
    return Motion(
        kind=_kind(diffusion, exponent, farthest, distance),
        diffusion=diffusion.value,
        diffusion_error=diffusion.error,
        exponent=exponent,
    )


def _growth(positions: Array) -> tuple[float, float]:
    """D ln MSD / d ln t at long lags, and the mean square displacement there (Angstrom^2)."""
    frames = len(positions)
    lags = np.unique(np.geomspace(frames // 5, frames // 2, 12).astype(int))
    squares = [((positions[lag:] - positions[:-lag]) ** 2).sum(axis=2).mean() for lag in lags]
    slope = np.polyfit(np.log(lags), np.log(np.maximum(squares, 1e-30)), 1)[0]
    return float(slope), float(np.mean(squares))


def _kind(diffusion: Estimate, exponent: float, displacement: float, distance: float) -> Kind:
    """What a run shows: bounded and small, growing as time does, or neither with certainty."""
    if displacement < 2 * (LINDEMANN * distance) ** 2:
        return "vibrates" if exponent < BOUNDED else "undecided"
    certain = diffusion.value > CERTAIN * diffusion.error
    return "diffuses" if certain and DIFFUSIVE[0] < exponent < DIFFUSIVE[1] else "undecided"


def segment_lags(frames: int) -> list[int]:
    """Lags (frames) of :func:`segment_displacements`, from 1 to half of a segment."""
    return list(range(1, max(2, frames // SEGMENTS // 2) + 1))


def segment_displacements(positions: Array) -> Array:
    """(segments, lags) mean square displacement in Angstrom^2 over atoms and time origins in each segment.

    Parameters
    ----------
    positions
        (frames, N, 3) Angstrom, not wrapped.
    """
    lags = segment_lags(len(positions))
    found = np.empty((SEGMENTS, len(lags)))
    for row, part in zip(found, _segments(positions), strict=True):
        for k, lag in enumerate(lags):
            row[k] = ((part[lag:] - part[:-lag]) ** 2).sum(axis=2).mean()
    return found


def without_drift(atoms: Atoms, positions: Array) -> Array:
    """Positions relative to the centre of mass of each frame."""
    masses = atoms.get_masses()
    return positions - np.einsum("tnk,n->tk", positions, masses)[:, None] / masses.sum()


def _segments(positions: Array) -> list[Array]:
    size = len(positions) // SEGMENTS
    return [positions[k * size : (k + 1) * size] for k in range(SEGMENTS)]


def spacing(atoms: Atoms) -> float:
    """Angstrom: twice the mean covalent radius, about the shortest distance between atoms."""
    return float(2 * np.mean(covalent_radii[atoms.numbers]))
