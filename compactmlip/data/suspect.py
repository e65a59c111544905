"""Labels against a model's predictions, to see whether their units are right.

A model that knows the chemistry, even of another functional, predicts labels up to a factor near one.
A factor near another unit's means that the labels have that unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ase import units

from compactmlip.data.inspect import Finding
from compactmlip.data.label_keys import ENERGY_UNITS, FORCES_UNITS, STRESS_UNITS

TOLERANCE = 1.35
"""A factor between labels and predictions this near (as a ratio) to a unit's is taken for that unit's."""

RELIABLE = 0.5
"""Smallest correlation at which a factor means anything."""

FEWEST = 4
"""Values below which nothing is concluded."""


@dataclass(frozen=True)
class Comparison:
    """Labels y beside predictions x.

    Attributes
    ----------
    slope
        Factor between them, y = slope x: the geometric mean of both regressions, with the sign of the
        correlation.
    correlation
        Pearson's, of the values as they are (about the fitted offsets for energies).
    count
        Number of values.
    """

    slope: float
    correlation: float
    count: int

    @classmethod
    def of(cls, y: np.ndarray, x: np.ndarray) -> Comparison | None:
        """Compare two arrays; None if there are too few values or one does not vary."""
        xx, yy, xy = float((x * x).sum()), float((y * y).sum()), float((x * y).sum())
        if x.size < FEWEST or min(xx, yy) <= 0:
            return None
        r = xy / np.sqrt(xx * yy)
        return cls(float(np.sign(r) * np.sqrt(yy / xx)), float(r), int(x.size))


def without_composition(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """What is left of energies (S,) after the best energies per species, given counts (S, species)."""
    fit, *_ = np.linalg.lstsq(counts, values, rcond=None)
    return np.asarray(values - counts @ fit)


def suspected_energies(labels: np.ndarray, predictions: np.ndarray, counts: np.ndarray) -> list[Finding]:
    """Look at the unit of energies (S,) of structures with ``counts`` (S, species) atoms of each species."""
    sizes = counts.sum(axis=1)
    rank = np.linalg.matrix_rank(counts)
    if len(labels) < rank + FEWEST:
        return []
    x = without_composition(predictions, counts)
    if x.std() < 1e-4 * sizes.mean():  # eV: too little variation to conclude anything
        return []
    total = Comparison.of(without_composition(labels, counts), x)
    if total is None:
        return []
    found = _suspicion(total, ENERGY_UNITS, "energies", "--energy-unit")
    whole = Comparison.of(without_composition(labels * sizes, counts), x)
    apart = abs(np.log(abs(total.slope) or 1e-300))
    if (
        whole is not None
        and whole.correlation > max(RELIABLE, abs(total.correlation) - 0.2)
        and apart > np.log(2.0)
        and abs(np.log(abs(whole.slope))) < np.log(TOLERANCE)
    ):
        text = (
            f"energies vary {total.slope:.3g} times as much as the parent predicts, but {whole.slope:.2f} "
            "times when multiplied by the number of atoms: they look like energies per atom (--set "
            "labels.energy_per_atom=true)."
        )
        # With a constant number of atoms near a unit's factor, both are possible.
        return [Finding("units", " ".join([*(f.message for f in found), text]))]
    return found


def suspected_forces(labels: np.ndarray, predictions: np.ndarray) -> list[Finding]:
    """Look at the unit and sign of forces (N, 3)."""
    found = Comparison.of(labels.ravel(), predictions.ravel())
    return [] if found is None else _suspicion(found, FORCES_UNITS, "forces", "--forces-unit")


def suspected_stresses(labels: np.ndarray, predictions: np.ndarray) -> list[Finding]:
    """Look at the unit and sign of stresses (S, 6)."""
    found = Comparison.of(labels.ravel(), predictions.ravel())
    return [] if found is None else _suspicion(found, STRESS_UNITS, "stresses", "--stress-unit")


def _suspicion(c: Comparison, known: dict[str, float], what: str, option: str) -> list[Finding]:
    """A finding if the factor is nearer to another unit's than to one, or negative."""
    if abs(c.correlation) < RELIABLE:
        return []
    size = abs(np.log(abs(c.slope)))
    # A label in a unit of u eV is 1/u times the number in eV.
    distance = {name: abs(np.log(abs(c.slope) * unit)) for name, unit in known.items() if unit != 1.0}
    best = min(distance, key=lambda name: distance[name])
    seen = (
        f"{what} are {c.slope:.4g} times the parent's predictions in eV and Angstrom (correlation "
        f"{c.correlation:.2f}, {c.count} values)"
    )
    if distance[best] < min(np.log(TOLERANCE), size):
        text = (
            f"{seen}: they look like {best}, for which the factor is {1 / known[best]:.4g} ({option} {best})."
        )
        return [Finding("units", text)]
    if what == "energies" and abs(np.log(abs(c.slope) / units.Hartree)) < np.log(TOLERANCE):
        return [Finding("units", f"{seen}: they look converted from Hartree twice.")]
    if c.slope < 0 and what != "energies":
        cure = "--set labels.gradients=true" if what == "forces" else "--set labels.compression_positive=true"
        return [Finding("units", f"{seen}: their sign looks reversed ({cure}).")]
    return []
