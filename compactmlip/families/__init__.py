"""Upstream model families: find, fetch and import their checkpoints as native models."""

from __future__ import annotations

import pickletools
import zipfile
import zlib
from pathlib import Path

import torch
from torch import nn

from compactmlip.checkpoint import load, sha256
from compactmlip.errors import CheckpointError
from compactmlip.families import sevennet
from compactmlip.families.fetch import fetch
from compactmlip.families.names import (
    Family,
    NamedCheckpoint,
    find_named,
    recognise,
    require_licence,
    unknown_name_error,
)
from compactmlip.families.unpickle import load_restricted
from compactmlip.models import cast
from compactmlip.spec import Provenance


def load_model(
    name_or_path: str | Path,
    *,
    modality: str | None = None,
    dtype: torch.dtype | None = torch.float32,
    accept_licence: str | None = None,
    progress: bool = True,
) -> nn.Module:
    """Load a model by name, from a compactmlip checkpoint, or from an upstream checkpoint file.

    Parameters
    ----------
    name_or_path
        A known name such as "7net-l3i5" or "mace-mpa-0-medium", a ``*.safetensors`` file, a SevenNet
        ``*.pth`` file or a MACE ``*.model`` file.
    modality
        Level of theory, for models that were trained on several; for MACE the name of the head.
    dtype
        Compute dtype; None keeps the stored one.
    accept_licence
        "ASL" accepts the Academic Software License, under which some models are published.  It is
        asked for whenever such an upstream model is loaded, by name or from its published file;
        ``*.safetensors`` files keep the licence in their provenance and ask no more.
    progress
        Show the progress of a download, on stderr.

    Raises
    ------
    InputError
        If the name is unknown, or the modality does not exist.
    LicenceError
        If the model's licence has to be accepted first; nothing has been downloaded then.
    CheckpointError, UnsupportedFeatureError, DownloadError
        If the file cannot be fetched, read or understood.
    """
    path = Path(name_or_path)
    if path.suffix == ".safetensors":
        return load(path, dtype)
    entry = find_named(str(name_or_path))
    if entry is not None and not path.is_file():
        require_licence(entry, accept_licence)
        path = fetch(entry, progress=progress)
        chosen = modality or (entry.modalities[0] if entry.modalities else None)
        provenance = _provenance(entry, entry.sha256 or sha256(path), entry.source, chosen)
        family: Family | None = entry.family
    elif path.is_file():
        chosen, digest, family = modality, sha256(path), None
        entry = recognise(path.name, digest)
        if entry is None:
            provenance = Provenance(name=path.stem, source=path.name, parent_sha256=digest)
        else:
            require_licence(entry, accept_licence)
            sure = "" if digest == entry.sha256 else ", by its file name"
            provenance = _provenance(entry, digest, f"{path.name}{sure}: {entry.source}", chosen)
    else:
        raise unknown_name_error(str(name_or_path))
    return cast(_import(path, provenance, chosen, family), dtype or torch.float32)


def _provenance(entry: NamedCheckpoint, digest: str, source: str, modality: str | None) -> Provenance:
    return Provenance(
        name=f"{entry.name} ({modality})" if modality else entry.name,
        source=source,
        licence=entry.licence,
        citation=entry.citation,
        parent_sha256=digest,
    )


def _import(path: Path, provenance: Provenance, modality: str | None, family: Family | None) -> nn.Module:
    """Import a file of a known family, or of the one that its name or content shows."""
    provenance = provenance.then("import", modality=modality)
    # A whole MACE model holds objects; its importer reads them without making them.
    if family == "mace" or (family is None and (path.suffix == ".model" or _names_mace(path))):
        return _import_mace(path, provenance, modality)
    content = load_restricted(path)
    # Both families may use these keys; the cutoff is called "r_max" by MACE and "cutoff" by SevenNet.
    if sevennet.is_checkpoint(content) and "r_max" not in content["config"]:
        return sevennet.import_model(content["config"], content["model_state_dict"], provenance, modality)
    try:
        return _import_mace(path, provenance, modality)
    except CheckpointError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise CheckpointError(
            f"{path}: a PyTorch file, but not a SevenNet checkpoint; read as a MACE model: {reason}"
        ) from error


def _import_mace(path: Path, provenance: Provenance, modality: str | None) -> nn.Module:
    from compactmlip.families import mace

    return mace.load_checkpoint(path, provenance, modality)


def _names_mace(path: Path) -> bool:
    """Whether the pickle in the file names something of the mace package; nothing is run."""
    try:
        with zipfile.ZipFile(path) as archive:
            member = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            words = (word for _, word, _ in pickletools.genops(archive.read(member)))
            return any(isinstance(word, str) and word.startswith("mace.") for word in words)
    except (zipfile.BadZipFile, zlib.error, StopIteration, ValueError, OSError, RuntimeError):
        return False
