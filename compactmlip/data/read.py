"""Read structures and labelled data sets; write labelled extended XYZ.

Labels live in ``info["REF_energy"]`` (eV), ``arrays["REF_forces"]`` (eV/Angstrom) and
``info["REF_stress"]`` (eV/Angstrom^3, Voigt order xx yy zz yz xz xy, tension positive as in ASE).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import ase.io
import numpy as np
from ase import Atoms

from compactmlip.checkpoint import atomic_write
from compactmlip.data.database import is_database, read_database
from compactmlip.data.extxyz import check_whole, write_frames
from compactmlip.errors import InputError, did_you_mean

Label = Literal["energy", "forces", "stress"]

ENERGY, FORCES, STRESS = "REF_energy", "REF_forces", "REF_stress"
ISOLATED_ATOM = "IsolatedAtom"
_XYZ_SUFFIXES = (".xyz", ".extxyz")
_VOIGT = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))


def read_structures(paths: str | Path | Sequence[str | Path]) -> list[Atoms]:
    """Read all frames of one or several files, in any format that ASE reads.

    ASE databases (and folders of LMDB ones) come with their key-value pairs as ``info``.

    Raises
    ------
    InputError
        If a file is missing, empty, truncated or not readable, or no file is given; the message names it.
    """
    files = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not files:
        raise InputError("no structure file given.")
    return [atoms for path in files for atoms in _read_file(Path(path))]


def _read_file(path: Path, *, labelled: bool = False) -> list[Atoms]:
    database = is_database(path)
    if not path.is_file() and not database:
        kind = "is a folder, not a file" if path.is_dir() else "no such file"
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise InputError(f"{path}: {kind}.{did_you_mean(path.name, names)}")
    try:
        if path.is_file() and path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty.")
        if path.name.removesuffix(".gz").endswith(_XYZ_SUFFIXES):
            check_whole(path, ended=labelled)
        frames = read_database(path) if database else ase.io.read(path, index=":")
    except InputError:
        raise
    except Exception as error:  # ASE's readers raise whatever their parsing trips over
        reason = str(error) or "its content does not fit its format"
        raise InputError(
            f"{path}: ASE cannot read this file ({type(error).__name__}: {reason}). It may be damaged, "
            "truncated or of a format that ASE does not recognise from its name."
        ) from error
    if not frames:
        raise InputError(f"{path}: the file holds no structure.")
    return list(frames)


def read_labelled(
    path: str | Path,
    *,
    energy_key: str = ENERGY,
    forces_key: str = FORCES,
    stress_key: str = STRESS,
    virials_key: str = "REF_virials",
    require: Sequence[Label] = ("energy", "forces"),
    finite: bool = True,
) -> list[Atoms]:
    """Read a labelled data set and bring its labels to the ``REF_*`` names.

    Parameters
    ----------
    path
        Any file that ASE reads; extended XYZ is usual.
    energy_key, forces_key, stress_key
        Names in ``info`` (energy, stress) and ``arrays`` (forces).  A name of an ASE property ("energy",
        "free_energy", "forces", "stress") is also looked up in the frame's calculator, where ASE puts
        such labels when it reads extended XYZ, OUTCAR or a database.
    virials_key
        Virial in eV, used where there is no stress: stress = -virial / volume, MACE's sign convention
        (virial = -dE/dstrain).
    require
        Labels that every frame must have.  Frames with ``config_type=IsolatedAtom`` need an energy only.
    finite
        Refuse labels that are NaN or infinite.

    Returns
    -------
    list[Atoms]
        Copies without calculator.  Stress may be stored as 6 (Voigt), 9 or 3x3 numbers and leaves as
        Voigt; it is left out of frames without a three-dimensional periodic cell, where it has no meaning.

    Raises
    ------
    InputError
        If the file cannot be used, or a label is missing, not finite or of the wrong shape; the message
        names the frame and the keys that are there.
    """
    unknown = set(require) - {"energy", "forces", "stress"}
    if unknown:
        raise InputError(f"cannot require {sorted(unknown)}: labels are energy, forces and stress.")
    keys = {"energy": energy_key, "forces": forces_key, "stress": stress_key, "virials": virials_key}
    return normalised(read_for_labels(path), keys, require, str(path), finite=finite)


def read_for_labels(path: str | Path) -> list[Atoms]:
    """Read all frames as they are in the file, whose last line must be whole; see :func:`normalised`.

    Raises
    ------
    InputError
        If the file is missing, empty, truncated or not readable.
    """
    return _read_file(Path(path), labelled=True)


def normalised(
    frames: Iterable[Atoms],
    keys: Mapping[str, str],
    require: Sequence[Label],
    name: str,
    *,
    finite: bool = True,
) -> list[Atoms]:
    """Bring the labels of frames to the ``REF_*`` names; see :func:`read_labelled`.

    ``keys`` maps "energy", "forces", "stress" and "virials" to their names in the frames.
    """
    return [_normalised(a, keys, require, f"{name}, frame {k}", finite) for k, a in enumerate(frames)]


def _normalised(
    atoms: Atoms, keys: Mapping[str, str], require: Sequence[Label], where: str, finite: bool
) -> Atoms:
    found = {label: _find(atoms, key) for label, key in keys.items()}
    isolated = is_isolated_atom(atoms)
    for label in ("energy",) if isolated else require:
        if found[label] is None and not (label == "stress" and found["virials"] is not None):
            raise InputError(_missing_label(atoms, label, keys[label], where))
    out = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    # Labels under the REF names that were not asked for would be taken for those that were.
    labels = {*keys.values(), ENERGY, FORCES, STRESS}
    out.info = {k: v for k, v in atoms.info.items() if k not in labels}
    for name, array in atoms.arrays.items():
        if name not in ("numbers", "positions", *labels):
            out.new_array(name, array)
    if found["energy"] is not None:
        energy = _numbers(found["energy"], [(), (1,)], keys["energy"], where, finite)
        out.info[ENERGY] = float(energy.reshape(()))
    if found["forces"] is not None:
        out.new_array(FORCES, _numbers(found["forces"], [(len(atoms), 3)], keys["forces"], where, finite))
    stress = _stress(atoms, found, keys, where, finite)
    if stress is not None:
        out.info[STRESS] = stress
    elif "stress" in require and not isolated:
        raise InputError(f"{where} has no periodic cell, hence no stress; read it without requiring stress.")
    return out


def _find(atoms: Atoms, key: str) -> Any:
    """Value of a label in info, arrays or the attached calculator's stored results, or None."""
    if key in atoms.info:
        return atoms.info[key]
    if key in atoms.arrays:
        return atoms.arrays[key]
    return (getattr(atoms.calc, "results", None) or {}).get(key)


def _stress(
    atoms: Atoms, found: dict[str, Any], keys: Mapping[str, str], where: str, finite: bool
) -> np.ndarray | None:
    if not atoms.pbc.any() or atoms.cell.rank < 3:
        return None
    shapes: list[tuple[int, ...]] = [(6,), (9,), (3, 3)]
    if found["stress"] is not None:
        return full_to_voigt(_numbers(found["stress"], shapes, keys["stress"], where, finite))
    if found["virials"] is not None:
        virials = _numbers(found["virials"], shapes, keys["virials"], where, finite)
        return -full_to_voigt(virials) / atoms.cell.volume
    return None


def full_to_voigt(values: np.ndarray) -> np.ndarray:
    """Voigt form (xx yy zz yz xz xy) of 6, 9 or 3x3 numbers; off-diagonal pairs are averaged."""
    if values.shape == (6,):
        return values
    tensor = values.reshape(3, 3)
    return np.array([0.5 * (tensor[i, j] + tensor[j, i]) for i, j in _VOIGT])


def _numbers(value: Any, shapes: list[tuple[int, ...]], key: str, where: str, finite: bool) -> np.ndarray:
    """Return the label as a float array; raise if it has none of the shapes or is not ``finite``."""
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{where}: label '{key}' is not a number: {str(value)[:60]!r}.") from None
    if array.shape not in shapes:
        wanted = " or ".join(str(s) for s in shapes)
        raise InputError(f"{where}: label '{key}' has shape {array.shape}, expected {wanted}.")
    if finite and not np.isfinite(array).all():
        raise InputError(
            f"{where}: label '{key}' holds NaN or infinite numbers; remove the frame or compute it again."
        )
    return array


def _missing_label(atoms: Atoms, label: str, key: str, where: str) -> str:
    results = [k for k, v in (getattr(atoms.calc, "results", None) or {}).items() if v is not None]
    arrays = [k for k in atoms.arrays if k not in ("numbers", "positions")]
    text = (
        f"{where} has no {label} label '{key}'. It has info keys {_listed(atoms.info)}, arrays "
        f"{_listed(arrays)} and calculator results {_listed(results)}."
    )
    text += did_you_mean(key, [*atoms.info, *arrays])
    if label in results:
        text += f" ASE moves keys named '{label}' to a calculator; choose it with {label}_key=\"{label}\"."
    return text


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "(none)"


def is_isolated_atom(atoms: Atoms) -> bool:
    """Whether a frame gives the reference energy E0 of its species (``config_type=IsolatedAtom``)."""
    return bool(atoms.info.get("config_type") == ISOLATED_ATOM)


def split_isolated_atoms(frames: Iterable[Atoms]) -> tuple[list[Atoms], dict[str, float]]:
    """Separate frames with ``config_type=IsolatedAtom``; return the others and {symbol: E0 in eV}.

    Raises
    ------
    InputError
        If such a frame has not exactly one atom or no energy, or two of them contradict each other.
    """
    kept: list[Atoms] = []
    energies: dict[str, float] = {}
    for k, atoms in enumerate(frames):
        if not is_isolated_atom(atoms):
            kept.append(atoms)
            continue
        if len(atoms) != 1 or ENERGY not in atoms.info:
            raise InputError(
                f"frame {k}: config_type={ISOLATED_ATOM} needs exactly one atom and {ENERGY}; "
                f"it has {len(atoms)} atoms and info keys {_listed(atoms.info)}."
            )
        symbol, energy = atoms.get_chemical_symbols()[0], float(atoms.info[ENERGY])
        if abs(energies.setdefault(symbol, energy) - energy) > 1e-6:
            known = energies[symbol]
            raise InputError(f"frame {k}: isolated {symbol} has {energy} eV here and {known} eV before.")
    return kept, energies


def write_labelled(path: str | Path, frames: Iterable[Atoms]) -> Path:
    """Write frames with their ``info`` and ``arrays`` as extended XYZ that reads back exactly.

    The file is complete or not there.  Calculators and constraints are not written.

    Raises
    ------
    InputError
        If the name is not ``*.xyz`` or ``*.extxyz``, or an array does not fit the format.
    CheckpointError
        If the file cannot be written.
    """
    path = Path(path)
    check_xyz_name(path)
    atomic_write(path, lambda temporary: write_frames(temporary, frames))
    return path


def check_xyz_name(path: Path) -> None:
    """Raise :class:`InputError` unless a file name ends in ``.xyz`` or ``.extxyz``."""
    if path.suffix not in _XYZ_SUFFIXES:
        raise InputError(f"{path}: labelled data are written as *.extxyz or *.xyz; choose such a name.")
