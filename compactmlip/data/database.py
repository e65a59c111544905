"""Structures from ASE databases, with what each row says about them.

ASE reads these files too, but leaves the key-value pairs behind: the names of materials, configuration types
and labels under names of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ase.db
import numpy as np
from ase import Atoms

from compactmlip.errors import InputError

LMDB_SUFFIX = ".aselmdb"

SUFFIXES = (".db", LMDB_SUFFIX)
"""SQLite, and the LMDB of large public data sets (Open Catalyst, OMat24)."""


def is_database(path: Path) -> bool:
    """Whether a path is read by :func:`read_database`: a file by its suffix, or a folder of LMDB files."""
    return path.suffix in SUFFIXES or (path.is_dir() and bool(_parts(path)))


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{LMDB_SUFFIX}"))


def read_database(path: Path) -> list[Atoms]:
    """Read all rows in order.

    Parameters
    ----------
    path
        A database, or a folder of LMDB databases, which are read in the order of their names.

    Returns
    -------
    list[Atoms]
        Energy, forces and stress are in the calculator, as ASE has it.  Key-value pairs and the row's data
        go to ``info``; data with one entry per atom go to ``arrays``.

    Raises
    ------
    InputError
        If the package that reads LMDB is missing.
    """
    files = _parts(path) if path.is_dir() else [path]
    if any(file.suffix == LMDB_SUFFIX for file in files):
        _need_backend(path)
    frames = []
    for file in files:
        how = {"readonly": True, "use_lock_file": False} if file.suffix == LMDB_SUFFIX else {}
        with ase.db.connect(file, **how) as rows:
            frames += [_frame(row) for row in rows.select()]
    return frames


def _frame(row: Any) -> Atoms:
    atoms: Atoms = row.toatoms()
    for name, value in {**row.key_value_pairs, **row.data}.items():
        array = np.asarray(value)
        tensor = any(word in name.lower() for word in ("stress", "virial"))
        numbers = array.dtype.kind in "biuf" and array.ndim > 0 and len(array) == len(atoms)
        if numbers and not tensor and name not in atoms.arrays:
            atoms.new_array(name, array)
        else:
            atoms.info[name] = value
    return atoms


def _need_backend(path: Path) -> None:
    try:
        import ase_db_backends  # noqa: F401
    except ImportError:
        raise InputError(
            f"{path}: LMDB databases need the package ase-db-backends (pip install '.[lmdb]')."
        ) from None
