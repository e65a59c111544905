"""Files for cuequivariance: the same numbers without compiled operators, refusal where they cannot run."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import contract
import mace_models
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from cueq_standin import emulate_uniform_1d
from torch import nn

from compactmlip import checkpoint
from compactmlip.cli import main
from compactmlip.compress.apply import keep_species, prune
from compactmlip.data.graph import build_graph, collate, energy_and_derivatives
from compactmlip.deploy import archive, compile as compiler, engine
from compactmlip.deploy.archive import Backend, inspect, load_deployed, without_profiling
from compactmlip.deploy.ase import CompactMLIPCalculator
from compactmlip.deploy.compile import compile_model
from compactmlip.deploy.cuda_graph import VALUE_DEPENDENT
from compactmlip.deploy.lower import convolution, lower as lowering, polynomial
from compactmlip.deploy.lower.convolution import PairTypes, SplineConvolution
from compactmlip.deploy.lower.dense import SpeciesDense
from compactmlip.deploy.lower.lower import lower_on_grid
from compactmlip.deploy.lower.polynomial import SpeciesProduct, with_polynomials
from compactmlip.deploy.lower.splines import Grid
from compactmlip.deploy.selfcheck import TABLES, TOLERANCES, random_structures
from compactmlip.errors import InputError, KernelError, UnsupportedFeatureError
from compactmlip.info import describe
from compactmlip.kernels import build as building
from compactmlip.kernels.build import without_kernels
from compactmlip.models.linear import MANY_SPECIES

NEQUIP: dict[str, dict[str, Any]] = {
    "biases": {"biases": True},
    "solid": {"envelope": {"kind": "xplor", "onset": 3.2}, "solid_harmonics": True},
    "species": {"self_connection": "species"},
}


def mace(variant: str, seed: int = 1) -> nn.Module:
    model: nn.Module = mace_models.make_model(
        mace_models.make_spec(**mace_models.VARIANTS[variant]), seed=seed
    )
    return model


def assert_same(model: Any, found: nn.Module, expected: nn.Module, tolerance: float = 1e-11) -> None:
    """On structures of all kinds; relative to the largest value, and to no less than 1."""
    graphs = [build_graph(atoms, model.spec) for atoms in (Atoms("O"), *random_structures(model.spec))]
    largest = 0.0
    for graph in [*graphs, collate(graphs)]:
        reference = energy_and_derivatives(expected, graph)
        with without_kernels():
            values = energy_and_derivatives(found, graph)
        for name in ("node_energies", "forces"):
            a, b = getattr(values, name), getattr(reference, name)
            assert float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max())), name
        largest = max(largest, float(reference.forces.abs().max()))
    assert largest > 1e-2


@pytest.mark.usefixtures("kernels")
class TestBesideCompiledOperators:
    """The oracle are the compiled operators, on the same tables."""

    @pytest.mark.parametrize("variant", mace_models.VARIANTS)
    @pytest.mark.parametrize("values", [2, 3])
    def test_mace(self, variant: str, values: int) -> None:
        model = mace(variant)
        lowered = lower_on_grid(model, 60, values)
        assert_same(model, with_polynomials(lowered), lowered)

    @pytest.mark.parametrize("variant", NEQUIP)
    def test_nequip(self, variant: str, make_model: Any, make_spec: Any) -> None:
        model = make_model(make_spec(**NEQUIP[variant]), seed=2)
        lowered = lower_on_grid(model, 60, 3)
        assert_same(model, with_polynomials(lowered), lowered)

    @pytest.mark.parametrize("seed", [0, 1])
    def test_channels_of_every_order(self, seed: int, make_model: Any, make_spec: Any) -> None:
        """Pruned models: paths with different numbers of channels are polynomials of their own."""
        models = mace("residual"), make_model(make_spec(channels=(17, 9, 3)), seed=seed)
        for model in models:
            small = prune(model, contract.random_masks(model, np.random.default_rng(seed)))
            lowered = lower_on_grid(small, 60, 3)
            found = with_polynomials(lowered)
            assert_same(small, found, lowered)
        parts = [m for m in found.modules() if isinstance(m, polynomial.PolynomialConvolution)]
        assert any(len(part.groups) > 1 for part in parts)

    def test_many_species(self) -> None:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(MANY_SPECIES, 6, 5, generator=generator, dtype=torch.float64)
        x = torch.randn(40, 3, 6, generator=generator, dtype=torch.float64)
        species = torch.randint(0, 3, (40,), generator=generator)
        for used in (weight, weight[:3], weight[:1]):
            dense, chosen = SpeciesDense(used), species % len(used)
            torch.testing.assert_close(SpeciesProduct(dense)(x, chosen), dense(x, chosen), rtol=1e-13, atol=0)

    def test_beyond_the_cutoff(self) -> None:
        """Edges behind the last knot add nothing, to values and gradients."""
        grid = Grid(4.0, 9, 3)
        source = SplineConvolution(
            [(0, 0, 0)], [1], [lambda r: torch.cos(r)[:, None]], PairTypes.one(), grid, lmax=0, unit=True
        )
        made = polynomial.PolynomialConvolution(source)
        vectors = torch.tensor([[4.0, 0, 0], [0, 7.5, 0], [1e4, 0, 0]], dtype=torch.float64).requires_grad_()
        ends = torch.zeros(3, dtype=torch.long)
        (out,) = made(convolution.Graph(vectors, torch.zeros(2, dtype=torch.long), ends, ends + 1), [])
        assert out is not None and not out.any()
        (gradient,) = torch.autograd.grad(out.sum(), vectors)
        assert not gradient.any()


@pytest.fixture(scope="module")
def cueq() -> None:
    pytest.importorskip("cuequivariance_torch")


@pytest.fixture(scope="module")
def native() -> nn.Module:
    return mace("residual", seed=3)


@pytest.fixture(scope="module")
def path(cueq: None, native: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("cueq") / "m.pt"
    return compile_model(native, file, dtype="float64", backend="cueq").path


def test_file(path: Path, native: nn.Module, structures: dict[str, Atoms]) -> None:
    spec, deployment = inspect(path)
    assert deployment.backend == "cueq" and deployment.tables is not None
    check = deployment.self_check
    assert check.force_tolerance == TOLERANCES["float64"].force + TABLES.force
    assert 0 < check.force_error < check.force_tolerance
    assert "needs cuequivariance on NVIDIA GPUs" in describe(path)["file"]
    for atoms in structures.values():
        results = []
        for model in (path, native):
            atoms.calc = CompactMLIPCalculator(model)
            results.append((atoms.get_potential_energy() / len(atoms), atoms.get_forces()))
            if atoms.pbc.any():
                results[-1] += (atoms.get_stress(),)
        for a, b in zip(*results, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=deployment.tables.force_bound)
    assert spec.dtype == "float64"


def test_numbers_of_atoms_are_free(path: Path, native: nn.Module) -> None:
    """The code was recorded on one structure; none of its sizes may be part of it."""
    engine_ = engine.load_engine(path)
    for atoms in random_structures(engine_.spec, seed=5):
        graph = build_graph(atoms * (1, 1, 2) if atoms.pbc.all() else atoms, engine_.spec)
        found, expected = engine_.evaluate(graph), energy_and_derivatives(native, graph)
        scale = max(1.0, float(expected.forces.abs().max()))
        assert float((found.forces - expected.forces).abs().max()) < 1e-5 * scale


def test_operations(path: Path, deployed: Path) -> None:
    """One operator of ours; none that waits for values; none that is bound to the device of its recording."""
    graphs = [load_deployed(file)[0].inlined_graph for file in (path, deployed)]
    kinds = [{node.kind() for node in graph.nodes()} for graph in graphs]
    assert {kind for kind in kinds[0] if kind.startswith("compactmlip")} == {"compactmlip::polynomial"}
    assert not kinds[0] & VALUE_DEPENDENT
    for graph in graphs:
        constants = [node.output() for node in graph.findAllNodes("prim::Constant")]
        assert constants
        assert [c for c in constants if str(c.type()) == "Device"] == []


def test_same_bits_as_a_copy(path: Path) -> None:
    atoms = bulk("MgO", "rocksalt", a=4.21, cubic=True)
    atoms.rattle(0.1, seed=0)
    atoms.calc = CompactMLIPCalculator(path)
    forces = atoms.get_forces()
    atoms.calc = pickle.loads(pickle.dumps(atoms.calc))
    assert np.array_equal(atoms.get_forces(), forces)


@pytest.mark.parametrize("dtype", ["float32", "mixed", "bf16"])
def test_precisions(cueq: None, native: nn.Module, tmp_path: Path, dtype: Any) -> None:
    report = compile_model(native, tmp_path / "m.pt", dtype=dtype, backend="cueq")
    limit = 2e-5 if dtype != "bf16" else 5e-2
    assert 1e-9 < report.self_check.force_error < limit
    module, spec = load_deployed(report.path)
    graph = build_graph(random_structures(spec)[2], spec, torch.float32)
    energies = without_profiling(module)(graph.species, graph.centers, graph.neighbors, graph.vectors)
    assert energies.dtype == torch.float64


def test_tf32_is_possible(cueq: None, native: nn.Module, tmp_path: Path) -> None:
    report = compile_model(native, tmp_path / "m.pt", backend="cueq", tf32=True)
    assert inspect(report.path)[1].tf32
    with pytest.raises(InputError, match="--backend torch or cueq"):
        compile_model(native, tmp_path / "m.pt", dtype="float64", backend="cueq", tf32=True)


def test_no_compiler_is_needed(
    cueq: None, make_model: Any, make_spec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are no compiled operators, tables are measured with the polynomials themselves."""
    model = make_model(make_spec(channels=(4, 3), num_layers=2, lmax_edge=1, self_connection="species"))
    monkeypatch.setattr(building, "_loaded", False)
    used: list[nn.Module] = []

    def watched(module: nn.Module) -> nn.Module:
        used.append(module)
        return with_polynomials(module)

    monkeypatch.setattr(polynomial, "with_polynomials", watched)
    report = compile_model(model, tmp_path / "m.pt", dtype="float64", backend="cueq")
    assert len(used) > 1 and report.tables is not None
    assert report.tables.force_error <= lowering.FORCE_BOUND


RUN = """
import sys
sys.modules["cuequivariance"] = None
from ase import Atoms
from compactmlip import CompactMLIPCalculator
atoms = Atoms("MgO", [[0, 0, 0], [0, 0.5, 2]])
atoms.calc = CompactMLIPCalculator(sys.argv[1])
print(repr(atoms.get_potential_energy()), "compactmlip.models" in sys.modules)
"""


def test_file_needs_torch_only_on_the_cpu(path: Path) -> None:
    atoms = Atoms("MgO", [[0, 0, 0], [0, 0.5, 2]])
    atoms.calc = CompactMLIPCalculator(path)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUN, str(path)], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == f"{atoms.get_potential_energy()!r} False" and not done.stderr, done.stderr


def test_compile_without_the_package(
    native: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuequivariance", None)
    with pytest.raises(KernelError, match=r"--backend cueq: .*pip install cuequivariance.*--backend torch"):
        compile_model(native, tmp_path / "m.pt", backend="cueq")
    assert not list(tmp_path.iterdir())


def test_cuda_without_the_package(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU, as far as is looked before anything runs on it."""
    for module in (archive, engine):
        monkeypatch.setattr(module, "usable_device", torch.device)
    with pytest.raises(KernelError, match=r"m\.pt: .*cuequivariance-ops-torch-cu13.*--backend torch"):
        engine.load_engine(path, "cuda")
    monkeypatch.setitem(sys.modules, "cuequivariance", None)
    with pytest.raises(KernelError, match=r"pip install cuequivariance cuequivariance-torch"):
        engine.load_engine(path, "cuda:0")


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("backend", ["kernels", "aoti"])
def test_cpu_files_on_cuda(
    backend: Backend, native: nn.Module, packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = packaged if backend == "aoti" else compile_model(native, tmp_path / "k.pt", backend="kernels").path
    for module in (archive, engine):
        monkeypatch.setattr(module, "usable_device", torch.device)
    with pytest.raises(
        InputError, match=r"'cuda'\. Compile the model again with --backend cueq .*or --backend torch"
    ):
        engine.load_engine(file, "cuda")


def test_models_that_cannot_be_lowered(
    cueq: None, native: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "MAX_TABLE_BYTES", 1)
    with pytest.raises(UnsupportedFeatureError, match=r"tables of .* would need .*--backend torch"):
        compile_model(native, tmp_path / "m.pt", backend="cueq")
    assert not list(tmp_path.iterdir())


def test_whole_model_through_the_interface_of_the_cuda_code(
    cueq: None, native: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call that a GPU would get, with a stand-in for the CUDA code."""
    model: Any = keep_species(native, ["Mg", "O"])
    lowered = with_polynomials(lower_on_grid(model, 20, 3))
    graph = build_graph(random_structures(model.spec)[2], model.spec)
    with without_kernels():
        expected = energy_and_derivatives(lowered, graph)
        calls = emulate_uniform_1d(monkeypatch)
        found = energy_and_derivatives(lowered, graph)
    # Radial weights, messages and contraction of two layers; the first radial weights need no neighbours.
    assert len(calls) == 12
    for name in ("node_energies", "forces"):
        a, b = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_command(
    cueq: None,
    native: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = checkpoint.save(native, tmp_path / "m.safetensors")
    target = tmp_path / "m.pt"
    words = ["compactmlip", "compile", str(source), "-o", str(target), "--backend", "cueq"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert "(cueq, float32" in capsys.readouterr().out
    assert inspect(target)[1].backend == "cueq"
    assert compiler.default_backend("meta") == "torch"
