"""Equivariant convolution: neighbours' features times spherical harmonics times radial weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from compactmlip.kernels.ops import convolve
from compactmlip.models.angular import wigner_3j
from compactmlip.models.linear import NormedMLP, RadialMLP, Tap
from compactmlip.models.radial import PolynomialEnvelope

Path = tuple[int, int, int]
"""(l of the neighbour's feature, l of the spherical harmonic, l of the message)."""

LAYER_ENVELOPE = PolynomialEnvelope(p=12)
"""Takes messages to zero at a layer's own cutoff.  It is close to one until shortly before, so that what the
layer has learned is of use, and has no kink, which tables would have to know of."""


@dataclass(frozen=True)
class Edges:
    """What a convolution needs to know about the edges.

    Attributes
    ----------
    centers, neighbors
        (E,) node indices; messages flow from neighbour to centre.
    basis
        (E, n_basis) radial basis times envelope.
    harmonics
        (E, (lmax + 1)^2) spherical harmonics of the edge vectors.
    envelope
        (E, 1) cutoff envelope that multiplies the path weights, where the basis does not contain it.
    within
        Edges that layers with a shorter cutoff see, by that cutoff (Angstrom).
    """

    centers: Tensor
    neighbors: Tensor
    basis: Tensor
    harmonics: Tensor
    envelope: Tensor | None = None
    within: Mapping[float, Edges] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Edges:
        """Return a copy in another precision."""
        return replace(
            self,
            basis=self.basis.to(dtype),
            harmonics=self.harmonics.to(dtype),
            envelope=None if self.envelope is None else self.envelope.to(dtype),
            within={cutoff: edges.to(dtype) for cutoff, edges in self.within.items()},
        )

    def shorter(self, lengths: Tensor, cutoff: float, *, static_shapes: bool = False) -> Edges:
        """Edges below a cutoff, with the envelope that takes messages smoothly to zero there.

        Parameters
        ----------
        lengths
            Of all edges, (E,), in Angstrom.
        cutoff
            Angstrom.
        static_shapes
            Keep all edges, also those that contribute nothing, so that no shape depends on distances.
        """
        if static_shapes:
            return replace(self, envelope=LAYER_ENVELOPE.evaluate(lengths, cutoff).unsqueeze(-1))
        kept = (lengths < cutoff).nonzero().squeeze(1)
        centers, neighbors, basis, harmonics, near = (
            x.index_select(0, kept)
            for x in (self.centers, self.neighbors, self.basis, self.harmonics, lengths)
        )
        envelope = LAYER_ENVELOPE.evaluate(near, cutoff).unsqueeze(-1)
        return Edges(centers, neighbors, basis, harmonics, envelope)


def group_by_input(paths: Sequence[Path]) -> dict[int, list[Path]]:
    """Paths by l of the neighbour's feature; the order of radial weight columns."""
    grouped: dict[int, list[Path]] = {}
    for path in sorted(paths):
        grouped.setdefault(path[0], []).append(path)
    return grouped


def radial_columns(paths: Sequence[Path], channels: Sequence[int]) -> dict[Path, slice]:
    """Columns of the radial network's output that weight each path."""
    columns, start = {}, 0
    for path in sorted(paths):
        columns[path] = slice(start, start + channels[path[0]])
        start += channels[path[0]]
    return columns


def message_rows(paths: Sequence[Path], channels: Sequence[int]) -> dict[Path, slice]:
    """Channels of the order-l3 message that each path fills."""
    rows: dict[Path, slice] = {}
    used: dict[int, int] = {}
    for path in sorted(paths):
        start = used.get(path[2], 0)
        rows[path] = slice(start, start + channels[path[0]])
        used[path[2]] = rows[path].stop
    return rows


def message_channels(paths: Sequence[Path], channels: Sequence[int], lmax: int) -> tuple[int, ...]:
    """Number of message channels of each order 0 ... lmax."""
    return tuple(sum(channels[p[0]] for p in paths if p[2] == l) for l in range(lmax + 1))


class Convolution(nn.Module):
    """Depth-wise tensor product with radial weights, summed over neighbours.

    For path p = (l1, l2, l3), with the coupling tensor C of norm sqrt(2 l3 + 1)::

        m_i[l3, p, c, k] = f * sum_j  R_p,c(r_ij)  C[a, b, k]  h_j[l1, c, a]  Y[l2, b](r_ij)

    where f is a frozen factor (one over the average number of neighbours, or its square root).
    This is the uvu tensor product of NequIP (Batzner et al. 2022, Eq. 3).

    Parameters
    ----------
    channels
        Channels per order of the neighbours' features.
    paths
        Paths that exist.
    lmax_edge
        Largest order of the spherical harmonics handed in.
    radial_sizes
        Basis size and hidden sizes of the radial network.
    radial_network
        Class of the radial network; it is built with ``radial_sizes`` and the number of path weights.
    """

    normalisation: Tensor

    def __init__(
        self,
        channels: Sequence[int],
        paths: Sequence[Path],
        lmax_edge: int,
        radial_sizes: Sequence[int],
        radial_network: type[RadialMLP] | type[NormedMLP] = RadialMLP,
    ) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.grouped = group_by_input(paths)
        self.lmax_out = max((p[2] for p in paths), default=0)
        num_weights = sum(self.channels[p[0]] for p in paths)
        self.radial = radial_network([*radial_sizes, num_weights])
        self.register_buffer("normalisation", torch.ones((), dtype=torch.float64))
        self.path_of_row: dict[int, tuple[int, ...]] = {}
        for l1, group in self.grouped.items():
            self.register_buffer(f"coupling_{l1}", _coupling(group, lmax_edge), persistent=False)
            rows = tuple(k for k, p in enumerate(group) for _ in range(2 * p[2] + 1))
            self.path_of_row[l1] = rows
            self.register_buffer(f"path_of_{l1}", torch.tensor(rows), persistent=False)

    def forward(
        self, x: Sequence[Tensor | None], edges: Edges, tap: Tap | None = None, space: str = ""
    ) -> list[Tensor | None]:
        """Return messages per order, shape (n_nodes, 2l+1, message channels).

        Rows are ordered as :func:`message_rows` says.
        """
        sizes = [len(group) * self.channels[l1] for l1, group in self.grouped.items()]
        pieces: list[list[Tensor]] = [[] for _ in range(self.lmax_out + 1)]
        weights = self.radial.pieces(edges.basis, sizes, tap, space)
        for (l1, group), weight in zip(self.grouped.items(), weights, strict=True):
            features = x[l1]
            assert features is not None
            if edges.envelope is not None:
                weight = weight * edges.envelope
            summed = self._sum_neighbors(l1, features, edges, weight)
            # Split, not sliced: the gradient of a split is one concatenation.
            messages = summed.split([2 * path[2] + 1 for path in group], dim=1)
            for path, message in zip(group, messages, strict=True):
                pieces[path[2]].append(message)
        return [torch.cat(parts, dim=-1) * self.normalisation if parts else None for parts in pieces]

    def _sum_neighbors(self, l1: int, features: Tensor, edges: Edges, weights: Tensor) -> Tensor:
        """Messages of all paths that start from order l1, components of all paths side by side."""
        rows = self.path_of_row[l1]
        coupling = edges.harmonics @ getattr(self, f"coupling_{l1}")
        return convolve(
            coupling.unflatten(1, (len(rows), 2 * l1 + 1)),
            features,
            weights.unflatten(1, (-1, self.channels[l1])),
            edges.centers,
            edges.neighbors,
            rows,
            getattr(self, f"path_of_{l1}"),
        )


def _coupling(group: Sequence[Path], lmax_edge: int) -> Tensor:
    """Matrix ((lmax_edge + 1)^2, rows * (2 l1 + 1)) that turns harmonics into coupling matrices."""
    l1 = group[0][0]
    blocks = []
    for _, l2, l3 in group:
        block = torch.zeros((lmax_edge + 1) ** 2, 2 * l3 + 1, 2 * l1 + 1, dtype=torch.float64)
        table = torch.tensor(wigner_3j(l1, l2, l3)) * math.sqrt(2 * l3 + 1)
        block[l2**2 : (l2 + 1) ** 2] = table.permute(1, 2, 0)
        blocks.append(block)
    return torch.cat(blocks, dim=1).flatten(1)
