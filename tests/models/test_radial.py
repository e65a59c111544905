"""Radial bases, distance transforms, cutoff envelopes and ZBL against formulas evaluated independently."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.polynomial import chebyshev
from torch import Tensor

from compactmlip.models.radial import (
    AgnesiTransform,
    PolynomialEnvelope,
    RadialBasis,
    RadialEmbedding,
    SoftTransform,
    Transform,
    XPLOREnvelope,
)
from compactmlip.models.repulsion import ZBLOptions, ZBLRepulsion

CUTOFF = 5.0
R = torch.linspace(0.3, 6.0, 58, dtype=torch.float64)


def derivative(function: Callable[[Tensor], Tensor], x: Tensor, order: int = 1) -> Tensor:
    """Derivative of an elementwise function by automatic differentiation."""
    x = x.clone().requires_grad_(True)
    value = function(x)
    for k in range(order):
        (value,) = torch.autograd.grad(value.sum(), x, create_graph=k < order - 1)
    return value.detach()


# Bases


def test_bessel_functions() -> None:
    found = RadialBasis("bessel", 6, CUTOFF)(R)
    expected = [
        [math.sqrt(2 / CUTOFF) * math.sin(n * math.pi * r / CUTOFF) / r for n in range(1, 7)]
        for r in R.tolist()
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-14)


def test_bessel_functions_are_orthonormal() -> None:
    """With the weight r^2 on (0, r_c): what makes them a basis of equal importance."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    r = torch.tensor((nodes + 1) * CUTOFF / 2)
    values = RadialBasis("bessel", 6, CUTOFF)(r).numpy()
    gram = values.T @ (values * (weights * CUTOFF / 2 * r.numpy() ** 2)[:, None])
    np.testing.assert_allclose(gram, np.eye(6), atol=1e-12)


def test_gaussians() -> None:
    basis = RadialBasis("gaussian", 6, CUTOFF)
    centres, width = np.linspace(0, CUTOFF, 6), CUTOFF / 5
    expected = np.exp(-0.5 * ((R.numpy()[:, None] - centres) / width) ** 2)
    np.testing.assert_allclose(basis(R), expected, rtol=1e-13)
    at_centres = basis(torch.tensor(centres)).numpy()
    np.testing.assert_allclose(np.diag(at_centres), 1.0, rtol=1e-14)
    np.testing.assert_allclose(np.diag(at_centres, 1), math.exp(-0.5), rtol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 9])
def test_chebyshev_polynomials(size: int) -> None:
    """T_1 ... T_n, inside and outside of [-1, 1], with derivatives."""
    x = torch.linspace(-1.5, 1.5, 31, dtype=torch.float64)
    basis = RadialBasis("chebyshev", size, CUTOFF)
    assert list(basis.state_dict()) == []
    for n in range(1, size + 1):
        coefficients = [0.0] * n + [1.0]
        expected = chebyshev.chebval(x.numpy(), coefficients)
        np.testing.assert_allclose(basis(x)[:, n - 1], expected, rtol=1e-12, atol=1e-12)
        slope = chebyshev.chebval(x.numpy(), chebyshev.chebder(coefficients))
        found = derivative(lambda y, n=n: basis(y)[:, n - 1], x)
        np.testing.assert_allclose(found, slope, rtol=1e-11, atol=1e-11)


def test_stored_points_are_used() -> None:
    """Importers bring wave numbers and centres that may have been trained."""
    bessel, gaussian = RadialBasis("bessel", 3, CUTOFF), RadialBasis("gaussian", 3, CUTOFF)
    points = torch.tensor([0.7, 1.1, 2.3], dtype=torch.float64)
    bessel.points.copy_(points)
    gaussian.points.copy_(points)
    x = 1.3
    expected = [math.sqrt(2 / CUTOFF) * math.sin(k * x) / x for k in points.tolist()]
    np.testing.assert_allclose(bessel(torch.tensor([x], dtype=torch.float64))[0], expected, rtol=1e-13)
    expected = [math.exp(-0.5 * ((x - c) / 2.5) ** 2) for c in points.tolist()]
    np.testing.assert_allclose(gaussian(torch.tensor([x], dtype=torch.float64))[0], expected, rtol=1e-13)


# Envelopes


@pytest.mark.parametrize("p", [2, 3, 5, 6, 8])
def test_polynomial_envelope(p: int) -> None:
    """One at the origin; value, slope and curvature vanish at the cutoff; falls in between."""
    envelope = PolynomialEnvelope(p=p)
    x = R.numpy() / CUTOFF
    expected = 1 - (p + 1) * (p + 2) / 2 * x**p + p * (p + 2) * x ** (p + 1) - p * (p + 1) / 2 * x ** (p + 2)
    np.testing.assert_allclose(envelope.evaluate(R, CUTOFF), np.where(x < 1, expected, 0), atol=1e-13)
    inside = torch.tensor([CUTOFF * (1 - 1e-7)], dtype=torch.float64)
    for order, bound in ((0, 1e-17), (1, 1e-11), (2, 1e-4)):
        found = derivative(lambda r: envelope.evaluate(r, CUTOFF), inside, order) if order else None
        value = envelope.evaluate(inside, CUTOFF) if found is None else found
        assert abs(float(value)) < max(bound, 1e-14), (order, float(value))
    assert float(envelope.evaluate(torch.tensor([1e-9]), CUTOFF)) == pytest.approx(1.0)
    assert (torch.diff(envelope.evaluate(R, CUTOFF)) <= 0).all()
    assert not envelope.evaluate(torch.tensor([CUTOFF, CUTOFF + 1.0]), CUTOFF).any()


def test_third_derivative_at_the_cutoff_jumps() -> None:
    """So the polynomial has exactly the smoothness that is claimed, not a higher one by chance."""
    envelope = PolynomialEnvelope(p=6)
    inside = torch.tensor([CUTOFF * (1 - 1e-7)], dtype=torch.float64)
    third = derivative(lambda r: envelope.evaluate(r, CUTOFF), inside, 3)
    assert float(third) == pytest.approx(-6 * 7 * 8 / CUTOFF**3, rel=1e-4)


def test_xplor_envelope_is_smooth_at_both_ends() -> None:
    envelope = XPLOREnvelope(onset=4.0)
    step = 1e-7
    for point, value in ((4.0, 1.0), (CUTOFF, 0.0)):
        ends = torch.tensor([point - step, point + step], dtype=torch.float64)
        np.testing.assert_allclose(envelope.evaluate(ends, CUTOFF), value, atol=1e-12)
        slopes = derivative(lambda r: envelope.evaluate(r, CUTOFF), ends)
        np.testing.assert_allclose(slopes, 0.0, atol=1e-5)


# Transforms of the distance


def agnesi(r: float, radii_sum: float, q: float, p: float, a: float) -> float:
    x = r / (radii_sum / 2)
    return 1 / (1 + a * x**q / (1 + x ** (q - p)))


def soft(r: float, radii_sum: float, alpha: float) -> float:
    low, high = 3 * radii_sum / 4, 4 * radii_sum / 3
    middle = (low + high) / 2
    return low + (r - low) / (1 + math.exp(-2 * alpha * (r - middle) / (high - low)))


TRANSFORMS: list[tuple[Transform, Callable[[float, float], float]]] = [
    (AgnesiTransform(), lambda r, s: agnesi(r, s, 0.9183, 4.5791, 1.0805)),
    (AgnesiTransform(q=1.1, p=3.0, a=2.0), lambda r, s: agnesi(r, s, 1.1, 3.0, 2.0)),
    (SoftTransform(), lambda r, s: soft(r, s, 4.0)),
    (SoftTransform(alpha=2.5), lambda r, s: soft(r, s, 2.5)),
]


@pytest.mark.parametrize(("transform", "formula"), TRANSFORMS)
def test_transforms(transform: Transform, formula: Callable[[float, float], float]) -> None:
    sums = torch.linspace(0.6, 4.2, len(R), dtype=torch.float64)
    expected = [formula(r, s) for r, s in zip(R.tolist(), sums.tolist(), strict=True)]
    np.testing.assert_allclose(transform.evaluate(R, sums), expected, rtol=1e-12)
    step = 1e-5
    pairs = list(zip(R.tolist(), sums.tolist(), strict=True))
    slopes = [(formula(r + step, s) - formula(r - step, s)) / (2 * step) for r, s in pairs]
    found = derivative(lambda r: transform.evaluate(r, sums), R)
    np.testing.assert_allclose(found, slopes, rtol=1e-6, atol=1e-8)


def test_agnesi_maps_distances_into_the_unit_interval() -> None:
    """Falling from one, without slope, at zero distance."""
    y = AgnesiTransform().evaluate(R, torch.full_like(R, 2.0))
    assert (torch.diff(y) < 0).all() and (y > 0).all() and (y < 1).all()
    near = torch.tensor([1e-6], dtype=torch.float64)
    assert float(AgnesiTransform().evaluate(near, torch.tensor([2.0]))) == pytest.approx(1.0, abs=1e-12)


def test_soft_transform_levels_off() -> None:
    """As its docstring says: constant at short distances, the distance itself at long ones."""
    transform, total = SoftTransform(alpha=20.0), torch.tensor([2.0], dtype=torch.float64)
    short, long = (torch.tensor([r], dtype=torch.float64) for r in (0.2, 4.0))
    assert float(transform.evaluate(short, total)) == pytest.approx(1.5, abs=1e-9)
    assert float(transform.evaluate(long, total)) == pytest.approx(4.0, abs=1e-9)


# Everything together


@pytest.mark.parametrize("on_basis", [True, False])
def test_embedding_uses_the_radii_of_both_ends(on_basis: bool) -> None:
    embedding = RadialEmbedding(
        "bessel", 4, CUTOFF, PolynomialEnvelope(p=5), AgnesiTransform(), 3, envelope_on_basis=on_basis
    )
    radii = [0.31, 0.76, 1.41]
    embedding.radii.copy_(torch.tensor(radii, dtype=torch.float64))
    r = torch.tensor([1.0, 2.2, 4.9, 5.3], dtype=torch.float64)
    centers, neighbors = torch.tensor([0, 1, 2, 0]), torch.tensor([2, 1, 0, 1])
    basis, envelope = embedding(r, centers, neighbors)
    for k, (i, j) in enumerate(zip(centers.tolist(), neighbors.tolist(), strict=True)):
        y = agnesi(float(r[k]), radii[i] + radii[j], 0.9183, 4.5791, 1.0805)
        waves = np.array(
            [math.sqrt(2 / CUTOFF) * math.sin(n * math.pi * y / CUTOFF) / y for n in range(1, 5)]
        )
        # The envelope is one of the plain distance.
        factor = float(PolynomialEnvelope(p=5).evaluate(r[k], CUTOFF))
        assert (factor == 0) == (k == 3)
        np.testing.assert_allclose(basis[k], waves * (factor if on_basis else 1), rtol=1e-12, atol=1e-15)
        if envelope is not None:
            assert float(envelope[k, 0]) == factor
    assert (envelope is None) == on_basis


# Repulsion


def zbl(r: float, z_i: float, z_j: float, reach: float, options: ZBLOptions) -> float:
    """Energy of a pair in eV (Ziegler, Biersack, Littmark 1985), times the DimeNet polynomial."""
    length = options.a_prefactor * 0.529 / (z_i**options.a_exponent + z_j**options.a_exponent)
    decays = (3.2, 0.9423, 0.4028, 0.2016)
    phi = sum(c * math.exp(-d * r / length) for c, d in zip(options.coefficients, decays, strict=True))
    p, x = options.p, r / reach
    envelope = 1 - (p + 1) * (p + 2) / 2 * x**p + p * (p + 2) * x ** (p + 1) - p * (p + 1) / 2 * x ** (p + 2)
    return 14.3996 * z_i * z_j / r * phi * (envelope if x < 1 else 0.0)


@pytest.mark.parametrize(
    "options", [ZBLOptions(), ZBLOptions(coefficients=(0.2, 0.5, 0.25, 0.05), a_exponent=0.23, p=5)]
)
def test_repulsion_of_pairs(options: ZBLOptions) -> None:
    """Each atom gets half of each of its pairs; forces are the slope of the energy."""
    charges, radii = [1.0, 8.0, 14.0], [0.31, 0.66, 1.11]
    model = ZBLRepulsion(options, 3)
    model.charges.copy_(torch.tensor(charges, dtype=torch.float64))
    model.radii.copy_(torch.tensor(radii, dtype=torch.float64))
    species = torch.tensor([2, 0, 1])
    centers, neighbors = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([1, 2, 0, 2, 0, 1])
    distance = {(0, 1): 0.9, (0, 2): 1.2, (1, 2): 1.5}  # the last one is beyond the reach
    r = torch.tensor(
        [distance[min(i, j), max(i, j)] for i, j in zip(centers.tolist(), neighbors.tolist(), strict=True)],
        dtype=torch.float64,
    )
    expected, slope = np.zeros(3), {}
    for (i, j), d in distance.items():
        a, b = int(species[i]), int(species[j])

        def pair(x: float, a: int = a, b: int = b) -> float:
            return zbl(x, charges[a], charges[b], radii[a] + radii[b], options)

        expected[[i, j]] += pair(d) / 2
        slope[i, j] = (pair(d + 1e-5) - pair(d - 1e-5)) / 2e-5
    found = model(r, species, centers, neighbors)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert expected.min() > 0.1
    gradient = derivative(lambda x: model(x, species, centers, neighbors), r)
    for k, (i, j) in enumerate(zip(centers.tolist(), neighbors.tolist(), strict=True)):
        assert float(gradient[k]) * 2 == pytest.approx(slope[min(i, j), max(i, j)], rel=1e-5, abs=1e-9)


def test_repulsion_tends_to_coulomb_and_ends_smoothly() -> None:
    model = ZBLRepulsion(ZBLOptions(), 1)
    model.charges.fill_(6.0)
    model.radii.fill_(0.76)
    species, one, other = torch.tensor([0, 0]), torch.tensor([0]), torch.tensor([1])

    def energy(r: float) -> float:
        pair = torch.tensor([r], dtype=torch.float64)
        return 2 * float(model(pair, species, one, other)[0])

    # The screening coefficients sum to 0.99997.
    assert energy(1e-7) * 1e-7 == pytest.approx(14.3996 * 36, rel=1e-4)
    assert energy(1.52) == energy(2.0) == 0
    assert 0 < energy(1.52 - 1e-3) < 1e-6
