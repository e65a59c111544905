"""Symmetric contraction: products of an atom's features with weights per species and channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from compactmlip.kernels.build import usable
from compactmlip.kernels.contraction import contraction_plan
from compactmlip.models.products import Monomial, Products, products

Parametrisation = Literal["paths", "independent"]
"""Whether a contraction has one weight per coupling path of upstream, or per independent product."""


def weight_key(output: int, degree: int) -> str:
    """Name of the weights of the products of one degree and output order."""
    return f"{output}_{degree}"


def num_weights(table: Products, parametrisation: Parametrisation) -> int:
    """Weights per species and channel."""
    return table.mixing.shape[1 if parametrisation == "paths" else 0]


def widened(features: Tensor | None, index: Tensor | None, width: int) -> Tensor:
    """Features (N, rows, channels) in ``width`` channels, zero where ``index`` does not place one."""
    assert features is not None
    if index is None:
        return features
    shape = (features.shape[0], features.shape[1], width)
    return features.new_zeros(shape).index_copy(2, index, features)


class SymmetricContraction(nn.Module):
    """Sum of all symmetric products up to a degree, with weights per species and channel.

    For output order L (MACE, Batatia et al. 2022, Eq. 10 and 11)::

        y_i[L, M, c] = sum_nu sum_r W[z_i, nu, r, c]  B_nu,r[L, M](x_i[:, c])

    where B_nu,r are the independent products of nu factors (:func:`products.products`).  With
    parametrisation "paths" the trainable weights belong to upstream's coupling paths, which are more
    than independent; they are combined before use.

    Parameters
    ----------
    width
        Channels c that the contraction works on.
    inputs, outputs
        Order l -> channels of the input, order L -> channels of the output, as increasing positions
        among ``width``; None stands for all of them.  Channels that are not listed are zero.
    degree
        Largest number of factors (upstream's correlation).
    num_species
        Species, or None when all share their weights.
    """

    plan: Tensor
    terms: Tensor

    def __init__(
        self,
        width: int,
        inputs: Mapping[int, Sequence[int] | None],
        outputs: Mapping[int, Sequence[int] | None],
        degree: int,
        num_species: int | None,
        parametrisation: Parametrisation = "paths",
    ) -> None:
        super().__init__()
        self.width, self.degree = width, degree
        self.orders = tuple(sorted(inputs))
        self.outputs = tuple(sorted(outputs))
        self.per_species, self.parametrisation = num_species is not None, parametrisation
        self.tables = {
            (L, nu): table
            for L in self.outputs
            for nu in range(1, degree + 1)
            if len((table := products(self.orders, L, nu)).multisets)
        }
        self.weights = nn.ParameterDict()
        for (L, nu), table in self.tables.items():
            chosen = outputs[L]
            shape = (
                num_species or 1,
                num_weights(table, parametrisation),
                width if chosen is None else len(chosen),
            )
            self.weights[weight_key(L, nu)] = nn.Parameter(torch.randn(shape, dtype=torch.float64) / shape[1])
            if parametrisation == "paths":
                self.register_buffer(f"mixing_{L}_{nu}", torch.tensor(table.mixing), persistent=False)
        for kind, listed in (("input", inputs), ("output", outputs)):
            for l, positions in listed.items():
                index = None if positions is None else torch.tensor(positions, dtype=torch.long)
                self.register_buffer(f"{kind}_{l}", index, persistent=False)
        self._build_plan()
        plan = contraction_plan(self.orders, self.outputs, degree)
        self.register_buffer("plan", torch.tensor(plan.table), persistent=False)
        self.register_buffer("terms", torch.tensor(plan.terms), persistent=False)

    def _build_plan(self) -> None:
        """Order the monomials by degree and parity; a longer one is built from its first factors.

        This is the plan of the operations in plain PyTorch; compiled kernels have their own.
        """
        needed: list[set[Monomial]] = [set() for _ in range(self.degree + 1)]
        for (_, nu), table in self.tables.items():
            needed[nu] |= set(table.monomials)
        for nu in range(self.degree, 1, -1):
            needed[nu - 1] |= {m[:-1] for m in needed[nu]}
        component = {l * l + k: start + k for l, start in self._starts().items() for k in range(2 * l + 1)}
        parity = {l * l + k: l % 2 for l in self.orders for k in range(2 * l + 1)}
        previous: dict[Monomial, int] = {(c,): position for c, position in component.items()}
        self.counts: dict[tuple[int, int], tuple[int, int]] = {}
        for nu in range(1, self.degree + 1):
            ordered = sorted(needed[nu], key=lambda m: (sum(parity[c] for c in m) % 2, m))
            even = sum(1 for m in ordered if sum(parity[c] for c in m) % 2 == 0)
            self.counts[nu, 0], self.counts[nu, 1] = (0, even), (even, len(ordered))
            left = [previous[m[:-1]] if nu > 1 else component[m[0]] for m in ordered]
            self.register_buffer(f"left_{nu}", torch.tensor(left, dtype=torch.long), persistent=False)
            if nu > 1:
                right = torch.tensor([component[m[-1]] for m in ordered], dtype=torch.long)
                self.register_buffer(f"right_{nu}", right, persistent=False)
            previous = {m: k for k, m in enumerate(ordered)}
            for p in (0, 1):
                self.register_buffer(f"matrix_{nu}_{p}", self._matrix(nu, p, previous), persistent=False)

    def _starts(self) -> dict[int, int]:
        """First component of each order among those that are present."""
        starts, start = {}, 0
        for l in self.orders:
            starts[l] = start
            start += 2 * l + 1
        return starts

    def _matrix(self, nu: int, parity: int, position: Mapping[Monomial, int]) -> Tensor | None:
        """Rows: (L, M, r) of one degree and parity; columns: its monomials."""
        first, last = self.counts[nu, parity]
        blocks = []
        for L in self.outputs:
            if parity != L % 2 or (L, nu) not in self.tables:
                continue
            table = self.tables[L, nu]
            block = np.zeros((2 * L + 1, len(table.multisets), last - first))
            columns = [position[m] - first for m in table.monomials]
            block[:, :, columns] = table.coefficients.transpose(1, 0, 2)
            blocks.append(block.reshape(-1, last - first))
        return torch.tensor(np.concatenate(blocks)) if blocks else None

    def combined_weights(self, output: int, degree: int) -> Tensor:
        """Weights of the independent products, shape (species, R, channels)."""
        weight = self.weights[weight_key(output, degree)]
        if self.parametrisation == "independent":
            return weight
        return getattr(self, f"mixing_{output}_{degree}") @ weight

    @torch.no_grad()
    def add_to_combined(self, output: int, degree: int, change: Tensor) -> None:
        """Change the weights, by the least possible amount, such that the combined ones change as given.

        ``change`` has the shape of :meth:`combined_weights`.
        """
        weight = self.weights[weight_key(output, degree)]
        if self.parametrisation == "paths":
            mixing: Tensor = getattr(self, f"mixing_{output}_{degree}").double()
            change = torch.linalg.pinv(mixing) @ change
        weight.add_(change.to(weight.dtype))

    def product_features(self, x: Sequence[Tensor | None]) -> dict[tuple[int, int], Tensor]:
        """Independent products by (L, degree), each (n_nodes, 2L+1, R, channels of that output)."""
        components = torch.cat([self._widened(x, l) for l in self.orders], dim=1)
        features: dict[tuple[int, int], Tensor] = {}
        monomials = components
        for nu in range(1, self.degree + 1):
            monomials = monomials.index_select(1, getattr(self, f"left_{nu}"))
            if nu > 1:
                monomials = monomials * components.index_select(1, getattr(self, f"right_{nu}"))
            for parity in (0, 1):
                matrix = getattr(self, f"matrix_{nu}_{parity}")
                if matrix is not None:
                    first, last = self.counts[nu, parity]
                    values = torch.matmul(matrix, monomials[:, first:last])
                    features |= self._split(values, nu, parity)
        return features

    def _widened(self, x: Sequence[Tensor | None], l: int) -> Tensor:
        return widened(x[l], getattr(self, f"input_{l}"), self.width)

    def _split(self, values: Tensor, nu: int, parity: int) -> dict[tuple[int, int], Tensor]:
        pieces, row = {}, 0
        for L in self.outputs:
            if parity != L % 2 or (L, nu) not in self.tables:
                continue
            count = len(self.tables[L, nu].multisets)
            piece = values[:, row : row + (2 * L + 1) * count].unflatten(1, (2 * L + 1, count))
            index = getattr(self, f"output_{L}")
            pieces[L, nu] = piece if index is None else piece.index_select(-1, index)
            row += (2 * L + 1) * count
        return pieces

    def forward(self, x: Sequence[Tensor | None], species: Tensor) -> list[Tensor | None]:
        """Contract features per order (n_nodes, 2l+1, channels) to outputs (n_nodes, 2L+1, channels)."""
        result: list[Tensor | None] = [None] * (max(self.outputs) + 1)
        first = x[self.orders[0]]
        assert first is not None
        if self.tables and usable(first, self.terms):
            values = self._contracted(x, species).split([2 * L + 1 for L in self.outputs], dim=1)
            for L, value in zip(self.outputs, values, strict=True):
                index = getattr(self, f"output_{L}")
                result[L] = value if index is None else value.index_select(2, index)
            return result
        for (L, nu), features in self.product_features(x).items():
            weight = self.combined_weights(L, nu)
            weight = weight.index_select(0, species) if self.per_species else weight
            term = (features * weight.unsqueeze(1)).sum(dim=2)
            total = result[L]
            result[L] = term if total is None else total + term
        return result

    def _contracted(self, x: Sequence[Tensor | None], species: Tensor) -> Tensor:
        """All outputs side by side in all channels, (n_nodes, rows, width), by the compiled kernel."""
        components = torch.cat([self._widened(x, l) for l in self.orders], dim=1)
        rows = sum(2 * L + 1 for L in self.outputs)
        total: Tensor = torch.ops.compactmlip.contract(
            components, self.product_weights(), species, self.plan, self.terms, rows
        )
        return total

    def product_weights(self) -> Tensor:
        """Weights of the independent products in all channels, (species, products, width).

        Products are ordered by output order, then degree; channels that an output does not have are zero.
        """
        weights = [self._in_all_channels(self.combined_weights(L, nu), L) for L, nu in self.tables]
        return torch.cat(weights, dim=1)

    def _in_all_channels(self, weights: Tensor, output: int) -> Tensor:
        """Weights of one output order with zeros in the channels that it does not have."""
        index = getattr(self, f"output_{output}")
        if index is None:
            return weights
        shape = (*weights.shape[:2], self.width)
        return weights.new_zeros(shape).index_copy(2, index, weights)
