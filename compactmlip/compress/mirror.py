"""Calibration structures as mirrored pairs, for refits that fit values and slopes.

Forces are derivatives: a refit that only sees the values of a layer's output at a few structures is free to
get its slopes wrong.  So each structure is replaced by two, displaced by +d and -d with d drawn at random.
Half the sum of what a layer puts out for the two is its value, up to second order in d, and half the
difference its derivative along d (first order, central).  Both are linear in the weights, as the output is,
so least squares fits them together; no label and no second derivative is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compactmlip.data.graph import GraphBatch, batches_by_edges, collate
from compactmlip.errors import InputError

DISPLACEMENT = 0.01
"""Angstrom: standard deviation of each component of d.  Large enough for differences in float32, and small
enough that the mean of a pair is the value: 0.05 puts 5 meV/atom into the energies of a molecule."""

SLOPE_WEIGHT = 0.1
"""Angstrom: an error of a slope counts like one of the value that is so many times as large.  With 0.05 to
0.2 the errors of SevenNet-l3i5's cuts hardly differ; with 1 the energies are worse than without slopes."""


REFIT_EDGES = 4000
"""Directed edges per batch of a refit.  Cut models without gradients want fewer calls than whole ones with
them: 60 structures of MgO took 42, 33, 24 and 24 s with 1000, 2000, 4000 and 8000 (one thread)."""


@dataclass(frozen=True)
class Pairs:
    """What a refit needs to know about batches that are mirrored pairs.

    Attributes
    ----------
    displacement, slope_weight
        See :data:`DISPLACEMENT` and :data:`SLOPE_WEIGHT`.
    """

    displacement: float = DISPLACEMENT
    slope_weight: float = SLOPE_WEIGHT

    def rows(self, x: Tensor) -> Tensor:
        """Values, then weighted slopes, from what a batch of pairs gives for its nodes (first axis)."""
        plus, minus = x.chunk(2)
        factor = self.slope_weight / (2 * self.displacement)
        return torch.cat([(plus + minus) / 2, (plus - minus) * factor])

    def batches(self, graphs: Sequence[GraphBatch], max_edges: int, seed: int) -> list[GraphBatch]:
        """Batches of pairs: all structures displaced by +d, then all by -d, in the same order.

        Parameters
        ----------
        graphs
            Structures.  Neighbours are those of the structures themselves, for a model and for what it is
            compared with.
        max_edges
            Of a batch, both halves together.
        seed
            Of the displacements.
        """
        generator = torch.Generator().manual_seed(seed)
        made = []
        for indices in batches_by_edges(graphs, max(max_edges // 2, 1)):
            batch = collate([graphs[k] for k in indices])
            d = self.displacement * torch.randn(len(batch.species), 3, generator=generator)
            made.append(collate([displaced(batch, d), displaced(batch, -d)]))
        return made


def displaced(batch: GraphBatch, displacements: Tensor) -> GraphBatch:
    """A batch with its atoms moved by (N, 3) Angstrom, neighbours and cell as they were.

    Raises
    ------
    InputError
        If there is not one displacement per atom.
    """
    if displacements.shape != (len(batch.species), 3):
        raise InputError(
            f"displacements of shape {tuple(displacements.shape)} for {len(batch.species)} atoms; "
            "give one row of three per atom."
        )
    d = displacements.to(batch.vectors)
    return replace(batch, vectors=batch.vectors + d[batch.neighbors] - d[batch.centers])
