"""Lowered models in programs that split a structure among processes.

The nodes of such a process are the atoms that it owns, then ghosts, atoms of other processes.  Convolutions
read features of all nodes and sum over the neighbours of owned atoms; everything else is computed for owned
atoms only.  Where nothing is split, all nodes are owned, and the operators here do nothing; models that do
without compiled operators (:func:`compactmlip.kernels.build.without_kernels`) do not call them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compactmlip.deploy.lower.convolution import Graph
from compactmlip.kernels.build import usable

Features = list[Tensor | None]


@dataclass(frozen=True)
class Domain(Graph):
    """A graph, and the species of the atoms that are owned."""

    owned_species: Tensor

    def within(self, cutoff: float) -> Domain:
        """The same with the edges below a cutoff (Angstrom) only."""
        kept = (torch.linalg.vector_norm(self.vectors, dim=-1) < cutoff).nonzero().squeeze(1)
        vectors, centers, neighbors = (
            x.index_select(0, kept) for x in (self.vectors, self.centers, self.neighbors)
        )
        return replace(self, vectors=vectors, centers=centers, neighbors=neighbors)


def domain(species: Tensor, centers: Tensor, neighbors: Tensor, vectors: Tensor) -> Domain:
    """Return the graph of all nodes together with what is owned."""
    (own,) = owned([species])
    assert own is not None
    return Domain(vectors, species, centers, neighbors, own)


def with_ghosts(features: Sequence[Tensor | None]) -> Features:
    """Features of all nodes, (n_nodes, ...), from those of owned atoms."""
    return _applied(torch.ops.compactmlip.ghost_exchange, features) if usable() else list(features)


def owned(features: Sequence[Tensor | None]) -> Features:
    """Rows of owned atoms, (n_owned, ...), from those of all nodes."""
    return _applied(torch.ops.compactmlip.owned, features) if usable() else list(features)


def _applied(operator: Callable[[list[Tensor]], list[Tensor]], features: Sequence[Tensor | None]) -> Features:
    given = [f for f in features if f is not None]
    found = iter(operator(given) if given else [])
    return [None if f is None else next(found) for f in features]
