"""Finished parts of a validation, kept beside its output until all are there.

Parts are arrays, structures and numbers, which pickle keeps bit for bit.  Unpickling runs code, so parts
are only read from a folder that belongs to the user who runs the validation.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from ase import Atoms

from compactmlip import __version__
from compactmlip.checkpoint import atomic_write, atomic_write_text, sha256
from compactmlip.data.label import update_with_structures
from compactmlip.validate.options import ValidateOptions

FOLDER, IDENTITY = ".unfinished-validation", "identity.json"

T = TypeVar("T")


class Parts:
    """Results by name; each is computed once, also if the run is stopped in between.

    Parameters
    ----------
    out
        Folder of the validation's files.
    identity
        What the results depend on; parts of a run with another one are removed.
    """

    def __init__(self, out: Path, identity: str) -> None:
        self.folder = out / FOLDER
        known = self.folder / IDENTITY
        if not (_own(self.folder) and known.is_file() and json.loads(known.read_text()) == identity):
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            atomic_write_text(known, json.dumps(identity))

    def of(self, name: str, compute: Callable[[], T]) -> T:
        """Return the part of this name, computed and kept if it is not there."""
        path = self.folder / f"{name}.pickle"
        if path.is_file():
            with path.open("rb") as file:
                return cast(T, pickle.load(file))
        found = compute()

        def write(temporary: Path) -> None:
            temporary.write_bytes(pickle.dumps(found))

        atomic_write(path, write)
        return found

    def finish(self) -> None:
        """Remove all parts."""
        shutil.rmtree(self.folder)


def _own(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink() and folder.stat().st_uid == os.getuid()


def identity(models: Sequence[Path], frames: Sequence[Atoms], options: ValidateOptions) -> str:
    """Hash of model files, structures with all that is said about them, options and version."""
    digest = hashlib.sha256()
    update_with_structures(digest, frames)
    for atoms in frames:
        for name, values in sorted({**atoms.arrays, **atoms.info}.items()):
            digest.update(name.encode() + _bytes(values))
    parts: list[Any] = [sha256(path) for path in models]
    parts += [digest.hexdigest(), options.model_dump_json(), __version__]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _bytes(values: Any) -> bytes:
    array = np.asarray(values)
    return repr(values).encode() if array.dtype == object else np.ascontiguousarray(array).tobytes()
