"""Programs of symmetric contractions with constant weights: values, and gradient for the features.

A product of three factors is coupled in two steps, ((l1 l2) l, l3) -> L.  Which two factors come first is
free, because all factors are the same features; so few pairs serve many products.  With weights W that
belong to such trees instead of products::

    p[l1 l2, l]  = x[l1] (x) x[l2]                        quadratic, shared by everything below
    e[L, l, l3]  = sum_(l1 l2) W p[l1 l2, l]              the only step that knows species and channel
    out[L]       = sum_(l, l3) e[L, l, l3] (x) x[l3] + sum W p[.., L] + W x[L]

which takes half the operations of sparse polynomials with a coefficient per monomial, and a few dozen
weights per species and channel in their place.  The gradient is reverse-mode differentiation of the same
steps.  Both are straight lines of sums of products, which become C++ (``contraction_source.py``).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product as pairs
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from compactmlip.models.angular import wigner_3j
from compactmlip.models.products import Monomial, products

MAX_DEGREE = 3


class Input(NamedTuple):
    """A row of the features or of the gradient."""

    source: Literal["x", "grad"]
    row: int


class Term(NamedTuple):
    """A node times a constant, a weight (its index) or another node."""

    kind: Literal["constant", "weight", "node"]
    factor: float
    node: int


Node = Input | tuple[Term, ...]
"""What is read, or a sum of products of nodes before it."""


@dataclass(frozen=True)
class Sweep:
    """Nodes in an order in which they can be computed, and those that are results."""

    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]

    @property
    def operations(self) -> int:
        """Multiplications and additions per atom and channel."""
        return sum(2 * len(node) - 1 for node in self.nodes if not isinstance(node, Input))


@dataclass(frozen=True)
class ContractionProgram:
    """What evaluates a contraction and its gradient.

    Attributes
    ----------
    forward, gradient
        From x to the outputs, and from x and the gradient of the outputs to that of x.
    mixing
        (products, weights): product r is the sum over trees k of ``mixing[r, k]`` times tree k.
    components, rows
        Components of the features, (l, m) with l ascending, and of the outputs, (L, M).
    identity
        Positive 63-bit number that depends on every step, so that weights made for one program are not
        read by another.
    """

    forward: Sweep
    gradient: Sweep
    mixing: NDArray[np.float64]
    components: int
    rows: int
    identity: int

    def __deepcopy__(self, memo: object) -> ContractionProgram:
        """Programs are shared and never change."""
        return self


class Tree(NamedTuple):
    """How factors are coupled: two of order ``pair[:2]`` to order ``pair[2]``, and that with order ``last``.

    One factor has no ``pair``; two factors have no ``last``.
    """

    output: int
    pair: tuple[int, int, int] | None
    last: int | None


Polynomial = dict[tuple[int, Monomial], float]
"""(M, sorted components l^2 + k) -> coefficient."""


@cache
def contraction_program(
    orders: tuple[int, ...], outputs: tuple[int, ...], degree: int
) -> ContractionProgram | None:
    """Program of all products of up to ``degree`` factors with l in ``orders``, None beyond degree 3.

    Products are ordered as in :func:`compactmlip.kernels.contraction.contraction_plan`.
    """
    orders, outputs = tuple(sorted(orders)), tuple(sorted(outputs))
    if degree > MAX_DEGREE:
        return None
    trees: list[Tree] = []
    known: set[tuple[int, ...]] = set()
    blocks: list[NDArray[np.float64]] = []
    for L in outputs:
        for nu in range(1, degree + 1):
            table = products(orders, L, nu)
            for multiset in sorted(set(table.multisets)):
                members = [r for r, m in enumerate(table.multisets) if m == multiset]
                targets = [
                    {
                        (int(M), table.monomials[k]): float(table.coefficients[r, M, k])
                        for M, k in zip(*np.nonzero(table.coefficients[r]), strict=True)
                    }
                    for r in members
                ]
                chosen, block = _chosen(L, multiset, targets, known)
                trees += chosen
                blocks.append(block)
    forward = _forward(orders, outputs, trees)
    gradient = _gradient(forward)
    return ContractionProgram(
        forward,
        gradient,
        _block_diagonal(blocks),
        sum(2 * l + 1 for l in orders),
        len(forward.outputs),
        _identity(forward, gradient),
    )


# ---- trees ---------------------------------------------------------------------------------------------


@cache
def _coupling(output: int, left: int, right: int) -> NDArray[np.float64]:
    """Coupling tensor, scaled such that its most frequent value is 1, which needs no multiplication."""
    table = wigner_3j(output, left, right)
    scaled = table / _unit(table[np.abs(table) > 1e-12])
    if 0 in (output, left, right):  # a multiple of the identity
        scaled = scaled * np.sign(scaled[np.abs(scaled) > 1e-6][0])
    return np.array([_exact(c) for c in scaled.flat]).reshape(table.shape)


@cache
def _pair(left: int, right: int, output: int) -> tuple[dict[Monomial, float], ...]:
    """Quadratic polynomial of each component of x[left] (x) x[right], which may be the same x."""
    table = _coupling(output, left, right)
    rows: list[dict[Monomial, float]] = []
    for M in range(2 * output + 1):
        row: dict[Monomial, float] = defaultdict(float)
        for a, b in zip(*np.nonzero(table[M]), strict=True):
            first, second = sorted((left * left + int(a), right * right + int(b)))
            row[first, second] += float(table[M, a, b])
        rows.append({m: c for m, c in row.items() if abs(c) > 1e-10})
    unit = _unit([c for row in rows for c in row.values()])
    return tuple({m: _exact(c / unit) for m, c in row.items()} for row in rows)


def _unit(values: Iterable[float]) -> float:
    """Most frequent absolute value."""
    sizes: dict[float, list[float]] = defaultdict(list)
    for value in values:
        sizes[round(abs(float(value)), 9)].append(abs(float(value)))
    return max(sizes.values(), key=lambda listed: (len(listed), listed[0]))[0]


def _exact(value: float) -> float:
    """Without rounding error where the value is a small integer, which includes zero."""
    return float(round(value)) if abs(value - round(value)) < 1e-12 else float(value)


def _polynomial(tree: Tree) -> Polynomial:
    if tree.pair is None:
        first = tree.output**2
        return {(M, (first + M,)): 1.0 for M in range(2 * tree.output + 1)}
    quadratic = _pair(*tree.pair)
    if tree.last is None:
        return {(M, m): c for M, row in enumerate(quadratic) for m, c in row.items()}
    total: Polynomial = defaultdict(float)
    table = _coupling(tree.output, tree.pair[2], tree.last)
    for M, m, k in zip(*np.nonzero(table), strict=True):
        for monomial, c in quadratic[m].items():
            key = int(M), tuple(sorted((*monomial, tree.last**2 + int(k))))
            total[key] += c * float(table[M, m, k])
    return total


def _trees(output: int, multiset: Monomial) -> list[Tree]:
    """All trees of these factors that can be something else than zero."""
    if len(multiset) == 1:
        return [Tree(output, None, multiset[0])]
    if len(multiset) == 2:
        return [Tree(output, (multiset[0], multiset[1], output), None)]
    found = []
    for k, last in enumerate(multiset):
        a, b = multiset[:k] + multiset[k + 1 :]
        for l in range(abs(a - b), a + b + 1):
            if (a != b or l % 2 == 0) and abs(l - last) <= output <= l + last:
                found.append(Tree(output, (a, b, l), last))
    return list(dict.fromkeys(found))


def _cost(tree: Tree, known: set[tuple[int, ...]]) -> int:
    """Operations that a tree adds to those of the trees before it."""
    if tree.pair is None:
        return 0
    l = tree.pair[2]
    cost = 2 * l + 1
    if tree.pair not in known:
        cost += sum(len(row) for row in _pair(*tree.pair))
    if tree.last is not None and (tree.output, l, tree.last, -1) not in known:
        nonzero = int(np.count_nonzero(_coupling(tree.output, l, tree.last)))
        plain = 0 in (tree.output, l, tree.last)
        cost += nonzero if plain else nonzero + (2 * l + 1) * (2 * tree.last + 1)
    return cost


def _chosen(
    output: int, multiset: Monomial, targets: Sequence[Polynomial], known: set[tuple[int, ...]]
) -> tuple[list[Tree], NDArray[np.float64]]:
    """As many independent trees as there are products, cheapest first, and the products in terms of them."""
    candidates = sorted(_trees(output, multiset), key=lambda tree: (_cost(tree, known), tree))
    polynomials = {tree: _polynomial(tree) for tree in candidates}
    keys = sorted({key for p in (*polynomials.values(), *targets) for key in p})
    vectors: list[NDArray[np.float64]] = []
    chosen: list[Tree] = []
    for tree in candidates:
        vector = np.array([polynomials[tree].get(key, 0.0) for key in keys])
        if np.linalg.matrix_rank(np.array([*vectors, vector]), tol=1e-8) > len(vectors):
            vectors.append(vector)
            chosen.append(tree)
            if tree.pair is not None:
                known |= {tree.pair, (output, tree.pair[2], -1 if tree.last is None else tree.last, -1)}
        if len(chosen) == len(targets):
            break
    wanted = np.array([[target.get(key, 0.0) for key in keys] for target in targets])
    basis = np.array(vectors)
    mixing = np.linalg.lstsq(basis.T, wanted.T, rcond=None)[0].T
    if not np.allclose(mixing @ basis, wanted, rtol=0, atol=1e-12):
        raise AssertionError(f"trees of factors {multiset} do not span the products of order {output}")
    return chosen, mixing


def _block_diagonal(blocks: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    total = np.zeros((sum(b.shape[0] for b in blocks), sum(b.shape[1] for b in blocks)))
    row = column = 0
    for block in blocks:
        total[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return total


# ---- programs ------------------------------------------------------------------------------------------


class _Nodes:
    """Nodes that are made once, however often they are asked for."""

    def __init__(self, nodes: Iterable[Node] = ()) -> None:
        self.nodes: list[Node] = []
        self.index: dict[Node, int] = {}
        for node in nodes:
            self.add(node)

    def add(self, node: Node) -> int:
        if node not in self.index:
            self.index[node] = len(self.nodes)
            self.nodes.append(node)
        return self.index[node]

    def sum(self, terms: Sequence[Term]) -> int:
        """A sum; one term that is a node with factor 1 is that node."""
        if len(terms) == 1 and terms[0].kind == "constant" and terms[0].factor == 1:
            return terms[0].node
        return self.add(tuple(terms))

    def product(self, a: int, b: int) -> int:
        return self.add((Term("node", a, b),))

    def live(self, outputs: Sequence[int]) -> Sweep:
        """Only what the outputs need, in the same order."""
        needed = set(outputs)
        for k in range(len(self.nodes) - 1, -1, -1):
            node = self.nodes[k]
            if k in needed and not isinstance(node, Input):
                for term in node:
                    needed |= {term.node, int(term.factor)} if term.kind == "node" else {term.node}
        place = {old: new for new, old in enumerate(sorted(needed))}

        def moved(node: Node) -> Node:
            if isinstance(node, Input):
                return node
            return tuple(
                Term(t.kind, place[int(t.factor)] if t.kind == "node" else t.factor, place[t.node])
                for t in node
            )

        return Sweep(tuple(moved(self.nodes[k]) for k in sorted(needed)), tuple(place[k] for k in outputs))


def _forward(orders: Sequence[int], outputs: Sequence[int], trees: Sequence[Tree]) -> Sweep:
    nodes = _Nodes()
    listed = [l * l + k for l in orders for k in range(2 * l + 1)]
    x = {component: nodes.add(Input("x", k)) for k, component in enumerate(listed)}

    def quadratic(pair: tuple[int, int, int]) -> list[int]:
        return [
            nodes.sum([Term("constant", c, nodes.product(x[a], x[b])) for (a, b), c in row.items()])
            for row in _pair(*pair)
        ]

    # Pairs next to each other, so that what they share is at hand.
    pair_nodes = {pair: quadratic(pair) for pair in sorted({t.pair for t in trees if t.pair is not None})}
    results: list[int] = []
    for L in outputs:
        total: list[list[Term]] = [[] for _ in range(2 * L + 1)]
        cubic: dict[tuple[int, int], list[tuple[int, list[int]]]] = defaultdict(list)
        for k, tree in enumerate(trees):
            if tree.output != L:
                continue
            if tree.pair is not None and tree.last is not None:
                cubic[tree.pair[2], tree.last].append((k, pair_nodes[tree.pair]))
                continue
            single = pair_nodes[tree.pair] if tree.pair else [x[L * L + M] for M in range(2 * L + 1)]
            for M, node in enumerate(single):
                total[M].append(Term("weight", k, node))
        for (l, last), members in cubic.items():
            mixed = [nodes.add(tuple(Term("weight", k, p[m]) for k, p in members)) for m in range(2 * l + 1)]
            table = _coupling(L, l, last)
            for m, k, M in pairs(range(2 * l + 1), range(2 * last + 1), range(2 * L + 1)):
                if table[M, m, k] == 1 and 0 in (L, l, last):
                    total[M].append(Term("node", mixed[m], x[last * last + k]))
                elif table[M, m, k] != 0:
                    factor = float(table[M, m, k])
                    total[M].append(Term("constant", factor, nodes.product(mixed[m], x[last * last + k])))
        results += [nodes.add(tuple(terms)) for terms in total]
    return nodes.live(results)


def _gradient(forward: Sweep) -> Sweep:
    """Reverse-mode differentiation: the adjoint of a node is a sum over the nodes that read it."""
    nodes = _Nodes(forward.nodes)
    seeds: dict[int, list[Term]] = defaultdict(list)
    for k, output in enumerate(forward.outputs):
        seeds[output].append(Term("constant", 1.0, nodes.add(Input("grad", k))))
    for k in range(len(forward.nodes) - 1, -1, -1):
        node = forward.nodes[k]
        if isinstance(node, Input) or k not in seeds:
            continue
        adjoint = nodes.sum(seeds[k])
        for term in node:
            if term.kind == "node":
                a, b = int(term.factor), term.node
                seeds[a].append(Term("node", b, adjoint))
                seeds[b].append(Term("node", a, adjoint))
            else:
                seeds[term.node].append(Term(term.kind, term.factor, adjoint))
    inputs = [k for k, node in enumerate(forward.nodes) if isinstance(node, Input)]
    return nodes.live([nodes.add(tuple(seeds[k])) for k in inputs])


def _identity(*sweeps: Sweep) -> int:
    """Numbers to nine digits: the last ones may differ between versions of the linear algebra."""
    text = [
        repr(node) if isinstance(node, Input) else [(t.kind, f"{t.factor:.9g}", t.node) for t in node]
        for sweep in sweeps
        for node in (*sweep.nodes, *(Input("x", k) for k in sweep.outputs))
    ]
    return int.from_bytes(hashlib.sha256(repr(text).encode()).digest()[:8], "big") >> 1
