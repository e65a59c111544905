"""Read upstream pickles without running what is in them.

A pickle can name any function and call it.  PyTorch's restricted unpickler calls only functions on
an allow-list; to its own list (tensors, storages, ordered dictionaries, devices) we add plain numpy
arrays, which old training configurations hold, and nothing else.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compactmlip.errors import CheckpointError

_RECONSTRUCT = np.zeros(0).__reduce__()[0]
_NUMPY_TYPES: list[Any] = [
    (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
    (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "b1")),
]


def load_restricted(path: Path) -> Any:
    """Load a file written by ``torch.save`` that holds tensors, numpy arrays and plain containers.

    Raises
    ------
    CheckpointError
        If the file is missing, truncated, not such a file, or refers to any other type.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file.")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path}: not a complete PyTorch checkpoint (no zip archive). It is truncated or of another type."
        )
    try:
        with torch.serialization.safe_globals(_NUMPY_TYPES):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        detail = next((s for s in str(error).splitlines() if "GLOBAL" in s or "nsupported" in s), "")
        raise CheckpointError(
            f"{path}: refused, because it holds objects other than tensors, arrays and plain containers. "
            f"{detail.strip()} Loading those would run code from the file; convert it with the program that "
            "wrote it, or ask for the bare state dict."
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}). It is truncated or damaged.") from error
