"""Whether all engines compute the same: ASE, and LAMMPS on one and on several processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from pydantic import BaseModel, ConfigDict

from compactmlip.errors import KernelError
from compactmlip.lammps.evaluate import LammpsRun
from compactmlip.validate.parity import MILLI


class EngineParity(BaseModel):
    """One engine against the ASE calculator on one structure.

    Attributes
    ----------
    engine
        "LAMMPS, 2 processes".
    atoms
        Of the structure.
    energy, forces
        Difference per atom (meV) and largest difference of a force component (meV/Angstrom); infinite where
        the engine failed.
    failure
        Why, or an empty string.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
    engine: str
    atoms: int
    energy: float
    forces: float
    failure: str = ""


def compare_engines(
    model: str | Path, calculator: Any, atoms: Atoms, ranks: Sequence[int] = (1, 2)
) -> tuple[EngineParity, ...]:
    """Compare LAMMPS with the ASE calculator; nothing where LAMMPS or its plugin is not there.

    Parameters
    ----------
    model
        Deployed file.
    calculator
        The ASE calculator of the same file.
    atoms
        The structure; it is not changed.
    ranks
        Numbers of processes.
    """
    lammps = LammpsRun.find()
    if lammps is None:
        return ()
    system = atoms.copy()
    system.set_constraint()
    system.calc = calculator
    energy, forces = system.get_potential_energy(), system.get_forces()
    found = []
    for number in ranks:
        if number > 1 and lammps.mpirun is None:
            continue
        name = f"LAMMPS, {number} process{'es' if number > 1 else ''}"
        try:
            other_energy, other_forces = lammps.evaluate(model, atoms, number)
        except KernelError as error:
            failed = {"energy": float("inf"), "forces": float("inf"), "failure": str(error)}
            found.append(EngineParity(engine=name, atoms=len(atoms), **failed))
            continue
        found.append(
            EngineParity(
                engine=name,
                atoms=len(atoms),
                energy=MILLI * abs(other_energy - energy) / len(atoms),
                forces=MILLI * float(np.abs(other_forces - forces).max()),
            )
        )
    return tuple(found)
