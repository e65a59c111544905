"""Lowered models without compiled operators: convolutions and contractions as segmented polynomials.

The same tables and folded weights, in operations that run on any device: segmented polynomials
(:mod:`compactmlip.kernels.polynomial`, evaluated by cuequivariance) where most of the time goes, plain torch
operators for the rest.  Nothing has a shape that depends on values, so that a CUDA graph can record it.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor, nn

from compactmlip.deploy.lower.contraction import FoldedContraction
from compactmlip.deploy.lower.convolution import Graph, SplineConvolution
from compactmlip.deploy.lower.dense import SpeciesDense
from compactmlip.kernels.contraction_program import ContractionProgram, Input
from compactmlip.kernels.polynomial import Operand, Polynomial, Products
from compactmlip.kernels.polynomial_operator import check
from compactmlip.kernels.spline_convolution import Path, knots_around
from compactmlip.models.angular import SphericalHarmonics, wigner_3j
from compactmlip.models.contraction import SymmetricContraction
from compactmlip.models.linear import MANY_SPECIES, operands

Term = tuple[int, int, tuple[int, ...]]
"""Row of the output, weight, and sorted rows of the features that are multiplied."""


def with_polynomials(lowered: nn.Module) -> nn.Module:
    """Return a copy of a lowered model in which nothing calls a compiled operator.

    Parameters
    ----------
    lowered
        In the precision in which it is to compute; distances and directions are in float64 in any case.
    """
    made = copy.deepcopy(lowered)
    for parent in list(made.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, SplineConvolution):
                setattr(parent, name, PolynomialConvolution(child))
            elif isinstance(child, FoldedContraction):
                setattr(parent, name, PolynomialContraction(child))
            elif isinstance(child, SpeciesDense):
                setattr(parent, name, SpeciesProduct(child))
    return made.eval()


def check_polynomials(model: nn.Module) -> None:
    """Let cuequivariance evaluate each polynomial of a model, and its gradient, on random numbers.

    Raises
    ------
    KernelError
        If it finds something else.
    """
    for part in model.modules():
        if isinstance(part, SegmentedPolynomial):
            polynomial = Polynomial.decoded(part.plan, part.coefficients)
            check(polynomial)
            check(polynomial.gradient([True] * len(polynomial.inputs)))


class SegmentedPolynomial(nn.Module):
    """A polynomial with the numbers that describe it."""

    plan: Tensor
    coefficients: Tensor

    def __init__(self, polynomial: Polynomial) -> None:
        super().__init__()
        plan, coefficients, self.digest = polynomial.encoded()
        (self.size,) = (o.size for o in polynomial.outputs)
        self.register_buffer("plan", plan)
        self.register_buffer("coefficients", coefficients)

    def forward(self, inputs: list[Tensor], indices: list[Tensor], where: list[int], like: Tensor) -> Tensor:
        """Evaluate it; arguments are those of the operator."""
        out: Tensor = torch.ops.compactmlip.polynomial(
            inputs, indices, where, like, self.plan, self.coefficients, self.digest, self.size
        )
        return out


class PolynomialConvolution(nn.Module):
    """What a :class:`SplineConvolution` computes; paths with as many channels are one polynomial."""

    pairs: Tensor

    def __init__(self, source: SplineConvolution) -> None:
        super().__init__()
        lmax, solid = int(source.structure[0]), bool(source.structure[1])
        flat = source.paths
        self.paths: list[Path] = list(zip(flat[0::3], flat[1::3], flat[2::3], strict=True))
        self.orders, self.cutoff, self.unit = source.orders, source.cutoff, source.unit
        self.kink, self.knots_before_kink = source.kink, source.knots_before_kink
        self.knots, self.values = source.table.shape[1], source.table.shape[2]
        self.harmonics = SphericalHarmonics(lmax, solid=solid)
        self.register_buffer("pairs", source.pairs.clone())
        self.many_types = source.pairs.numel() > 0
        columns = [0, *accumulate(source.channels)]
        members: dict[int, list[int]] = defaultdict(list)
        for k, channels in enumerate(source.channels):
            members[channels].append(k)
        self.members = list(members.values())
        groups = []
        for channels, chosen in members.items():
            table = torch.cat([source.table[..., columns[k] : columns[k + 1]] for k in chosen], dim=-1)
            groups.append(_PathGroup([self.paths[k] for k in chosen], channels, table, unit=self.unit))
        self.groups = nn.ModuleList(groups)

    def forward(self, graph: Graph, features: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Messages by l3, as :meth:`SplineConvolution.forward`."""
        vectors = graph.vectors.to(torch.float64)
        lengths = torch.linalg.vector_norm(vectors, dim=-1)
        left, weights = knots_around(
            lengths, self.knots, self.values, self.cutoff, self.kink, self.knots_before_kink
        )
        weights = torch.where((lengths < self.cutoff).unsqueeze(-1), weights, torch.zeros_like(weights))
        if self.many_types:
            ends = (graph.species.index_select(0, k) for k in (graph.centers, graph.neighbors))
            left = left + self.knots * self.pairs[tuple(ends)]
        harmonics = self.harmonics(vectors, lengths)
        pieces: list[Tensor | None] = [None] * len(self.paths)
        for group, chosen in zip(self.groups, self.members, strict=True):
            found = group(graph, features, weights, left, harmonics)
            for k, piece in zip(chosen, found, strict=True):
                pieces[k] = piece
        messages: list[Tensor | None] = []
        for l in range(1 + max(self.orders, default=-1)):
            parts = [m for m, path in zip(pieces, self.paths, strict=True) if path[2] == l and m is not None]
            messages.append(torch.cat(parts, dim=-1) if parts else None)
        return messages


class _PathGroup(nn.Module):
    """Paths with as many channels."""

    table: Tensor

    def __init__(self, paths: list[Path], channels: int, table: Tensor, *, unit: bool) -> None:
        super().__init__()
        self.inputs = [] if unit else sorted({p[0] for p in paths})
        self.harmonics, self.rows = sorted({p[1] for p in paths}), [2 * p[2] + 1 for p in paths]
        self.channels = channels
        # One row per knot: (types * knots, values * paths * channels).
        self.register_buffer("table", table.flatten(0, 1).flatten(1).contiguous())
        self.radial = SegmentedPolynomial(radial_polynomial(len(paths), table.shape[2], channels))
        self.messages = SegmentedPolynomial(message_polynomial(paths, channels, self.inputs, self.harmonics))

    def forward(
        self,
        graph: Graph,
        features: Sequence[Tensor | None],
        weights: Tensor,
        left: Tensor,
        harmonics: Tensor,
    ) -> list[Tensor]:
        """Messages of each path, (n_nodes, 2 l3 + 1, channels)."""
        dtype = self.table.dtype
        radial = self.radial(
            [self.table, self.table, weights.to(dtype)], [left, left + 1], [0, 1, -1, -1], graph.centers
        )
        parts = [harmonics[:, l * l : (l + 1) ** 2] for l in self.harmonics]
        inputs, where = [torch.cat(parts, dim=-1).to(dtype), radial], [-1, -1, 0]
        if self.inputs:
            sent = [f for l in self.inputs if (f := features[l]) is not None]
            inputs, where = [torch.cat(sent, dim=1).flatten(1), *inputs], [1, *where]
        indices = [graph.centers, graph.neighbors] if self.inputs else [graph.centers]
        total = self.messages(inputs, indices, where, graph.species)
        return list(total.unflatten(1, (sum(self.rows), self.channels)).split(self.rows, dim=1))


def radial_polynomial(num_paths: int, values: int, channels: int) -> Polynomial:
    """Hermite interpolation: rows of both knots and (2 * values) weights -> radial weights of all paths."""
    rows = np.array([(v * num_paths + p, v, p) for v in range(values) for p in range(num_paths)])
    ones = np.ones(len(rows))
    knot = Operand(values * num_paths, channels)
    parts = (Products((0, 2, 3), rows, ones), Products((1, 2, 3), rows + np.array([0, values, 0]), ones))
    return Polynomial((knot, knot, Operand(2 * values)), (Operand(num_paths, channels),), parts)


def message_polynomial(
    paths: Sequence[Path], channels: int, inputs: Sequence[int], harmonics: Sequence[int]
) -> Polynomial:
    """Tensor product of features, harmonics and radial weights.

    Parameters
    ----------
    paths
        (l1, l2, l3).
    channels
        Of all paths.
    inputs, harmonics
        Orders of the features and of the harmonics that are side by side; no inputs if features are one.
    """
    first = dict(zip(inputs, _starts([2 * l + 1 for l in inputs]), strict=True))
    second = dict(zip(harmonics, _starts([2 * l + 1 for l in harmonics]), strict=True))
    out = _starts([2 * p[2] + 1 for p in paths])
    rows, values = [], []
    for k, (l1, l2, l3) in enumerate(paths):
        table = wigner_3j(l1, l2, l3) * np.sqrt(2 * l3 + 1)
        for a, b, c in zip(*np.nonzero(table), strict=True):
            factors = [first[l1] + a] if inputs else []
            rows.append([*factors, second[l2] + b, k, out[k] + c])
            values.append(table[a, b, c])
    shapes = [Operand(sum(2 * l + 1 for l in inputs), channels)] if inputs else []
    shapes += [Operand(sum(2 * l + 1 for l in harmonics)), Operand(len(paths), channels)]
    result = Operand(sum(2 * p[2] + 1 for p in paths), channels)
    products = Products(tuple(range(len(shapes) + 1)), np.array(rows), np.array(values))
    return Polynomial(tuple(shapes), (result,), (products,))


def _starts(sizes: Sequence[int]) -> list[int]:
    return [0, *accumulate(sizes)][:-1]


class PolynomialContraction(nn.Module):
    """What a :class:`FoldedContraction` computes."""

    weights: Tensor

    def __init__(self, source: FoldedContraction) -> None:
        super().__init__()
        self.width, self.orders, self.rows = source.width, source.orders, source.rows
        holder = source if source.original is None else source.original
        for l in self.orders:
            self.register_buffer(f"input_{l}", getattr(holder, f"input_{l}"))
        if source.program is not None:
            blocks = source.weights  # (species, blocks, trees, block)
            weights = blocks.transpose(1, 2).flatten(2)[..., : self.width]
            terms = terms_of_program(source.program)
        else:
            assert source.original is not None
            weights = source.original.product_weights().detach()
            terms = terms_of_products(source.original)
        self.per_species = weights.shape[0] > 1
        self.register_buffer("weights", weights.flatten(1).contiguous())
        components = sum(2 * l + 1 for l in self.orders)
        self.polynomial: SegmentedPolynomial | None = None
        if terms:
            made = contraction_polynomial(terms, weights.shape[1], components, self.rows, self.width)
            self.polynomial = SegmentedPolynomial(made)

    def forward(self, x: Tensor | Sequence[Tensor | None], species: Tensor) -> Tensor:
        """Contract features, as :meth:`FoldedContraction.forward`."""
        if not isinstance(x, Tensor):
            x = torch.cat([self._widened(x, l) for l in self.orders], dim=1)
        if self.polynomial is None:
            return x.new_zeros((x.shape[0], self.rows, self.width))
        indices, where = ([species], [0, -1, -1]) if self.per_species else ([], [-1, -1, -1])
        out: Tensor = self.polynomial([self.weights, x.flatten(1)], indices, where, x)
        return out.unflatten(1, (self.rows, self.width))

    def _widened(self, x: Sequence[Tensor | None], l: int) -> Tensor:
        features, index = x[l], getattr(self, f"input_{l}")
        assert features is not None
        if index is None:
            return features
        shape = (features.shape[0], features.shape[1], self.width)
        return features.new_zeros(shape).index_copy(2, index, features)


def contraction_polynomial(
    terms: dict[Term, float], num_weights: int, components: int, rows: int, width: int
) -> Polynomial:
    """Polynomial of weights and features, from its terms."""
    by_degree: dict[int, list[tuple[list[int], float]]] = defaultdict(list)
    for (row, weight, factors), value in sorted(terms.items()):
        by_degree[len(factors)].append(([weight, *factors, row], value))
    products = [
        Products(
            (0, *[1] * degree, 2),
            np.array([segments for segments, _ in found]),
            np.array([value for _, value in found]),
        )
        for degree, found in sorted(by_degree.items())
    ]
    shapes = Operand(num_weights, width), Operand(components, width)
    return Polynomial(shapes, (Operand(rows, width),), tuple(products))


def terms_of_program(program: ContractionProgram) -> dict[Term, float]:
    """Terms of the outputs of a program."""
    values: list[dict[tuple[int, tuple[int, ...]], float]] = []
    for node in program.forward.nodes:
        total: dict[tuple[int, tuple[int, ...]], float] = defaultdict(float)
        if isinstance(node, Input):
            total[-1, (node.row,)] = 1.0
        else:
            for kind, factor, k in node:
                for (weight, rows), value in values[k].items():
                    if kind == "constant":
                        total[weight, rows] += factor * value
                    elif kind == "weight":
                        total[int(factor), rows] += value
                    else:
                        for (other, more), second in values[int(factor)].items():
                            # At most one of two factors has a weight; -1 stands for none.
                            key = max(weight, other), tuple(sorted(rows + more))
                            total[key] += value * second
        values.append(total)
    return {
        (row, weight, rows): value
        for row, k in enumerate(program.forward.outputs)
        for (weight, rows), value in values[k].items()
        if abs(value) > 1e-14
    }


def terms_of_products(contraction: SymmetricContraction) -> dict[Term, float]:
    """Terms of a contraction with the weights of its independent products."""
    starts = dict(zip(contraction.orders, _starts([2 * l + 1 for l in contraction.orders]), strict=True))
    position = {l * l + k: start + k for l, start in starts.items() for k in range(2 * l + 1)}
    out = dict(zip(contraction.outputs, _starts([2 * L + 1 for L in contraction.outputs]), strict=True))
    terms, offset = {}, 0
    for (L, _), table in contraction.tables.items():
        for r, M, k in zip(*np.nonzero(table.coefficients), strict=True):
            factors = tuple(position[c] for c in table.monomials[k])
            terms[out[L] + int(M), offset + int(r), factors] = float(table.coefficients[r, M, k])
        offset += len(table.coefficients)
    return terms


class SpeciesProduct(nn.Module):
    """What a :class:`SpeciesDense` computes."""

    weight: Tensor

    def __init__(self, source: SpeciesDense) -> None:
        super().__init__()
        self.precision, self.num_species = source.precision, source.weight.shape[0]
        self.register_buffer("weight", source.weight.clone())

    def forward(self, x: Tensor, species: Tensor) -> Tensor:
        """Apply the map to (n_nodes, components, in)."""
        x, weight = operands(x, self.weight, self.precision)
        if self.num_species >= MANY_SPECIES:
            return x @ weight.index_select(0, species)
        total = x @ weight[0]
        for s in range(1, self.num_species):
            mine = (species == s)[:, None, None]
            total = torch.where(mine, x @ weight[s], total)
        return total
