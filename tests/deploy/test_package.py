"""Files with machine code: same numbers as the model for any size, refusal where they cannot run."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mace_models
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from torch import Tensor, nn

from compactmlip.data.graph import Derivatives, build_graph, collate, energy_and_derivatives
from compactmlip.deploy.aoti import compile_package
from compactmlip.deploy.archive import ENTRY, inspect, load_deployed
from compactmlip.deploy.ase import CompactMLIPCalculator
from compactmlip.deploy.compile import compile_model
from compactmlip.deploy.engine import load_engine
from compactmlip.deploy.package import this_machine
from compactmlip.errors import CheckpointError, InputError, KernelError, UnsupportedFeatureError
from compactmlip.info import describe
from compactmlip.models.linear import MANY_SPECIES, EquivariantLinear


def assert_equal(found: Derivatives, expected: Derivatives, tolerance: float) -> None:
    for name in ("energies", "node_energies", "forces", "stresses"):
        a, b = getattr(found, name).double(), getattr(expected, name)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def sizes() -> list[Atoms]:
    """From one atom without neighbours to more atoms than any example has."""
    crystal = bulk("MgO", "rocksalt", a=4.21, cubic=True)
    crystal.rattle(0.1, seed=0)
    chain = Atoms("O" * 5, np.arange(5)[:, None] * [30.0, 0, 0])
    return [
        Atoms("O"),
        Atoms("Mg"),
        Atoms("MgO", [[0, 0, 0], [0, 0, 1.9]]),
        Atoms("OMgO", [[0, 0, 0], [0, 0, 1.9], [50, 0, 0]]),
        chain,
        Atoms("Mg", cell=[3.9, 9, 9], pbc=True),  # two edges, of an atom with itself
        bulk("MgO", "rocksalt", a=4.21),
        crystal,
        crystal * (2, 2, 3),
    ]


def test_any_number_of_atoms_and_edges(packaged: Path, tiny_model: nn.Module) -> None:
    engine = load_engine(packaged)
    graphs = [build_graph(atoms, engine.spec) for atoms in sizes()]
    assert {(len(g.species), len(g.centers)) for g in graphs} >= {(1, 0), (5, 0), (2, 2), (1, 2)}
    for graph in [*graphs, collate(graphs)]:
        expected = energy_and_derivatives(tiny_model, graph)
        assert_equal(engine.evaluate(graph), expected, 1e-12 * max(1.0, float(expected.forces.abs().max())))
    assert max(float(energy_and_derivatives(tiny_model, g).forces.abs().max()) for g in graphs) > 0.05


def test_calculator(packaged: Path, tiny_model: nn.Module) -> None:
    crystal = sizes()[-2]
    results = []
    for model in (packaged, tiny_model):
        crystal.calc = CompactMLIPCalculator(model)
        results.append((crystal.get_potential_energy(), crystal.get_forces(), crystal.get_stress()))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)
    crystal.calc = CompactMLIPCalculator(packaged)
    with torch.inference_mode():
        assert crystal.get_potential_energy() == pytest.approx(results[0][0], abs=1e-11)
    again = pickle.loads(pickle.dumps(crystal.calc))
    assert again.get_potential_energy(crystal) == crystal.get_potential_energy()


def test_description(packaged: Path) -> None:
    spec, deployment = inspect(packaged)
    assert (deployment.backend, deployment.precision, spec.dtype) == ("aoti", "float64", "float64")
    assert deployment.torch_version == str(torch.__version__)
    assert deployment.binary == this_machine()
    assert deployment.self_check.num_structures == 6 and deployment.self_check.force_error < 1e-12
    assert "machine code for torch" in describe(packaged)["file"]
    with pytest.raises(CheckpointError, match="no TorchScript module"):
        load_deployed(packaged)


def test_needs_neither_model_code_nor_compiler(packaged: Path) -> None:
    code = f"""
import sys
from ase import Atoms
from compactmlip.deploy.ase import CompactMLIPCalculator
atoms = Atoms("MgO", [[0, 0, 0], [0, 0, 1.9]])
atoms.calc = CompactMLIPCalculator({str(packaged)!r})
assert abs(atoms.get_forces()).max() > 1e-4
for part in ("compactmlip.models", "compactmlip.checkpoint", "torch._inductor.compile_fx"):
    assert part not in sys.modules, part
"""
    environment = os.environ | {"CXX": "no-such-compiler", "COMPACTMLIP_KERNELS": "off"}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0 and not done.stderr, done.stderr


def rewritten(path: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for item in old.infolist():
            content = old.read(item)
            if item.filename.endswith(ENTRY):
                data = json.loads(content)
                change(data["deployed"])
                content = json.dumps(data).encode()
            new.writestr(item, content)
    return target


def test_rewritten_copy_loads(packaged: Path, tmp_path: Path) -> None:
    """The control of the test below."""
    engine = load_engine(rewritten(packaged, tmp_path / "m.pt2", lambda d: None))
    assert engine.evaluate(build_graph(Atoms("O"), engine.spec)).forces.shape == (1, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(torch_version="1.0.0"), "made with torch 1.0.0"),
        (lambda d: d["binary"].update(machine="riscv64"), "machine code for riscv64"),
        (lambda d: d["binary"]["instruction_sets"].append("avx9000"), r"this one lacks \(avx9000\)"),
        (lambda d: d.update(binary=None), "for which processor"),
    ],
)
def test_code_for_another_machine(
    packaged: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = rewritten(packaged, tmp_path / "m.pt2", change)
    with pytest.raises(CheckpointError, match=message) as refused:
        CompactMLIPCalculator(path)
    assert "-o m.pt2 --backend aoti --dtype float64" in str(refused.value)


def test_damaged_files(packaged: Path, tmp_path: Path) -> None:
    content = packaged.read_bytes()
    short, flipped = tmp_path / "short.pt2", tmp_path / "flipped.pt2"
    short.write_bytes(content[: len(content) // 2])
    middle = len(content) // 2
    flipped.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])
    for path, message in ((short, "truncated or damaged"), (flipped, "damaged at")):
        with pytest.raises(CheckpointError, match=message):
            CompactMLIPCalculator(path)
    bare = tmp_path / "bare.pt2"
    with zipfile.ZipFile(packaged) as old, zipfile.ZipFile(bare, "w") as new:
        for item in old.infolist():
            if not item.filename.endswith(ENTRY):
                new.writestr(item, old.read(item))
    with pytest.raises(CheckpointError, match="an AOTInductor package, but not made by"):
        CompactMLIPCalculator(bare)


def test_other_device(packaged: Path) -> None:
    with pytest.raises(InputError, match="for the CPU, and cannot run on 'meta'"):
        load_engine(packaged, "meta")


def test_unusable_options(tiny_model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"--backend aoti is saved as \*\.pt2"):
        compile_model(tiny_model, tmp_path / "m.pt", backend="aoti")
    with pytest.raises(CheckpointError, match=r"--backend torch is saved as \*\.pt;"):
        compile_model(tiny_model, tmp_path / "m.pt2")
    with pytest.raises(InputError, match="Did you mean 'aoti'"):
        compile_model(tiny_model, tmp_path / "m.pt2", backend="aot")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_no_compiler(tiny_model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(KernelError, match=r"no-such-compiler.*--backend torch"):
        compile_model(tiny_model, tmp_path / "m.pt2", backend="aoti")
    assert not list(tmp_path.iterdir())


class DependsOnData(nn.Module):
    """What cannot be exported: the number of steps is in the data."""

    def forward(self, species: Tensor, centers: Tensor, neighbors: Tensor, vectors: Tensor) -> Tensor:
        return vectors.sum() * torch.ones(int(species.sum()), dtype=vectors.dtype)


def test_what_cannot_be_exported(tiny_model: nn.Module) -> None:
    graph = build_graph(sizes()[-2], tiny_model.spec)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedFeatureError, match=r"cannot be exported.*--backend torch"):
        compile_package(DependsOnData(), graph)


@pytest.mark.parametrize("num_species", [3, MANY_SPECIES + 1])
def test_weights_per_species_of_static_shape(num_species: int, rng: np.random.Generator) -> None:
    torch.manual_seed(0)
    linear = EquivariantLinear((4, 3), (5, 2), num_species=num_species)
    x = [torch.randn(11, 1, 4).double(), torch.randn(11, 3, 3).double()]
    species = torch.tensor(rng.integers(0, num_species, 11))
    expected = linear(x, species)
    linear.static_shapes = True
    for a, b in zip(linear(x, species), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    assert expected[0] is not None and float(expected[0].detach().abs().max()) > 0.1


# Every option of both families, in float32: two minutes each.


@pytest.mark.slow
@pytest.mark.parametrize("variant", list(mace_models.VARIANTS))
def test_mace(variant: str, structures: dict[str, Atoms], tmp_path: Path) -> None:
    model = mace_models.make_model(mace_models.make_spec(**mace_models.VARIANTS[variant]))
    assert_compiles(model, structures, tmp_path, "float32")


@pytest.mark.slow
def test_nequip(model_variant: nn.Module, structures: dict[str, Atoms], tmp_path: Path) -> None:
    assert_compiles(model_variant, structures, tmp_path, "float64")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["mixed", "bf16"])
def test_precisions(
    precision: str, small_model: nn.Module, structures: dict[str, Atoms], tmp_path: Path
) -> None:
    assert_compiles(small_model, structures, tmp_path, precision)


def assert_compiles(model: nn.Module, structures: dict[str, Atoms], folder: Path, precision: Any) -> None:
    path = compile_model(model, folder / "m.pt2", dtype=precision, backend="aoti").path
    engine = load_engine(path)
    far_apart = Atoms("HHH", np.arange(3)[:, None] * [20.0, 0, 0])
    tolerance = {"float64": 1e-11, "bf16": 5e-2}.get(precision, 2e-5)
    for atoms in (*structures.values(), far_apart):
        expected = energy_and_derivatives(model, build_graph(atoms, engine.spec))  # type: ignore[arg-type]
        found = engine.evaluate(build_graph(atoms, engine.spec, engine.dtype))
        assert_equal(found, expected, tolerance * max(1.0, float(expected.forces.abs().max())))
