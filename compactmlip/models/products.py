"""Symmetric products of equivariant features: the polynomials of MACE's higher-order messages.

A product of degree nu couples nu copies of the same feature x[l, m] to one output of order L.  Upstream
writes it with dense generalised Clebsch-Gordan tensors U[M, i_1 ... i_nu, path] (MACE, Batatia et al.
2022, Eq. 10 and 11).  Because all factors are the same x, only the symmetric part of U counts: a
polynomial in the monomials of x, sparse, and with fewer independent members than there are paths.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from compactmlip.models.angular import wigner_3j

Monomial = tuple[int, ...]
"""Sorted component indices; component l^2 + l + m of the features (l, m)."""


@dataclass(frozen=True)
class CouplingPath:
    """One way of coupling nu factors: ``((l_1 l_2) l_12, l_3) ...`` to the output order.

    Attributes
    ----------
    orders
        l of each factor.
    intermediates
        l after each coupling; the last one is the output order.
    tensor
        Shape (2L+1, 2 l_1 + 1, ..., 2 l_nu + 1).
    """

    orders: tuple[int, ...]
    intermediates: tuple[int, ...]
    tensor: NDArray[np.float64]


@dataclass(frozen=True)
class Products:
    """All products of one degree and output order.

    Attributes
    ----------
    monomials
        Those that occur.
    coefficients
        (R, 2L+1, monomials): the R linearly independent products, each of unit norm.
    multisets
        Sorted l of the factors of each independent product.
    path_multisets
        The same for each of the K coupling paths of upstream.
    mixing
        (R, K): path k is the sum over r of ``mixing[r, k]`` times product r.
    """

    monomials: tuple[Monomial, ...]
    coefficients: NDArray[np.float64]
    multisets: tuple[tuple[int, ...], ...]
    path_multisets: tuple[tuple[int, ...], ...]
    mixing: NDArray[np.float64]

    def __deepcopy__(self, memo: object) -> Products:
        """Tables are shared and never change."""
        return self


def _coupled(orders: Sequence[int], degree: int) -> Iterator[tuple[int, int, CouplingPath]]:
    """Yield (l, parity, path) of all couplings of ``degree`` factors, in the order that upstream uses.

    Upstream sorts by irrep after each factor, stably: by l, then parity -1 before +1.
    """
    if degree == 1:
        for l in orders:
            yield l, (-1) ** l, CouplingPath((l,), (), np.eye(2 * l + 1))
        return
    found = []
    for l_left, p_left, left in _coupled(orders, degree - 1):
        for l in orders:
            for l_out in range(abs(l_left - l), l_left + l + 1):
                found.append((l_out, p_left * (-1) ** l, left, l_left, l))
    found.sort(key=lambda item: item[:2])
    for l_out, parity, left, l_left, l in found:
        table = wigner_3j(l_out, l_left, l) * np.sqrt(2 * l_out + 1)
        tensor = np.tensordot(left.tensor, table, axes=(0, 1))
        tensor = np.moveaxis(tensor, -2, 0)
        yield l_out, parity, CouplingPath((*left.orders, l), (*left.intermediates, l_out), tensor)


@cache
def coupling_paths(orders: tuple[int, ...], output: int, degree: int) -> tuple[CouplingPath, ...]:
    """Coupling paths to ``output`` with natural parity (-1)^l, in upstream's order.

    From degree 4 on upstream keeps natural parity in all intermediates as well.
    """
    paths = (path for l, p, path in _coupled(orders, degree) if l == output and p == (-1) ** output)
    if degree < 4:
        return tuple(paths)
    return tuple(path for path in paths if _natural(path))


def _natural(path: CouplingPath) -> bool:
    sums = itertools.accumulate(path.orders)
    next(sums)
    return all((total - l) % 2 == 0 for total, l in zip(sums, path.intermediates, strict=True))


def symmetrised(path: CouplingPath) -> dict[Monomial, NDArray[np.float64]]:
    """Coefficients (2L+1,) of the monomials that a path's tensor stands for."""
    flat = path.tensor.reshape(path.tensor.shape[0], -1).T
    used = np.flatnonzero(np.abs(flat).max(axis=1) > 1e-13)
    local = np.stack(np.unravel_index(used, path.tensor.shape[1:]), axis=1)
    components = np.sort(local + np.array([l * l for l in path.orders]), axis=1)
    unique, inverse = np.unique(components, axis=0, return_inverse=True)
    total = np.zeros((len(unique), flat.shape[1]))
    np.add.at(total, inverse.reshape(-1), flat[used])
    return {tuple(int(c) for c in m): row for m, row in zip(unique, total, strict=True)}


@cache
def products(orders: tuple[int, ...], output: int, degree: int) -> Products:
    """Independent products of ``degree`` factors with l in ``orders`` that have order ``output``.

    Paths are taken in order; one that adds nothing new to those before it is expressed by them.
    Products with different multisets of l share no monomial, so leaving out an order leaves the
    others as they are.
    """
    paths = coupling_paths(orders, output, degree)
    polynomials = [symmetrised(path) for path in paths]
    multisets = [tuple(sorted(path.orders)) for path in paths]
    blocks, kept_multisets = [], []
    mixing_rows: list[NDArray[np.float64]] = []
    for multiset in sorted(set(multisets)):
        members = [k for k, m in enumerate(multisets) if m == multiset]
        names = sorted({m for k in members for m in polynomials[k]})
        matrix = np.zeros((len(names), 2 * output + 1, len(members)))
        for column, k in enumerate(members):
            for monomial, row in polynomials[k].items():
                matrix[names.index(monomial), :, column] = row
        basis, mixing = _independent(matrix.reshape(-1, len(members)))
        for r in range(basis.shape[1]):
            blocks.append((names, basis[:, r].reshape(len(names), -1)))
            kept_multisets.append(multiset)
            row = np.zeros(len(paths))
            row[members] = mixing[r]
            mixing_rows.append(row)
    nonzero = {m for names, block in blocks for m, row in zip(names, block, strict=True) if np.any(row)}
    monomials = tuple(sorted(nonzero))
    index = {m: i for i, m in enumerate(monomials)}
    coefficients = np.zeros((len(blocks), 2 * output + 1, len(monomials)))
    for r, (names, block) in enumerate(blocks):
        for monomial, row in zip(names, block, strict=True):
            if monomial in index:
                coefficients[r, :, index[monomial]] = row
    mixed = np.array(mixing_rows).reshape(len(blocks), len(paths))
    return Products(monomials, coefficients, tuple(kept_multisets), tuple(multisets), mixed)


def _independent(matrix: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """First independent columns of a matrix, normalised, and all columns in terms of them."""
    kept: list[int] = []
    orthogonal = np.zeros((matrix.shape[0], 0))
    for k in range(matrix.shape[1]):
        column = matrix[:, k]
        rest = column - orthogonal @ (orthogonal.T @ column)
        rest = rest - orthogonal @ (orthogonal.T @ rest)
        if np.linalg.norm(rest) > 1e-8:
            kept.append(k)
            orthogonal = np.column_stack([orthogonal, rest / np.linalg.norm(rest)])
    basis = matrix[:, kept] / np.linalg.norm(matrix[:, kept], axis=0)
    basis[np.abs(basis) < 1e-13] = 0.0
    mixing = np.linalg.lstsq(basis, matrix, rcond=None)[0] if kept else np.zeros((0, matrix.shape[1]))
    mixing[np.abs(mixing) < 1e-12] = 0.0
    return basis, mixing
