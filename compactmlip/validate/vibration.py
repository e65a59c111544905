"""How far atoms move from their sites, in model and teacher.

In a harmonic crystal <u^2> is kB T times the trace of the inverse of the force constants, so that it tells
the stiffness of all modes at once (Willis and Pryor, Thermal Vibrations in Crystallography, Cambridge 1975).
"""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict

from compactmlip.validate.ensemble import Ensembles
from compactmlip.validate.motion import LINDEMANN, spacing, without_drift
from compactmlip.validate.parity import Array
from compactmlip.validate.statistics import Estimate, independent


class Vibration(BaseModel):
    """Atoms of one species in model and teacher.

    Attributes
    ----------
    model, teacher
        <u^2> about the mean positions of all runs, Angstrom^2, and standard errors.
    difference, difference_error
        Percent of the teacher's; the error is that of differences run by run, which is smaller than that of
        either where runs of both stay close to each other.
    runs
        Independent samples.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
    species: str
    atoms: int
    runs: int
    model: float
    model_error: float
    teacher: float
    teacher_error: float
    difference: float
    difference_error: float

    @property
    def debye_waller(self) -> tuple[float, float]:
        """B = 8 pi^2 <u^2> / 3 of model and teacher in Angstrom^2."""
        return 8 * np.pi**2 * self.model / 3, 8 * np.pi**2 * self.teacher / 3

    @property
    def excess(self) -> float:
        """Percent by which they certainly differ."""
        return Estimate(self.difference, self.difference_error, self.runs - 1).excess(0.0)


def compare_vibrations(runs: Ensembles) -> tuple[Vibration, ...]:
    """Compare how far atoms move from their mean positions in several runs, two at least.

    Returns
    -------
    A summary for each species that stays at its sites in the teacher, by Lindemann's rule; none for
    structures that are not periodic in all directions, which may turn as a whole.
    """
    atoms = runs.cell
    if not atoms.pbc.all() or not runs.model.size:
        return ()
    own, other = _squares(runs)
    symbols = np.array(atoms.get_chemical_symbols())
    rows = []
    for symbol in sorted(set(symbols.tolist())):
        chosen = symbols == symbol
        ours, theirs = (independent(squares[:, chosen].mean(axis=1)) for squares in (own, other))
        if theirs.value > (LINDEMANN * spacing(atoms)) ** 2 or theirs.value <= 0:
            continue
        between = independent(100 * (own - other)[:, chosen].mean(axis=1) / theirs.value)
        row = Vibration(
            species=symbol,
            atoms=int(chosen.sum()),
            runs=len(own),
            model=ours.value,
            model_error=ours.error,
            teacher=theirs.value,
            teacher_error=theirs.error,
            difference=between.value,
            difference_error=between.error,
        )
        rows.append(row)
    return tuple(rows)


def _squares(runs: Ensembles) -> tuple[Array, Array]:
    """(runs, N) mean square displacement of each atom from its mean position over all runs, in both."""
    atoms = runs.cell

    def squares(positions: Array) -> Array:
        still = np.stack([without_drift(atoms, run) for run in positions])
        return np.asarray(((still - still.mean(axis=(0, 1))) ** 2).sum(axis=3))

    return runs.averages(squares)
