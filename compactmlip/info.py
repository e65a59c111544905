"""What ``compactmlip info`` prints about a model file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compactmlip import checkpoint
from compactmlip.models import build, channel_rows
from compactmlip.spec import ModelSpec


def describe(path: str | Path) -> dict[str, Any]:
    """Describe a checkpoint (``*.safetensors``) or a deployed file (``*.pt``).

    Returns
    -------
    dict
        Rows (label -> text or list of texts), in the order in which they should be shown.

    Raises
    ------
    CheckpointError
        If the file is neither, or damaged.
    """
    path = Path(path)
    if path.suffix == ".pt":
        from compactmlip.deploy.archive import inspect

        spec, deployment = inspect(path)
        needs = ", needs compiled kernels" if deployment.backend == "kernels" else ""
        kind = f"deployed TorchScript file{needs}"
    else:
        kind, spec = "checkpoint", checkpoint.read_spec(path)
    blocks = parameters_by_block(spec)
    provenance = spec.provenance
    return {
        "file": f"{path} ({path.stat().st_size / 1e6:.2f} MB, {kind}, format {spec.format_version})",
        "family": f"{spec.family}, {spec.num_message_passing_layers} message-passing layers",
        "species": f"{len(spec.species)}: {' '.join(spec.species)}",
        "parameters": f"{sum(blocks.values())}",
        "by block": [f"{name}: {count}" for name, count in blocks.items()],
        "channels": [f"{name}: {text}" for name, text in channel_rows(spec)],
        "cutoff": f"{spec.cutoff} Angstrom",
        "receptive field": f"{spec.receptive_field} Angstrom",
        "dtype": spec.dtype,
        "units": f"energy {spec.units.energy}, length {spec.units.length}",
        "model": provenance.name,
        "source": provenance.source,
        "licence": provenance.licence,
        "citation": provenance.citation or "none given",
        "parent sha256": provenance.parent_sha256 or "none",
        "steps": [step.action for step in provenance.steps] or "none",
    }


def parameters_by_block(spec: ModelSpec) -> dict[str, int]:
    """Number of parameters of each top-level block and layer."""
    counts: dict[str, int] = {}
    for name, parameter in build(spec).named_parameters():
        head, _, rest = name.partition(".")
        block = f"layer {rest.partition('.')[0]}" if head == "layers" else head.partition("_")[0]
        counts[block] = counts.get(block, 0) + parameter.numel()
    return counts
