"""Extended XYZ with every digit, and the check that a file is whole.

ASE writes atomic columns with eight decimals; here each number has the fewest digits that read back
to the same float64, so that labels and geometries survive a file exactly.  Reading is left to ASE.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.io.extxyz import key_val_dict_to_str
from ase.io.formats import open_with_compression

from compactmlip.errors import InputError

_COLUMN_TYPES = {"f": "R", "i": "I", "u": "I", "b": "L", "U": "S"}
_IMPLIED = ("numbers", "positions")


def format_frame(atoms: Atoms) -> str:
    """Return one frame as text: cell, ``pbc``, ``info`` and ``arrays``; calculators and constraints stay out.

    Raises
    ------
    InputError
        If an array has more than two axes or holds objects.
    """
    extra = {name: np.asarray(a) for name, a in atoms.arrays.items() if name not in _IMPLIED}
    properties = "species:S:1:pos:R:3"
    columns = [atoms.get_chemical_symbols(), *_column_texts(atoms.positions)]
    for name, array in extra.items():
        if array.ndim not in (1, 2) or array.dtype.kind not in _COLUMN_TYPES:
            raise InputError(
                f"the array '{name}' (shape {array.shape}, {array.dtype}) does not fit into extended XYZ; "
                "delete it from atoms.arrays or flatten it to (atoms, columns)."
            )
        width = 1 if array.ndim == 1 else array.shape[1]
        properties += f":{name}:{_COLUMN_TYPES[array.dtype.kind]}:{width}"
        columns += _column_texts(array)
    header: dict[str, Any] = {}
    if atoms.cell.any():
        header["Lattice"] = atoms.cell.array.T
    header["Properties"] = properties
    header["pbc"] = atoms.pbc
    comment = key_val_dict_to_str({**header, **atoms.info}).replace("\n", " ")
    rows = (" ".join(row) for row in zip(*columns, strict=True))
    return "\n".join((str(len(atoms)), comment, *rows)) + "\n"


def _column_texts(array: np.ndarray) -> list[list[str]]:
    """Text of each column of an array (N,) or (N, columns)."""
    table = array[:, None] if array.ndim == 1 else array
    if table.dtype.kind == "b":
        return [["T" if x else "F" for x in column] for column in table.T]
    if table.dtype.kind == "f":
        return [[repr(float(x)) for x in column] for column in table.T]
    return [[str(x) for x in column] for column in table.T]


def write_frames(path: Path, frames: Iterable[Atoms]) -> None:
    """Write frames one after the other (not atomically)."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(format_frame(atoms) for atoms in frames)


def complete_prefix(lines: Sequence[bytes]) -> tuple[int, int]:
    """Return (number of complete frames, their length in bytes) at the start of a file.

    ``lines`` keep their line ends.  A frame is complete when all its lines are there and the last one is
    ended by a newline: what is appended in order and cut off anywhere is recognised.
    """
    frames, size, k = 0, 0, 0
    while k < len(lines) and lines[k].strip().isdigit():
        end = k + 2 + int(lines[k])
        if end > len(lines) or not lines[end - 1].endswith(b"\n"):
            break
        size += sum(len(line) for line in lines[k:end])
        frames, k = frames + 1, end
    return frames, size


def check_whole(path: Path, *, ended: bool = False) -> None:
    """Refuse an XYZ file that ends inside a frame, or has something after a blank line.

    ASE stops at a blank line without a word, which would lose every frame behind it.  With ``ended`` the
    last line must be ended by a newline: without one, its last number may have lost digits.

    Raises
    ------
    InputError
        Naming the file, the frame and the line.
    """
    with open_with_compression(str(path), "rb") as file:
        lines = file.read().split(b"\n")
    if not lines[-1].strip():
        lines.pop()
    elif ended:
        raise InputError(
            f"{path}: the last line is not ended by a newline, so the file may have been cut off inside "
            "a number; if it is complete, add a newline at its end."
        )
    k, frame = 0, 0
    while k < len(lines):
        count = lines[k].strip()
        if not count:
            break
        if not count.isdigit():
            shown = count[:40].decode(errors="replace")
            raise InputError(
                f"{path}: line {k + 1} should give frame {frame}'s number of atoms, not '{shown}'."
            )
        end = k + 2 + int(count)
        if end > len(lines):
            raise InputError(
                f"{path}: frame {frame} (line {k + 1}) announces {int(count)} atoms, but the file ends after "
                f"{max(len(lines) - k - 2, 0)}. It is truncated: copy it again, or delete the last frame."
            )
        k, frame = end, frame + 1
        while k < len(lines) and lines[k].lstrip().startswith(b"VEC"):
            k += 1
    rest = next((j for j in range(k, len(lines)) if lines[j].strip()), None)
    if rest is not None:
        raise InputError(
            f"{path}: line {k + 1} is blank, and the text from line {rest + 1} on would be ignored; "
            "delete the blank line between the frames."
        )
