"""Energy and forces of one structure from LAMMPS, in processes of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.lammps import Prism

from compactmlip.errors import KernelError
from compactmlip.lammps.build import PLUGIN, installed, ready
from compactmlip.lammps.input import boundary, boxed, write_data

SCRIPT = """\
units metal
atom_style atomic
boundary {boundary}
plugin load {plugin}
read_data data.lammps
pair_style compactmlip
pair_coeff * * {model} {symbols}
thermo_style custom step pe
thermo_modify format float %.17g
dump forces all custom 1 forces.txt id fx fy fz
dump_modify forces sort id format float %.17g
run 0
"""

TIMEOUT = 600.0
"""Seconds for one structure."""


@dataclass(frozen=True)
class LammpsRun:
    """How LAMMPS is started.

    Attributes
    ----------
    lmp, mpirun
        Programs; ``mpirun`` is None where there is none, and then there is one process.
    plugin
        The plugin's file.
    """

    lmp: str
    mpirun: str | None
    plugin: Path

    @classmethod
    def find(cls) -> LammpsRun | None:
        """The LAMMPS of this environment if its plugin is built; nothing is built."""
        lmp, installation = program("lmp"), installed()
        folder = ready(installation) if lmp and installation else None
        return cls(lmp, program("mpirun"), folder / PLUGIN) if lmp and folder else None

    def evaluate(self, model: str | Path, atoms: Atoms, ranks: int = 1) -> tuple[float, np.ndarray]:
        """Energy (eV) and forces (N, 3) (eV/Angstrom, in the structure's own axes).

        Parameters
        ----------
        model
            Deployed file.
        atoms
            Along directions that are not periodic it stays so.
        ranks
            Number of processes.

        Raises
        ------
        KernelError
            If LAMMPS fails or does not finish; the message has its error.
        """
        system = boxed(atoms)
        symbols = sorted(set(system.get_chemical_symbols()))
        command = [self.lmp, "-in", "in.lammps", "-log", "log.lammps"]
        if ranks > 1:
            if self.mpirun is None:
                raise KernelError("there is no mpirun beside this Python or on the PATH.")
            command = [self.mpirun, "-n", str(ranks), *command]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_data(folder / "data.lammps", system, symbols)
            script = SCRIPT.format(
                boundary=boundary(system),
                plugin=self.plugin,
                model=Path(model).absolute(),
                symbols=" ".join(symbols),
            )
            (folder / "in.lammps").write_text(script)
            variables = os.environ | {"OMP_NUM_THREADS": "1", "LAMMPS_PLUGIN_PATH": ""}
            try:
                done = subprocess.run(
                    command,
                    cwd=folder,
                    env=variables,
                    capture_output=True,
                    text=True,
                    timeout=TIMEOUT,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                raise KernelError(
                    f"LAMMPS on {ranks} process(es) did not finish within {TIMEOUT:g} s."
                ) from None
            if done.returncode:
                raise KernelError(
                    f"LAMMPS on {ranks} process(es) failed: {_error(done.stdout + done.stderr)}"
                )
            energy = re.findall(r"^ *0 +(\S+) *$", (folder / "log.lammps").read_text(), re.MULTILINE)[-1]
            rows = (folder / "forces.txt").read_text().splitlines()[9:]
        forces = np.array([[float(word) for word in row.split()[1:]] for row in rows])
        return float(energy), np.asarray(Prism(system.cell, pbc=system.pbc).vector_to_ase(forces))


def program(name: str) -> str | None:
    """Path of a program of this environment."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name)


def _error(output: str) -> str:
    lines = [line for line in output.splitlines() if line.startswith("ERROR")]
    return lines[0] if lines else output[-500:]
