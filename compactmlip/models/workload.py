"""How much work and memory a deployed model needs, counted from its architecture alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache

import numpy as np

from compactmlip.models.angular import wigner_3j

LANES = 8
"""Channels that vector units work on at once: other numbers of channels are padded in convolutions."""


@dataclass(frozen=True)
class Work:
    """Multiply-adds of one energy evaluation of a lowered model, and numbers that it keeps for the forces.

    Attributes
    ----------
    dense
        Multiply-adds of products with dense weights, per atom.
    products
        Multiply-adds of many-body contractions, per atom.
    convolution
        Multiply-adds of tensor products, per edge; channels padded to :data:`LANES`.
    tables
        Radial weights looked up, per edge; channels padded.
    gathered
        Features of neighbours that are read, per edge; channels padded.
    couplings
        Coupling entries (2 l1 + 1)(2 l3 + 1) that are formed for the paths of a convolution, per edge,
        whatever the number of channels: with few of these, most of the time.
    kept
        Numbers stored until the forces are computed, per atom.
    """

    dense: float = 0.0
    products: float = 0.0
    convolution: float = 0.0
    tables: float = 0.0
    gathered: float = 0.0
    couplings: float = 0.0
    kept: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Work)))

    def with_edges(self, share: float) -> Work:
        """The same with a share of the edges only."""
        return replace(self, **{name: share * getattr(self, name) for name in PER_EDGE})

    def per_atom(self, edges_per_atom: float) -> dict[str, float]:
        """All parts per atom, by name."""
        return {
            f.name: getattr(self, f.name) * (edges_per_atom if f.name in PER_EDGE else 1.0)
            for f in fields(Work)
        }

    def multiply_adds(self, edges_per_atom: float) -> float:
        """Multiply-adds per atom of the energy (its gradient takes about twice as many in addition)."""
        parts = self.per_atom(edges_per_atom)
        return parts["dense"] + parts["products"] + parts["convolution"] + TABLE_COST * parts["tables"]

    def effort(self, edges_per_atom: float) -> float:
        """What the time is about proportional to: multiply-adds, and the coupling entries of each path."""
        return self.multiply_adds(edges_per_atom) + COUPLING_COST * edges_per_atom * self.couplings


PER_EDGE = frozenset({"convolution", "tables", "gathered", "couplings"})
"""Parts of the work that are counted per edge; the others are per atom."""

COUPLING_COST = 20.0
"""Time of one coupling entry, forward and back, in that of multiply-adds of a convolution.

Fitted to the times of 70 plans of SevenNet-l3i5 with AVX-512."""

TABLE_COST = 6.0
"""Multiply-adds to interpolate one radial weight and its slope from a quintic table."""


def padded(size: int) -> int:
    """Smallest multiple of :data:`LANES` that is not below ``size``."""
    return -(-size // LANES) * LANES


@cache
def coupling_terms(l1: int, l2: int, l3: int) -> int:
    """Number of entries of a coupling tensor that are not zero."""
    return int(np.count_nonzero(np.abs(wigner_3j(l1, l2, l3)) > 1e-9))


def convolution_work(paths: Mapping[tuple[int, int, int], int]) -> Work:
    """Work of a tensor product with neighbours, given the channels of each path."""
    sent = {l1: padded(size) for (l1, _, _), size in paths.items()}
    return Work(
        convolution=float(sum(coupling_terms(*p) * padded(size) for p, size in paths.items())),
        tables=float(sum(padded(size) for size in paths.values())),
        gathered=float(sum((2 * l + 1) * size for l, size in sent.items())),
        couplings=float(sum((2 * l1 + 1) * (2 * l3 + 1) for l1, _, l3 in paths)),
        kept=float(sum((2 * p[2] + 1) * padded(size) for p, size in paths.items())),
    )


def dense_work(sizes: Mapping[int, tuple[int, int]]) -> Work:
    """Work of a linear map within each order, given inputs and outputs by order."""
    return Work(
        dense=float(sum((2 * l + 1) * n * m for l, (n, m) in sizes.items())),
        kept=float(sum((2 * l + 1) * m for l, (_, m) in sizes.items())),
    )
