"""What mixed and bf16 files compute, what they say about their errors, and that no device is in them."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import mace_models
import pytest
import torch
from ase import Atoms
from conftest import VARIANTS
from torch import Tensor, nn

from compactmlip.data.graph import build_graph, energy_and_derivatives
from compactmlip.deploy import compile as compiler
from compactmlip.deploy.archive import ENTRY, INPUTS, Accuracy, inspect
from compactmlip.deploy.ase import CompactMLIPCalculator
from compactmlip.deploy.compile import compile_model, trace, with_constants
from compactmlip.deploy.engine import load_engine
from compactmlip.deploy.precision import in_precision, input_dtype
from compactmlip.deploy.selfcheck import random_structures
from compactmlip.errors import InputError, SelfCheckError, SpeciesError, UnsupportedFeatureError
from compactmlip.info import describe
from compactmlip.kernels.build import without_kernels
from compactmlip.models.linear import EquivariantLinear, NormedMLP, RadialMLP, multiply


def made(family: str) -> nn.Module:
    variant = mace_models.VARIANTS[family]
    return mace_models.make_model(mace_models.make_spec(**variant))


def test_products() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(7, 33), torch.randn(33, 5)
    assert torch.equal(multiply(x, w, None), x @ w)
    wide = multiply(x, w, "float64")
    assert wide.dtype == torch.float64 and torch.equal(wide, x.double() @ w.double())
    rounded = multiply(x, w, "bf16")
    exact = x.bfloat16().double() @ w.bfloat16().double()
    assert rounded.dtype == torch.float32
    # Sums are float32, so that nothing but the operands is rounded to bfloat16 (4e-3).
    assert float((rounded - exact).abs().max()) < 1e-5 < 1e-2 < float((rounded - wide).abs().max())


@pytest.mark.parametrize("kind", [RadialMLP, NormedMLP])
def test_bf16_networks_round_every_product(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    network = kind([4, 6, 5, 3]).float()
    for p in network.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(20, 4)
    in_precision(network, "bf16")
    found, pieces = network(x), torch.cat(network.pieces(x, [1, 2]), dim=1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(pieces, found)
    seen: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "__matmul__", recording(seen))
        network(x)
    assert len(seen) == 6
    assert all(torch.equal(t, t.bfloat16().float()) for t in seen)


def recording(seen: list[Tensor]) -> Any:
    real = Tensor.__matmul__

    def product(a: Tensor, b: Tensor) -> Tensor:
        seen.extend((a, b))
        return real(a, b)

    return product


@pytest.mark.parametrize("family", ["nequip", "density", "nonlinear"])
def test_errors_grow_as_digits_go(family: str, small_model: nn.Module, tmp_path: Path) -> None:
    model = small_model if family == "nequip" else made(family)
    errors = {}
    for precision in INPUTS:
        report = compile_model(model, tmp_path / f"{precision}.pt", dtype=precision)
        assert report.precision == inspect(report.path)[1].precision == precision
        assert report.spec.dtype == INPUTS[precision]
        engine = load_engine(report.path)
        assert engine.dtype == input_dtype(precision)
        errors[precision] = report.accuracy[0].force_mae
        rows = describe(report.path)
        assert rows["precision"] == precision and rows["dtype"] == INPUTS[precision]
        assert f"forces {errors[precision]:.1e}" in rows["error against float64"][0]
    assert errors["float64"] < 1e-13
    assert 1e-9 < errors["mixed"] < errors["float32"] < 1e-5 < errors["bf16"] < 0.1


@pytest.mark.parametrize("family", ["nequip", "density"])
def test_mixed_keeps_geometry_and_heads_in_float64(family: str, small_model: nn.Module) -> None:
    model = small_model if family == "nequip" else made(family)
    module = in_precision(with_constants(model), "mixed")
    dtypes = {name: buffer.dtype for name, buffer in module.named_buffers() if buffer.is_floating_point()}
    wide = {name for name, dtype in dtypes.items() if dtype == torch.float64}
    for name in dtypes:
        parts = name.split(".")
        geometry = parts[0] in ("basis", "radial", "harmonics", "repulsion")
        head = any(p.startswith("readout") for p in parts)
        assert (name in wide) == (geometry or head or parts[-1].startswith("energy_")), name
    graph = build_graph(random_structures(model.spec)[2], model.spec, torch.float32)  # type: ignore[arg-type]
    arguments = (graph.centers, graph.neighbors, graph.vectors)
    if family != "nequip":
        arguments = (graph.species, *arguments)
    edges = module.edge_features(*arguments)  # type: ignore[operator]
    assert edges.basis.dtype == edges.harmonics.dtype == torch.float32
    exact = model.edge_features(*(a.double() if a.is_floating_point() else a for a in arguments))  # type: ignore[operator]
    assert torch.equal(edges.harmonics, exact.harmonics.float())
    torch.testing.assert_close(edges.basis, exact.basis.float(), rtol=1e-7, atol=1e-12)


def test_modules_without_such_parts() -> None:
    for precision in ("mixed", "bf16"):
        with pytest.raises(UnsupportedFeatureError, match=f"--dtype {precision}"):
            in_precision(nn.Softplus(), precision)  # type: ignore[arg-type]


def test_bf16_tolerance_sees_a_missing_product(
    small_model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_skip(model: nn.Module) -> nn.Module:
        constant = real(model)
        skip = constant.get_submodule("layers.1.skip")
        assert isinstance(skip, EquivariantLinear)
        skip.get_submodule("orders.0").get_buffer("value").zero_()
        return constant

    real = compiler.with_constants
    monkeypatch.setattr(compiler, "with_constants", without_skip)
    with pytest.raises(SelfCheckError, match="bf16"):
        compile_model(small_model, tmp_path / "m.pt", dtype="bf16")
    assert not list(tmp_path.iterdir())


def test_calibration(small_model: nn.Module, structures: dict[str, Atoms], tmp_path: Path) -> None:
    frames = [structures["crystal"], structures["molecule"]]
    report = compile_model(small_model, tmp_path / "m.pt", dtype="bf16", calibration=frames)
    built_in, found = report.accuracy
    assert (built_in.structures, found.structures) == ("built-in", "calibration")
    assert (found.num_structures, found.num_atoms) == (2, sum(map(len, frames)))
    assert report.self_check.num_structures == built_in.num_structures == 6
    forces, energies, stresses, largest = [], [], [], []
    for atoms in frames:
        expected = energy_and_derivatives(small_model, build_graph(atoms, report.spec))
        atoms.calc = CompactMLIPCalculator(report.path)
        largest.append(float(expected.forces.abs().max()))
        forces.append(torch.tensor(atoms.get_forces()) - expected.forces)
        energies.append(abs(atoms.get_potential_energy() - float(expected.energies)) / len(atoms))
        if atoms.pbc.all():
            stresses.append(torch.tensor(atoms.get_stress(voigt=False)) - expected.stresses[0])
    difference = torch.cat(forces).abs()
    assert found.force_mae == pytest.approx(float(difference.mean()), rel=1e-6)
    assert found.force_max == pytest.approx(float(difference.max()), rel=1e-6)
    assert found.force_largest == pytest.approx(max(largest), rel=1e-6)
    assert found.energy_max == pytest.approx(max(energies), rel=1e-6)
    assert found.energy_mae == pytest.approx(sum(energies) / 2, rel=1e-6)
    assert len(stresses) == 1 and found.stress_max == pytest.approx(float(stresses[0].abs().max()), rel=1e-5)
    assert len(describe(report.path)["error against float64"]) == 2
    alone = compile_model(small_model, tmp_path / "m.pt", calibration=[frames[1]]).accuracy[1]
    assert alone.stress_mae is None
    with pytest.raises(SpeciesError, match="Au"):
        compile_model(small_model, tmp_path / "m.pt", calibration=[Atoms("Au")])


def test_dtype_of_the_calculator(small_model: nn.Module, tmp_path: Path) -> None:
    path = compile_model(small_model, tmp_path / "m.pt", dtype="mixed").path
    assert CompactMLIPCalculator(path).dtype == torch.float32
    with pytest.raises(InputError, match="compiled in float32"):
        CompactMLIPCalculator(path, dtype="float64")


@pytest.mark.parametrize(("version", "extra"), [(1, ()), (2, ("backend",))])
def test_files_of_older_releases(
    deployed: Path, tmp_path: Path, version: int, extra: tuple[str, ...]
) -> None:
    path = tmp_path / "old.pt"
    kept = {"format_version", "compactmlip_version", "torch_version", "source_sha256", "self_check", *extra}
    with zipfile.ZipFile(deployed) as old, zipfile.ZipFile(path, "w") as new:
        for item in old.infolist():
            content = old.read(item)
            if item.filename.endswith(ENTRY):
                data = json.loads(content)
                data["deployed"] = {k: v for k, v in data["deployed"].items() if k in kept}
                data["deployed"]["format_version"] = version
                content = json.dumps(data).encode()
            new.writestr(item, content)
    _, deployment = inspect(path)
    assert (deployment.precision, deployment.accuracy, deployment.tf32) == (None, (), False)
    rows = describe(path)
    assert (rows["precision"], rows["error against float64"]) == ("float64", "not measured")
    atoms = Atoms("OH", [[0, 0, 0], [0, 0, 1]])
    atoms.calc = CompactMLIPCalculator(path)
    assert abs(atoms.get_forces()).max() > 1e-3


def test_accuracy_is_frozen_data(deployed: Path) -> None:
    (accuracy,) = inspect(deployed)[1].accuracy
    assert Accuracy.model_validate_json(accuracy.model_dump_json()) == accuracy


# Devices


def device_constants(graph: Any) -> list[str]:
    """Constants of a trace that are devices, or arrays, which stay where they are when a file is moved."""
    found = []
    for node in graph.findAllNodes("prim::Constant"):
        kind = str(node.output().type())
        is_array = kind == "Tensor" and node.kindOf("value") == "t" and node.t("value").dim() > 0
        if "Device" in kind or is_array:
            found.append(str(node))
    return found


ALL = {f"nequip {k}": k for k in VARIANTS} | {f"mace {k}": k for k in mace_models.VARIANTS}


@pytest.mark.parametrize(
    ("name", "precision"),
    [(name, "float32") for name in ALL]
    + [(name, precision) for name in ("nequip biases", "mace density") for precision in ("mixed", "bf16")],
)
def test_traces_hold_no_device(name: str, precision: Any, make_model: Any, make_spec: Any) -> None:
    """A trace could fix the device of tensors that it makes; on a GPU such a file would fail."""
    variant = ALL[name]
    model = made(variant) if name.startswith("mace") else make_model(make_spec(**VARIANTS[variant]))
    graph = build_graph(random_structures(model.spec)[0], model.spec, torch.float32)
    with without_kernels():
        traced = trace(in_precision(with_constants(model), precision), graph)
    operations = traced.inlined_graph  # nodes live as long as it does
    assert device_constants(operations) == []
    if not operations.findAllNodes("aten::nonzero"):  # its shape depends on data, which meta tensors lack
        moved, inputs = traced.to("meta"), graph.to("meta")
        energy = moved(inputs.species, inputs.centers, inputs.neighbors, inputs.vectors)
        assert energy.device.type == "meta" and energy.dtype == torch.float64


@pytest.mark.parametrize("wrong", ["device", "array"])
def test_a_device_in_a_trace_is_found(wrong: str, small_model: nn.Module) -> None:
    """The control of the test above."""

    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

    class OnTheCPU(nn.Module):
        def forward(self, species: Tensor, centers: Tensor, neighbors: Tensor, vectors: Tensor) -> Tensor:
            if wrong == "device":
                return torch.zeros(species.shape[0]) + vectors.sum()
            return (vectors * weights).sum(dim=1)

    graph = build_graph(Atoms("OH", [[0, 0, 0], [0, 0, 1]]), small_model.spec)  # type: ignore[arg-type]
    operations = trace(OnTheCPU(), graph).inlined_graph
    assert len(device_constants(operations)) > 0
