"""Whether all engines compute the same: ASE, LAMMPS on one and on several processes, and plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from ase import Atoms
from pydantic import BaseModel, ConfigDict

from compactmlip.checkpoint import sha256
from compactmlip.deploy.archive import Deployment, inspect
from compactmlip.errors import CompactMLIPError, InputError, KernelError
from compactmlip.lammps.evaluate import LammpsRun
from compactmlip.validate.left_out import ENGINES, LAMMPS, PLAIN, LeftOut
from compactmlip.validate.parity import MILLI


class EngineParity(BaseModel):
    """One engine against the ASE calculator on one structure.

    Attributes
    ----------
    engine
        "LAMMPS, 2 processes", "PyTorch, eager", "TorchScript, plain operations".
    atoms
        Of the structure.
    energy, forces
        Difference per atom (meV) and largest difference of a force component (meV/Angstrom); infinite where
        the engine failed.
    tables
        What the forces may differ by because the file has tables of radial functions and the engine has none
        (meV/Angstrom): twice the bound that they were made for.
    failure
        Why, or an empty string.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
    engine: str
    atoms: int
    energy: float
    forces: float
    tables: float = 0.0
    failure: str = ""

    @property
    def unexplained(self) -> float:
        """Difference of the forces beyond that of tables, meV/Angstrom."""
        return max(0.0, self.forces - self.tables)


def compare_deployed(
    model: Path, calculator: Any, atoms: Atoms, source: str | Path | None
) -> tuple[tuple[EngineParity, ...], list[LeftOut]]:
    """Compare a deployed file with its checkpoint in plain PyTorch, and in LAMMPS, where each can be done.

    Parameters
    ----------
    model
        The file that is validated.
    calculator
        Its ASE calculator.
    atoms
        The structure; it is not changed.
    source
        The checkpoint from which the file was made, None where it was not given.

    Returns
    -------
    tuple
        What was compared, and what was not with the reason.
    """
    if model.suffix not in (".pt", ".pt2"):
        return (), [LeftOut(name=ENGINES, reason="The model is a checkpoint, not a deployed file.")]
    deployment = inspect(model)[1]
    plain = compare_plain(source, deployment, calculator, atoms) if source else ()
    left_out = []
    if not source:
        left_out.append(LeftOut(name=PLAIN, reason="The checkpoint was not given (--checkpoint)."))
    elif not plain:
        reason = f"The file is of reduced precision ({deployment.precision})."
        left_out.append(LeftOut(name=PLAIN, reason=reason))
    if deployment.backend != "kernels":
        reason = f"The file's backend is {deployment.backend}, not kernels."
        return plain, [*left_out, LeftOut(name=LAMMPS, reason=reason)]
    lammps = compare_engines(model, calculator, atoms)
    if not lammps:
        reason = "LAMMPS or its plugin was not found (compactmlip build)."
        left_out.append(LeftOut(name=LAMMPS, reason=reason))
    return (*plain, *lammps), left_out


def compare_plain(
    source: str | Path, deployment: Deployment, calculator: Any, atoms: Atoms
) -> tuple[EngineParity, ...]:
    """Compare the checkpoint in plain PyTorch, without compiled operators and tables, with the deployed file.

    Parameters
    ----------
    source
        The checkpoint that was compiled.
    deployment, calculator
        What the deployed file says about itself, and its ASE calculator.
    atoms
        The structure; it is not changed.

    Returns
    -------
    As the model that was trained, and as a TorchScript file of plain operations, in the file's precision;
    nothing for files of reduced precision, which are not meant to agree.

    Raises
    ------
    InputError
        If the file was made from another checkpoint.
    """
    from compactmlip.deploy.ase import CompactMLIPCalculator
    from compactmlip.deploy.compile import compile_model
    from compactmlip.kernels.build import without_kernels

    if deployment.source_sha256 != sha256(Path(source)):
        raise InputError(f"{source}: this is not the checkpoint that the model was compiled from.")
    precision = deployment.precision
    if precision not in ("float32", "float64"):
        return ()

    def eager() -> tuple[float, Any]:
        return _evaluate(CompactMLIPCalculator(source, dtype=precision), atoms)

    def scripted() -> tuple[float, Any]:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "plain.pt"
            compile_model(source, path, dtype=precision, backend="torch")
            return _evaluate(CompactMLIPCalculator(path), atoms)

    expected = _evaluate(calculator, atoms)
    tables = 2 * MILLI * deployment.tables.force_bound if deployment.tables else 0.0
    with without_kernels():
        rows = (
            _row("PyTorch, eager", eager, expected, len(atoms)),
            _row("TorchScript, plain operations", scripted, expected, len(atoms)),
        )
    return tuple(row.model_copy(update={"tables": tables}) for row in rows)


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
    expected = _evaluate(calculator, atoms)
    found = []
    for number in ranks:
        if number > 1 and lammps.mpirun is None:
            continue
        name = f"LAMMPS, {number} process{'es' if number > 1 else ''}"
        evaluate = partial(lammps.evaluate, model, atoms, number)
        found.append(_row(name, evaluate, expected, len(atoms), KernelError))
    return tuple(found)


def _evaluate(calculator: Any, atoms: Atoms) -> tuple[float, Any]:
    """Energy (eV) and forces (eV/Angstrom)."""
    system = atoms.copy()
    system.set_constraint()
    system.calc = calculator
    return system.get_potential_energy(), system.get_forces()


def _row(
    name: str,
    evaluate: Callable[[], tuple[float, Any]],
    expected: tuple[float, Any],
    atoms: int,
    failures: type[CompactMLIPError] = CompactMLIPError,
) -> EngineParity:
    """Compare what an engine computes, or say that it failed."""
    try:
        energy, forces = evaluate()
    except failures as error:
        infinite = float("inf")
        return EngineParity(engine=name, atoms=atoms, energy=infinite, forces=infinite, failure=str(error))
    return EngineParity(
        engine=name,
        atoms=atoms,
        energy=MILLI * abs(energy - expected[0]) / atoms,
        forces=MILLI * float(np.abs(forces - expected[1]).max()),
    )
