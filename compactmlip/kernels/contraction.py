"""Plan of a symmetric contraction for the compiled operator: how its polynomials are factored.

With 1 as an additional component, every monomial has as many factors as the degree.  It is a prefix, the
product of all but one of its factors, times that one.  Monomials that share a prefix form a group, whose
sum over the remaining factor is multiplied by the prefix once.  Which prefix a monomial belongs to is
free; taking the most frequent first leaves half as many groups as taking the first factors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from compactmlip.models.products import Monomial, products

Groups = list[tuple[Monomial, list[tuple[int, Monomial]]]]
"""Prefix -> (remaining factor, monomial) of its members."""


@dataclass(frozen=True)
class ContractionPlan:
    """What ``torch.ops.compactmlip.contract`` needs to know besides features and weights.

    Attributes
    ----------
    table
        int32: sizes, nodes, groups and coefficients of both sweeps, as ``kernels/contraction.h`` reads them.
    terms
        Coefficient of each product in each coefficient of the polynomials.
    rows
        Components of the output: (L, M), L ascending.
    num_products
        Independent products of all outputs and degrees, side by side.
    operations
        Multiplications and additions per atom and channel of the values, and of the gradient with
        respect to the features.
    """

    table: NDArray[np.int32]
    terms: NDArray[np.float64]
    rows: int
    num_products: int
    operations: tuple[int, int]

    def __deepcopy__(self, memo: object) -> ContractionPlan:
        """Plans are shared and never change."""
        return self


@cache
def contraction_plan(orders: tuple[int, ...], outputs: tuple[int, ...], degree: int) -> ContractionPlan:
    """Plan of all products of up to ``degree`` factors with l in ``orders``.

    Components of the features are those of ``orders`` side by side.  Products are ordered by output
    order, then degree.
    """
    num_components, polynomials, num_products = _polynomials(orders, outputs, degree)
    forward = [_grouped(polynomial) for polynomial in polynomials]
    reverse = _grouped({m for polynomial in polynomials for m in polynomial})
    nodes = _Nodes(num_components)
    every = [group for groups in forward for group in groups]
    pairs, reverse_pairs = ([nodes.pair(prefix) for prefix, _ in groups] for groups in (every, reverse))

    position: dict[tuple[int, Monomial], int] = {}
    terms: list[list[tuple[int, float]]] = []
    for row, groups in enumerate(forward):
        for _, members in groups:
            for _, monomial in members:
                position[row, monomial] = len(terms)
                terms.append(polynomials[row][monomial])
    rows_with: dict[Monomial, list[int]] = defaultdict(list)
    for row, polynomial in enumerate(polynomials):
        for monomial in polynomial:
            rows_with[monomial].append(row)
    for _, members in reverse:
        members.sort(key=lambda member: (len(rows_with[member[1]]), member[0]))
    leaves = [member for _, members in reverse for member in members]
    rows_of = [rows_with[monomial] for _, monomial in leaves]
    parts = [
        [a for a, _ in nodes.factors],
        [b for _, b in nodes.factors],
        _starts(forward),
        [a for a, _ in pairs],
        [b for _, b in pairs],
        _starts(members for _, members in every),
        [factor for _, members in every for factor, _ in members],
        [a for a, _ in reverse_pairs],
        [b for _, b in reverse_pairs],
        _starts(members for _, members in reverse),
        [factor for factor, _ in leaves],
        _starts(rows_of),
        [row for listed in rows_of for row in listed],
        [position[row, m] for (_, m), listed in zip(leaves, rows_of, strict=True) for row in listed],
        _starts(terms),
        [product for listed in terms for product, _ in listed],
    ]
    header = [
        num_components,
        num_products,
        len(polynomials),
        len(nodes.factors),
        len(every),
        len(terms),
        len(reverse),
        len(leaves),
        sum(map(len, terms)),
    ]
    made = len(nodes.factors) - num_components - 1
    forward_operations = made + 2 * len(terms) + 3 * len(every)
    reverse_operations = 5 * made + 2 * len(terms) + 4 * len(leaves) + 5 * len(reverse)
    return ContractionPlan(
        np.concatenate([header, *parts]).astype(np.int32),
        np.array([c for listed in terms for _, c in listed], dtype=np.float64),
        len(polynomials),
        num_products,
        (forward_operations, reverse_operations),
    )


def _polynomials(
    orders: tuple[int, ...], outputs: tuple[int, ...], degree: int
) -> tuple[int, list[dict[Monomial, list[tuple[int, float]]]], int]:
    """Number of components; per row, monomial -> (product, coefficient); number of products.

    Monomials hold the positions of components, and the position behind the last one stands for 1.
    """
    listed = [l * l + k for l in sorted(orders) for k in range(2 * l + 1)]
    component = {c: position for position, c in enumerate(listed)}
    polynomials: list[dict[Monomial, list[tuple[int, float]]]] = []
    first = 0
    for L in sorted(outputs):
        rows: list[dict[Monomial, list[tuple[int, float]]]] = [{} for _ in range(2 * L + 1)]
        for nu in range(1, degree + 1):
            table = products(tuple(sorted(orders)), L, nu)
            padding = (len(listed),) * (degree - nu)
            for r, row, k in zip(*np.nonzero(table.coefficients), strict=True):
                monomial = tuple(sorted(component[c] for c in table.monomials[k])) + padding
                term = (first + int(r), float(table.coefficients[r, row, k]))
                rows[row].setdefault(monomial, []).append(term)
            first += len(table.multisets)
        polynomials += rows
    return len(listed), polynomials, first


def _grouped(monomials: Iterable[Monomial]) -> Groups:
    """Divide monomials among prefixes, the one with most monomials first."""
    members: dict[Monomial, dict[Monomial, int]] = defaultdict(dict)
    for monomial in sorted(monomials):
        for k, factor in enumerate(monomial):
            members[monomial[:k] + monomial[k + 1 :]][monomial] = factor
    groups: Groups = []
    while members:
        prefix = min(members, key=lambda p: (-len(members[p]), p))
        taken = members.pop(prefix)
        groups.append((prefix, sorted((factor, monomial) for monomial, factor in taken.items())))
        for monomial in taken:
            for k in range(len(monomial)):
                other = members.get(monomial[:k] + monomial[k + 1 :])
                if other is not None:
                    other.pop(monomial, None)
        members = {p: rest for p, rest in members.items() if rest}
    return sorted(groups, key=lambda group: (-len(group[1]), group[0]))


class _Nodes:
    """What prefixes are made from: the components, 1, and products of two nodes before."""

    def __init__(self, num_components: int) -> None:
        self.one = num_components
        self.factors: list[tuple[int, int]] = [(0, 0)] * (num_components + 1)
        self.index: dict[Monomial, int] = {(c,): c for c in range(num_components)} | {(): num_components}

    def pair(self, prefix: Monomial) -> tuple[int, int]:
        """Two nodes whose product is the prefix."""
        proper = tuple(c for c in prefix if c != self.one)
        if proper in self.index:
            return self.index[proper], self.one
        rest = [self._without(proper, k) for k in range(len(proper))]
        left = next((k for k in range(len(proper)) if rest[k] in self.index), len(proper) - 1)
        return self._node(rest[left]), proper[left]

    def _node(self, monomial: Monomial) -> int:
        if monomial not in self.index:
            self.factors.append(self.pair(monomial))
            self.index[monomial] = len(self.factors) - 1
        return self.index[monomial]

    @staticmethod
    def _without(monomial: Monomial, k: int) -> Monomial:
        return monomial[:k] + monomial[k + 1 :]


def _starts(lists: Iterable[Sequence[object] | Mapping[object, object]]) -> list[int]:
    """Position of the first entry of each list in all of them side by side, and the total."""
    return [0, *accumulate(len(entries) for entries in lists)]
