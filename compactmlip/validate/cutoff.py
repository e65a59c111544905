"""Whether energy and force end smoothly at the cutoff: two atoms that come into reach of each other.

A step of the energy, or a force that begins at once, heats every simulation in which neighbours come and go.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
from ase import Atoms
from pydantic import BaseModel, ConfigDict

from compactmlip.validate.parity import MILLI

INSIDE = 1e-3
"""Angstrom within the cutoff at which the force is taken; that of a smooth cutoff has hardly begun."""


class CutoffStep(BaseModel):
    """The pair of species with the largest force just within the cutoff.

    Attributes
    ----------
    pair
        "Mg-O".
    cutoff
        Angstrom.
    energy
        Step of the energy between just within and just beyond it, meV.
    force
        Force on either atom just within it, meV/Angstrom.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
    pair: str
    cutoff: float
    energy: float
    force: float


def cutoff_step(calculator: Any, symbols: Sequence[str], cutoff: float) -> CutoffStep:
    """Let two atoms of each two species cross the cutoff.

    Parameters
    ----------
    calculator
        ASE calculator.
    symbols
        Species to combine.
    cutoff
        Angstrom.
    """
    found = []
    for pair in combinations_with_replacement(sorted(set(symbols)), 2):
        inside, beyond = (_two_atoms(calculator, pair, cutoff + shift) for shift in (-INSIDE, INSIDE))
        force = float(np.abs(inside[1]).max())
        step = abs(inside[0] - beyond[0])
        found.append(CutoffStep(pair="-".join(pair), cutoff=cutoff, energy=step * MILLI, force=force * MILLI))
    return max(found, key=lambda f: max(f.energy / INSIDE, f.force))


def _two_atoms(calculator: Any, pair: tuple[str, str], distance: float) -> tuple[float, np.ndarray]:
    atoms = Atoms(pair, [[0.0, 0.0, 0.0], [0.0, 0.0, distance]])
    atoms.calc = calculator
    return float(atoms.get_potential_energy()), np.asarray(atoms.get_forces())
