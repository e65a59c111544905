"""Trust region of a deployed file: whether an atom's surroundings are like those of the calibration set.

The file's second method, :data:`METHOD`, takes what the first takes and returns scores (n_owned, 4), float64,
one column for each of :data:`REASONS`.  **An atom is outside where a score is not at most 1**, so an engine
needs no number but this one.  The scores are

``species``
    0, or infinite where the calibration set has too few atoms of the species.
``distance``
    Over all neighbours, the shortest distance allowed for the pair of species over the distance; and the
    distance of the nearest neighbour over the largest one allowed.  A pair of species that was never seen
    within the cutoff may not come within it.
``coordination``
    Distance of the coordination number from the middle of its range, over half the range.  The number is
    smooth: a neighbour at distance r counts ``(1 + cos(pi r / cutoff)) / 2``.
``features``
    Mahalanobis distance of the invariant features of the last layer from their mean over the species, over
    the largest one allowed.  Up to 32 principal directions have variances of their own, the others share one.

:class:`TrustRegion` is the part of the file's description that says how large the region is, for people.
Atoms inside have familiar surroundings; that is no bound on the error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

METHOD = "trust"
"""Name of the method in the TorchScript module."""

REASONS = ("species", "distance", "coordination", "features")
"""What the columns of the scores are about."""

TrustScores = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From species, centers, neighbors, vectors to scores (n_atoms, 4)."""


class SpeciesRegion(BaseModel):
    """What is allowed for atoms of one species.

    Attributes
    ----------
    num_atoms
        Atoms in the calibration set.
    nearest
        Angstrom: distance of the nearest neighbour.
    coordination
        Smooth coordination number, see :mod:`compactmlip.deploy.trust`.
    directions
        Principal directions of the features that have variances of their own.
    feature_distance
        Largest Mahalanobis distance of the features.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    num_atoms: int = Field(ge=1)
    nearest: tuple[float, float]
    coordination: tuple[float, float]
    directions: int = Field(ge=0)
    feature_distance: float = Field(gt=0)


class TrustRegion(BaseModel):
    """Where a model was calibrated; margins are included in all limits.

    Attributes
    ----------
    num_structures, num_atoms
        Of the calibration set, without structures in which no atom has a neighbour.
    species
        Symbol -> limits.  Atoms of other species are outside.
    shortest
        "Mg-O" -> shortest distance allowed, Angstrom; pairs that were seen within the cutoff.
    held_out
        Fraction of the calibration atoms that are outside the region that the other structures make
        (cross-validation): what to expect of new structures of the same kind.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    num_structures: int = Field(ge=1)
    num_atoms: int = Field(ge=1)
    species: dict[str, SpeciesRegion]
    shortest: dict[str, float]
    held_out: float = Field(ge=0, le=1)


@dataclass(frozen=True)
class Outside:
    """Which atoms of a structure are outside a trust region, and why.

    Attributes
    ----------
    scores
        (N, 4), one column for each of :data:`REASONS`; above 1 is outside.
    """

    scores: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """(N,) bool: atoms that are outside."""
        return np.asarray(self._beyond.any(axis=1))

    @property
    def count(self) -> int:
        """Number of atoms that are outside."""
        return int(self.mask.sum())

    def reasons(self, atom: int) -> tuple[str, ...]:
        """Why an atom is outside; empty if it is inside."""
        return tuple(name for name, bad in zip(REASONS, self._beyond[atom], strict=True) if bad)

    def describe(self) -> str:
        """One sentence: how many atoms, and for each reason how many, which and how far."""
        parts = []
        for name, column, bad in zip(REASONS, self.scores.T, self._beyond.T, strict=True):
            atoms = np.flatnonzero(bad)
            if atoms.size:
                worst = column[atoms].max()
                far = f", up to {worst:.2g} times the limit" if np.isfinite(worst) else ""
                parts.append(f"{name}: {atoms.size} (atoms {_listed(atoms)}{far})")
        reasons = f": {'; '.join(parts)}" if parts else ""
        verb = "is" if self.count == 1 else "are"
        return f"{self.count} of {len(self.scores)} atoms {verb} outside the model's trust region{reasons}"

    @property
    def _beyond(self) -> np.ndarray:
        # Written so that a score that is not a number is outside.
        beyond: np.ndarray = ~(self.scores <= 1.0)
        return beyond


def _listed(atoms: np.ndarray, most: int = 5) -> str:
    shown = ", ".join(map(str, atoms[:most]))
    return f"{shown}, ..." if len(atoms) > most else shown
