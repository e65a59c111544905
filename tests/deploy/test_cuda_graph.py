"""CUDA graphs: what is padded keeps its results; what is recorded, and when, with a stand-in for the GPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mace_models
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from torch import Tensor, nn

from compactmlip import checkpoint
from compactmlip.compress.apply import with_layer_cutoffs
from compactmlip.data.graph import Derivatives, GraphBatch, build_graph, collate, energy_and_derivatives
from compactmlip.deploy.archive import Backend, load_deployed, without_profiling
from compactmlip.deploy.ase import CompactMLIPCalculator
from compactmlip.deploy.compile import compile_model
from compactmlip.deploy.cuda_graph import (
    GRANULARITY,
    WARM_UP,
    Capacity,
    Padded,
    PaddedInputs,
    Recorded,
    check_recordable,
)
from compactmlip.deploy.engine import load_engine
from compactmlip.deploy.selfcheck import random_structures
from compactmlip.errors import InputError
from compactmlip.models import model_spec
from compactmlip.spec import ModelSpec


def assert_equal(found: Derivatives, expected: Derivatives, tolerance: float = 1e-12) -> None:
    for name in ("energies", "node_energies", "forces", "stresses"):
        a, b = getattr(found, name), getattr(expected, name)
        scale = max(1.0, float(b.nan_to_num().abs().max()))
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale, equal_nan=True)


class Counted(Padded):
    """Counts how often the inputs were new."""

    prepared = 0

    def prepare(self, inputs: PaddedInputs) -> None:
        self.prepared += 1


def graphs(spec: Any) -> list[GraphBatch]:
    """One atom, molecules, crystals and all together, in an order in which sizes rise and fall."""
    crystal = bulk("MgO", "rocksalt", a=4.21, cubic=True) * (2, 2, 1)
    crystal.rattle(0.1, seed=1)
    found = [build_graph(a, spec) for a in (Atoms("O"), *random_structures(spec), crystal, Atoms("Mg"))]
    return [*found, collate(found), found[2]]


@pytest.mark.parametrize("variant", ["residual", "density", "nonlinear", "agnostic first"])
def test_mace(variant: str) -> None:
    """Every kind of sum over neighbours; repulsion, which has a cutoff of its own."""
    model: Any = mace_models.make_model(mace_models.make_spec(**mace_models.VARIANTS[variant]), seed=2)
    padded = Padded(model, model.spec.cutoff)
    for graph in graphs(model.spec):
        assert_equal(padded(graph), energy_and_derivatives(model, graph))


def test_nequip(model_variant: nn.Module) -> None:
    spec: Any = model_variant.spec
    padded = Padded(model_variant, spec.cutoff)  # type: ignore[arg-type]
    for graph in graphs(spec):
        assert_equal(padded(graph), energy_and_derivatives(model_variant, graph))


@pytest.mark.parametrize("backend", ["torch", "cueq"])
def test_files(backend: Any, tmp_path: Path, make_model: Any, make_spec: Any) -> None:
    if backend == "cueq":
        pytest.importorskip("cuequivariance_torch")
    model = make_model(make_spec(channels=(6, 4), num_layers=2, lmax_edge=2))
    path = compile_model(model, tmp_path / "m.pt", dtype="float64", backend=backend).path
    module, spec = load_deployed(path)
    check_recordable(path, module, torch.device("cuda"))
    node_energy = without_profiling(module)
    padded, largest = Counted(node_energy, spec.cutoff), 0.0
    for graph in graphs(spec):
        expected = energy_and_derivatives(node_energy, graph)
        assert_equal(padded(graph), expected)
        largest = max(largest, float(expected.forces.abs().max()))
    assert largest > 0.05
    # From one atom on, capacities only grow; what is smaller again uses what is there.
    assert 2 <= padded.prepared < len(graphs(spec)) - 1


@pytest.mark.parametrize("spare_atoms", [1, 2, 50])
@pytest.mark.parametrize("spare_edges", [0, 1, 7, 64])
def test_padding(spare_atoms: int, spare_edges: int) -> None:
    centers = torch.tensor([0, 0, 1, 2])
    vectors = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    batch = GraphBatch(
        species=torch.tensor([1, 2, 1]),
        centers=centers,
        neighbors=centers.flip(0),
        vectors=vectors,
        structure=torch.zeros(3, dtype=torch.long),
        num_atoms=torch.tensor([3]),
        volumes=torch.tensor([float("nan")]),
    )
    inputs = PaddedInputs(Capacity(3 + spare_atoms, 4 + spare_edges), 4.0, torch.float32, "cpu")
    for tensor in (inputs.species, inputs.centers, inputs.neighbors, inputs.vectors):
        tensor.fill_(1)  # of an earlier structure
    inputs.fill(batch)
    assert inputs.species.tolist() == [1, 2, 1] + [0] * spare_atoms
    assert torch.equal(inputs.centers[:4], centers) and torch.equal(inputs.vectors[:4], vectors)
    assert torch.equal(inputs.neighbors[:4], centers.flip(0))
    added = inputs.centers[4:]
    assert torch.equal(added, inputs.neighbors[4:])
    assert bool((inputs.centers.diff() >= 0).all())  # sorted by centre
    if spare_edges:
        assert int(added.min()) >= 3 and int(added.max()) < 3 + spare_atoms
        assert float(inputs.vectors[4:].norm(dim=1).min()) > 4.0
        counts = torch.bincount(added - 3, minlength=spare_atoms)
        assert int(counts.max() - counts.min()) <= 1  # no atom gets them all
    with pytest.raises(ValueError, match="do not fit"):
        PaddedInputs(Capacity(3, 64), 4.0, torch.float32, "cpu").fill(batch)


@pytest.mark.parametrize("count", [0, 1, 57, 58, 63, 64, 1000, 123456])
def test_capacity(count: int) -> None:
    """Always room for one atom of padding; some headroom, not much."""
    capacity = Capacity.of(count, count)
    assert capacity.holds(count, count) and capacity.atoms > count
    assert capacity.atoms % GRANULARITY == 0 and capacity.atoms <= 1.1 * count + GRANULARITY
    assert not capacity.holds(capacity.atoms, 0) and not capacity.holds(0, capacity.edges + 1)
    assert capacity.holds(capacity.atoms - 1, capacity.edges)


class FakeGPU:
    """What :class:`Recorded` uses of torch.cuda; recordings are calculated again when they are replayed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.recording = False
        gpu = self

        class Stream:
            def wait_stream(self, other: Any) -> None:
                gpu.events.append("wait")

        class Graph:
            def replay(self) -> None:
                gpu.events.append("replay")
                recorded = gpu.recorded
                for old, new in zip(recorded._results, recorded.evaluate(recorded.inputs), strict=True):
                    old.copy_(new)

        class Recording:
            def __init__(self, graph: Graph) -> None:
                assert isinstance(graph, Graph)

            def __enter__(self) -> None:
                gpu.events.append("record")
                gpu.recording = True

            def __exit__(self, *_: object) -> None:
                gpu.recording = False

        current = Stream()
        for name, value in {
            "Stream": Stream,
            "CUDAGraph": Graph,
            "graph": Recording,
            "current_stream": lambda: current,
            "stream": lambda stream: nullcontext(),
            "device": lambda device: nullcontext(),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    recorded: Any = None


def test_recording(deployed_quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-up, recording, replays; again where a structure does not fit."""
    module, spec = load_deployed(deployed_quick)
    node_energy = without_profiling(module)
    gpu = FakeGPU(monkeypatch)
    runs = 0

    def watched(*inputs: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        gpu.events.append("run")
        return node_energy(*inputs)

    recorded = gpu.recorded = Recorded(watched, spec.cutoff)
    small = bulk("MgO", "rocksalt", a=4.21, cubic=True)
    first = ["wait", *["run"] * WARM_UP, "wait", "record", "run"]
    for repeat, expected in (
        ((1, 1, 1), [*first, "replay", "run"]),
        ((1, 1, 1), ["replay", "run"]),
        ((2, 2, 2), [*first, "replay", "run"]),
        ((1, 1, 1), ["replay", "run"]),
    ):
        atoms = small * repeat
        atoms.rattle(0.1, seed=runs)
        graph = build_graph(atoms, spec)
        gpu.events.clear()
        found = recorded(graph)
        assert gpu.events == expected
        assert_equal(found, energy_and_derivatives(node_energy, graph))


def test_results_are_not_overwritten(deployed_quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording writes into the same memory again; what has been returned is not part of it."""
    module, spec = load_deployed(deployed_quick)
    gpu = FakeGPU(monkeypatch)
    recorded = gpu.recorded = Recorded(without_profiling(module), spec.cutoff)
    atoms = bulk("MgO", "rocksalt", a=4.21, cubic=True)
    atoms.rattle(0.1, seed=0)
    found = recorded(build_graph(atoms, spec))
    before = [getattr(found, name).clone() for name in ("energies", "node_energies", "forces", "stresses")]
    atoms.rattle(0.1, seed=1)
    assert not torch.equal(recorded(build_graph(atoms, spec)).node_energies, before[1])
    assert gpu.events.count("record") == 1
    for name, value in zip(("energies", "node_energies", "forces", "stresses"), before, strict=True):
        assert torch.equal(getattr(found, name), value), name


def test_recording_that_fails(deployed_quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is told, and the next calculation tries again instead of replaying nothing."""
    module, spec = load_deployed(deployed_quick)
    node_energy = without_profiling(module)
    gpu = FakeGPU(monkeypatch)
    broken = True

    def failing(*inputs: Tensor) -> Tensor:
        if gpu.recording and broken:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return node_energy(*inputs)

    recorded = gpu.recorded = Recorded(failing, spec.cutoff)
    graph = build_graph(bulk("MgO", "rocksalt", a=4.21), spec)
    for _ in range(2):
        with pytest.raises(InputError, match=r"not permitted when stream is capturing\. Leave out"):
            recorded(graph)
    broken = False
    assert_equal(recorded(graph), energy_and_derivatives(node_energy, graph))


def test_refusals(deployed: Path, packaged: Path, small_model: nn.Module, tmp_path: Path) -> None:
    for path in (deployed, packaged):
        with pytest.raises(InputError, match="cuda_graph=True is for NVIDIA GPUs, not for device 'cpu'"):
            CompactMLIPCalculator(path, cuda_graph=True)
    saved = checkpoint.save(small_model, tmp_path / "m.safetensors")
    for model in (small_model, saved):
        with pytest.raises(InputError, match=r"for compiled models \(\*\.pt\)"):
            CompactMLIPCalculator(model, cuda_graph=True)
    with pytest.raises(InputError, match=r"only TorchScript files"):
        check_recordable(packaged, None, torch.device("cuda"))
    assert CompactMLIPCalculator(deployed).parameters["cuda_graph"] is False


def test_operations_that_wait_for_values(tiny_model: nn.Module, tmp_path: Path) -> None:
    """Weights per species in plain PyTorch; files of cuequivariance have no such operations."""
    path = compile_model(tiny_model, tmp_path / "m.pt", dtype="float64", backend="torch").path
    module, _ = load_deployed(path)
    with pytest.raises(InputError, match=r"aten::nonzero cannot .*--static-shapes"):
        check_recordable(path, module, torch.device("cuda"))
    path = compile_model(tiny_model, path, dtype="float64", backend="torch", static_shapes=True).path
    check_recordable(path, load_deployed(path)[0], torch.device("cuda"))
    pytest.importorskip("cuequivariance_torch")
    path = compile_model(tiny_model, tmp_path / "c.pt", dtype="float64", backend="cueq").path
    module, _ = load_deployed(path)
    check_recordable(path, module, torch.device("cuda"))


@pytest.mark.parametrize("backend", ["torch", "cueq"])
def test_layers_with_cutoffs_of_their_own(
    make_model: Callable[..., nn.Module],
    make_spec: Callable[..., ModelSpec],
    tmp_path: Path,
    backend: Backend,
) -> None:
    """They drop edges, which a recording cannot; with all edges the file computes the same."""
    if backend == "cueq":
        pytest.importorskip("cuequivariance_torch")
    whole = make_model(make_spec(species=("O", "Mg"), channels=(4, 2), num_layers=3, cutoff=4.0), seed=4)
    short = with_layer_cutoffs(whole, (None, 3.0, 2.5))
    modules = []
    for static in (False, True):
        path = tmp_path / f"{static}.pt"
        compile_model(short, path, dtype="float64", backend=backend, static_shapes=static)
        modules.append(load_deployed(path)[0])
    with pytest.raises(InputError, match="layers with cutoffs of their own"):
        check_recordable(path, modules[0], torch.device("cuda"))
    check_recordable(path, modules[1], torch.device("cuda"))
    for graph in graphs(model_spec(short)):
        assert_equal(*(energy_and_derivatives(without_profiling(m), graph) for m in modules))
        padded = Padded(without_profiling(modules[1]), 4.0)
        assert_equal(padded(graph), energy_and_derivatives(without_profiling(modules[0]), graph))


def test_static_shapes_are_for_gpus(tiny_model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--static-shapes is for files that run as CUDA graphs"):
        compile_model(tiny_model, tmp_path / "m.pt", backend="kernels", static_shapes=True)
    assert not list(tmp_path.iterdir())


def test_engine_records(deployed_quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keyword reaches the recording; the device is a stand-in."""
    from compactmlip.deploy import engine

    plain = load_engine(deployed_quick)
    gpu = FakeGPU(monkeypatch)
    monkeypatch.setattr(engine, "usable_device", torch.device)
    monkeypatch.setattr(engine, "load_deployed", lambda path, device: load_deployed(path))
    made: list[Recorded] = []

    class Watched(Recorded):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(engine, "Recorded", Watched)
    engine_ = load_engine(deployed_quick, "cuda", cuda_graph=True)
    (gpu.recorded,) = made
    assert engine_.device == torch.device("cuda")
    graph = build_graph(bulk("MgO", "rocksalt", a=4.21), engine_.spec)
    assert_equal(engine_.evaluate(graph), plain.evaluate(graph))
    assert "record" in gpu.events and np.isfinite(engine_.evaluate(graph).forces.numpy()).all()
