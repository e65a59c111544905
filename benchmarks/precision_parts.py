"""Where float32 loses digits: one part of a model at a time in the other precision.

Forces of the same model with one part raised to float64 in a float32 model, and with one part lowered to
float32 in a float64 model, against the model in float64 throughout.

    OMP_NUM_THREADS=1 python benchmarks/precision_parts.py [--mace FILE --mace-structures FILE]
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from ase import Atoms
from ase.build import bulk
from ase.io import read
from common import header, parser, report, table
from torch import Tensor, nn

from compactmlip.compress.apply import keep_species
from compactmlip.data.graph import GraphBatch, build_graph
from compactmlip.families import load_model
from compactmlip.kernels.build import without_kernels
from compactmlip.models import cast, convolution, mace, model_spec, nequip
from compactmlip.models.contraction import SymmetricContraction
from compactmlip.models.linear import EquivariantLinear, NormedMLP, RadialMLP
from compactmlip.models.repulsion import ZBLRepulsion

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
"""Edge vectors: rounding of the input; geometry: lengths, harmonics and radial basis made from them."""


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


def modules_of(model: nn.Module, part: str) -> list[nn.Module]:
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
def one_part(model: nn.Module, part: str, inside: torch.dtype, outside: torch.dtype) -> Iterator[None]:
    """Compute one part in a precision of its own; the model is cast accordingly."""
    with ExitStack() as stack:
        for module in modules_of(model, part):
            cast(module, inside)
            after = None if part == "readout" else outside
            for name in ("forward", "pieces"):
                if hasattr(module, name) and not (
                    part == "geometry" and not isinstance(module, ZBLRepulsion)
                ):
                    stack.enter_context(
                        patch.object(module, name, between(getattr(module, name), inside, after))
                    )
        if part == "geometry":
            changed = between(model.edge_features, inside, outside)  # type: ignore[arg-type]
            stack.enter_context(patch.object(model, "edge_features", changed))
        if part == "sums over neighbours":
            stack.enter_context(
                patch.object(convolution, "convolve", between(convolution.convolve, inside, outside))
            )
        if part == "contraction or gate":
            for family in (mace, nequip):
                stack.enter_context(patch.object(family, "gate", between(family.gate, inside, outside)))
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


def force_error(
    original: nn.Module, graphs: Sequence[GraphBatch], wanted: Sequence[Tensor], base: str, part: str | None
) -> tuple[float, float]:
    """Mean and largest force error, eV/Angstrom."""
    outside = getattr(torch, base)
    inside = torch.float64 if base == "float32" else torch.float32
    model = copy.deepcopy(original)
    # What a part in float64 reads from the model is float64 as well; so weights are cast part by part.
    chosen = set(modules_of(model, part)) if part else set()
    kept = {id(m): copy.deepcopy(m) for m in chosen}
    cast(model, outside)
    for module in chosen:
        module.load_state_dict(kept[id(module)].state_dict())
        for name, child in kept[id(module)].named_modules():
            for key, buffer in child.named_buffers(recurse=False):
                module.get_submodule(name).register_buffer(
                    key, buffer.clone(), persistent=key not in child._non_persistent_buffers_set
                )
            for key, parameter in child.named_parameters(recurse=False):
                module.get_submodule(name).get_parameter(key).data = parameter.data.clone()
    vectors = inside if part == "edge vectors" else outside
    summed = inside if part == "sum of pair forces" else outside
    differences = []
    with one_part(model, part or "", inside, outside):
        if part == "edge vectors":
            # Only the rounding of the vectors: in the float32 model, geometry in float64 comes with it.
            changed = between(model.edge_features, torch.float64, outside)  # type: ignore[arg-type]
            for module in modules_of(model, "geometry"):
                cast(module, torch.float64)
            with patch.object(model, "edge_features", changed):
                found = [forces(model, g, vectors, summed) for g in graphs]
        else:
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


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--mace", help="a MACE model, for instance a .model file")
    options_parser.add_argument("--mace-structures", type=Path, help="structures for it")
    options = options_parser.parse_args()
    torch.set_num_threads(options.threads)
    text = header("Which part of a model limits float32", "python benchmarks/precision_parts.py")
    crystal = bulk("MgO", "rocksalt", a=4.21, cubic=True) * (2, 2, 2)
    frames = []
    for seed in range(3):
        frames.append(crystal.copy())
        frames[-1].rattle(0.1, seed=seed)
    cases = {"SevenNet-l3i5, MgO": (keep_species(load_model("7net-l3i5"), ["Mg", "O"]), frames)}
    if options.mace:
        given = read(options.mace_structures, ":20")
        loaded = load_model(options.mace)
        cases["MACE, molecules"] = (
            keep_species(loaded, sorted({s for a in given for s in a.symbols})),
            given,
        )
    for name, (model, structures) in cases.items():
        sizes = sorted({len(a) for a in structures})
        text += f"\n{name}: {len(structures)} structures of {sizes} atoms; force errors in µeV/Angstrom\n\n"
        columns = ("part in the other precision", "float32, part raised: mean", "max")
        text += table((*columns, "float64, part lowered: mean", "max"), rows_for(model, structures))
    report(text, options.output)


if __name__ == "__main__":
    main()
