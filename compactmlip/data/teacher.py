"""Run a native model over many structures: batches, labels, invariant features, an ASE calculator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from torch import Tensor, nn

from compactmlip.data.graph import (
    MAX_EDGES,
    GraphBatch,
    build_graph,
    check_structure,
    collate,
    energy_and_derivatives,
)
from compactmlip.data.hessian import best_method, random_directions
from compactmlip.errors import CompactMLIPError, InputError, SpeciesError, UnsupportedFeatureError
from compactmlip.models import model_dtype, model_spec
from compactmlip.spec import ModelSpec


@dataclass(frozen=True)
class Evaluation:
    """What a model says about one structure of N atoms.

    Attributes
    ----------
    energies
        (N,) energy of each atom, eV.
    forces
        (N, 3) eV/Angstrom.
    stress
        (3, 3) eV/Angstrom^3; NaN where there is no periodic cell.
    directions, products
        (N, K, 3) displacements and the Hessian times each, eV/Angstrom^2; None if they were not asked for.
    """

    energies: np.ndarray
    forces: np.ndarray
    stress: np.ndarray
    directions: np.ndarray | None = None
    products: np.ndarray | None = None

    @property
    def energy(self) -> float:
        """Total energy in eV."""
        return float(self.energies.sum())


def check_frames(frames: Sequence[Atoms], spec: ModelSpec) -> None:
    """Refuse frames that the model cannot take, before any work is done.

    Raises
    ------
    SpeciesError, InputError
        Naming the frame.
    """
    if not frames:
        raise InputError("there is no structure to work on.")
    for k, atoms in enumerate(frames):
        spec.species_index(atoms.get_chemical_symbols(), where=f"frame {k}")
        check_structure(atoms, where=f"frame {k}")


def graph_batches(
    frames: Sequence[Atoms], model: nn.Module, max_edges: int = MAX_EDGES, *, start: int = 0
) -> Iterator[tuple[range, GraphBatch]]:
    """Yield (frame indices, batch) from frame ``start`` on, each of at most ``max_edges`` edges."""
    spec, dtype, device = model_spec(model), model_dtype(model), next(model.parameters()).device
    graphs: list[GraphBatch] = []
    edges = 0
    for k in range(start, len(frames)):
        try:
            graph = build_graph(frames[k], spec, dtype)
        except SpeciesError:
            raise
        except InputError as error:
            raise InputError(f"frame {k}: {error}") from error
        size = len(graph.centers)
        if graphs and edges + size > max_edges:
            yield range(start, k), collate(graphs).to(device, dtype)
            graphs, start, edges = [], k, 0
        graphs.append(graph)
        edges += size
    if graphs:
        yield range(start, len(frames)), collate(graphs).to(device, dtype)


def evaluate(
    frames: Sequence[Atoms], model: nn.Module, max_edges: int = MAX_EDGES, *, start: int = 0
) -> Iterator[tuple[range, list[Evaluation]]]:
    """Yield (frame indices, energies, forces and stresses of these frames), batch by batch from ``start`` on.

    Raises
    ------
    CompactMLIPError
        If the model returns a number that is not finite.
    """
    for indices, batch in graph_batches(frames, model, max_edges, start=start):
        result = energy_and_derivatives(model, batch)
        sizes = batch.num_atoms.tolist()
        energies = [x.cpu().double().numpy() for x in result.node_energies.split(sizes)]
        forces = [x.detach().cpu().double().numpy() for x in result.forces.split(sizes)]
        stresses = result.stresses.detach().cpu().double().numpy()
        for k, e, f in zip(indices, energies, forces, strict=True):
            if not (np.isfinite(e).all() and np.isfinite(f).all()):
                raise CompactMLIPError(
                    f"the model returns energies or forces that are not finite for frame {k}; the "
                    "structure may be far from anything it knows, or its precision too low (try float64)."
                )
        yield indices, [Evaluation(*row) for row in zip(energies, forces, stresses, strict=True)]


def evaluate_hessian(
    frames: Sequence[Atoms], model: nn.Module, number: int, max_edges: int = MAX_EDGES, *, start: int = 0
) -> Iterator[tuple[range, list[Evaluation]]]:
    """As :func:`evaluate`, with ``number`` Hessian products along random directions for each frame.

    Directions depend on the position of the frame in ``frames`` only.

    Raises
    ------
    CompactMLIPError
        If the model returns a number that is not finite, or has no Hessian.
    """
    if start >= len(frames):
        return
    method = best_method(model, min(frames, key=len))
    found = evaluate(frames, model, max_edges, start=start)
    batches = graph_batches(frames, model, max_edges, start=start)
    for (indices, results), (_, batch) in zip(found, batches, strict=True):
        directions = [random_directions(len(frames[k]), number, [k]) for k in indices]
        moved = torch.as_tensor(np.concatenate(directions), device=batch.vectors.device)
        products = method(batch, moved).cpu().double().numpy()
        if not np.isfinite(products).all():
            where = f"frames {indices[0]} to {indices[-1]}" if len(indices) > 1 else f"frame {indices[0]}"
            raise CompactMLIPError(f"the model returns a Hessian that is not finite for {where}.")
        parts = np.split(products, np.cumsum([len(d) for d in directions])[:-1])
        rows = zip(results, directions, parts, strict=True)
        yield indices, [replace(e, directions=d, products=p) for e, d, p in rows]


def scalar_features(
    frames: Sequence[Atoms], model: nn.Module, max_edges: int = MAX_EDGES
) -> Iterator[tuple[float, np.ndarray]]:
    """Yield (energy in eV, invariant features (N, C) of the last layer) of each frame; no gradients.

    Raises
    ------
    UnsupportedFeatureError
        If the model's family does not offer its last layer's scalars to a tap.
    """
    space = f"layers.{model_spec(model).num_message_passing_layers - 1}.out"
    caught: list[Tensor] = []

    def tap(name: str, order: int, x: Tensor) -> Tensor:
        if name == space and order == 0:
            caught.append(x[:, 0])
        return x

    for _, batch in graph_batches(frames, model, max_edges):
        caught.clear()
        with torch.no_grad():
            node_energies = model(batch.species, batch.centers, batch.neighbors, batch.vectors, tap=tap)
        if not caught:
            family = model_spec(model).family
            raise UnsupportedFeatureError(f"a model of family '{family}' has no feature '{space}'.")
        sizes = batch.num_atoms.tolist()
        per_frame = zip(node_energies.split(sizes), caught[-1].split(sizes), strict=True)
        yield from ((float(e.sum()), x.cpu().double().numpy()) for e, x in per_frame)


class TeacherCalculator(Calculator):
    """ASE calculator (energy, forces) on a native model, for short runs while data are made."""

    implemented_properties: list[str] = ["energy", "forces"]  # noqa: RUF012 (as ASE declares it)

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Fill ``results`` (eV, eV/Angstrom)."""
        super().calculate(atoms, properties, system_changes)
        assert isinstance(self.atoms, Atoms)
        ((_, (result,)),) = evaluate([self.atoms], self.model)
        results: dict[str, Any] = {"energy": result.energy, "forces": result.forces}
        self.results = results
