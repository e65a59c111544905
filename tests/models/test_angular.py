"""Spherical harmonics and coupling tensors against e3nn 0.5.1 and closed forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from compactmlip.models.angular import SphericalHarmonics, wigner_3j
from compactmlip.models.linear import SILU_GAIN

REFERENCE = np.load(Path(__file__).parents[1] / "reference" / "e3nn.npz")


def test_coupling_tensors_are_those_of_e3nn() -> None:
    names = [name for name in REFERENCE if name.startswith("w3j_")]
    assert len(names) > 60
    for name in names:
        orders = [int(c) for c in name.split("_")[1:]]
        np.testing.assert_allclose(wigner_3j(*orders), REFERENCE[name], atol=1e-14, err_msg=name)


def test_coupling_outside_the_triangle_is_refused() -> None:
    with pytest.raises(ValueError, match="do not couple"):
        wigner_3j(1, 1, 3)


def test_harmonics_are_those_of_e3nn() -> None:
    vectors = torch.tensor(REFERENCE["vectors"], dtype=torch.float64)
    found = SphericalHarmonics(4)(vectors, vectors.norm(dim=-1))
    np.testing.assert_allclose(found, REFERENCE["spherical_harmonics"], atol=1e-12)


def test_solid_harmonics_scale_with_the_distance() -> None:
    vectors = torch.tensor(REFERENCE["vectors"], dtype=torch.float64)
    lengths = vectors.norm(dim=-1)
    unit, solid = SphericalHarmonics(3)(vectors, lengths), SphericalHarmonics(3, solid=True)(vectors, lengths)
    powers = torch.cat([lengths[:, None].pow(l).expand(-1, 2 * l + 1) for l in range(4)], dim=1)
    torch.testing.assert_close(solid, unit * powers, rtol=1e-12, atol=1e-12)


def test_harmonics_are_orthogonal_and_normalised() -> None:
    """Exact quadrature on the sphere: Gauss-Legendre in the polar angle, uniform in the azimuth."""
    nodes, weights = np.polynomial.legendre.leggauss(8)
    phi = np.arange(16) * 2 * np.pi / 16
    z, angle = np.meshgrid(nodes, phi, indexing="ij")
    rho = np.sqrt(1 - z**2)
    points = torch.tensor(np.stack([rho * np.cos(angle), rho * np.sin(angle), z], -1).reshape(-1, 3))
    weight = torch.tensor(np.repeat(weights / 2 / 16, 16))
    values = SphericalHarmonics(3)(points, points.norm(dim=-1))
    gram = values.T @ (weight[:, None] * values)
    torch.testing.assert_close(gram, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-13)


def test_coupling_commutes_with_rotation() -> None:
    rotation = torch.tensor(Rotation.random(rng=np.random.default_rng(3)).as_matrix())
    vectors = torch.tensor(np.random.default_rng(4).normal(size=(2, 3)))
    harmonics = SphericalHarmonics(2)
    before, after = (harmonics(v, v.norm(dim=-1)) for v in (vectors, vectors @ rotation.T))
    coupled = [
        np.einsum("a,b,abc->c", y[0, 1:4].numpy(), y[1, 4:9].numpy(), wigner_3j(1, 2, 1))
        for y in (before, after)
    ]
    np.testing.assert_allclose(rotation.numpy() @ coupled[0], coupled[1], atol=1e-12)


def test_second_derivative_along_the_axes_is_finite() -> None:
    vectors = torch.eye(3, dtype=torch.float64, requires_grad=True)
    total = SphericalHarmonics(3)(vectors, vectors.norm(dim=-1)).pow(3).sum()
    (gradient,) = torch.autograd.grad(total, vectors, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), vectors)
    assert torch.isfinite(second).all()


def test_gain_of_silu() -> None:
    assert float(REFERENCE["normalize2mom_silu"]) == pytest.approx(SILU_GAIN, rel=1e-14)
