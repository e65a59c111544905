"""Whether energy and force are smooth at the cutoffs: two atoms that come into reach of each other.

A step of the energy, or of the force, heats every simulation in which neighbours come and go.  Layers may
have shorter cutoffs than the model; there the two atoms see each other on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement, product
from typing import Any

import numpy as np
from ase import Atoms
from pydantic import BaseModel, ConfigDict

from compactmlip.validate.parity import MILLI

INSIDE = 1e-3
"""Angstrom on either side of a cutoff, once and twice, at which energy and force are taken: what makes a
smooth cutoff is hardly to be seen there."""


class CutoffStep(BaseModel):
    """The pair of species and the cutoff with the largest step.

    Attributes
    ----------
    pair
        "Mg-O".
    cutoff
        Angstrom.
    energy
        Step of the energy between just within and just beyond it that the forces do not account for, meV.
    force
        Step of the force on either atom, meV/Angstrom.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
    pair: str
    cutoff: float
    energy: float
    force: float


def cutoff_step(calculator: Any, symbols: Sequence[str], cutoffs: Sequence[float]) -> CutoffStep:
    """Let two atoms of each two species cross each cutoff.

    Parameters
    ----------
    calculator
        ASE calculator.
    symbols
        Species to combine.
    cutoffs
        Angstrom.
    """
    found = []
    for pair, cutoff in product(combinations_with_replacement(sorted(set(symbols)), 2), cutoffs):
        (_, f_far), (e_in, f_in), (e_out, f_out), (_, f_beyond) = (
            _two_atoms(calculator, pair, cutoff + k * INSIDE) for k in (-2, -1, 1, 2)
        )
        # The force on the first atom is the slope of the energy over the distance.
        step = abs(e_out - e_in - INSIDE * float((f_in + f_out)[0, 2]))
        # Forces on both sides go on as straight lines to where these meet.
        force = float(np.abs((2 * f_in - f_far) - (2 * f_out - f_beyond)).max())
        found.append(CutoffStep(pair="-".join(pair), cutoff=cutoff, energy=step * MILLI, force=force * MILLI))
    return max(found, key=lambda f: max(f.energy / INSIDE, f.force))


def _two_atoms(calculator: Any, pair: tuple[str, str], distance: float) -> tuple[float, np.ndarray]:
    atoms = Atoms(pair, [[0.0, 0.0, 0.0], [0.0, 0.0, distance]])
    atoms.calc = calculator
    return float(atoms.get_potential_energy()), np.asarray(atoms.get_forces())
