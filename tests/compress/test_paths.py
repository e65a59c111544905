"""Single paths of the tensor products that a plan cuts, in both families."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import mace_models
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from torch import nn

from compactmlip.compress.compress import compress
from compactmlip.compress.path_importance import path_importance
from compactmlip.compress.plan_file import Plan
from compactmlip.data.graph import build_graph, energy_and_derivatives
from compactmlip.deploy.lower.lower import lower_on_grid
from compactmlip.errors import InputError, UnsupportedFeatureError
from compactmlip.families.mace_uniform import constructor_arguments
from compactmlip.models import channel_graph, model_spec

CUT = ("layers.1.path/0-1-1", "layers.0.path/0-2-2")


@pytest.fixture(params=["nequip", "mace"])
def model(request: Any, make_spec: Callable[..., Any], make_model: Callable[..., nn.Module]) -> nn.Module:
    if request.param == "nequip":
        return make_model(make_spec())
    return mace_models.make_model(mace_models.make_spec(lmax_edge=2, correlation=2), seed=1)


def _atoms(model: nn.Module) -> Atoms:
    atoms = bulk("MgO", "rocksalt", a=4.21, cubic=True)
    atoms.symbols[:] = [model_spec(model).species[k % len(model_spec(model).species)] for k in range(8)]
    atoms.rattle(0.2, seed=1)
    return atoms


def _whole(model: nn.Module, *without: str) -> Plan:
    """Plan that keeps everything but some paths."""
    groups = channel_graph(model_spec(model)).groups
    orders = 1 + max(group.order for group in groups.values())
    layers = model_spec(model).num_message_passing_layers
    target = "+".join(f"99x{l}" for l in range(orders))
    return Plan.uniform(target, layers, edge_order=9, odd_paths=True, without_paths=without)


def test_a_cut_path_is_one_without_weights(model: nn.Module) -> None:
    graph = build_graph(_atoms(model), model_spec(model))
    cut = compress(model, [graph], _whole(model, *CUT), with_compensation=False).model
    silent = copy.deepcopy(model)
    parameters = dict(silent.named_parameters())
    with torch.no_grad():
        for name in CUT:
            for slot in channel_graph(model_spec(model)).groups[name].slots:
                parameters[slot.parameter].narrow(slot.axis, slot.offset, slot.block).zero_()
    found, wanted, before = (energy_and_derivatives(m, graph) for m in (cut, silent, model))
    torch.testing.assert_close(found.energies, wanted.energies, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.forces, wanted.forces, rtol=0, atol=1e-12)
    assert float((before.forces - wanted.forces).abs().max()) > 1e-6
    for name in CUT:
        t, path = int(name.split(".")[1]), [int(l) for l in name.rpartition("/")[2].split("-")]
        assert path in model_spec(model).architecture["layers"][t]["paths"]
        assert path not in model_spec(cut).architecture["layers"][t]["paths"]
    assert list(model_spec(cut).provenance.steps[-1].options["without_paths"]) == sorted(CUT)


def test_it_is_lowered(model: nn.Module, kernels: None) -> None:
    graph = build_graph(_atoms(model), model_spec(model))
    cut = compress(model, [graph], _whole(model, *CUT), with_compensation=False).model
    found, wanted = (energy_and_derivatives(m, graph) for m in (lower_on_grid(cut, 400), cut))
    torch.testing.assert_close(found.forces, wanted.forces, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["layers.1.path/0-9-9", "layers.1.out/1", "0-1-1"])
def test_no_such_path(model: nn.Module, name: str) -> None:
    with pytest.raises(InputError, match=f"no tensor-product path '{name}'.*named like layers"):
        compress(model, [build_graph(_atoms(model), model_spec(model))], _whole(model, name))


def test_a_layer_without_paths(model: nn.Module) -> None:
    groups = channel_graph(model_spec(model)).groups
    every = [name for name in groups if name.startswith("layers.1.path/")]
    with pytest.raises(
        InputError, match="pruning would leave (layer 1 without|nothing of the contraction of layers.1)"
    ):
        compress(model, [build_graph(_atoms(model), model_spec(model))], _whole(model, *every))


def test_mace_torch_has_all_paths() -> None:
    model = mace_models.make_model(mace_models.make_spec(), seed=1)
    graph = build_graph(_atoms(model), model_spec(model))
    cut = compress(model, [graph], _whole(model, CUT[0]), with_compensation=False).model
    with pytest.raises(UnsupportedFeatureError, match="paths of the convolution"):
        constructor_arguments(model_spec(cut), 1.0)


def test_importance_is_the_squared_derivative_by_a_factor(model: nn.Module) -> None:
    graphs = []
    for seed in range(2):
        atoms = _atoms(model)
        atoms.rattle(0.1, seed=seed)
        graphs.append(build_graph(atoms, model_spec(model)))
    found = path_importance(model, graphs)
    assert set(found) == {name for name in channel_graph(model_spec(model)).groups if ".path/" in name}
    parameters = dict(model.named_parameters())
    for name in CUT:
        (slot,) = (s for s in channel_graph(model_spec(model)).groups[name].slots if ".down." in s.parameter)
        energies = []
        for factor in (1 + 1e-4, 1 - 1e-4):
            with torch.no_grad():
                own = parameters[slot.parameter].narrow(slot.axis, slot.offset, slot.block)
                before = own.clone()
                own *= factor
                energies.append([float(energy_and_derivatives(model, g).energies) for g in graphs])
                own.copy_(before)
        slopes = (np.array(energies[0]) - np.array(energies[1])) / 2e-4
        assert found[name] == pytest.approx(float(np.mean(slopes**2)), rel=1e-5)


def test_importance_needs_structures(model: nn.Module) -> None:
    with pytest.raises(InputError, match="at least one"):
        path_importance(model, [])
