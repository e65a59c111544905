"""Hessian products: against springs and finite differences of forces; models that have no derivative."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from mace_models import make_model as make_mace, make_spec as make_mace_spec
from springs import RANGE, SPRING, Springs
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from compactmlip.data import hessian, label as labelling
from compactmlip.data.graph import build_graph, collate, energy_and_derivatives, neighbor_list
from compactmlip.data.hessian import DIRECTIONS, PRODUCTS, best_method, random_directions
from compactmlip.data.label import label
from compactmlip.errors import CompactMLIPError, InputError


def directions_of(atoms: Atoms, count: int, seed: int = 0) -> Tensor:
    return torch.as_tensor(random_directions(len(atoms), count, [seed]))


def by_positions(model: nn.Module, atoms: Atoms, directions: np.ndarray, step: float = 1e-4) -> np.ndarray:
    """(N, K, 3) central differences of forces of moved atoms, each with its own neighbour list."""
    out = []
    for k in range(directions.shape[1]):
        ends = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions += sign * step * directions[:, k]
            ends.append(energy_and_derivatives(model, build_graph(moved, model.spec)).forces.numpy())
        out.append((ends[1] - ends[0]) / (2 * step))
    return np.stack(out, axis=1)


def test_directions_are_signs_that_the_seed_determines() -> None:
    found = random_directions(50, 4, [3])
    assert found.shape == (50, 4, 3) and set(np.unique(found)) == {-1.0, 1.0}
    assert abs(found.mean()) < 0.15
    assert np.array_equal(found, random_directions(50, 4, [3]))
    assert not np.array_equal(found, random_directions(50, 4, [4]))


def test_springs_have_their_force_constants(make_spec: Callable[..., Any]) -> None:
    """At rest the Hessian is a sum of k n n^T over bonds."""
    model = Springs(make_spec(num_layers=1, cutoff=RANGE))
    atoms = bulk("MgO", "rocksalt", a=4.21, cubic=True)
    expected = np.zeros((8, 3, 8, 3))
    for i, j, vector in zip(*(neighbor_list(atoms, RANGE)[n] for n in (0, 1, 3)), strict=True):
        unit = vector / np.linalg.norm(vector)
        expected[i, :, i] += SPRING * np.outer(unit, unit)
        expected[i, :, j] -= SPRING * np.outer(unit, unit)
    every = torch.eye(24, dtype=torch.float64).reshape(8, 3, 24).transpose(1, 2)
    graph = build_graph(atoms, model.spec)
    for method in (hessian.by_derivative, hessian.by_differences):
        found = method(model, graph, every).permute(0, 2, 1).reshape(8, 3, 8, 3)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("family", ["nequip", "mace"])
def test_products_are_derivatives_of_forces(
    small_model: nn.Module, structures: dict[str, Atoms], family: str
) -> None:
    """A batch of unlike structures, among them one without neighbours and a cell below the cutoff."""
    model = small_model if family == "nequip" else make_mace(make_mace_spec())
    atoms = list(structures.values())
    directions = [directions_of(a, 2, seed=k) for k, a in enumerate(atoms)]
    batch = collate([build_graph(a, model.spec) for a in atoms])
    found = hessian.by_derivative(model, batch, torch.cat(directions))
    expected = [by_positions(model, a, d.numpy()) for a, d in zip(atoms, directions, strict=True)]
    largest = np.abs(np.concatenate(expected)).max()
    assert largest > 0.1
    np.testing.assert_allclose(found.numpy(), np.concatenate(expected), rtol=1e-4, atol=1e-5 * largest)
    differences = hessian.by_differences(model, batch, torch.cat(directions))
    np.testing.assert_allclose(found.numpy(), differences.numpy(), rtol=1e-4, atol=1e-5 * largest)


class _Square(torch.autograd.Function):
    """x^2 that can be differentiated once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient * ctx.saved_tensors[0]


class _Silent(torch.autograd.Function):
    """x^2 whose derivative seems to be a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = 2 * x.detach()
        return x**2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.slope


class Quadratic(nn.Module):
    """Half the sum of squared edge vectors, by a given square: H = 4 (n - sum over neighbours)."""

    def __init__(self, spec: Any, square: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.spec, self.square = spec, square
        self.unused = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, species: Tensor, centers: Tensor, neighbors: Tensor, vectors: Tensor) -> Tensor:
        energies = torch.zeros(len(species), dtype=torch.float64)
        return energies.index_add(0, centers, self.square.apply(vectors).sum(dim=1))


@pytest.mark.parametrize("square", [_Square, _Silent])
def test_differences_where_forces_have_no_derivative(
    make_spec: Callable[..., Any], square: type[torch.autograd.Function]
) -> None:
    model = Quadratic(make_spec(cutoff=2.5), square)
    atoms = bulk("MgO", "rocksalt", a=4.21, cubic=True)
    moved = directions_of(atoms, 2)
    i, j, _, _ = neighbor_list(atoms, 2.5)
    expected = torch.zeros_like(moved).index_add(0, torch.as_tensor(i), 4 * (moved[i] - moved[j]))
    found = best_method(model, atoms)(build_graph(atoms, model.spec), moved)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_derivative_is_used_where_it_is_right(
    small_model: nn.Module, structures: dict[str, Atoms], monkeypatch: pytest.MonkeyPatch
) -> None:
    atoms = structures["crystal"]
    method = best_method(small_model, atoms)
    monkeypatch.setattr(hessian, "by_differences", None)
    method(build_graph(atoms, small_model.spec), directions_of(atoms, 1))


@pytest.fixture
def tiny_model(make_spec: Callable[..., Any], make_model: Callable[..., nn.Module]) -> nn.Module:
    return make_model(make_spec(channels=(4, 2), num_layers=1, lmax_edge=1))


def test_labels_are_written_and_survive_an_interruption(
    tiny_model: nn.Module,
    structures: dict[str, Atoms],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frames = [a for k in range(2) for a in structures.values()]
    whole = label(frames, tiny_model, tmp_path / "whole.xyz", hessian=2, max_edges=300, progress=False)
    for atoms in whole:
        shape = (len(atoms), 2, 3)
        directions = atoms.arrays[DIRECTIONS].reshape(shape)
        expected = by_positions(tiny_model, atoms, directions)
        np.testing.assert_allclose(atoms.arrays[PRODUCTS].reshape(shape), expected, rtol=1e-4, atol=1e-6)
    assert not np.array_equal(whole[0].arrays[DIRECTIONS], whole[5].arrays[DIRECTIONS])

    evaluate, count = labelling.evaluate_hessian, 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        for k, found in enumerate(evaluate(*args, **kwargs)):
            if k == 2:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(labelling, "evaluate_hessian", interrupted)
    with pytest.raises(KeyboardInterrupt):
        label(frames, tiny_model, tmp_path / "parts.xyz", hessian=2, max_edges=300, progress=False)

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        for indices, found in evaluate(*args, **kwargs):
            count += len(indices)
            yield indices, found

    monkeypatch.setattr(labelling, "evaluate_hessian", counted)
    again = label(frames, tiny_model, tmp_path / "parts.xyz", hessian=2, max_edges=300, progress=False)
    assert 0 < count < len(frames)
    for a, b in zip(again, whole, strict=True):
        assert np.array_equal(a.arrays[DIRECTIONS], b.arrays[DIRECTIONS])
        np.testing.assert_allclose(a.arrays[PRODUCTS], b.arrays[PRODUCTS], rtol=0, atol=1e-10)


def test_other_numbers_of_directions_are_another_run(
    tiny_model: nn.Module, structures: dict[str, Atoms], tmp_path: Path
) -> None:
    frames, path = [structures["crystal"]], tmp_path / "out.xyz"
    label(frames, tiny_model, path, progress=False)
    with pytest.raises(InputError, match="another number of Hessian products"):
        label(frames, tiny_model, path, hessian=1, progress=False)
    with pytest.raises(InputError, match="-1 directions"):
        label(frames, tiny_model, path, hessian=-1, progress=False)


def test_products_join_labels_of_another_level_of_theory(
    tiny_model: nn.Module, structures: dict[str, Atoms], tmp_path: Path
) -> None:
    atoms = structures["crystal"].copy()
    atoms.info["REF_energy"] = -7.25
    atoms.new_array("REF_forces", np.full((8, 3), 0.125))
    path = tmp_path / "out.xyz"
    (found,) = label([atoms], tiny_model, path, hessian=1, keep_labels=True, progress=False)
    assert found.info["REF_energy"] == -7.25 and (found.arrays["REF_forces"] == 0.125).all()
    assert "REF_energies" not in found.arrays
    expected = by_positions(tiny_model, atoms, found.arrays[DIRECTIONS][:, None])
    np.testing.assert_allclose(found.arrays[PRODUCTS][:, None], expected, rtol=1e-4, atol=1e-6)
    atoms.info["REF_energy"] = -7.5
    with pytest.raises(InputError, match="exists and holds other"):
        label([atoms], tiny_model, path, hessian=1, keep_labels=True, progress=False)
    with pytest.raises(InputError, match="nothing to do without Hessian"):
        label([atoms], tiny_model, path, keep_labels=True, progress=False)


def test_model_that_is_broken_is_reported(
    tiny_model: nn.Module, structures: dict[str, Atoms], tmp_path: Path
) -> None:
    with torch.no_grad():
        tiny_model.readout.weight.fill_(float("nan"))
    with pytest.raises(CompactMLIPError, match="not finite"):
        label([structures["crystal"]], tiny_model, tmp_path / "out.xyz", hessian=1, progress=False)
