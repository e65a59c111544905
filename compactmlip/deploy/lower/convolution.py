"""The convolution of a lowered model: radial weights from tables, channels padded for vector units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compactmlip.deploy.lower.splines import Grid, RadialFunction
from compactmlip.errors import LoweringError
from compactmlip.kernels.spline_convolution import CHANNEL_MULTIPLE, Path, spline_structure
from compactmlip.models.convolution import message_rows

MAX_TABLE_BYTES = 512 * 2**20
"""Largest size of one layer's tables in float32; those of many pairs of species would not fit the memory."""


@dataclass(frozen=True)
class PairTypes:
    """Pairs of species that have radial functions of their own.

    Attributes
    ----------
    members
        (species of centre, species of neighbour) that stand for each type.
    index
        (species, species) type of each pair; (0, 0) if there is one type.
    """

    members: tuple[tuple[int, int], ...]
    index: Tensor

    @staticmethod
    def one() -> PairTypes:
        """All pairs alike."""
        return PairTypes(((0, 0),), torch.zeros(0, 0, dtype=torch.long))

    @staticmethod
    def by_neighbor(num_species: int) -> PairTypes:
        """One type per species of the neighbour."""
        index = torch.arange(num_species).expand(num_species, num_species).contiguous()
        return PairTypes(tuple((0, j) for j in range(num_species)), index)

    @staticmethod
    def by_pair(num_species: int) -> PairTypes:
        """One type per ordered pair."""
        members = tuple((i, j) for i in range(num_species) for j in range(num_species))
        return PairTypes(members, torch.arange(num_species**2).reshape(num_species, num_species))


@dataclass(frozen=True)
class Graph:
    """What all layers need to know of the structure: edge vectors, species, ends of the edges."""

    vectors: Tensor
    species: Tensor
    centers: Tensor
    neighbors: Tensor


def padded(size: int) -> int:
    """Smallest multiple of the channel block that is not below ``size``."""
    return -(-size // CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE


def pad_columns(x: Tensor) -> Tensor:
    """Zeros behind the last column up to the channel block."""
    return torch.nn.functional.pad(x, (0, padded(x.shape[-1]) - x.shape[-1]))


class SplineConvolution(nn.Module):
    """Messages from edge vectors and neighbours' features.

    Parameters
    ----------
    paths
        Sorted (l1, l2, l3).
    sizes
        Channels of each path before padding.
    functions
        Radial weights of each pair type, the columns of all paths side by side, every factor included.
    types
        Pair types.
    grid
        Where to tabulate.
    lmax, solid
        Of the harmonics.
    unit
        Whether the features are one: what neighbours send is part of the radial weights.
    """

    table: Tensor
    pairs: Tensor
    structure: Tensor
    coefficients: Tensor

    def __init__(
        self,
        paths: Sequence[Path],
        sizes: Sequence[int],
        functions: Sequence[RadialFunction],
        types: PairTypes,
        grid: Grid,
        *,
        lmax: int,
        solid: bool = False,
        unit: bool = False,
    ) -> None:
        super().__init__()
        shape = spline_structure(paths, lmax, solid=solid, values_per_knot=grid.values_per_knot)
        assert tuple(paths) == shape.paths
        self.sizes, self.channels = tuple(sizes), [padded(size) for size in sizes]
        self.paths = [l for path in paths for l in path]
        self.orders = frozenset(path[2] for path in paths)
        self.unit, self.cutoff = unit, grid.cutoff
        self.kink, self.knots_before_kink = grid.kink, grid.knots_before_kink
        num_bytes = 4 * len(functions) * grid.knots * grid.values_per_knot * sum(self.channels)
        if num_bytes > MAX_TABLE_BYTES:
            raise LoweringError(
                f"tables of {len(functions)} pairs of species would need {num_bytes / 2**30:.1f} GB; "
                "keep fewer species ('compactmlip convert --species')"
            )
        self.register_buffer("table", torch.stack([self._tabulated(f, grid) for f in functions]))
        self.register_buffer("pairs", types.index)
        self.register_buffer("structure", torch.tensor(shape.structure))
        self.register_buffer("coefficients", torch.tensor(shape.coefficients))

    def _tabulated(self, function: RadialFunction, grid: Grid) -> Tensor:
        parts = grid.tabulate(function).split(list(self.sizes), dim=-1)
        return torch.cat([pad_columns(part) for part in parts], dim=-1)

    def forward(self, graph: Graph, features: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return messages by l3, (n_nodes, 2 l3 + 1, padded channels of all its paths side by side).

        ``features`` by l1 have padded channels; none are read if they are one.
        """
        none = graph.vectors.new_zeros((0, 0, 0))
        given = [] if self.unit else [none if f is None else f for f in features]
        found: list[Tensor] = torch.ops.compactmlip.spline_convolve(
            graph.vectors,
            given,
            graph.species,
            graph.centers,
            graph.neighbors,
            self.table,
            self.pairs,
            self.structure,
            self.coefficients,
            self.paths,
            self.channels,
            self.cutoff,
            self.kink,
            self.knots_before_kink,
        )
        return [m if l in self.orders else None for l, m in enumerate(found)]


def sum_of_neighbors(functions: Sequence[RadialFunction], types: PairTypes, grid: Grid) -> SplineConvolution:
    """Sum over neighbours of one radial function; read it with :func:`first_scalar`."""
    return SplineConvolution([(0, 0, 0)], [1], functions, types, grid, lmax=0, unit=True)


def first_scalar(messages: Sequence[Tensor | None]) -> Tensor:
    """First channel of the scalars, (n_nodes, 1, 1)."""
    scalars = messages[0]
    assert scalars is not None
    return scalars[:, :, :1]


def padded_rows(weight: Tensor, l3: int, paths: Sequence[Path], channels: Sequence[int]) -> Tensor:
    """Weight (message channels of order l3, out) with zero rows where messages are padded.

    ``channels`` are those of the features by l1, before padding.
    """
    rows = message_rows(paths, channels)
    parts = []
    for path in sorted(paths):
        if path[2] == l3:
            missing = padded(channels[path[0]]) - channels[path[0]]
            parts.append(torch.nn.functional.pad(weight[rows[path]], (0, 0, 0, missing)))
    return torch.cat(parts)


def folded(
    raw: RadialFunction,
    paths: Sequence[Path],
    sent: Tensor,
    down: Mapping[int, Tensor],
) -> tuple[RadialFunction, list[Path], list[int]]:
    """Fold what a neighbour of one species sends, and the map behind the convolution, into radial functions.

    Possible where neighbours send scalars only: each order of the messages has one path then.

    Parameters
    ----------
    raw
        Radial weights of all paths, each with the channels of ``sent``.
    sent
        (channels,) features of the neighbour.
    down
        Order -> (channels, out).

    Returns
    -------
    function, paths, sizes
        Columns of the paths that are left, and their sizes.
    """
    kept = [p for p in sorted(paths) if p[2] in down]
    all_paths = sorted(paths)

    def function(r: Tensor) -> Tensor:
        pieces = dict(zip(all_paths, raw(r).split(sent.shape[0], dim=-1), strict=True))
        return torch.cat([(pieces[p] * sent) @ down[p[2]] for p in kept], dim=-1)

    return function, kept, [down[p[2]].shape[1] for p in kept]
