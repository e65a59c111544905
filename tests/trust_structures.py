"""Structures in and outside the trust regions that tests make."""

from __future__ import annotations

import torch
from ase import Atoms
from ase.build import bulk

from compactmlip.data.graph import GraphBatch


def crystals(count: int, start: int = 0, amount: float = 0.08) -> list[Atoms]:
    """Rattled MgO, the domain of the region."""
    found = []
    for seed in range(start, start + count):
        atoms = bulk("MgO", "rocksalt", a=4.21, cubic=True)
        atoms.rattle(amount, seed=seed)
        found.append(atoms)
    return found


def squeezed(pair: tuple[int, int] = (0, 1)) -> Atoms:
    """A crystal in which one atom comes close to a neighbour."""
    atoms = crystals(1, 50)[0] * (2, 1, 1)
    atoms.positions[pair[1]] += 0.35 * atoms.get_distance(pair[1], pair[0], mic=True, vector=True)
    return atoms


def inputs(graph: GraphBatch) -> tuple[torch.Tensor, ...]:
    """Arguments of a model."""
    return graph.species, graph.centers, graph.neighbors, graph.vectors
