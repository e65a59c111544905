"""Proof that a fine-tuning starts from its parent: same forces, energies up to a shift per species."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ase import Atoms
from torch import nn

from compactmlip.data.teacher import Evaluation, evaluate
from compactmlip.errors import SelfCheckError
from compactmlip.models import model_dtype

MOST_FRAMES = 16
"""Frames that are compared."""

TOLERANCE = {torch.float64: (1e-9, 1e-8), torch.float32: (2e-5, 2e-4)}
"""Largest differences by dtype: eV/atom, and the force's relative to the largest force (at least 1 eV/A)."""


@dataclass(frozen=True)
class StepZero:
    """Model before the training against its parent.

    Attributes
    ----------
    frames
        Number of frames compared.
    energy
        Largest difference after the shift, eV/atom.
    forces
        Largest difference, eV/Angstrom.
    """

    frames: int
    energy: float
    forces: float

    def describe(self) -> str:
        """One line for people."""
        return (
            f"step 0 is the parent: on {self.frames} frames energies differ by at most {self.energy:.1e} "
            f"eV/atom after the E0 shift, forces by {self.forces:.1e} eV/A"
        )


def compare_with_parent(
    parent: nn.Module, start: nn.Module, frames: Sequence[Atoms], shifts: Mapping[str, float]
) -> StepZero:
    """Compare the model before its training with its parent.

    Parameters
    ----------
    parent
        With all its species.
    start
        Without the species that are not needed, and with shifted energies.
    frames
        Structures; some are used.
    shifts
        eV by species.

    Raises
    ------
    SelfCheckError
        If they differ by more than rounding.
    """
    chosen = list(frames[:: max(1, len(frames) // MOST_FRAMES)][:MOST_FRAMES])
    energy = forces = largest = 0.0
    pairs = zip(_all(parent, chosen), _all(start, chosen), chosen, strict=True)
    for old, new, atoms in pairs:
        expected = old.energy + sum(shifts.get(s, 0.0) for s in atoms.get_chemical_symbols())
        energy = max(energy, abs(new.energy - expected) / len(atoms))
        forces = max(forces, float(np.abs(new.forces - old.forces).max()))
        largest = max(largest, float(np.abs(old.forces).max()))
    most_energy, most_forces = TOLERANCE[model_dtype(start)]
    if not (energy <= most_energy and forces <= most_forces * max(1.0, largest)):
        raise SelfCheckError(
            f"the model before the training differs from its parent by {energy:.2e} eV/atom and {forces:.2e} "
            "eV/Angstrom, which is more than rounding. Please report this as a bug."
        )
    return StepZero(len(chosen), energy, forces)


def _all(model: nn.Module, frames: Sequence[Atoms]) -> list[Evaluation]:
    return [found for _, batch in evaluate(frames, model) for found in batch]
