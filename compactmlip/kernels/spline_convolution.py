"""Convolution with tabulated radial weights: its shape for the compiled operator, and a plain reference.

The operator forms distances, radial weights, spherical harmonics and coupling entries edge by edge from the
edge vectors, and stores nothing of the size edges x channels.  It is for deployed models: it has first
derivatives only, with respect to vectors and features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compactmlip.models.angular import SphericalHarmonics, wigner_3j

Path = tuple[int, int, int]

CHANNEL_MULTIPLE = 8
"""Channels of every path are padded to a multiple of this: 32 bytes of float32."""


@dataclass(frozen=True)
class SplineStructure:
    """What ``torch.ops.compactmlip.spline_convolve`` needs to know besides numbers.

    Attributes
    ----------
    paths
        Sorted (l1, l2, l3).
    structure
        int32: sizes, terms of each path, steps of the harmonics, terms of the coupling entries, as
        ``kernels/spline_plan.h`` reads them.
    coefficients
        Of the steps, then of the terms.
    """

    paths: tuple[Path, ...]
    structure: NDArray[np.int32]
    coefficients: NDArray[np.float64]


def spline_structure(
    paths: Sequence[Path], lmax: int, *, solid: bool = False, values_per_knot: int = 2
) -> SplineStructure:
    """Shape of a convolution.

    Parameters
    ----------
    paths
        (l1, l2, l3) of features, harmonics and messages, each l up to 7.
    lmax
        Largest order of the harmonics.
    solid
        Whether harmonics of order l grow as r^l.
    values_per_knot
        2: value and first derivative (cubic); 3: second derivative as well (quintic).
    """
    ordered = tuple(sorted(paths))
    steps, values = _harmonic_steps(lmax)
    terms: list[tuple[int, int]] = []
    counts: list[int] = []
    first_entry: dict[int, int] = {}
    for l1, l2, l3 in ordered:
        start = first_entry.get(l1, 0)
        table = wigner_3j(l1, l2, l3) * math.sqrt(2 * l3 + 1)
        found = [
            (start + r * (2 * l1 + 1) + a, l2 * l2 + b) for a, b, r in zip(*np.nonzero(table), strict=True)
        ]
        values += [float(v) for v in table[np.nonzero(table)]]
        terms += [(int(entry), int(harmonic)) for entry, harmonic in found]
        counts.append(len(found))
        first_entry[l1] = start + (2 * l3 + 1) * (2 * l1 + 1)
    head = [lmax, int(solid), values_per_knot, len(steps), *counts]
    flat = [*head, *(k for step in steps for k in step), *(k for term in terms for k in term)]
    return SplineStructure(ordered, np.array(flat, dtype=np.int32), np.array(values, dtype=np.float64))


def _harmonic_steps(lmax: int) -> tuple[list[tuple[int, int, int]], list[float]]:
    """Bilinear steps (target, source, first-order source) from each order to the next, and their factors."""
    harmonics = SphericalHarmonics(lmax)
    steps, values = [], []
    for l in range(2, lmax + 1):
        table = getattr(harmonics, f"step_{l}").numpy().reshape(2 * l - 1, 3, 2 * l + 1)
        for i, k, m in zip(*np.nonzero(np.abs(table) > 1e-14), strict=True):
            steps.append((l * l + int(m), (l - 1) ** 2 + int(i), 1 + int(k)))
            values.append(float(table[i, k, m]))
    return steps, values


def hermite_weights(u: Tensor, values_per_knot: int) -> Tensor:
    """Weights (E, 2 * values_per_knot) of the values at both knots at positions ``u`` in [0, 1] between them.

    Values, first and second derivatives per interval: cubic or quintic Hermite interpolation.
    """
    v = 1 - u
    if values_per_knot == 2:
        parts = [(1 + 2 * u) * v**2, u * v**2, u**2 * (3 - 2 * u), -(u**2) * v]
    else:
        left = [v**3 * (1 + 3 * u + 6 * u**2), v**3 * u * (1 + 3 * u), v**3 * u**2 / 2]
        right = [u**3 * (1 + 3 * v + 6 * v**2), -(u**3) * v * (1 + 3 * v), u**3 * v**2 / 2]
        parts = left + right
    return torch.stack(parts, dim=-1)


def knots_around(
    lengths: Tensor, num_knots: int, values_per_knot: int, cutoff: float, kink: float, knots_before_kink: int
) -> tuple[Tensor, Tensor]:
    """Knot before each distance (E,), and weights (E, 2 * values_per_knot) of the values there and behind it.

    Beyond the cutoff the weights mean nothing.  Arguments are those of :func:`interpolate`.
    """
    behind = lengths >= kink
    rest = num_knots - knots_before_kink
    before, after = kink / max(knots_before_kink - 1, 1), (cutoff - kink) / (rest - 1)
    position = torch.where(behind, (lengths - kink) / after, lengths / (before or 1.0))
    last = torch.where(behind, rest, knots_before_kink) - 2
    interval = torch.minimum(position.detach().clamp(min=0), last).floor()
    index = (interval + behind * knots_before_kink).long()
    return index, hermite_weights(position - interval, values_per_knot)


def interpolate(
    table: Tensor,
    types: Tensor,
    lengths: Tensor,
    cutoff: float,
    kink: float = 0.0,
    knots_before_kink: int = 0,
) -> Tensor:
    """Tabulated functions at distances, (E, columns); zero beyond the cutoff.

    Parameters
    ----------
    table
        (types, knots, values per knot, columns); derivatives are per interval.
    types, lengths
        (E,) index of the table and distance in Angstrom.
    cutoff, kink, knots_before_kink
        Where the knots lie, see :class:`compactmlip.deploy.lower.splines.Grid`.
    """
    num_knots, values = table.shape[1], table.shape[2]
    index, weights = knots_around(lengths, num_knots, values, cutoff, kink, knots_before_kink)
    rows = torch.cat([table[types, index], table[types, index + 1]], dim=1)
    found = (weights.unsqueeze(-1) * rows).sum(1)
    return torch.where((lengths < cutoff).unsqueeze(-1), found, torch.zeros_like(found))


def spline_convolve_reference(
    vectors: Tensor,
    features: Sequence[Tensor],
    species: Tensor,
    centers: Tensor,
    neighbors: Tensor,
    table: Tensor,
    pairs: Tensor,
    shape: SplineStructure,
    channels: Sequence[int],
    cutoff: float,
    kink: float = 0.0,
    knots_before_kink: int = 0,
    *,
    solid: bool = False,
) -> list[Tensor]:
    """The operator in plain PyTorch; it stores (E, rows, channels).

    Parameters
    ----------
    vectors
        (E, 3) Angstrom.
    features
        By l1, (N, 2 l1 + 1, channels); empty if they are one, and then all paths start from l1 = 0.
    species
        (N,).
    table
        (types, knots, values per knot, columns), the columns of the sorted paths side by side.
    pairs
        (species, species) type of each pair of centre and neighbour; (0, 0) if there is one type.
    channels
        Of each path.

    Returns
    -------
    list
        By l3, (N, 2 l3 + 1, channels of all its paths side by side).
    """
    lmax = int(shape.structure[0])
    lengths = torch.linalg.vector_norm(vectors, dim=-1)
    harmonics = SphericalHarmonics(lmax, solid=solid).to(vectors.dtype)(vectors, lengths)
    types = torch.zeros_like(centers)
    if pairs.numel():
        types = pairs[species[centers], species[neighbors]]
    weights = interpolate(table, types, lengths, cutoff, kink, knots_before_kink).split(
        list(channels), dim=-1
    )
    messages: list[list[Tensor]] = [[] for _ in range(1 + max((p[2] for p in shape.paths), default=-1))]
    num_nodes = species.shape[0]
    for (l1, l2, l3), weight in zip(shape.paths, weights, strict=True):
        coupling = torch.tensor(wigner_3j(l1, l2, l3) * math.sqrt(2 * l3 + 1)).to(vectors.dtype)
        entries = torch.einsum("abr,eb->era", coupling, harmonics[:, l2 * l2 : (l2 + 1) ** 2])
        if features:
            edge = torch.bmm(entries, features[l1].index_select(0, neighbors)) * weight.unsqueeze(1)
        else:
            edge = entries * weight.unsqueeze(1)
        total = edge.new_zeros(num_nodes, 2 * l3 + 1, weight.shape[1])
        messages[l3].append(total.index_add(0, centers, edge))
    empty = vectors.new_zeros
    return [
        torch.cat(parts, dim=-1) if parts else empty(num_nodes, 2 * l3 + 1, 0)
        for l3, parts in enumerate(messages)
    ]


def operations(shape: SplineStructure, channels: Sequence[int], *, unit: bool) -> tuple[int, int]:
    """Floating-point operations per edge of the messages, and of the gradient.

    Those of the channels only: what belongs to an edge alone (harmonics, coupling entries) is not counted.
    """
    values = 2 * int(shape.structure[2])
    forward = backward = 0
    for (l1, l2, l3), size in zip(shape.paths, channels, strict=True):
        components, products = 2 * l1 + 1, (2 * l1 + 1) * (2 * l3 + 1)
        if l2 == 0:  # diagonal, and constant
            forward += size * (2 * values + 3 * components)
            backward += size * (4 * values + (2 if unit else 5) * components + 2)
            continue
        forward += size * (2 * values + (0 if unit else components) + 2 * products)
        backward += size * (4 * values + 4 * products + (2 if unit else 7 * components + 2))
    return forward, backward


def flops(operator: str, arguments: Sequence[Any]) -> float | None:
    """Operations of one call of an operator, as :func:`operations` counts them; None for other operators."""
    if operator not in ("compactmlip::spline_convolve", "compactmlip::spline_convolve_backward"):
        return None
    backward = operator.endswith("backward")
    vectors, features, *_, paths, channels = arguments[int(backward) : 11 + int(backward)]
    values = arguments[5 + int(backward)].shape[2]
    shape = spline_structure(
        list(zip(paths[0::3], paths[1::3], paths[2::3], strict=True)),
        max(paths[1::3], default=0),
        values_per_knot=values,
    )
    return float(operations(shape, channels, unit=not features)[int(backward)] * vectors.shape[0])
