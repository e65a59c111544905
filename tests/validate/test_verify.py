"""A certificate holds for its model and files, and for nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from ase.build import bulk
from torch import nn
from typer.testing import CliRunner

from compactmlip import checkpoint
from compactmlip.cli import app
from compactmlip.data.sample import SampleOptions
from compactmlip.errors import CertificateError, CheckpointError
from compactmlip.validate import ValidateOptions, validate
from compactmlip.validate.verify import Finding, require, verify

WHAT = (
    "the model is the one that was validated",
    "verdicts are those of the numbers",
    "heldout.extxyz is unchanged",
    "validation.npz is unchanged",
    "errors follow from the held-out structures",
    "the model gives these numbers",
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, make_spec: Any, make_model: Any) -> Path:
    """A folder with a model, its certificate and the files beside it."""
    folder = tmp_path_factory.mktemp("certified")
    spec = make_spec(species=("Mg", "O"), channels=(4, 3), lmax_edge=1, num_layers=2)
    model: nn.Module = make_model(spec, dtype=torch.float32)
    model.get_buffer("energy_scale").mul_(0.2)
    checkpoint.save(model, folder / "model.safetensors")
    options = ValidateOptions(
        n_heldout=3,
        sample=SampleOptions(max_atoms=8, md_fraction=0.0),
        nve_seconds=0.5,
        nve_ps=0.1,
        teacher_nve_seconds=0.3,
        speed_seconds=0.2,
        sizes=(8,),
        repeats=1,
        crystal_seconds=0,
        approach_points=0,
        nvt_seconds=0,
        ladder_seconds=0,
        npt_seconds=0,
        defect_seconds=0,
    )
    file = folder / "model.safetensors"
    validate(file, file, [bulk("MgO", "rocksalt", a=4.21, cubic=True)], options, folder, progress=False)
    return folder


@pytest.fixture
def certified(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def wrong(folder: Path, **options: int) -> set[str]:
    found = verify(folder / "model.safetensors", folder / "certificate.json", **options)
    assert all(isinstance(f, Finding) and f.detail for f in found)
    return {f.what for f in found if not f.agrees}


def edit(folder: Path, change: Any) -> None:
    path = folder / "certificate.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("frames", [0, 1, 8])
def test_holds(certified: Path, frames: int) -> None:
    found = verify(certified / "model.safetensors", certified / "certificate.json", frames=frames)
    assert [f.what for f in found] == list(WHAT) and all(f.agrees for f in found)


def test_other_model(certified: Path) -> None:
    """One that differs by a hundredth in its energies."""
    model = checkpoint.load(certified / "model.safetensors", None)
    model.get_buffer("energy_scale").mul_(1.01)
    checkpoint.save(model, certified / "model.safetensors")
    assert wrong(certified) == {WHAT[0], WHAT[5]}
    with pytest.raises(CertificateError, match="certificate of another file"):
        require(certified / "model.safetensors", certified / "certificate.json")


def test_improved_numbers(certified: Path) -> None:
    def better(data: Any) -> None:
        data["parity"]["energy"]["mae"] *= 0.5
        data["parity"]["forces"]["mae"] += 1e-3

    edit(certified, better)
    assert wrong(certified) == {WHAT[4]}


def test_improved_verdict(certified: Path) -> None:
    def better(data: Any) -> None:
        check = next(c for c in data["checks"] if c["good"] is not None and c["value"] is not None)
        check["value"], check["verdict"] = 10 * check["bad"] + 1, "pass"

    edit(certified, better)
    assert wrong(certified) == {WHAT[1]}
    edit(certified, lambda data: data.update(verdict="fail"))
    with pytest.raises(CertificateError, match="failed"):
        require(certified / "model.safetensors", certified / "certificate.json")


def test_changed_files(certified: Path) -> None:
    path = certified / "heldout.extxyz"
    frames: Any = ase.io.read(path, index=":")
    path.write_text(path.read_text().replace("Mg", "Mg ", 1))
    assert wrong(certified) == {WHAT[2]}
    assert len(frames) == 3
    path.unlink()
    assert wrong(certified) == {"heldout.extxyz is there"}


def test_arrays_that_the_model_does_not_give(certified: Path) -> None:
    """Also if the hash was made to fit."""
    from compactmlip.checkpoint import sha256

    path = certified / "validation.npz"
    with np.load(path) as file:
        arrays = dict(file)
    arrays["model_forces_eV_per_A"][0, 0] += 0.01
    np.savez(path, **arrays)
    edit(certified, lambda data: data["files"].update({"validation.npz": sha256(path)}))
    assert WHAT[5] in wrong(certified, frames=0) and WHAT[4] in wrong(certified)


def test_command(certified: Path) -> None:
    names = [str(certified / "model.safetensors"), str(certified / "certificate.json")]
    result = CliRunner().invoke(app, ["verify", *names], catch_exceptions=False)
    assert result.exit_code == 0 and result.output.count("yes ") == len(WHAT)
    edit(certified, lambda data: data.update(verdict="warn" if data["verdict"] != "warn" else "pass"))
    with pytest.raises(CertificateError, match="verdicts are those of the numbers"):
        CliRunner().invoke(app, ["verify", *names], catch_exceptions=False)
    with pytest.raises(CheckpointError):
        CliRunner().invoke(app, ["verify", names[0], names[0]], catch_exceptions=False)


def test_compile_refuses_without(certified: Path) -> None:
    model, output = certified / "model.safetensors", certified / "model.pt"
    command = ["compile", str(model), "--backend", "torch", "-o", str(output), "--require-certificate"]

    def passes(data: Any) -> None:
        data["verdict"] = "pass"
        for check in data["checks"]:
            check["verdict"] = "pass"

    edit(certified, passes)
    result = CliRunner().invoke(app, [*command, str(certified / "certificate.json")], catch_exceptions=False)
    assert result.exit_code == 0 and output.exists()
    output.unlink()
    edit(certified, lambda data: data["checks"][0].update(verdict="fail"))
    with pytest.raises(CertificateError, match="failed"):
        CliRunner().invoke(app, [*command, str(certified / "certificate.json")], catch_exceptions=False)
    assert not output.exists()
