"""Compiled files: same numbers as the model for any structure, self-description, refusals."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from torch import Tensor, nn

from compactmlip import checkpoint
from compactmlip.data.graph import Derivatives, build_graph, collate, energy_and_derivatives
from compactmlip.deploy import compile as compiler
from compactmlip.deploy.archive import ENTRY, inspect, load_deployed, without_profiling
from compactmlip.deploy.compile import compile_model
from compactmlip.deploy.engine import from_energies
from compactmlip.deploy.selfcheck import TOLERANCES, random_structures
from compactmlip.errors import CheckpointError, InputError, SelfCheckError, SpeciesError
from compactmlip.models import cast
from compactmlip.spec import ModelSpec


def assert_equal(found: Derivatives, expected: Derivatives, tolerance: float) -> None:
    for name in ("energies", "node_energies", "forces", "stresses"):
        torch.testing.assert_close(
            getattr(found, name).double(),
            getattr(expected, name),
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-11), ("float32", 2e-5)])
def test_file_equals_model(
    model_variant: nn.Module,
    structures: dict[str, Atoms],
    tmp_path: Path,
    dtype: str,
    tolerance: float,
) -> None:
    """Every architecture option; structures with 1 to 9 atoms, also without any edge, and a batch."""
    path = compile_model(model_variant, tmp_path / "m.pt", dtype=dtype).path  # type: ignore[arg-type]
    module, spec = load_deployed(path)
    far_apart = Atoms("HCOMgSi", np.arange(5)[:, None] * [20.0, 0, 0])
    graphs = [build_graph(a, spec) for a in (*structures.values(), far_apart)]
    assert {len(g.centers) for g in graphs} >= {0}
    graphs.append(collate(graphs))
    for graph in graphs:
        expected = energy_and_derivatives(model_variant, graph)
        found = energy_and_derivatives(without_profiling(module), graph.to(dtype=getattr(torch, dtype)))
        assert found.node_energies.dtype == torch.float64
        assert_equal(found, expected, tolerance * max(1.0, float(expected.forces.abs().max())))
        if len(graph.num_atoms) > 1:
            assert float(expected.forces.abs().max()) > 0.05


def test_same_bits_at_every_call(deployed: Path, structures: dict[str, Atoms]) -> None:
    """TorchScript's executor would compile at the second call, and change the last digits."""
    module, spec = load_deployed(deployed)
    node_energy = without_profiling(module)
    graphs = [build_graph(a, spec) for a in structures.values()]
    rounds = [[energy_and_derivatives(node_energy, g) for g in graphs] for _ in range(4)]
    for other in rounds[1:]:
        for a, b in zip(rounds[0], other, strict=True):
            assert torch.equal(a.node_energies, b.node_energies)
            assert torch.equal(a.forces, b.forces)


def test_derivatives_of_any_size_by_default_executor(deployed: Path, small_model: nn.Module) -> None:
    """Other engines run the file with the default executor, which must not be wrong either."""
    module, spec = load_deployed(deployed)
    for seed in range(3):
        for atoms in random_structures(spec, seed):
            graph = build_graph(atoms, spec)
            expected = energy_and_derivatives(small_model, graph)
            assert_equal(energy_and_derivatives(module, graph), expected, 1e-9)


def test_description(deployed: Path, small_spec: ModelSpec) -> None:
    spec, deployment = inspect(deployed)
    assert (spec.species, spec.cutoff, spec.dtype) == (small_spec.species, small_spec.cutoff, "float64")
    assert spec.provenance.name == small_spec.provenance.name
    assert spec.provenance.steps[-1].action == "compile"
    check = deployment.self_check
    assert check.num_structures == 6
    assert 0 <= check.energy_error <= check.energy_tolerance == TOLERANCES["float64"].energy
    assert 0 <= check.force_error <= check.force_tolerance
    assert 0 <= check.stress_error <= check.stress_tolerance
    entries = {ENTRY: ""}
    torch.jit.load(str(deployed), _extra_files=entries)
    plain = json.loads(entries[ENTRY])
    assert plain["species"] == list(small_spec.species)
    assert plain["units"] == {"energy": "eV", "length": "Angstrom"}
    assert plain["deployed"]["format_version"] == 4


def test_report_and_source(small_model: nn.Module, tmp_path: Path) -> None:
    source = checkpoint.save(small_model, tmp_path / "m.safetensors")
    report = compile_model(source, tmp_path / "m.pt", dtype="float32")
    assert report.path.stat().st_size == report.num_bytes
    assert checkpoint.sha256(report.path) == report.sha256
    assert report.spec.dtype == "float32"
    assert 1e-9 < report.self_check.force_error < 2e-5
    assert inspect(report.path)[1].source_sha256 == checkpoint.sha256(source)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.pt", "m.safetensors"]


def test_model_and_torch_are_left_alone(small_model: nn.Module, tmp_path: Path) -> None:
    small_model.train()
    before = copy.deepcopy(small_model.state_dict())
    state = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled())
    filters = list(warnings.filters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # without the exemptions of the test suite
        module, spec = load_deployed(compile_model(small_model, tmp_path / "m.pt").path)
        energy_and_derivatives(without_profiling(module), build_graph(Atoms("O"), spec, torch.float32))
    assert (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()) == state
    assert torch._C._get_graph_executor_optimize()  # type: ignore[attr-defined]
    assert warnings.filters == filters
    assert small_model.training
    assert all(p.requires_grad for p in small_model.parameters())
    after = small_model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_file_is_bound_to_no_device(deployed: Path) -> None:
    """Moved as a whole: the meta device stands for any other device, as it refuses to mix with the CPU."""
    module, spec = load_deployed(deployed)
    assert not list(module.parameters())
    moved = module.to("meta")
    graph = build_graph(Atoms("OH", [[0, 0, 0], [0, 0, 1.0]]), spec).to("meta")
    assert moved(graph.species, graph.centers, graph.neighbors, graph.vectors).device.type == "meta"
    with zipfile.ZipFile(deployed) as archive:
        code = b"".join(archive.read(n) for n in archive.namelist() if n.endswith(".py"))
    assert b"torch.device(" not in code
    assert b"new_zeros" in code


def test_file_needs_no_model_code(deployed: Path) -> None:
    code = f"""
import sys
from ase.build import molecule
from compactmlip.deploy.ase import CompactMLIPCalculator
atoms = molecule("H2O")
atoms.calc = CompactMLIPCalculator({str(deployed)!r})
assert abs(atoms.get_forces()).max() > 1e-3
for part in ("models", "families", "compress", "train", "checkpoint"):
    assert "compactmlip." + part not in sys.modules, part
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Altered(nn.Module):
    """A model whose compiled form is wrong: ``alter`` sees energies and edge vectors."""

    def __init__(self, model: nn.Module, alter: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.alter = model, alter

    def forward(self, species: Tensor, centers: Tensor, neighbors: Tensor, vectors: Tensor) -> Tensor:
        energies: Tensor = self.model(species, centers, neighbors, vectors)
        return self.alter(energies, vectors)


def alter_what_is_compiled(
    monkeypatch: pytest.MonkeyPatch, alter: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """From now on, not the model is compiled but its altered form."""
    real = compiler.with_constants
    monkeypatch.setattr(compiler, "with_constants", lambda model: Altered(real(model), alter))


ALTERATIONS = {
    "energy of an isolated atom": (
        # A constant that belongs to the number of atoms of the traced example.
        lambda e, v: e * (torch.tensor(float(len(e)), dtype=e.dtype) / e.shape[0]),
        "energy",
    ),
    "size of the traced example": (lambda e, v: e + torch.zeros(len(e.tolist()), dtype=e.dtype), "run"),
    "small force": (lambda e, v: e + 1e-9 * (v * v - (v * v).detach()).sum(), "force"),
    "not a number": (lambda e, v: e * torch.nan, "energy"),
}


@pytest.mark.parametrize("kind", list(ALTERATIONS))
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # the faults on trial are those it warns of
def test_wrong_compilation_is_refused(
    small_model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    wrong, what = ALTERATIONS[kind]
    alter_what_is_compiled(monkeypatch, wrong)
    output = tmp_path / "m.pt"
    output.write_bytes(b"earlier file")
    with pytest.raises(SelfCheckError, match=what):
        compile_model(small_model, output, dtype="float64", backend="torch")
    assert output.read_bytes() == b"earlier file"
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt"]


def test_unaltered_wrapper_is_accepted(
    small_model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above."""
    alter_what_is_compiled(monkeypatch, lambda e, v: e)
    compile_model(small_model, tmp_path / "m.pt", dtype="float64", backend="torch")


def test_changed_weight_is_refused(
    small_model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = compiler.with_constants

    def perturbed(model: nn.Module) -> nn.Module:
        constant = real(model)
        constant.get_buffer("layers.0.up.orders.0.value")[0, 0] += 1e-7
        return constant

    monkeypatch.setattr(compiler, "with_constants", perturbed)
    with pytest.raises(SelfCheckError, match=r"float64.*deviates"):
        compile_model(small_model, tmp_path / "m.pt", dtype="float64")
    assert not list(tmp_path.iterdir())


def test_broken_model_is_refused(small_model: nn.Module, tmp_path: Path) -> None:
    with torch.no_grad():
        small_model.get_parameter("readout.weight")[0] = torch.nan
    with pytest.raises(SelfCheckError, match="nan"):
        compile_model(small_model, tmp_path / "m.pt")


def test_given_structures_are_used(
    small_model: nn.Module, structures: dict[str, Atoms], tmp_path: Path
) -> None:
    report = compile_model(small_model, tmp_path / "m.pt", check_structures=list(structures.values()))
    assert report.self_check.num_structures == len(structures) + 2  # and the isolated atoms
    with pytest.raises(SpeciesError, match="Au"):
        compile_model(small_model, tmp_path / "m.pt", check_structures=[Atoms("Au")])


def test_one_species(
    make_model: Callable[..., nn.Module], make_spec: Callable[..., ModelSpec], tmp_path: Path
) -> None:
    report = compile_model(make_model(make_spec(species=("Si",))), tmp_path / "m.pt", dtype="float64")
    assert report.self_check.num_structures == 5


def test_unusable_options(small_model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\*\.pt"):
        compile_model(small_model, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="Did you mean 'float32'"):
        compile_model(small_model, tmp_path / "m.pt", dtype="float23")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="cannot write"):
        compile_model(small_model, tmp_path / "missing" / "m.pt")
    with pytest.raises(CheckpointError, match="no such file"):
        compile_model(tmp_path / "missing.safetensors", tmp_path / "m.pt")
    assert not list(tmp_path.iterdir())


def test_random_structures_have_edges(small_spec: ModelSpec) -> None:
    many = small_spec.model_copy(update={"species": ("Cs", "H", "C", "Pb", "O", "Fr")})
    for spec in (small_spec, many):
        for atoms in random_structures(spec):
            assert len(build_graph(atoms, spec).centers) >= len(atoms)


# Reading files that are not deployed files


def rewritten(path: Path, target: Path, change: Callable[[dict[str, object]], object]) -> Path:
    """Copy of a deployed file with another description."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for item in old.infolist():
            content = old.read(item)
            if item.filename.endswith(ENTRY):
                data = json.loads(content)
                change(data)
                content = json.dumps(data).encode()
            new.writestr(item, content)
    return target


def test_rewritten_copy_loads(deployed: Path, tmp_path: Path) -> None:
    """The control of the tests below."""
    assert load_deployed(rewritten(deployed, tmp_path / "m.pt", lambda d: None))[1].cutoff == 4.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["deployed"].update(format_version=4), "Upgrade"),
        (lambda d: d.update(format_version=99), "Upgrade"),
        (lambda d: d.pop("deployed"), "description is damaged"),
        (lambda d: d["deployed"].pop("self_check"), "self_check"),
        (lambda d: d.update(cutoff=-1.0), "cutoff"),
        (lambda d: d.pop("species"), "species"),
    ],
)
def test_other_descriptions(
    deployed: Path, tmp_path: Path, change: Callable[[dict[str, object]], object], message: str
) -> None:
    path = rewritten(deployed, tmp_path / "m.pt", change)
    for read in (inspect, load_deployed):
        with pytest.raises(CheckpointError, match=message):
            read(path)


@pytest.mark.parametrize("kept", [0, 3, 100, 0.5, 0.99])
def test_truncated_file(deployed: Path, tmp_path: Path, kept: float) -> None:
    content = deployed.read_bytes()
    path = tmp_path / "m.pt"
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(CheckpointError, match="truncated|not a deployed file"):
        load_deployed(path)


def test_flipped_byte(deployed: Path, tmp_path: Path) -> None:
    """torch reads such a file without complaint."""
    content = bytearray(deployed.read_bytes())
    with zipfile.ZipFile(deployed) as archive:
        largest = max(archive.infolist(), key=lambda item: item.file_size)
    content[largest.header_offset + largest.file_size // 2 + 200] ^= 0x40
    path = tmp_path / "m.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        load_deployed(path)


def test_files_of_other_types(small_model: nn.Module, tmp_path: Path) -> None:
    saved = checkpoint.save(small_model, tmp_path / "m.safetensors")
    renamed = tmp_path / "renamed.pt"
    renamed.write_bytes(saved.read_bytes())
    foreign, pickled, text = tmp_path / "foreign.pt", tmp_path / "pickled.pt", tmp_path / "text.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(foreign))
    torch.save({"weight": torch.zeros(2)}, pickled)
    text.write_text("energy 1.0\n")
    for path, message in [
        (saved, r"compile it first: compactmlip compile .*m\.safetensors -o m\.pt"),
        (renamed, "compile it first"),
        (foreign, "a TorchScript file, but not made by"),
        (pickled, "not made by 'compactmlip compile'"),
        (text, "not a deployed file"),
        (tmp_path, "no such file"),
        (tmp_path / "missing.pt", "no such file"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            load_deployed(path)


def test_missing_device(deployed: Path) -> None:
    for device in ("cuda:99", "nonsense"):
        with pytest.raises(InputError, match=device):
            load_deployed(deployed, device)


def test_float32_tolerances_see_reduced_precision(small_model: nn.Module, tmp_path: Path) -> None:
    """Ten bits less in the weights, as reduced-precision matrix products have, are refused."""
    coarse = cast(copy.deepcopy(small_model), torch.float32)
    with torch.no_grad():
        for parameter in coarse.parameters():
            parameter.copy_(parameter.bfloat16())
    checker = compiler.SelfChecker(small_model, small_model.spec)  # type: ignore[arg-type]
    with pytest.raises(SelfCheckError, match="float32"):
        checker.compare(from_energies(coarse), "float32", TOLERANCES["float32"])
    exact = cast(copy.deepcopy(small_model), torch.float32)
    checker.compare(from_energies(exact), "float32", TOLERANCES["float32"])  # type: ignore[arg-type]
