"""Engines that agree, and one that does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ase import Atoms
from ase.build import bulk, molecule
from torch import nn

from compactmlip import CompactMLIPCalculator, checkpoint
from compactmlip.deploy.archive import inspect
from compactmlip.deploy.compile import compile_model
from compactmlip.errors import InputError, KernelError
from compactmlip.lammps.build import build, installed
from compactmlip.lammps.evaluate import LammpsRun
from compactmlip.validate import engines
from compactmlip.validate.checks import engine_checks
from compactmlip.validate.engines import EngineParity, compare_engines, compare_plain


@pytest.fixture(scope="module")
def model(make_model: Any, make_spec: Any, kernels: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    installation = installed()
    if installation is None:
        pytest.skip("LAMMPS is not installed")
    build(installation)
    network: nn.Module = make_model(make_spec(num_layers=2, lmax_edge=1), seed=2)
    path = tmp_path_factory.mktemp("engines") / "model.pt"
    source = checkpoint.save(network, path.with_suffix(".safetensors"))
    compile_model(source, path, dtype="float64", backend="kernels")
    return path


@pytest.fixture
def skewed() -> Atoms:
    atoms = bulk("MgO", "rocksalt", a=4.21)
    atoms = atoms.repeat((2, 2, 2))
    atoms.rattle(0.05, seed=1)
    return atoms


def test_ase_and_lammps_agree(model: Path, skewed: Atoms) -> None:
    found = compare_engines(model, CompactMLIPCalculator(model), skewed)
    assert [f.engine for f in found] == ["LAMMPS, 1 process", "LAMMPS, 2 processes"]
    for row in found:
        assert row.atoms == 16 and row.energy < 1e-8 and row.forces < 1e-7 and not row.failure
    assert {c.verdict for c in engine_checks(found, "float64")} == {"pass"}


def test_plain_pytorch_agrees(model: Path, skewed: Atoms) -> None:
    """The checkpoint as it was trained, and as TorchScript of plain operations; tables change 1e-5 eV/A."""
    deployment = inspect(model)[1]
    source = model.with_name("model.safetensors")
    found = compare_plain(source, deployment, CompactMLIPCalculator(model), skewed)
    assert [f.engine for f in found] == ["PyTorch, eager", "TorchScript, plain operations"]
    for row in found:
        assert 0 < row.forces < 0.02 and row.energy < 1e-3 and not row.failure
    assert found[0].forces == pytest.approx(found[1].forces, rel=0.05)
    assert {c.verdict for c in engine_checks(found, "float64")} == {"pass"} and found[0].tables == 0.02
    reduced = deployment.model_copy(update={"precision": "bf16"})
    assert compare_plain(source, reduced, CompactMLIPCalculator(model), skewed) == ()
    changed = deployment.model_copy(update={"source_sha256": "0" * 64})
    with pytest.raises(InputError, match="not the checkpoint"):
        compare_plain(source, changed, CompactMLIPCalculator(model), skewed)


def test_plain_pytorch_that_differs(model: Path, skewed: Atoms, make_model: Any, make_spec: Any) -> None:
    """As if the file computed something else than its checkpoint."""
    other = CompactMLIPCalculator(make_model(make_spec(num_layers=2, lmax_edge=1), seed=3))
    found = compare_plain(model.with_name("model.safetensors"), inspect(model)[1], other, skewed)
    assert all(row.forces > 1 for row in found)
    assert {c.verdict for c in engine_checks(found, "float32")} == {"fail"}


def test_molecule(model: Path) -> None:
    run = LammpsRun.find()
    assert run is not None
    atoms = molecule("CH3OH")
    energy, forces = run.evaluate(model, atoms)
    atoms.calc = CompactMLIPCalculator(model)
    assert energy == pytest.approx(atoms.get_potential_energy(), rel=1e-10)
    assert abs(forces - atoms.get_forces()).max() < 1e-9


def test_another_model_fails(
    model: Path, skewed: Atoms, make_model: Any, make_spec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if LAMMPS computed something else than ASE."""
    other = make_model(make_spec(num_layers=2, lmax_edge=1), seed=3)
    found = compare_engines(model, CompactMLIPCalculator(other), skewed, ranks=(1,))
    assert found[0].forces > 1
    assert {c.verdict for c in engine_checks(found, "float64")} == {"fail"}


def test_failure_is_told(model: Path, skewed: Atoms) -> None:
    unknown = skewed.copy()
    unknown.symbols[0] = "Cu"
    run = LammpsRun.find()
    assert run is not None
    with pytest.raises(KernelError, match="does not cover Cu"):
        run.evaluate(model, unknown)


def test_lammps_that_hangs_is_a_failure(model: Path, skewed: Atoms, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compactmlip.lammps.evaluate.TIMEOUT", 0.01)
    (found,) = compare_engines(model, CompactMLIPCalculator(model), skewed, ranks=(1,))
    assert "did not finish within 0.01 s" in found.failure
    assert [c.verdict for c in engine_checks((found,), "float64")] == ["fail"]


def test_without_lammps(skewed: Atoms, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.LammpsRun, "find", classmethod(lambda cls: None))
    assert compare_engines("nothing.pt", None, skewed) == ()
    assert engine_checks((), "float32") == []
    broken = EngineParity(
        engine="LAMMPS, 1 process", atoms=2, energy=float("inf"), forces=float("inf"), failure="x"
    )
    (check,) = engine_checks((broken,), "float32")
    assert check.verdict == "fail" and "x" in check.reason
