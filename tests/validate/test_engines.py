"""Engines that agree, and one that does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ase import Atoms
from ase.build import bulk, molecule
from torch import nn

from compactmlip import CompactMLIPCalculator
from compactmlip.deploy.compile import compile_model
from compactmlip.errors import KernelError
from compactmlip.lammps.build import build, installed
from compactmlip.lammps.evaluate import LammpsRun
from compactmlip.validate import engines
from compactmlip.validate.checks import engine_checks
from compactmlip.validate.engines import EngineParity, compare_engines


@pytest.fixture(scope="module")
def model(make_model: Any, make_spec: Any, kernels: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    installation = installed()
    if installation is None:
        pytest.skip("LAMMPS is not installed")
    build(installation)
    network: nn.Module = make_model(make_spec(num_layers=2, lmax_edge=1), seed=2)
    path = tmp_path_factory.mktemp("engines") / "model.pt"
    compile_model(network, path, dtype="float64", backend="kernels")
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
