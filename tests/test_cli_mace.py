"""Commands on a small random MACE model: cuts of depth and channels, the radial basis, the whole way."""

from __future__ import annotations

import json
from pathlib import Path

import ase.io
import mace_models
import numpy as np
import pytest
import torch
from ase.build import bulk
from cli_runs import run_cli

from compactmlip.checkpoint import load, read_spec, save
from compactmlip.config import resolve
from compactmlip.data.graph import build_graph, energy_and_derivatives
from compactmlip.models import cast
from compactmlip.specialize import specialize
from compactmlip.specialize_options import SpecializeOptions


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    spec = mace_models.make_spec(blocks="density", lmax_edge=2, correlation=2)
    model = cast(mace_models.make_model(spec), torch.float32)
    model.get_buffer("energy_scale").mul_(0.1)
    save(model, tmp_path / "teacher.safetensors")
    rng = np.random.default_rng(0)
    frames = [bulk("MgO", "rocksalt", a=4.21, cubic=True) for _ in range(6)]
    for atoms in frames:
        atoms.rattle(0.1, rng=rng)
    ase.io.write(tmp_path / "mgo.xyz", frames)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _prune(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: str
) -> tuple[int, str, str]:
    line = f"prune teacher.safetensors -o out.safetensors --calibration mgo.xyz {options}"
    return run_cli(monkeypatch, capsys, line)


def _forces(path: Path) -> torch.Tensor:
    model = load(path)
    return energy_and_derivatives(
        model, build_graph(ase.io.read("mgo.xyz"), model.spec, torch.float32)
    ).forces


@pytest.mark.parametrize(
    ("options", "actions", "outputs", "num_basis"),
    [
        ("--layers 1", ["cut layers"], [[6]], 5),
        ("--layers 1 --to 4x0", ["cut layers", "prune"], [[4]], 5),
        ("--to 4x0+3x1", ["prune"], [[4, 3], [4]], 5),
        ("--to 4x0+3x1,5x0 --num-basis 8", ["prune", "resize basis"], [[4, 3], [5]], 8),
        ("--num-basis 7 --basis-start random", ["resize basis"], [[6, 5, 4], [6]], 7),
        ("--layers 1 --num-basis 3 --basis-start random", ["cut layers", "resize basis"], [[6]], 3),
    ],
)
def test_prune(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: str,
    actions: list[str],
    outputs: list[list[int]],
    num_basis: int,
) -> None:
    code, out, err = _prune(monkeypatch, capsys, f"{options} --json --seed 5 --no-compensate")
    assert code == 0, err
    spec = read_spec(folder / "out.safetensors")
    assert [step.action for step in spec.provenance.steps] == actions
    assert [layer["out"] for layer in spec.architecture["layers"]] == outputs
    assert spec.architecture["num_basis"] == num_basis and set(spec.species) == {"Mg", "O"}
    assert torch.isfinite(_forces(folder / "out.safetensors")).all()
    result = json.loads(out)
    assert result["parameters"] == sum(p.numel() for p in load(folder / "out.safetensors").parameters())
    if "random" in options:
        assert spec.provenance.steps[-1].options == {"num_basis": num_basis, "start": "random", "seed": 5}


def test_a_larger_basis_alone_is_inherited(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _prune(monkeypatch, capsys, "--num-basis 9")[0] == 0
    before, after = (_forces(folder / name) for name in ("teacher.safetensors", "out.safetensors"))
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--num-basis 4", "only a larger number inherits"),
        ("--num-basis 0", "at least one function"),
        ("--num-basis 8 --basis-start zero", "choose inherited or random"),
        ("--layers 2", "cannot keep 2 layers of 2"),
        ("--to 6x0,6x0,6x0", "lists 3 layers"),
    ],
)
def test_refusals(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: str,
    message: str,
) -> None:
    code, _, err = _prune(monkeypatch, capsys, options)
    assert code == 1 and err.startswith("error: ") and message in err and "Traceback" not in err
    assert not (folder / "out.safetensors").exists()


def test_specialize(folder: Path) -> None:
    """From structures to a validated file, with MACE as the teacher."""
    settings = ["sample.n=20", "sample.max_atoms=8", "sample.md_fraction=0", "distil.max_epochs=2"]
    validation = ["nve_seconds=1", "teacher_nve_seconds=1", "speed_seconds=0.3", "sizes=[8]"]
    settings += [f"validation.{part}" for part in (*validation, "repeats=1", "nve_ps=0.02")]
    options = resolve(
        SpecializeOptions, None, settings, teacher="teacher.safetensors", to="4x0+3x1", minutes=1.0
    )
    atoms = bulk("MgO", "rocksalt", a=4.21, cubic=True)
    certificate = specialize([atoms], options, folder / "run", progress=False)
    parameters = [row.parameters for row in certificate.stages]
    assert parameters[0] > parameters[1] > parameters[2] == parameters[3] == parameters[4]
    assert {"model.pt", "certificate.json", "report.html"} <= {p.name for p in (folder / "run").iterdir()}
    spec = read_spec(folder / "run" / "distilled.safetensors")
    assert spec.family == "mace" and spec.provenance.steps[0].action == "prune"
