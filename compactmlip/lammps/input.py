"""Files to start a simulation in LAMMPS: the structure, and a script."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ase import Atoms
from ase.calculators.lammps import Prism
from ase.data import atomic_masses, atomic_numbers

from compactmlip.data.graph import check_structure
from compactmlip.deploy.archive import inspect
from compactmlip.errors import InputError, did_you_mean

Ensemble = Literal["nve", "nvt", "npt"]

ROOM = 10.0
"""Angstrom of empty space around atoms without a cell."""

FIXES: dict[Ensemble, str] = {
    "nve": "fix             move all nve",
    "nvt": "fix             move all nvt temp ${temperature} ${temperature} 0.1",
    "npt": "fix             move all npt temp ${temperature} ${temperature} 0.1 {box} 0.0 0.0 1.0",
}

SCRIPT = """\
# {formula}, {ensemble} with {model}.
#   lmp -in {name}
#   mpirun -n 4 lmp -in {name}
# Change values on the command line:  lmp -in {name} -var steps 10000 -var temperature 600
variable        steps index 1000
variable        temperature index {temperature:g}

units           metal
atom_style      atomic
boundary        {boundary}
newton          on
read_data       {data}

pair_style      compactmlip{check}
pair_coeff      * * {model} {symbols}

neighbor        1.0 bin
timestep        0.001
velocity        all create ${{temperature}} 4928 mom yes rot no loop all
{fix}

{count}thermo          100
thermo_style    custom step temp pe etotal press density{column}
dump            trajectory all custom 100 trajectory.lammpstrj id type element x y z
dump_modify     trajectory sort id element {symbols}
restart         1000 restart.a restart.b
run             ${{steps}}
"""

COUNT = """\
# Atoms whose surroundings are unlike those that the model was made for; LAMMPS warns of the first.
compute         told all pair compactmlip
variable        outside equal c_told[1]
"""


@dataclass(frozen=True)
class LammpsInput:
    """Files that were written."""

    script: Path
    data: Path


def write_input(
    atoms: Atoms,
    model: str | Path,
    folder: str | Path,
    *,
    ensemble: Ensemble = "nvt",
    temperature: float = 300.0,
) -> LammpsInput:
    """Write a script and a data file for a structure and a deployed model.

    If the model has a trust region, the script compares with it every 100 steps.

    Parameters
    ----------
    atoms
        The structure; along directions that are not periodic it stays so.
    model
        A file made by ``compactmlip compile``.
    folder
        Where to write ``in.lammps`` and ``data.lammps``.
    ensemble
        "nve", "nvt" or "npt" (pressure 0).
    temperature
        K; initial velocities have it as well.

    Raises
    ------
    CheckpointError
        If the model is not a deployed file.
    SpeciesError, InputError
        If the model does not cover a species, the structure means nothing, or an option does.
    """
    if ensemble not in get_args(Ensemble):
        hint = did_you_mean(ensemble, get_args(Ensemble))
        raise InputError(f"unknown ensemble '{ensemble}'; known: {', '.join(get_args(Ensemble))}.{hint}")
    if not temperature > 0:
        raise InputError(f"the temperature must be above 0 K, not {temperature:g}.")
    if ensemble == "npt" and not atoms.pbc.all():
        raise InputError("constant pressure (npt) needs a structure that is periodic in all directions.")
    check_structure(atoms)
    spec, deployment = inspect(model)
    spec.species_index(atoms.get_chemical_symbols())
    atoms = boxed(atoms)
    symbols = sorted(set(atoms.get_chemical_symbols()))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    script, data = folder / "in.lammps", folder / "data.lammps"
    write_data(data, atoms, symbols)
    box = "tri" if Prism(atoms.cell, pbc=atoms.pbc).is_skewed() else "aniso"
    text = SCRIPT.format(
        formula=atoms.get_chemical_formula(),
        ensemble=ensemble,
        model=_quoted(os.path.relpath(model, folder)),
        name=script.name,
        data=data.name,
        temperature=temperature,
        boundary=boundary(atoms),
        symbols=" ".join(symbols),
        fix=FIXES[ensemble].replace("{box}", box),
        **_checks(deployment.trust is not None),
    )
    script.write_text(text)
    return LammpsInput(script, data)


def _checks(known: bool) -> dict[str, str]:
    if not known:
        return {"check": "", "count": "", "column": ""}
    return {"check": " check 100", "count": COUNT, "column": " v_outside"}


def boxed(atoms: Atoms) -> Atoms:
    """Copy with a cell in three dimensions, and atoms inside it where it is not periodic."""
    made = atoms.copy()
    free = [axis for axis in range(3) if not made.pbc[axis]]
    if free:
        made.cell[free] = 0.0
        made.set_cell(made.cell.complete())
        made.center(vacuum=ROOM, axis=tuple(free))
    return made


def boundary(atoms: Atoms) -> str:
    """Argument of the command ``boundary``."""
    return " ".join("p" if periodic else "f" for periodic in atoms.pbc)


def write_data(path: str | Path, atoms: Atoms, types: Sequence[str]) -> None:
    """Write a structure as a data file with every digit, turned into LAMMPS's axes.

    Parameters
    ----------
    path
        The file.
    atoms
        With a cell in three dimensions.
    types
        Chemical symbols of types 1, 2, ...
    """
    prism = Prism(atoms.cell, pbc=atoms.pbc)
    xhi, yhi, zhi, xy, xz, yz = prism.get_lammps_prism()
    lines = [f"{atoms.get_chemical_formula()}: {' '.join(types)}", ""]
    lines += [f"{len(atoms)} atoms", f"{len(types)} atom types", ""]
    lines += [f"0 {high:.17g} {axis}lo {axis}hi" for axis, high in zip("xyz", (xhi, yhi, zhi), strict=True)]
    if prism.is_skewed():
        lines.append(f"{xy:.17g} {xz:.17g} {yz:.17g} xy xz yz")
    lines += ["", "Masses", ""]
    lines += [f"{k} {atomic_masses[atomic_numbers[s]]:.10g}  # {s}" for k, s in enumerate(types, start=1)]
    lines += ["", "Atoms # atomic", ""]
    positions = prism.vector_to_lammps(atoms.positions, wrap=False)
    for k, (symbol, r) in enumerate(zip(atoms.get_chemical_symbols(), positions, strict=True), start=1):
        lines.append(f"{k} {types.index(symbol) + 1} {r[0]:.17g} {r[1]:.17g} {r[2]:.17g}")
    Path(path).write_text("\n".join(lines) + "\n")


def _quoted(path: str) -> str:
    return f'"{path}"' if " " in path else path
