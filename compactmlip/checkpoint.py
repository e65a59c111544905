"""Load and save models as safetensors with the JSON spec in the header.

Nothing here unpickles anything.  Files are written beside their target and renamed, so that a full
disk or an interruption leaves either the old file or none.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from compactmlip.errors import CheckpointError
from compactmlip.models import build, cast, model_dtype, model_spec
from compactmlip.spec import ModelSpec

SPEC_KEY = "compactmlip"
"""Header entry that holds the spec."""

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def atomic_write(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` on a temporary file beside ``path`` and rename it when it is complete.

    Raises
    ------
    CheckpointError
        If the file cannot be written (no such folder, no permission, disk full); nothing is left.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}.") from error
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"cannot write {path}: {error}. Nothing was changed.") from error
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file whole or not at all; raises as :func:`atomic_write`."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    atomic_write(path, write)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_name(path: Path, what: str = "a model is") -> None:
    """Raise :class:`CheckpointError` unless a file name ends in ``.safetensors``."""
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: {what} saved as *.safetensors; choose such a name.")


def save(model: nn.Module, path: str | Path) -> Path:
    """Write a model as ``*.safetensors``.

    Weights have the model's compute dtype; frozen factors and per-species energies keep float64.

    Raises
    ------
    CheckpointError
        If the name does not end in ``.safetensors`` or the file cannot be written.
    """
    path = Path(path)
    check_name(path)
    dtype = "float64" if model_dtype(model) == torch.float64 else "float32"
    spec = ModelSpec.model_validate({**model_spec(model).model_dump(), "dtype": dtype})
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    atomic_write(path, lambda p: save_file(tensors, str(p), metadata={SPEC_KEY: spec.to_json()}))
    return path


def read_spec(path: str | Path) -> ModelSpec:
    """Read the spec of a checkpoint without its tensors.

    Raises
    ------
    CheckpointError
        If the file is missing, truncated, not a compactmlip checkpoint or of a newer version.
    """
    return _read(Path(path), with_tensors=False)[0]


def load(path: str | Path, dtype: torch.dtype | None = None) -> nn.Module:
    """Load a model; ``dtype`` overrides the stored compute dtype.

    Raises
    ------
    CheckpointError
        If the file is missing, truncated, not a compactmlip checkpoint or of a newer version, or if
        its tensors do not fit its spec.
    """
    path = Path(path)
    spec, tensors = _read(path, with_tensors=True)
    model = build(spec)
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{path}: tensors do not fit the spec: {name} has shape {found.get(name)}, expected "
            f"{expected.get(name)} ({len(wrong)} such tensors). The file is damaged."
        )
    bad = [name for name, t in tensors.items() if not torch.isfinite(t).all()]
    if bad:
        raise CheckpointError(f"{path}: {bad[0]} holds values that are not finite. The file is damaged.")
    model.load_state_dict(tensors)
    return cast(model, dtype or DTYPES[spec.dtype])


def _read(path: Path, *, with_tensors: bool) -> tuple[ModelSpec, dict[str, Tensor]]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file.")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if SPEC_KEY not in metadata:
                raise CheckpointError(
                    f"{path}: a safetensors file, but not written by compactmlip. "
                    "Import upstream models with 'compactmlip convert'."
                )
            spec = ModelSpec.from_json(metadata[SPEC_KEY], str(path))
            names = file.keys() if with_tensors else ()
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: not a complete safetensors file ({error}). It is truncated or of another type; "
            "upstream checkpoints are imported with 'compactmlip convert'."
        ) from error
    return spec, tensors
