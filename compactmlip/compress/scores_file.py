"""Scores of channels as a file: kept beside a run, and read again for pruning."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import nn

from compactmlip.checkpoint import atomic_write, check_name
from compactmlip.compress.tapped import Scores, group_sizes
from compactmlip.errors import CheckpointError, InputError
from compactmlip.models import model_spec

KEY = "compactmlip-scores"
"""Header entry that says what the scores are."""


def save_scores(path: str | Path, scores: Scores, model: nn.Module, **details: Any) -> Path:
    """Write scores as ``*.safetensors``, one tensor (channels,) per channel group.

    Parameters
    ----------
    path
        File to write.
    model
        What was scored; the file names its architecture, so that it is not used for another.
    details
        Further entries of the header (JSON), for instance the criterion.

    Raises
    ------
    CheckpointError
        If the name does not end in ``.safetensors`` or the file cannot be written.
    """
    path = Path(path)
    check_name(path, "scores are")
    header = json.dumps({"version": 1, "model": architecture_digest(model), **details})
    tensors = {name: np.ascontiguousarray(score) for name, score in scores.items()}
    atomic_write(path, lambda p: save_file(tensors, str(p), metadata={KEY: header}))
    return path


def load_scores(path: str | Path, model: nn.Module) -> tuple[Scores, Mapping[str, Any]]:
    """Read scores of a model and the header.

    Raises
    ------
    CheckpointError
        If there is no such file or it does not hold scores.
    InputError
        If they are scores of another architecture.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file.")
    try:
        with safe_open(str(path), framework="np") as file:
            metadata = file.metadata() or {}
            scores: Scores = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a complete safetensors file ({error}).") from error
    if KEY not in metadata:
        raise CheckpointError(f"{path}: holds no scores; 'compactmlip importance' writes such a file.")
    header: dict[str, Any] = json.loads(metadata[KEY])
    sizes = {name: len(score) for name, score in scores.items()}
    if header.get("model") != architecture_digest(model) or sizes != group_sizes(model):
        raise InputError(
            f"{path}: these are scores of another architecture; make them from this model with "
            "'compactmlip importance'."
        )
    return scores, header


def architecture_digest(model: nn.Module) -> str:
    """Digest of family, species and architecture."""
    spec = model_spec(model)
    identity = json.dumps([spec.family, spec.species, spec.architecture], sort_keys=True, default=str)
    return hashlib.sha256(identity.encode()).hexdigest()[:16]
