"""Lower a model and choose how fine its tables are."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ase.data import atomic_numbers, covalent_radii
from torch import Tensor, nn

from compactmlip.data.graph import GraphBatch, energy_and_derivatives
from compactmlip.deploy.archive import Tables
from compactmlip.deploy.lower.convolution import Grid
from compactmlip.deploy.lower.splines import SmoothLayerNorm
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

INTERVALS = (60, 80, 120, 160, 240, 320, 480, 640, 960, 1280, 1920)
"""Numbers of intervals that are tried; many divisors let kinks of cutoff functions fall on knots."""


@dataclass(frozen=True)
class Lowered:
    """A lowered model in float64, and size and errors of its tables."""

    module: nn.Module
    tables: Tables


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
    original = exact_copy(model)
    for parent in original.modules():
        for child_name, child in parent.named_children():
            if isinstance(child, nn.LayerNorm):
                setattr(parent, child_name, SmoothLayerNorm(child))
    made = build(original, Grid(spec.cutoff, knots, values_per_knot))
    return made.eval().requires_grad_(False)


def lower(
    model: nn.Module,
    graphs: Sequence[GraphBatch],
    *,
    energy_bound: float = ENERGY_BOUND,
    force_bound: float = FORCE_BOUND,
    runnable: Callable[[nn.Module], nn.Module] | None = None,
) -> Lowered:
    """Lower a native model with the smallest tables that keep the bounds.

    Quintic tables, whose second derivatives are continuous, are tried before cubic ones; those serve cutoff
    functions with a kink in the second derivative.

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
    graphs = [*graphs, dimers(model_spec(model))]
    expected = [energy_and_derivatives(original, graph) for graph in graphs]
    # Pairs of atoms are structures of their own.
    counted = [(r.forces.abs() <= MEANINGLESS).all(dim=1) for r in expected]
    counted = [mask & mask.all() for mask in counted[:-1]] + counted[-1:]
    shift_of: Tensor = original.energy_shift  # type: ignore[assignment]
    shifts = [shift_of.index_select(0, graph.species) for graph in graphs]
    kept: Lowered | None = None
    for intervals, values in itertools.product(INTERVALS, (3, 2)):
        module = lower_on_grid(original, intervals + 1, values)
        measured = module if runnable is None else runnable(module)
        energy = force = 0.0
        for graph, reference, shift, mask in zip(graphs, expected, shifts, counted, strict=True):
            if not mask.any():
                continue
            found = energy_and_derivatives(measured, graph)
            energies, forces = found.node_energies[mask], found.forces[mask]
            energy = max(energy, _error(energies, reference.node_energies[mask], shift[mask]))
            force = max(force, _error(forces, reference.forces[mask]))
        excess = max(energy / energy_bound, force / force_bound) if energy_bound and force_bound else math.inf
        if excess <= 1 and (kept is None or excess * MARGIN <= 1):
            tables = Tables(
                knots=intervals + 1,
                values_per_knot=values,
                energy_error=energy,
                force_error=force,
                energy_bound=energy_bound,
                force_bound=force_bound,
            )
            kept = Lowered(module, tables)
        if excess * MARGIN <= 1 and kept is not None:
            return kept
    if kept is not None:
        return kept
    raise LoweringError(
        f"tables with {intervals + 1} knots still cause errors of {energy:.1e} eV/atom and {force:.1e} "
        f"eV/Angstrom, above the bounds {energy_bound:.0e} and {force_bound:.0e}"
    )


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
