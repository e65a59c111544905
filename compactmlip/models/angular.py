"""Real spherical harmonics and their coupling (Clebsch-Gordan) coefficients.

Convention: the components of order l are ordered m = -l ... l with y as the polar axis, so that the
components of l = 1 are (x, y, z).  Signs and basis are those of e3nn >= 0.5; importers of models
with another phase fold the difference into their weights.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


def _clebsch_gordan(l1: int, l2: int, l3: int) -> NDArray[np.complex128]:
    """Clebsch-Gordan coefficients <l1 m1 l2 m2 | l3 m3> by Racah's formula, Condon-Shortley phase."""
    fact = math.factorial
    table = np.zeros((2 * l1 + 1, 2 * l2 + 1, 2 * l3 + 1), dtype=np.complex128)
    triangle = fact(l1 + l2 - l3) * fact(l1 - l2 + l3) * fact(-l1 + l2 + l3) / fact(l1 + l2 + l3 + 1)
    for m1 in range(-l1, l1 + 1):
        for m2 in range(-l2, l2 + 1):
            m3 = m1 + m2
            if abs(m3) > l3:
                continue
            weight = (2 * l3 + 1) * triangle
            for l, m in ((l1, m1), (l2, m2), (l3, m3)):
                weight *= fact(l + m) * fact(l - m)
            total = 0.0
            for k in range(l1 + l2 - l3 + 1):
                terms = (k, l1 + l2 - l3 - k, l1 - m1 - k, l2 + m2 - k, l3 - l2 + m1 + k, l3 - l1 - m2 + k)
                if min(terms) >= 0:
                    total += (-1) ** k / math.prod(fact(t) for t in terms)
            table[l1 + m1, l2 + m2, l3 + m3] = math.sqrt(weight) * total
    return table


def _complex_to_real(l: int) -> NDArray[np.complex128]:
    """Rows: complex components m; columns: real components.  The factor (-i)^l keeps couplings real."""
    q = np.zeros((2 * l + 1, 2 * l + 1), dtype=np.complex128)
    q[l, l] = 1.0
    for m in range(1, l + 1):
        q[l - m, l + m] = 1 / math.sqrt(2)
        q[l - m, l - m] = -1j / math.sqrt(2)
        q[l + m, l + m] = (-1) ** m / math.sqrt(2)
        q[l + m, l - m] = 1j * (-1) ** m / math.sqrt(2)
    return (-1j) ** l * q


@cache
def wigner_3j(l1: int, l2: int, l3: int) -> NDArray[np.float64]:
    """Real coupling tensor of shape (2 l1 + 1, 2 l2 + 1, 2 l3 + 1) with unit Frobenius norm.

    It is the only tensor, up to a factor, that is invariant when all three indices are rotated.

    Raises
    ------
    ValueError
        If the orders violate the triangle inequality.
    """
    if not abs(l1 - l2) <= l3 <= l1 + l2:
        raise ValueError(f"orders {l1}, {l2}, {l3} do not couple: |l1 - l2| <= l3 <= l1 + l2 is violated")
    q1, q2, q3 = _complex_to_real(l1), _complex_to_real(l2), _complex_to_real(l3)
    coupled = np.einsum("abc,ai,bj,ck->ijk", _clebsch_gordan(l1, l2, l3), q1, q2, q3.conj())
    table: NDArray[np.float64] = coupled.real / np.linalg.norm(coupled)
    table[np.abs(table) < 1e-14] = 0.0
    table.setflags(write=False)
    return table


class SphericalHarmonics(nn.Module):
    """Real spherical harmonics of orders 0 ... lmax of edge vectors, "component" normalised.

    For a unit vector the squares of the 2l + 1 components sum to 2l + 1.  Each order is obtained from
    the one below by coupling with l = 1, which only multiplies and adds: exact derivatives of any
    order, and no special case along the axes.

    Parameters
    ----------
    lmax
        Largest order.
    solid
        If true, order l is multiplied by r^l (vectors are not normalised first).
    """

    def __init__(self, lmax: int, *, solid: bool = False) -> None:
        super().__init__()
        self.lmax, self.solid = lmax, solid
        pole = np.array([0.0, 1.0, 0.0]) * math.sqrt(3.0)
        previous = pole
        for l in range(2, lmax + 1):
            step = wigner_3j(l - 1, 1, l).reshape(-1, 2 * l + 1)
            at_pole = np.outer(previous, pole).reshape(-1) @ step
            step = step * math.sqrt(2 * l + 1) / at_pole[l]
            previous = np.outer(previous, pole).reshape(-1) @ step
            self.register_buffer(f"step_{l}", torch.tensor(step), persistent=False)

    def forward(self, vectors: Tensor, lengths: Tensor) -> Tensor:
        """Return shape (E, (lmax + 1)^2) from ``vectors`` (E, 3) and ``lengths`` (E,), in Angstrom."""
        first = vectors if self.solid else vectors / lengths.unsqueeze(-1)
        orders = [torch.ones_like(lengths).unsqueeze(-1)]
        if self.lmax > 0:
            first = math.sqrt(3.0) * first
            orders.append(first)
        for l in range(2, self.lmax + 1):
            product = (orders[-1].unsqueeze(-1) * first.unsqueeze(-2)).flatten(1)
            orders.append(product @ getattr(self, f"step_{l}"))
        return torch.cat(orders, dim=-1)
