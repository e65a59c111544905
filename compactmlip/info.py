"""What ``compactmlip info`` prints about a model file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactmlip import checkpoint
from compactmlip.models import build, channel_rows
from compactmlip.spec import ModelSpec

if TYPE_CHECKING:
    from compactmlip.deploy.archive import Accuracy, Deployment, Tables
    from compactmlip.deploy.trust import TrustRegion


def describe(path: str | Path) -> dict[str, Any]:
    """Describe a checkpoint (``*.safetensors``) or a deployed file (``*.pt``, ``*.pt2``).

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
    deployed: dict[str, Any] = {}
    if path.suffix in (".pt", ".pt2"):
        from compactmlip.deploy.archive import inspect

        spec, deployment = inspect(path)
        kind, deployed = _kind(deployment), _precision(spec, deployment)
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
        **deployed,
        "units": f"energy {spec.units.energy}, length {spec.units.length}",
        "model": provenance.name,
        "source": provenance.source,
        "licence": provenance.licence,
        "citation": provenance.citation or "none given",
        "parent sha256": provenance.parent_sha256 or "none",
        "steps": [step.action for step in provenance.steps] or "none",
    }


def _kind(deployment: Deployment) -> str:
    if deployment.backend == "aoti":
        return f"deployed machine code for torch {deployment.torch_version} and processors like its maker's"
    needs = {"kernels": ", needs compiled kernels", "cueq": ", needs cuequivariance on NVIDIA GPUs"}
    return f"deployed TorchScript file{needs.get(deployment.backend, '')}"


def _precision(spec: ModelSpec, deployment: Deployment) -> dict[str, Any]:
    precision = deployment.precision or spec.dtype
    tf32 = ", TF32 products on NVIDIA GPUs" if deployment.tf32 else ""
    errors = [accuracy_text(a) for a in deployment.accuracy] or "not measured"
    tables = {} if deployment.tables is None else {"radial tables": tables_text(deployment.tables)}
    return {
        "precision": f"{precision}{tf32}",
        **tables,
        "error against float64": errors,
        "trust region": trust_text(deployment.trust),
    }


def trust_text(region: TrustRegion | None) -> list[str] | str:
    """Describe a trust region: the calibration set, then one line for each species and for pairs."""
    if region is None:
        return "none (compiled without calibration structures)"
    lines = [
        f"{region.num_structures} structures, {region.num_atoms} atoms; {100 * region.held_out:.2g} % of "
        "held-out atoms are outside"
    ]
    for symbol, s in region.species.items():
        lines.append(
            f"{symbol}: {s.num_atoms} atoms, nearest neighbour {_range(s.nearest)} Angstrom, coordination "
            f"{_range(s.coordination)}, features in {s.directions} directions"
        )
    if region.shortest:
        pairs = ", ".join(f"{pair} {d:.2f}" for pair, d in region.shortest.items())
        lines.append(f"shortest distances: {pairs} Angstrom")
    return lines


def _range(limits: tuple[float, float]) -> str:
    return f"{limits[0]:.2f} to {limits[1]:.2f}"


def tables_text(tables: Tables) -> str:
    """Describe the tables of a lowered model in one line."""
    kind = "quintic" if tables.values_per_knot == 3 else "cubic"
    return (
        f"{tables.knots} knots, {kind}; they change energies by up to {tables.energy_error:.1e} eV/atom and "
        f"forces by {tables.force_error:.1e} eV/Angstrom"
    )


def accuracy_text(accuracy: Accuracy) -> str:
    """One line about the errors of a deployed file against the float64 model."""
    a = accuracy
    text = (
        f"{a.num_structures} {a.structures} structures: energy {a.energy_mae:.1e} (max {a.energy_max:.1e}) "
        f"eV/atom, forces {a.force_mae:.1e} (max {a.force_max:.1e}) eV/Angstrom"
    )
    if a.force_largest is not None:
        text += f" where the largest is {a.force_largest:.1e}"
    if a.stress_mae is None:
        return text
    return f"{text}, stress {a.stress_mae:.1e} (max {a.stress_max:.1e}) eV/Angstrom^3"


def parameters_by_block(spec: ModelSpec) -> dict[str, int]:
    """Number of parameters of each top-level block and layer."""
    counts: dict[str, int] = {}
    for name, parameter in build(spec).named_parameters():
        head, _, rest = name.partition(".")
        block = f"layer {rest.partition('.')[0]}" if head == "layers" else head.partition("_")[0]
        counts[block] = counts.get(block, 0) + parameter.numel()
    return counts
