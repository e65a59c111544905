"""Lower a model and choose how fine its tables are."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ase.data import atomic_numbers, covalent_radii
from torch import Tensor, nn

from compactmlip.data.graph import GraphBatch, energy_and_derivatives
from compactmlip.deploy.archive import Tables
from compactmlip.deploy.lower.splines import Grid, SmoothLayerNorm
from compactmlip.errors import LoweringError
from compactmlip.models import exact_copy, model_spec
from compactmlip.spec import ModelSpec

LOWERED = {
    "mace": ("compactmlip.deploy.lower.mace", "LoweredMACE"),
    "nequip": ("compactmlip.deploy.lower.nequip", "LoweredNequIP"),
}
"""Family -> module and class; imported when first used."""

ENERGY_BOUND = 1e-6
"""eV per atom: largest error of an atom's energy that tables may cause."""

FORCE_BOUND = 1e-5
"""eV/Angstrom: largest error of a force component that tables may cause."""

MARGIN = 4.0
"""Measured errors stay this far below the bounds: on rattled silicon the tables of 7net-0 cause three
times the force error that they cause on the structures of the check."""

LARGE = 10.0
"""eV and eV/Angstrom: where an atom's energy (without its shift) or a force is larger, bounds count for this
much of it.  Structures with such forces are far from any that are simulated."""

MEANINGLESS = 100.0
"""eV/Angstrom: a structure (or a pair of atoms) with a larger force is not counted.  Random structures of
some elements have forces of 1e8, which say nothing about what is simulated."""

FEWEST_INTERVALS, MOST_INTERVALS = 60, 2000
"""From zero to the cutoff."""

ORDER = 5
"""Errors of forces fall with this power of the number of intervals."""


@dataclass(frozen=True)
class Lowered:
    """A lowered model in float64, and size and errors of its tables."""

    module: nn.Module
    tables: Tables


def lower_on_grid(model: nn.Module, intervals: int, values_per_knot: int = 3) -> nn.Module:
    """Lower a native model with given tables, in float64; the model is not changed.

    ``intervals`` are those from zero to the cutoff, ``values_per_knot`` is 2 for cubic and 3 for quintic
    interpolation.

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
    original = exact_copy(model)
    for parent in original.modules():
        for child_name, child in parent.named_children():
            if isinstance(child, nn.LayerNorm):
                setattr(parent, child_name, SmoothLayerNorm(child))
    made = build(original, grid_of(model, intervals, values_per_knot))
    return made.eval().requires_grad_(False)


def grid_of(model: Any, intervals: int, values_per_knot: int = 3) -> Grid:
    """Where the radial functions of a model are tabulated."""
    return Grid.with_intervals(model_spec(model).cutoff, intervals, values_per_knot, model.arch.envelope.kink)


def lower(
    model: nn.Module,
    graphs: Sequence[GraphBatch],
    *,
    energy_bound: float = ENERGY_BOUND,
    force_bound: float = FORCE_BOUND,
    runnable: Callable[[nn.Module], nn.Module] | None = None,
) -> Lowered:
    """Lower a native model with quintic tables, about the smallest that keep the bounds.

    Parameters
    ----------
    model
        A native model; it is not changed.
    graphs
        Structures (float64) on which errors are measured, besides pairs of atoms at all distances.
    energy_bound, force_bound
        Largest errors of an atom's energy (eV) and of a force component (eV/Angstrom); what is measured stays
        below them by :data:`MARGIN` where that is possible.
    runnable
        What makes the form of a lowered model that errors are measured with, where compiled operators cannot
        be used.

    Raises
    ------
    LoweringError
        If the family has no lowered form, or no tables keep the bounds.
    """
    original = exact_copy(model)
    references = [_Reference(original, graph) for graph in graphs]
    # Pairs of atoms are structures of their own.
    references.append(_Reference(original, dimers(model_spec(model)), each_atom=True))
    kept: Lowered | None = None
    intervals = FEWEST_INTERVALS
    while True:
        module = lower_on_grid(original, intervals)
        measured = module if runnable is None else runnable(module)
        found = [reference.errors(measured) for reference in references]
        energy, force = (max(errors) for errors in zip(*found, strict=True))
        excess = max(energy / energy_bound, force / force_bound) if energy_bound and force_bound else math.inf
        if excess <= 1 and (kept is None or excess * MARGIN <= 1):
            tables = Tables(
                knots=grid_of(original, intervals).knots,
                values_per_knot=3,
                energy_error=energy,
                force_error=force,
                energy_bound=energy_bound,
                force_bound=force_bound,
            )
            kept = Lowered(module, tables)
        if kept is not None and excess * MARGIN <= 1:
            return kept
        if intervals >= MOST_INTERVALS:
            break
        intervals = min(_more(intervals, excess * MARGIN), MOST_INTERVALS)
    if kept is not None:
        return kept
    raise LoweringError(
        f"tables with {intervals} intervals still cause errors of {energy:.1e} eV/atom and {force:.1e} "
        f"eV/Angstrom, above the bounds {energy_bound:.0e} and {force_bound:.0e}"
    )


def _more(intervals: int, excess: float) -> int:
    """Number of intervals to try next; a little more than the error asks for, and 1.2 to 3 times as many."""
    factor = 1.05 * excess ** (1 / ORDER) if math.isfinite(excess) else 3.0
    return math.ceil(intervals * min(max(factor, 1.2), 3.0) / 10) * 10


class _Reference:
    """What the model without tables says about a structure."""

    def __init__(self, model: nn.Module, graph: GraphBatch, *, each_atom: bool = False) -> None:
        self.graph, self.expected = graph, energy_and_derivatives(model, graph)
        counted = (self.expected.forces.abs() <= MEANINGLESS).all(dim=1)
        self.counted = counted if each_atom else counted & counted.all()
        shift: Tensor = model.energy_shift  # type: ignore[assignment]
        self.shift = shift.index_select(0, graph.species)

    def errors(self, module: nn.Module) -> tuple[float, float]:
        """Largest error of an atom's energy (eV) and of a force component (eV/Angstrom)."""
        mask = self.counted
        if not mask.any():
            return 0.0, 0.0
        found, expected = energy_and_derivatives(module, self.graph), self.expected
        energy = _error(found.node_energies[mask], expected.node_energies[mask], self.shift[mask])
        return energy, _error(found.forces[mask], expected.forces[mask])


SHORTEST = 0.5
"""Closest pair on which tables are tested, in sums of covalent radii; no less than this in Angstrom, too."""

MAX_PAIRS = 32
"""Pairs of species that are tested, chosen at random where there are more."""


def dimers(spec: ModelSpec) -> GraphBatch:
    """Pairs of atoms at distances up to the cutoff, close to each other near it, as one graph."""
    species = range(len(spec.species))
    pairs = list(itertools.combinations_with_replacement(species, 2))
    rng = np.random.default_rng(0)
    if len(pairs) > MAX_PAIRS:
        pairs = [pairs[k] for k in rng.choice(len(pairs), MAX_PAIRS, replace=False)]
    cutoff = spec.cutoff
    radii = [covalent_radii[atomic_numbers[s]] for s in spec.species]
    nearest = [min(max(SHORTEST, SHORTEST * (radii[i] + radii[j])), cutoff - 0.2) for i, j in pairs]
    last = np.linspace(cutoff - 0.1, cutoff, 60)[1:-1]
    distances = np.array([np.concatenate([np.linspace(r, cutoff - 0.1, 301), last]) for r in nearest])
    count = distances.size
    directions = rng.normal(size=(count, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    vectors = distances.reshape(-1, 1) * directions
    first = torch.arange(0, 2 * count, 2)
    return GraphBatch(
        species=torch.tensor(np.repeat(np.array(pairs), distances.shape[1], axis=0).reshape(-1)),
        centers=torch.stack([first, first + 1], dim=1).reshape(-1),
        neighbors=torch.stack([first + 1, first], dim=1).reshape(-1),
        vectors=torch.tensor(np.stack([vectors, -vectors], axis=1).reshape(-1, 3)),
        structure=torch.zeros(2 * count, dtype=torch.long),
        num_atoms=torch.tensor([2 * count]),
        volumes=torch.tensor([float("nan")], dtype=torch.float64),
    )


def _error(found: Tensor, expected: Tensor, shift: Tensor | float = 0.0) -> float:
    """Largest difference; infinite if one is not a number."""
    scale = ((expected - shift).abs() / LARGE).clamp(min=1.0)
    errors = ((found - expected).abs() / scale).nan_to_num(nan=float("inf"))
    return float(errors.max()) if errors.numel() else 0.0
