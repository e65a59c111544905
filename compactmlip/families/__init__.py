"""Upstream model families: find, fetch and import their checkpoints as native models."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from compactmlip.checkpoint import load, sha256
from compactmlip.families.fetch import fetch
from compactmlip.families.names import find_named, unknown_name_error
from compactmlip.models import cast
from compactmlip.spec import Provenance


def load_model(
    name_or_path: str | Path, *, modality: str | None = None, dtype: torch.dtype | None = torch.float32
) -> nn.Module:
    """Load a model by name, from a compactmlip checkpoint, or from an upstream checkpoint file.

    Parameters
    ----------
    name_or_path
        A known name such as "7net-l3i5", a ``*.safetensors`` file, or a SevenNet ``*.pth`` file.
    modality
        Level of theory, for models that were trained on several.
    dtype
        Compute dtype; None keeps the stored one.

    Raises
    ------
    InputError
        If the name is unknown, or the modality does not exist.
    CheckpointError, UnsupportedFeatureError, DownloadError
        If the file cannot be fetched, read or understood.
    """
    path = Path(name_or_path)
    entry = find_named(str(name_or_path))
    if path.suffix == ".safetensors":
        return load(path, dtype)
    if entry is not None and not path.is_file():
        path = fetch(entry)
        chosen = modality or (entry.modalities[0] if entry.modalities else None)
        label = f"{entry.name} ({chosen})" if chosen else entry.name
        provenance = Provenance(
            name=label,
            source=entry.source,
            licence=entry.licence,
            citation=entry.citation,
            parent_sha256=entry.sha256,
        )
    elif path.is_file():
        chosen = modality
        provenance = Provenance(name=path.stem, source=path.name, parent_sha256=sha256(path))
    else:
        raise unknown_name_error(str(name_or_path))
    return cast(_import(path, provenance, chosen), dtype or torch.float32)


def _import(path: Path, provenance: Provenance, modality: str | None) -> nn.Module:
    from compactmlip.families.sevennet import load_checkpoint

    return load_checkpoint(path, provenance.then("import", modality=modality), modality)
