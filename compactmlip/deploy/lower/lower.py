"""Lower a model and choose how fine its tables are."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from compactmlip.data.graph import GraphBatch, energy_and_derivatives
from compactmlip.deploy.lower.convolution import Grid
from compactmlip.errors import LoweringError
from compactmlip.models import exact_copy, model_spec

LOWERED = {
    "mace": ("compactmlip.deploy.lower.mace", "LoweredMACE"),
    "nequip": ("compactmlip.deploy.lower.nequip", "LoweredNequIP"),
}
"""Family -> module and class; imported when first used."""

ENERGY_BOUND = 1e-6
"""eV per atom: largest error of an atom's energy that tables may cause."""

FORCE_BOUND = 1e-5
"""eV/Angstrom: largest error of a force component that tables may cause."""

LARGE = 10.0
"""eV and eV/Angstrom: where an atom's energy (without its shift) or a force is larger, bounds count for this
much of it.  Structures with such forces are far from any that are simulated."""

INTERVALS = (60, 80, 120, 160, 240, 320, 480, 640, 960, 1280)
"""Numbers of intervals that are tried; many divisors, so that a kink of the cutoff function falls on a knot."""


@dataclass(frozen=True)
class TableErrors:
    """Largest errors that the tables cause, in float64, and what was allowed.

    Energies in eV per atom, forces in eV/Angstrom; for large ones the same fraction of :data:`LARGE`.
    """

    knots: int
    values_per_knot: int
    energy_error: float
    force_error: float
    energy_bound: float
    force_bound: float


@dataclass(frozen=True)
class Lowered:
    """A lowered model in float64 and the errors of its tables."""

    module: nn.Module
    errors: TableErrors


def lower_on_grid(model: nn.Module, knots: int, values_per_knot: int = 3) -> nn.Module:
    """Lower a native model with given tables, in float64; the model is not changed.

    Raises
    ------
    LoweringError
        If the family has no lowered form, or the tables would be too large.
    """
    spec = model_spec(model)
    if spec.family not in LOWERED:
        raise LoweringError(f"models of family '{spec.family}' have no lowered form")
    module, name = LOWERED[spec.family]
    build: Callable[[nn.Module, Grid], nn.Module] = getattr(importlib.import_module(module), name)
    made = build(exact_copy(model), Grid(spec.cutoff, knots, values_per_knot))
    return made.eval().requires_grad_(False)


def lower(
    model: nn.Module,
    graphs: Sequence[GraphBatch],
    *,
    energy_bound: float = ENERGY_BOUND,
    force_bound: float = FORCE_BOUND,
) -> Lowered:
    """Lower a native model with the smallest tables that keep the bounds.

    Quintic tables, whose second derivatives are continuous, are tried before cubic ones; those serve cutoff
    functions with a kink in the second derivative.

    Parameters
    ----------
    model
        A native model; it is not changed.
    graphs
        Structures (float64) on which errors are measured.
    energy_bound, force_bound
        Largest errors of an atom's energy (eV) and of a force component (eV/Angstrom).

    Raises
    ------
    LoweringError
        If the family has no lowered form, or no tables keep the bounds.
    """
    original = exact_copy(model)
    expected = [energy_and_derivatives(original, graph) for graph in graphs]
    shifts = [original.energy_shift.index_select(0, graph.species) for graph in graphs]
    for intervals, values in itertools.product(INTERVALS, (3, 2)):
        module = lower_on_grid(original, intervals + 1, values)
        energy = force = 0.0
        for graph, reference, shift in zip(graphs, expected, shifts, strict=True):
            found = energy_and_derivatives(module, graph)
            energy = max(energy, _error(found.node_energies, reference.node_energies, shift))
            force = max(force, _error(found.forces, reference.forces))
        if energy <= energy_bound and force <= force_bound:
            errors = TableErrors(intervals + 1, values, energy, force, energy_bound, force_bound)
            return Lowered(module, errors)
    raise LoweringError(
        f"tables with {intervals + 1} knots still cause errors of {energy:.1e} eV/atom and {force:.1e} "
        f"eV/Angstrom, above the bounds {energy_bound:.0e} and {force_bound:.0e}"
    )


def _error(found: Tensor, expected: Tensor, shift: Tensor | float = 0.0) -> float:
    """Largest difference; infinite if one is not a number."""
    scale = ((expected - shift).abs() / LARGE).clamp(min=1.0)
    errors = ((found - expected).abs() / scale).nan_to_num(nan=float("inf"))
    return float(errors.max()) if errors.numel() else 0.0
