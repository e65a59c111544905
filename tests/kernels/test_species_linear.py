"""Each atom's features times the matrix of its species, against gathered matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.usefixtures("kernels")


def arguments(num_atoms: int, num_species: int, present: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(num_atoms + present)
    x = torch.randn(num_atoms, 3, 5, generator=generator, dtype=torch.float64).to(dtype)
    weights = torch.randn(num_species, 5, 4, generator=generator, dtype=torch.float64).to(dtype)
    species = torch.randint(num_species - present, num_species, (num_atoms,), generator=generator)
    return x, weights, species


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    ("num_atoms", "num_species", "present"), [(0, 2, 1), (1, 1, 1), (9, 4, 1), (40, 7, 3)]
)
def test_values_and_gradient(
    num_atoms: int, num_species: int, present: int, dtype: torch.dtype, tolerance: float
) -> None:
    x, weights, species = arguments(num_atoms, num_species, present, dtype)
    found = []
    for apply in (
        lambda x: torch.ops.compactmlip.species_linear(x, weights, species),
        lambda x: torch.bmm(x, weights[species]),
    ):
        leaf = x.clone().requires_grad_()
        out = apply(leaf)
        (gradient,) = torch.autograd.grad((out**2).sum(), leaf)
        found.append((out.detach(), gradient))
    for a, b in zip(*found, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_gradcheck() -> None:
    x, weights, species = arguments(6, 3, 3, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: torch.ops.compactmlip.species_linear(x, weights, species), x.requires_grad_()
    )


def test_bad_arguments() -> None:
    x, weights, species = arguments(6, 3, 3, torch.float64)
    with pytest.raises(IndexError, match="atom 0 has species 3"):
        torch.ops.compactmlip.species_linear(x, weights, torch.full((6,), 3))
    with pytest.raises(ValueError, match="must fit"):
        torch.ops.compactmlip.species_linear(x, weights.float(), species)
    with pytest.raises(ValueError, match="6 int64"):
        torch.ops.compactmlip.species_linear(x, weights, species[:5])
    trained = weights.clone().requires_grad_()
    out = torch.ops.compactmlip.species_linear(x.requires_grad_(), trained, species)
    with pytest.raises(RuntimeError, match="no gradient with respect to its weights"):
        out.sum().backward()
