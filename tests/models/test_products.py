"""Symmetric products: equivariance, independence, number by characters, values of upstream."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from compactmlip.families.mace_contraction import path_sign
from compactmlip.models.angular import SphericalHarmonics
from compactmlip.models.contraction import SymmetricContraction, num_weights, weight_key
from compactmlip.models.products import Products, coupling_paths, products

UPSTREAM = dict(np.load(Path(__file__).parents[1] / "reference" / "mace" / "products.npz"))
"""``<lmax>_<degree>_<L>``: (points, 2L+1, K); ``x_<lmax>``: (points, components)."""

CASES = [
    (orders, L, degree)
    for orders, degree in [
        ((0, 1), 1),
        ((0, 1), 2),
        ((0, 1), 3),
        ((0, 1, 2), 3),
        ((0, 1, 2, 3), 2),
        ((0, 1, 2, 3), 3),
        ((1, 3), 3),
        ((0, 1, 2), 4),
        ((0, 1), 4),
    ]
    for L in range(3)
]


def evaluate(table: Products, x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Products (points, 2L+1, R) of features (points, components of l = 0 ... lmax)."""
    monomials = np.stack([np.prod(x[:, list(m)], axis=1) for m in table.monomials], axis=1)
    return np.asarray(np.einsum("rMm,bm->bMr", table.coefficients, monomials))


def rotations(lmax: int, matrix: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Matrices of all orders that harmonics of rotated points obey: Y(R v) = D Y(v)."""
    points = np.random.default_rng(5).normal(size=(80, 3))
    one, two = (
        SphericalHarmonics(lmax)(p, p.norm(dim=-1)).numpy()
        for p in (torch.tensor(points), torch.tensor(points @ matrix.T))
    )
    found = []
    for l in range(lmax + 1):
        own = slice(l * l, (l + 1) ** 2)
        found.append(np.linalg.lstsq(one[:, own], two[:, own], rcond=None)[0].T)
        np.testing.assert_allclose(found[-1] @ found[-1].T, np.eye(2 * l + 1), atol=1e-12)
    return found


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize(("orders", "L", "degree"), CASES)
def test_equivariance(orders: tuple[int, ...], L: int, degree: int, inverted: bool) -> None:
    table = products(orders, L, degree)
    if not table.multisets:
        return
    matrix = Rotation.random(rng=np.random.default_rng(degree)).as_matrix() * (-1 if inverted else 1)
    lmax = max(*orders, L)
    blocks = rotations(lmax, matrix)
    x = np.random.default_rng(1).normal(size=(4, (lmax + 1) ** 2))
    rotated = np.concatenate([x[:, l * l : (l + 1) ** 2] @ blocks[l].T for l in range(lmax + 1)], axis=1)
    values = evaluate(table, x)
    np.testing.assert_allclose(
        evaluate(table, rotated), np.einsum("MN,bNr->bMr", blocks[L], values), rtol=0, atol=1e-11
    )
    assert (np.abs(values).max(axis=(0, 1)) > 1e-3).all()


@pytest.mark.parametrize(("orders", "L", "degree"), CASES)
def test_products_are_independent_and_normalised(orders: tuple[int, ...], L: int, degree: int) -> None:
    table = products(orders, L, degree)
    flat = table.coefficients.reshape(len(table.multisets), (2 * L + 1) * len(table.monomials))
    np.testing.assert_allclose(np.linalg.norm(flat, axis=1), 1.0, rtol=1e-12)
    if len(flat):
        assert np.linalg.svd(flat, compute_uv=False).min() > 1e-3
    assert table.mixing.shape == (len(table.multisets), len(table.path_multisets))
    used = {
        m for m, column in zip(table.monomials, table.coefficients.any(axis=(0, 1)), strict=True) if column
    }
    assert used == set(table.monomials)


def _power_character(l: int, power: int, angle: NDArray[np.float64], inversion: bool) -> NDArray[np.float64]:
    """Trace of the ``power``-th power of a rotation (with inversion) on features of order l."""
    trace = sum(np.cos(m * power * angle) for m in range(-l, l + 1))
    return np.asarray(trace * ((-1) ** (l * power) if inversion else 1))


def _symmetric_character(
    l: int, degree: int, angle: NDArray[np.float64], inversion: bool
) -> NDArray[np.float64]:
    """Trace on symmetric products of ``degree`` equal factors (Newton's identities)."""
    traces = [np.ones_like(angle)]
    for n in range(1, degree + 1):
        powers = (_power_character(l, k, angle, inversion) * traces[n - k] for k in range(1, n + 1))
        traces.append(sum(powers) / n)
    return traces[degree]


def multiplicity(multiset: tuple[int, ...], L: int) -> int:
    """How often order L of natural parity occurs among the symmetric products of one multiset.

    Orthogonality of the characters of O(3); the mean over angles is exact for trigonometric polynomials.
    """
    angle = np.arange(128) * 2 * np.pi / 128
    total = 0.0
    for inversion in (False, True):
        character = _power_character(L, 1, angle, inversion)
        for l, count in Counter(multiset).items():
            character = character * _symmetric_character(l, count, angle, inversion)
        total += float(np.mean(character * (1 - np.cos(angle)))) / 2
    assert abs(total - round(total)) < 1e-9
    return round(total)


@pytest.mark.parametrize(("orders", "L", "degree"), CASES)
def test_number_of_products_by_characters(orders: tuple[int, ...], L: int, degree: int) -> None:
    """Complete, multiset by multiset: no product is missing, none is counted twice."""
    found = Counter(products(orders, L, degree).multisets)
    for multiset in itertools.combinations_with_replacement(orders, degree):
        assert found[multiset] == multiplicity(multiset, L), multiset


def test_numbers_for_the_released_models() -> None:
    """Orders up to 3, three factors: upstream's paths and how many of them are independent."""
    counts = [products((0, 1, 2, 3), L, 3).mixing.shape for L in range(3)]
    assert counts == [(8, 23), (12, 51), (14, 65)]


@pytest.mark.parametrize("key", [k for k in UPSTREAM if not k.startswith("x_")])
def test_values_of_upstream(key: str) -> None:
    """Each of upstream's couplings, in its order, up to the phases of e3nn 0.4."""
    lmax, degree, L = map(int, key.split("_"))
    table, orders = products(tuple(range(lmax + 1)), L, degree), tuple(range(lmax + 1))
    paths = coupling_paths(orders, L, degree)
    assert UPSTREAM[key].shape[-1] == len(paths) == table.mixing.shape[1]
    signs = np.array([path_sign(path) for path in paths])
    found = evaluate(table, UPSTREAM[f"x_{lmax}"]) @ table.mixing * signs
    np.testing.assert_allclose(found, UPSTREAM[key], rtol=0, atol=1e-12)


def test_phases_matter_somewhere() -> None:
    """Otherwise the comparison above would say nothing about them."""
    flipped = [path for L in range(3) for path in coupling_paths((0, 1, 2, 3), L, 3) if path_sign(path) < 0]
    assert flipped


def test_leaving_out_an_order_leaves_the_other_products() -> None:
    everything, fewer = products((0, 1, 2, 3), 1, 3), products((0, 1, 3), 1, 3)
    kept = [k for k, multiset in enumerate(everything.multisets) if 2 not in multiset]
    assert tuple(everything.multisets[k] for k in kept) == fewer.multisets
    columns = [everything.monomials.index(m) for m in fewer.monomials]
    np.testing.assert_array_equal(everything.coefficients[kept][:, :, columns], fewer.coefficients)
    paths = [k for k, multiset in enumerate(everything.path_multisets) if 2 not in multiset]
    np.testing.assert_array_equal(everything.mixing[np.ix_(kept, paths)], fewer.mixing)


def test_no_products_of_the_wrong_parity() -> None:
    assert products((1,), 0, 3).multisets == ()
    assert products((1, 3), 2, 1).multisets == ()


# The contraction that uses the products


@pytest.mark.parametrize(("lmax", "degree"), [(1, 3), (2, 4), (3, 3)])
def test_contraction_is_the_sum_of_upstreams_couplings(lmax: int, degree: int) -> None:
    """Species choose the weights; every degree contributes; channels do not mix."""
    points, channels, num_species = 6, 2, 3
    rng = np.random.default_rng(8)
    orders = tuple(range(lmax + 1))
    outputs = tuple(range(min(lmax, 2) + 1))
    contraction = SymmetricContraction(
        channels, dict.fromkeys(orders), dict.fromkeys(outputs), degree, num_species
    )
    species = np.array([0, 1, 2, 2, 1, 0])
    x = UPSTREAM[f"x_{lmax}"]
    features = torch.tensor(np.stack([x, x], axis=-1))
    expected = {L: np.zeros((points, 2 * L + 1, channels)) for L in outputs}
    for L, nu in itertools.product(outputs, range(1, degree + 1)):
        couplings = x[:, L * L : (L + 1) ** 2, None] if nu == 1 else UPSTREAM[f"{lmax}_{nu}_{L}"]
        weight = rng.normal(size=(num_species, couplings.shape[-1], channels))
        signs = np.array([path_sign(path) for path in coupling_paths(orders, L, nu)])
        with torch.no_grad():
            contraction.weights[weight_key(L, nu)].copy_(torch.tensor(weight * signs[:, None]))
        expected[L] += np.einsum("bMk,bkc->bMc", couplings, weight[species])
    found = contraction([features[:, l * l : (l + 1) ** 2] for l in orders], torch.tensor(species))
    for L in outputs:
        np.testing.assert_allclose(found[L].detach(), expected[L], rtol=0, atol=1e-10)


def test_independent_weights_are_those_of_the_products() -> None:
    orders, L, nu = (0, 1, 2), 1, 3
    paths, independent = (
        SymmetricContraction(2, dict.fromkeys(orders), {L: None}, nu, 2, kind)
        for kind in ("paths", "independent")
    )
    table = products(orders, L, nu)
    assert num_weights(table, "independent") == len(table.multisets) < num_weights(table, "paths")
    with torch.no_grad():
        for degree in range(1, nu + 1):
            weight = paths.combined_weights(L, degree)
            independent.weights[weight_key(L, degree)].copy_(weight)
    rng = np.random.default_rng(2)
    x = [torch.tensor(rng.normal(size=(5, 2 * l + 1, 2))) for l in orders]
    species = torch.tensor([0, 1, 1, 0, 1])
    torch.testing.assert_close(paths(x, species)[L], independent(x, species)[L], rtol=1e-13, atol=1e-13)


def test_absent_channels_count_as_zero() -> None:
    """Orders with fewer channels than the contraction is wide, and outputs for some channels only."""
    rng = np.random.default_rng(3)
    full = SymmetricContraction(4, {0: None, 1: None, 2: None}, {0: None, 1: None}, 3, 2)
    some = SymmetricContraction(4, {0: (0, 1, 3), 1: (2, 3), 2: None}, {0: (1, 3), 1: (0, 2, 3)}, 3, 2)
    with torch.no_grad():
        for L, chosen in ((0, [1, 3]), (1, [0, 2, 3])):
            for nu in range(1, 4):
                some.weights[weight_key(L, nu)].copy_(full.weights[weight_key(L, nu)][:, :, chosen])
    x = [torch.tensor(rng.normal(size=(5, 2 * l + 1, 4))) for l in range(3)]
    x[0][..., 2] = 0
    x[1][..., :2] = 0
    species = torch.tensor([0, 1, 0, 1, 1])
    expected, found = full(x, species), some([x[0][..., [0, 1, 3]], x[1][..., 2:], x[2]], species)
    torch.testing.assert_close(found[0], expected[0][..., [1, 3]], rtol=0, atol=1e-13)
    torch.testing.assert_close(found[1], expected[1][..., [0, 2, 3]], rtol=0, atol=1e-13)


def test_contraction_is_twice_differentiable() -> None:
    contraction = SymmetricContraction(2, dict.fromkeys((0, 1, 2)), dict.fromkeys((0, 1)), 3, 1)
    x = torch.tensor(np.random.default_rng(4).normal(size=(1, 9, 2)), requires_grad=True)
    species = torch.zeros(1, dtype=torch.long)

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.cat(contraction([x[:, :1], x[:, 1:4], x[:, 4:]], species), dim=1)

    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,))
