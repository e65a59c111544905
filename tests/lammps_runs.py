"""Run LAMMPS as its users do, ``lmp`` and ``mpirun`` in processes of their own, and read what it computed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.lammps import Prism

from compactmlip.lammps.evaluate import program
from compactmlip.lammps.input import boundary, write_data

BAR = 1.6021765e6
"""bar per eV/Angstrom^3, as LAMMPS has it in metal units."""

OBSERVE = """
compute energies all pe/atom
compute stresses all stress/atom NULL
compute sums all reduce sum c_energies c_stresses[1] c_stresses[2] c_stresses[3] c_stresses[4] c_stresses[5] &
  c_stresses[6]
thermo_style custom step pe pxx pyy pzz pyz pxz pxy vol c_sums[*]
thermo_modify format float %.17g
dump forces all custom 1 forces.txt id fx fy fz c_energies
dump_modify forces sort id format float %.17g
"""


def found_by_entry_point() -> bool:
    """Whether the installed package tells LAMMPS where its plugin is."""
    return any(e.value.startswith("compactmlip.") for e in metadata.entry_points(group="lammps.plugins"))


@dataclass(frozen=True)
class Run:
    """What a run of LAMMPS left."""

    folder: Path
    status: int
    output: str

    @property
    def error(self) -> str:
        """The lines that say what went wrong."""
        lines = self.output.splitlines()
        first = next((k for k, line in enumerate(lines) if line.startswith("ERROR")), None)
        return self.output[-2000:] if first is None else "\n".join(lines[first : first + 3])

    def thermo(self) -> dict[str, np.ndarray]:
        """Columns of the thermo output by name, since they were last chosen."""
        log = (self.folder / "log.lammps").read_text()
        columns: list[str] = []
        rows: list[list[float]] = []
        inside = False
        for line in log.splitlines():
            words = line.split()
            if words[:1] == ["Step"]:
                rows = rows if words == columns else []
                columns, inside = words, True
            elif inside and len(words) == len(columns) and re.fullmatch(r"\d+", words[0]):
                rows.append([float(w) for w in words])
            elif line.startswith("Loop time"):
                inside = False
        return dict(zip(columns, np.array(rows).T, strict=True))


@dataclass(frozen=True)
class Observed:
    """Energies (eV), forces (eV/Angstrom) and stress (eV/Angstrom^3, 3x3) in the axes of ASE."""

    energy: float
    energies: np.ndarray
    forces: np.ndarray
    stress: np.ndarray
    per_atom_stress: np.ndarray


@dataclass(frozen=True)
class Lammps:
    """Starts LAMMPS with the plugin.

    Attributes
    ----------
    plugin
        Folder of the plugin, for installations that do not announce it.
    """

    plugin: Path

    def run(self, folder: Path, script: str, *, ranks: int = 1, **environment: str) -> Run:
        """Run a script in a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "in.lammps").write_text(script)
        lmp, mpirun = program("lmp"), program("mpirun")
        assert lmp and mpirun
        command = [lmp, "-in", "in.lammps", "-log", "log.lammps"]
        if ranks > 1:
            command = [mpirun, "-n", str(ranks), *command]
        variables = self.variables(**environment)
        done = subprocess.run(
            command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300, check=False
        )
        return Run(folder, done.returncode, done.stdout + done.stderr)

    def variables(self, **environment: str) -> dict[str, str]:
        """Environment in which LAMMPS finds the plugin."""
        found = os.environ | {"OMP_NUM_THREADS": "1", **environment}
        if not found_by_entry_point():
            found["LAMMPS_PLUGIN_PATH"] = str(self.plugin)
        return found

    def start(self, folder: Path, script: str) -> subprocess.Popen[bytes]:
        """Begin a run on one rank, in a group of processes of its own."""
        lmp = program("lmp")
        assert lmp
        return subprocess.Popen(
            [lmp, "-in", script, "-log", "none", "-screen", "none"],
            cwd=folder,
            env=self.variables(),
            start_new_session=True,
        )

    @staticmethod
    def kill(process: subprocess.Popen[bytes]) -> None:
        """End such a run at once."""
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def evaluate(
        self,
        folder: Path,
        atoms: Atoms,
        model: Path,
        *,
        ranks: int = 1,
        style: str = "compactmlip",
        coefficients: str | None = None,
        before: str = "",
        setup: str = "",
        types: Sequence[str] = (),
    ) -> Observed:
        """Energy and its derivatives of one structure."""
        order = list(types) or sorted(set(atoms.get_chemical_symbols()))
        given = coefficients or f"pair_coeff * * {model} {' '.join(order)}"
        start = f"{header(atoms, before)}read_data data.lammps\npair_style {style}\n"
        script = f"{start}{given}\n{setup}\n{OBSERVE}run 0\n"
        folder.mkdir(parents=True, exist_ok=True)
        write_data(folder / "data.lammps", atoms, order)
        done = self.run(folder, script, ranks=ranks)
        assert done.status == 0, done.output[-3000:]
        return observed(done, atoms)


def header(atoms: Atoms, before: str = "") -> str:
    """First commands of a script."""
    return f"units metal\natom_style atomic\nboundary {boundary(atoms)}\n{before}\n"


def dumped(path: Path, frame: int = -1) -> np.ndarray:
    """One frame of a dump: rows sorted by atom, without the ID."""
    text = path.read_text().split("ITEM: TIMESTEP\n")[1:][frame]
    return np.array([[float(w) for w in row.split()] for row in text.splitlines()[8:]])[:, 1:]


def observed(run: Run, atoms: Atoms) -> Observed:
    """Results of the first step, turned back to the axes of ASE."""
    prism = Prism(atoms.cell, pbc=atoms.pbc)
    thermo = {name: column[0] for name, column in run.thermo().items()}
    table = dumped(run.folder / "forces.txt", 0)
    pressure = np.array([thermo[name] for name in ("Pxx", "Pyy", "Pzz", "Pyz", "Pxz", "Pxy")])
    # LAMMPS orders the components of atoms xx yy zz xy xz yz, in bar Angstrom^3.
    sums = np.array([thermo[f"c_sums[{k}]"] for k in (2, 3, 4, 7, 6, 5)]) / thermo["Volume"]
    assert np.isclose(thermo["c_sums[1]"], thermo["PotEng"], rtol=1e-9)
    return Observed(
        energy=thermo["PotEng"],
        energies=table[:, 3],
        forces=prism.vector_to_ase(table[:, :3]),
        stress=_to_ase(-pressure / BAR, prism),
        per_atom_stress=_to_ase(sums / BAR, prism),
    )


def _to_ase(voigt: np.ndarray, prism: Prism) -> np.ndarray:
    xx, yy, zz, yz, xz, xy = voigt
    tensor = np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
    axes: np.ndarray = prism.vector_to_ase(np.eye(3))
    return axes.T @ tensor @ axes
