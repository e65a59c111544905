"""Where float32 loses digits: one part of a model at a time in the other precision (for precision.py).

Forces of the same model with one part raised to float64 in a float32 model, and with one part lowered to
float32 in a float64 model, against the model in float64 throughout.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from ase import Atoms
from torch import Tensor, nn

from compactmlip.data.graph import GraphBatch, build_graph
from compactmlip.kernels.build import without_kernels
from compactmlip.models import FLOAT64_BUFFERS, cast, convolution, mace, model_spec, nequip
from compactmlip.models.contraction import SymmetricContraction
from compactmlip.models.linear import EquivariantLinear, NormedMLP, RadialMLP

PARTS = (
    "edge vectors",
    "geometry",
    "radial networks",
    "sums over neighbours",
    "linear maps",
    "contraction or gate",
    "readout",
    "sum of pair forces",
)
"""Edge vectors: as geometry, and without rounding of the vectors (or with that alone); geometry: lengths,
harmonics, radial basis and repulsion."""


def convert(value: Any, dtype: torch.dtype) -> Any:
    """Cast every floating-point tensor in a nest of containers."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, list | tuple):
        return type(value)(convert(v, dtype) for v in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: convert(getattr(value, f.name), dtype) for f in fields(value)})
    return value


def between(function: Callable[..., Any], inside: torch.dtype, outside: torch.dtype | None) -> Any:
    """The function computed in one precision among others."""

    def call(*args: Any, **options: Any) -> Any:
        result = function(*convert(args, inside), **options)
        return result if outside is None else convert(result, outside)

    return call


def modules_of(model: nn.Module, part: str | None) -> list[nn.Module]:
    """Modules that make up a part."""
    radial = [m for m in model.modules() if isinstance(m, RadialMLP | NormedMLP)]
    if part == "radial networks":
        return radial
    if part == "geometry":
        names = ("basis", "radial", "harmonics", "repulsion")
        return [m for n in names if isinstance(m := getattr(model, n, None), nn.Module)]
    if part == "contraction or gate":
        return [m for m in model.modules() if isinstance(m, SymmetricContraction)]
    if part == "readout":
        found = [m for m in model.modules() if isinstance(m, mace.Readout)]
        return found or [model.readout_hidden, model.readout]  # type: ignore[list-item]
    if part == "linear maps":
        head = getattr(model, "readout_hidden", None)
        return [m for m in model.modules() if isinstance(m, EquivariantLinear) and m is not head]
    return []


@contextmanager
def one_part(model: nn.Module, part: str | None, inside: torch.dtype, outside: torch.dtype) -> Iterator[None]:
    """Compute one part in a precision of its own; the model has been cast accordingly."""
    changed: list[tuple[object, str, torch.dtype | None]] = []
    if part == "geometry":
        changed = [
            (model, name, outside) for name in ("edge_features", "pair_energy") if hasattr(model, name)
        ]
    else:
        after = None if part == "readout" else outside
        modules, names = modules_of(model, part), ("forward", "pieces")
        changed = [(module, name, after) for module in modules for name in names if hasattr(module, name)]
    if part == "readout" and isinstance(model, nequip.NequIP):
        changed = [(model, "read_energy", None)]
    if part == "sums over neighbours":
        changed.append((convolution, "convolve", outside))
    if part == "contraction or gate":
        changed += [(family, "gate", outside) for family in (mace, nequip)]
    with ExitStack() as stack:
        for owner, name, after in changed:
            stack.enter_context(patch.object(owner, name, between(getattr(owner, name), inside, after)))
        yield


def forces(model: nn.Module, graph: GraphBatch, vectors: torch.dtype, summed: torch.dtype) -> Tensor:
    """Forces with the edge vectors, and the sum of the pair forces, in given precisions."""
    given = graph.vectors.to(vectors).requires_grad_()
    energy = model(graph.species, graph.centers, graph.neighbors, given)
    (gradient,) = torch.autograd.grad(energy.sum(), given)
    gradient = gradient.to(summed)
    total = gradient.new_zeros(len(graph.species), 3)
    total = total.index_add(0, graph.centers, gradient).index_add(0, graph.neighbors, -gradient)
    return total.double()


def cast_parts(
    model: nn.Module, chosen: Sequence[nn.Module], inside: torch.dtype, outside: torch.dtype
) -> None:
    """Cast the chosen modules to one precision and the others to another."""
    within = {m for part in chosen for m in part.modules()}
    for module in model.modules():
        dtype = inside if module in within else outside
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in FLOAT64_BUFFERS:
                setattr(module, name, buffer.to(dtype))


def force_error(
    original: nn.Module, graphs: Sequence[GraphBatch], wanted: Sequence[Tensor], base: str, part: str | None
) -> tuple[float, float]:
    """Mean and largest force error, eV/Angstrom."""
    outside = getattr(torch, base)
    inside = torch.float64 if base == "float32" else torch.float32
    model = copy.deepcopy(original)
    vectors = inside if part == "edge vectors" else outside
    summed = inside if part == "sum of pair forces" else outside
    computed: str | None = part
    if part == "edge vectors":
        # What is made from float64 vectors is float64 too; from float32 ones, this is rounding alone.
        inside, computed = torch.float64, "geometry"
    cast_parts(model, modules_of(model, computed), inside, outside)
    with one_part(model, computed, inside, outside):
        found = [forces(model, g, vectors, summed) for g in graphs]
    differences = torch.cat([(f - w).abs().flatten() for f, w in zip(found, wanted, strict=True)])
    return float(differences.mean()), float(differences.max())


def rows_for(model: nn.Module, frames: Sequence[Atoms]) -> list[list[object]]:
    """One row for each part."""
    original = cast(model, torch.float64)
    graphs = [build_graph(a, model_spec(model)) for a in frames]
    with without_kernels():
        wanted = [forces(original, g, torch.float64, torch.float64) for g in graphs]
        rows: list[list[object]] = []
        for part in (None, *PARTS):
            row: list[object] = [part or "nothing"]
            for base in ("float32", "float64"):
                row += [1e6 * e for e in force_error(original, graphs, wanted, base, part)]
            rows.append(row)
            print(row, flush=True)
    return rows
