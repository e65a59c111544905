"""Lowered models in programs that split a structure among processes.

The nodes of such a process are the atoms that it owns, then ghosts, atoms of other processes.  Convolutions
read features of all nodes and sum over the neighbours of owned atoms; everything else is computed for owned
atoms only.  Where nothing is split, all nodes are owned, and the operators here do nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compactmlip.deploy.lower.convolution import Graph

Features = list[Tensor | None]


@dataclass(frozen=True)
class Domain(Graph):
    """A graph, and the species of the atoms that are owned."""

    owned_species: Tensor


def domain(species: Tensor, centers: Tensor, neighbors: Tensor, vectors: Tensor) -> Domain:
    """Return the graph of all nodes together with what is owned."""
    own: list[Tensor] = torch.ops.compactmlip.owned([species])
    return Domain(vectors, species, centers, neighbors, own[0])


def with_ghosts(features: Sequence[Tensor | None]) -> Features:
    """Features of all nodes, (n_nodes, ...), from those of owned atoms."""
    given = [f for f in features if f is not None]
    return _in_place_of(features, torch.ops.compactmlip.ghost_exchange(given)) if given else list(features)


def owned(features: Sequence[Tensor | None]) -> Features:
    """Rows of owned atoms, (n_owned, ...), from those of all nodes."""
    return _in_place_of(features, torch.ops.compactmlip.owned([f for f in features if f is not None]))


def _in_place_of(features: Sequence[Tensor | None], found: Sequence[Tensor]) -> Features:
    left = iter(found)
    return [None if f is None else next(left) for f in features]
