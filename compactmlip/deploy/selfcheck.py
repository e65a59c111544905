"""Compare a compiled model with the model it was made from, on structures of many kinds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from ase import Atoms
from ase.data import atomic_numbers, covalent_radii
from torch import Tensor

from compactmlip.data.graph import Derivatives, GraphBatch, build_graph, energy_and_derivatives
from compactmlip.deploy.archive import Accuracy, NodeEnergy, Precision, SelfCheck
from compactmlip.deploy.engine import Evaluate
from compactmlip.deploy.precision import input_dtype
from compactmlip.errors import SelfCheckError
from compactmlip.spec import ModelSpec

SEED = 20240229

Periodicity = bool | tuple[bool, bool, bool]


@dataclass(frozen=True)
class Tolerances:
    """Largest allowed deviations, relative as in :class:`compactmlip.deploy.archive.SelfCheck`."""

    energy: float
    force: float
    stress: float

    def plus(self, other: Tolerances) -> Tolerances:
        """Sum of both."""
        return Tolerances(self.energy + other.energy, self.force + other.force, self.stress + other.stress)


TOLERANCES: dict[Precision, Tolerances] = {
    # The same operations in the same precision: what is left is the order of summation.
    "float64": Tolerances(1e-10, 1e-10, 1e-10),
    # Rounding of every intermediate to 6e-8 adds up.  SevenNet-l3i5, five layers deep, deviates by
    # 3e-6, 6e-6 and 1e-5; one matrix product in reduced precision (TF32, 5e-4) would show.
    "float32": Tolerances(5e-5, 1e-4, 2e-4),
    # Half of the deviation of float32 where it is better at all; all products are in float32.
    "mixed": Tolerances(5e-5, 1e-4, 2e-4),
    # Operands are rounded by up to 2e-3 in every product.  SevenNet models and a MACE deviate by 3e-3 to
    # 4e-2; a product that is missing or doubled changes everything by its own size.
    "bf16": Tolerances(1e-1, 2e-1, 2e-1),
}

TABLES = Tolerances(2e-6, 2e-5, 1e-4)
"""Added for lowered models, whose tables change energies by up to 1e-6 eV and forces by 1e-5 eV/Angstrom."""

UNCHECKED = SelfCheck(
    num_structures=0,
    energy_error=math.nan,
    force_error=math.nan,
    stress_error=math.nan,
    energy_tolerance=0.0,
    force_tolerance=0.0,
    stress_tolerance=0.0,
)
"""Of a file that is being made."""

FLOORS = Tolerances(energy=1.0, force=1.0, stress=0.1)
"""eV, eV/Angstrom, eV/Angstrom^3: below these magnitudes deviations count as absolute."""


def isolated_atoms(spec: ModelSpec) -> list[Atoms]:
    """Return one atom alone, and one of each species, all beyond the cutoff of each other."""
    symbols = list(spec.species)
    line = np.arange(len(symbols))[:, None] * np.array([10.0 * spec.cutoff, 0.0, 0.0])
    every = [Atoms(symbols, line)] if len(symbols) > 1 else []
    return [Atoms(symbols[:1]), *every]


def random_structures(spec: ModelSpec, seed: int = SEED) -> list[Atoms]:
    """Return structures of different size and periodicity made of the model's species.

    A molecule, a crystal with one atom in a cell smaller than the cutoff, a skewed crystal with
    eight atoms, and a slab; species follow each other in a random order.
    """
    rng = np.random.default_rng(seed)
    order = [spec.species[k] for k in rng.permutation(len(spec.species))]
    kinds: list[tuple[tuple[int, int, int], Periodicity]] = [
        ((3, 2, 1), False),
        ((1, 1, 1), True),
        ((2, 2, 2), True),
        ((2, 2, 3), (True, True, False)),
    ]
    structures, used = [], 0
    for shape, pbc in kinds:
        symbols = [order[(used + k) % len(order)] for k in range(math.prod(shape))]
        used += len(symbols)
        structures.append(_distorted_grid(symbols, shape, pbc, spec.cutoff, rng))
    return structures


def _distorted_grid(
    symbols: Sequence[str],
    shape: tuple[int, int, int],
    pbc: Periodicity,
    cutoff: float,
    rng: np.random.Generator,
) -> Atoms:
    """Atoms about a bond length apart on a sheared, rattled simple cubic grid."""
    radii = [covalent_radii[atomic_numbers[s]] for s in symbols]
    # An element on a simple cubic grid needs more room than a compound, or its energy is meaningless.
    room = 2.2 if len(set(symbols)) > 1 else 3.0
    spacing = float(np.clip(room * np.mean(radii), 1.2, 0.7 * cutoff))
    shear = np.eye(3) + np.triu(rng.uniform(-0.2, 0.2, (3, 3)), 1)
    cell = spacing * np.diag(shape) @ shear
    atoms = Atoms(symbols, scaled_positions=np.indices(shape).reshape(3, -1).T / shape, cell=cell, pbc=pbc)
    atoms.positions += rng.uniform(-0.1, 0.1, atoms.positions.shape) * spacing
    if not atoms.pbc.any():
        atoms.cell[:] = 0.0
    elif not atoms.pbc.all():
        atoms.center(vacuum=cutoff, axis=2)
    return atoms


class SelfChecker:
    """Energies, forces and stresses of the original model, to compare compiled files with.

    Parameters
    ----------
    model
        The original in float64, as a function of species, centers, neighbors, vectors.
    spec
        Its spec.
    structures
        What to compare on; random structures if None.  Isolated atoms always belong to it.
    calibration
        More structures, whose errors are measured apart.

    Raises
    ------
    SpeciesError, InputError
        If a structure does not fit the model.
    """

    def __init__(
        self,
        model: NodeEnergy,
        spec: ModelSpec,
        structures: Sequence[Atoms] | None = None,
        calibration: Sequence[Atoms] = (),
    ) -> None:
        chosen = random_structures(spec) if structures is None else structures
        self.graphs = [build_graph(a, spec) for a in (*isolated_atoms(spec), *chosen)]
        self.expected = [energy_and_derivatives(model, graph) for graph in self.graphs]
        self.calibration = [build_graph(a, spec) for a in calibration]
        self.calibration_expected = [energy_and_derivatives(model, graph) for graph in self.calibration]

    def largest_graph(self) -> GraphBatch:
        """Graph with the most edges."""
        return max(self.graphs, key=lambda graph: len(graph.centers))

    def compare(self, compiled: Evaluate, precision: Precision, tolerances: Tolerances) -> SelfCheck:
        """Run a compiled model on every structure.

        Raises
        ------
        SelfCheckError
            If it deviates by more than the tolerances, gives values that are not finite, or cannot run.
        """
        found = _run(compiled, self.graphs, precision)
        periodic = [bool(torch.isfinite(g.volumes).all()) for g in self.graphs]
        stresses = [(d, e) for d, e, p in zip(found, self.expected, periodic, strict=True) if p]
        check = SelfCheck(
            num_structures=len(self.graphs),
            energy_error=_deviation(found, self.expected, "node_energies", FLOORS.energy),
            force_error=_deviation(found, self.expected, "forces", FLOORS.force),
            stress_error=_deviation(
                [d for d, _ in stresses], [e for _, e in stresses], "stresses", FLOORS.stress
            ),
            energy_tolerance=tolerances.energy,
            force_tolerance=tolerances.force,
            stress_tolerance=tolerances.stress,
        )
        for name in ("energy", "force", "stress"):
            deviation, allowed = getattr(check, f"{name}_error"), getattr(check, f"{name}_tolerance")
            if not deviation <= allowed:  # also true for NaN
                hint = "" if precision == "float64" else " Compile with --dtype float64."
                raise SelfCheckError(
                    f"the compiled model ({precision}) deviates from the original by "
                    f"{deviation:.1e} (relative) in the {name}; {allowed:.1e} is allowed. "
                    f"Nothing was written.{hint}"
                )
        return check

    def measure(self, compiled: Evaluate, precision: Precision) -> tuple[Accuracy, ...]:
        """Errors of a compiled model on the structures, and on those for calibration if there are any.

        Raises
        ------
        SelfCheckError
            If it cannot run on one of them, or gives values that are not finite.
        """
        found = [_accuracy("built-in", self.graphs, _run(compiled, self.graphs, precision), self.expected)]
        if self.calibration:
            values = _run(compiled, self.calibration, precision)
            found.append(_accuracy("calibration", self.calibration, values, self.calibration_expected))
        return tuple(found)


def _run(compiled: Evaluate, graphs: Sequence[GraphBatch], precision: Precision) -> list[Derivatives]:
    try:
        return [compiled(graph.to(dtype=input_dtype(precision))) for graph in graphs]
    except RuntimeError as error:
        raise SelfCheckError(
            f"the compiled model does not run: {str(error).strip().splitlines()[-1]}. Nothing was written."
        ) from error


def _accuracy(
    structures: Literal["built-in", "calibration"],
    graphs: Sequence[GraphBatch],
    found: Sequence[Derivatives],
    expected: Sequence[Derivatives],
) -> Accuracy:
    def differences(what: str, chosen: Sequence[bool]) -> Tensor:
        pairs = [(f, e) for f, e, c in zip(found, expected, chosen, strict=True) if c]
        parts = [(getattr(f, what).double() - getattr(e, what)).abs().flatten() for f, e in pairs]
        return torch.cat(parts) if parts else torch.empty(0)

    everything = [True] * len(graphs)
    sizes = torch.cat([g.num_atoms for g in graphs])
    energy = differences("energies", everything) / sizes
    force = differences("forces", everything)
    stress = differences("stresses", [bool(torch.isfinite(g.volumes).all()) for g in graphs])
    if not (energy.isfinite().all() and force.isfinite().all()):
        raise SelfCheckError(
            f"the compiled model gives values that are not finite on a {structures} structure. "
            "Nothing was written."
        )
    return Accuracy(
        structures=structures,
        num_structures=len(graphs),
        num_atoms=int(sizes.sum()),
        energy_mae=float(energy.mean()),
        energy_max=float(energy.max()),
        force_mae=float(force.mean()),
        force_max=float(force.max()),
        force_largest=max(float(e.forces.abs().max()) for e in expected),
        stress_mae=float(stress.mean()) if len(stress) else None,
        stress_max=float(stress.max()) if len(stress) else None,
    )


def _deviation(
    found: Sequence[Derivatives], expected: Sequence[Derivatives], what: str, floor: float
) -> float:
    """Largest difference over the largest expected magnitude; NaN if any value is."""
    if not expected:
        return 0.0
    a = torch.cat([getattr(d, what).flatten().to(torch.float64) for d in found])
    b = torch.cat([getattr(d, what).flatten() for d in expected])
    return float((a - b).abs().max() / b.abs().max().clamp(min=floor))
