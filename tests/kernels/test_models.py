"""Whole models and deployed files with compiled operators, against the same in plain PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contract
import mace_models
import numpy as np
import pytest
import torch
from ase import Atoms
from torch import Tensor, nn

from compactmlip.data.graph import GraphBatch, build_graph, collate, energy_and_derivatives
from compactmlip.deploy.archive import DEPLOYED_VERSION, inspect, load_deployed
from compactmlip.deploy.ase import CompactMLIPCalculator
from compactmlip.deploy.compile import compile_model
from compactmlip.errors import InputError, KernelError
from compactmlip.info import describe
from compactmlip.kernels import build as building
from compactmlip.kernels.build import without_kernels

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.fixture(params=["nequip", "mace"])
def model(request: pytest.FixtureRequest, make_model: Any, make_spec: Any) -> nn.Module:
    if request.param == "mace":
        made = mace_models.make_model(mace_models.make_spec())
        return made
    made = make_model(make_spec())
    return made


def force_loss(model: nn.Module, batch: GraphBatch) -> dict[str, Tensor]:
    """Energies, forces, stresses and the gradient of a loss on energies and forces."""
    model.zero_grad()
    found = energy_and_derivatives(model, batch, create_graph=True)
    stresses = found.stresses[found.stresses.isfinite().all(dim=(1, 2))]
    loss = (found.forces**2).mean() + (found.energies**2).mean()
    loss.backward()
    values = {"energies": found.node_energies, "forces": found.forces, "stresses": stresses}
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {k: v.detach() for k, v in (values | gradients).items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys() and len(found) > 20
    for name, value in expected.items():
        largest = float(value.abs().max())
        # Gradients that cancel to nothing have no digits of their own.
        floor = max(largest, 1e-3 * float(expected["forces"].abs().max()))
        assert float((found[name] - value).abs().max()) <= tolerance * floor, name


def test_training_step(model: nn.Module, structures: dict[str, Atoms]) -> None:
    batch = collate([build_graph(a, model.spec) for a in structures.values()])
    found = force_loss(model, batch)
    with without_kernels():
        assert_equal(found, force_loss(model, batch), 1e-10)
    again = force_loss(model, batch)
    assert all(torch.equal(found[k], again[k]) for k in found)


def test_each_structure(model: nn.Module, structure: Atoms) -> None:
    found = contract.evaluate(model, structure)
    with without_kernels():
        expected = contract.evaluate(model, structure)
    for name in ("node_energies", "forces"):
        a, b = getattr(found, name), getattr(expected, name)
        assert float((a - b).abs().max()) <= 1e-11 * max(1.0, float(b.abs().max()))


def test_unsorted_edges(model: nn.Module, structures: dict[str, Atoms]) -> None:
    graph = build_graph(structures["crystal"], model.spec)
    order = torch.randperm(len(graph.centers), generator=torch.Generator().manual_seed(0))
    mixed = (graph.species, graph.centers[order], graph.neighbors[order], graph.vectors[order])
    expected = model(graph.species, graph.centers, graph.neighbors, graph.vectors)
    assert torch.allclose(model(*mixed), expected, rtol=1e-12, atol=1e-12)


@pytest.fixture
def deployed_with_kernels(model: nn.Module, tmp_path: Path) -> Path:
    return compile_model(model, tmp_path / "kernels.pt", dtype="float64", backend="kernels").path


def test_deployed_file(
    model: nn.Module, deployed_with_kernels: Path, structure: Atoms, tmp_path: Path
) -> None:
    plain = compile_model(model, tmp_path / "plain.pt", dtype="float64").path
    operators = [str(load_deployed(p)[0].inlined_graph) for p in (plain, deployed_with_kernels)]
    assert ["compactmlip::" in text for text in operators] == [False, True]
    deployments = [inspect(p)[1] for p in (plain, deployed_with_kernels)]
    assert [d.backend for d in deployments] == ["torch", "kernels"]
    assert [d.format_version for d in deployments] == [DEPLOYED_VERSION] * 2
    assert "needs compiled kernels" in describe(deployed_with_kernels)["file"]
    forces = []
    for path in (plain, deployed_with_kernels):
        atoms = structure.copy()
        atoms.calc = CompactMLIPCalculator(path)
        forces.append(atoms.get_forces())
    # Radial networks are tables now; tests/deploy/test_lower.py compares lowered models on fine ones.
    tables = deployments[1].tables
    assert tables is not None and tables.force_bound == 1e-5
    assert np.abs(forces[0] - forces[1]).max() <= tables.force_bound


RUN = """
import sys, torch
from ase import Atoms
from compactmlip.deploy.ase import CompactMLIPCalculator
from compactmlip.errors import CompactMLIPError
atoms = Atoms("MgO", [[0, 0, 0], [0, 0.5, 2]])
try:
    atoms.calc = CompactMLIPCalculator(sys.argv[1])
    print(repr(atoms.get_potential_energy()), "compactmlip.models" in sys.modules)
except CompactMLIPError as error:
    print(type(error).__name__, error)
"""


def run(path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", RUN, str(path)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


def test_deployed_file_loads_the_library_itself(
    make_model: Callable[..., nn.Module], make_spec: Any, tmp_path: Path
) -> None:
    model = make_model(make_spec(channels=(4, 3), num_layers=2, lmax_edge=1))
    path = compile_model(model, tmp_path / "k.pt", dtype="float64", backend="kernels").path
    atoms = Atoms("MgO", [[0, 0, 0], [0, 0.5, 2]])
    atoms.calc = CompactMLIPCalculator(path)
    expected = f"{atoms.get_potential_energy()!r} False"
    for mode in ("auto", "off"):  # off is for models in memory: this file has no other operators
        done = run(path, COMPACTMLIP_KERNELS=mode)
        assert done.stdout.strip() == expected and not done.stderr, done.stderr
    done = run(path, XDG_CACHE_HOME=str(tmp_path / "empty"), CXX="no-such-compiler")
    assert done.stdout.startswith("KernelError") and not done.stderr, done.stderr
    for word in (str(path), "--backend kernels", "no-such-compiler", "--backend torch"):
        assert word in done.stdout
    with pytest.raises(InputError, match="on the CPU only, not on 'meta'"):
        load_deployed(path, "meta")


def test_kernels_are_wanted_but_switched_off(
    small_model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "_loaded", False)
    monkeypatch.setenv("COMPACTMLIP_KERNELS", "off")
    with pytest.raises(KernelError, match="COMPACTMLIP_KERNELS is 'off'"):
        compile_model(small_model, tmp_path / "m.pt", backend="kernels")
    with pytest.raises(InputError, match="Did you mean 'kernels'"):
        compile_model(small_model, tmp_path / "m.pt", backend="kernel")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
