"""The NequIP family satisfies the family contract, for every architecture option."""

from __future__ import annotations

import contract
import numpy as np
import pytest
import torch
from ase import Atoms
from torch import nn

PERIODIC = ("crystal", "smaller than the cutoff", "slab")


def test_rotation(model_variant: nn.Module, structure: Atoms, rng: np.random.Generator) -> None:
    contract.check_rotation(model_variant, structure, rng)


def test_inversion_holds_without_odd_paths(make_spec, make_model, structures: dict[str, Atoms]) -> None:
    """SO(3) models may couple l1 + l2 + l3 odd, which changes sign under inversion; without those, O(3)."""
    spec = make_spec()
    layers = spec.architecture["layers"]
    for layer in layers:
        layer["paths"] = [p for p in layer["paths"] if sum(p) % 2 == 0]
    even = make_model(spec.model_copy(update={"architecture": {**spec.architecture, "layers": layers}}))
    atoms = structures["smaller than the cutoff"]
    one = contract.evaluate(even, atoms)
    two = contract.evaluate(even, contract.transformed(atoms, -np.eye(3)))
    torch.testing.assert_close(one.energies, two.energies, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.forces, -two.forces, rtol=0, atol=1e-12)


def test_translation_and_wrapping(model_variant: nn.Module, structure: Atoms) -> None:
    contract.check_translation_and_wrapping(model_variant, structure)


def test_permutation(model_variant: nn.Module, structure: Atoms, rng: np.random.Generator) -> None:
    contract.check_permutation(model_variant, structure, rng)


def test_extensivity(model_variant: nn.Module, structure: Atoms) -> None:
    contract.check_extensivity(model_variant, structure)


def test_forces(model_variant: nn.Module, structure: Atoms, rng: np.random.Generator) -> None:
    contract.check_forces(model_variant, structure, rng)


@pytest.mark.parametrize("name", PERIODIC)
def test_stress(
    model_variant: nn.Module, structures: dict[str, Atoms], name: str, rng: np.random.Generator
) -> None:
    contract.check_stress(model_variant, structures[name], rng)


def test_smooth_at_cutoff(model_variant: nn.Module) -> None:
    contract.check_smooth_at_cutoff(model_variant, "MgO")


def test_empty_plan_is_identity(model_variant: nn.Module, structure: Atoms) -> None:
    contract.check_empty_plan(model_variant, structure)


@pytest.mark.parametrize("seed", range(4))
def test_masked_equals_pruned(model_variant: nn.Module, structures: dict[str, Atoms], seed: int) -> None:
    contract.check_masked_equals_pruned(model_variant, list(structures.values()), np.random.default_rng(seed))


def test_whole_orders_cut(model_variant: nn.Module, structures: dict[str, Atoms]) -> None:
    contract.check_whole_orders_cut(model_variant, [structures["crystal"], structures["molecule"]])


def test_species_removal_is_exact(model_variant: nn.Module, structure: Atoms) -> None:
    contract.check_species_removal(model_variant, structure)


def test_second_derivatives(model_variant: nn.Module, structures: dict[str, Atoms]) -> None:
    """Training differentiates forces; check that against finite differences of parameters."""
    from compactmlip.data.graph import build_graph, energy_and_derivatives

    batch = build_graph(structures["molecule"], model_variant.spec, torch.float64)
    weight = model_variant.get_parameter("layers.1.up.orders.1.weight")

    def loss() -> torch.Tensor:
        return energy_and_derivatives(model_variant, batch, create_graph=True).forces.square().sum()

    (gradient,) = torch.autograd.grad(loss(), weight)
    step, direction = (
        1e-5,
        torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    )
    with torch.no_grad():
        weight += step * direction
    up = loss().detach()
    with torch.no_grad():
        weight -= 2 * step * direction
    down = loss().detach()
    expected = (up - down) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-6, atol=1e-9)
