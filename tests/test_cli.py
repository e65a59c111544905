"""Commands on a small random model: what they write, print and refuse."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.io
import pytest
import torch
from ase.build import bulk
from cli_runs import run_cli
from torch import nn

from compactmlip.checkpoint import read_spec, save
from compactmlip.errors import CompactMLIPError


@pytest.fixture
def folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_spec: Callable[..., Any],
    make_model: Callable[..., nn.Module],
) -> Path:
    model = make_model(make_spec(channels=(6, 4), num_layers=2, lmax_edge=1), dtype=torch.float32)
    model.energy_scale.mul_(0.1)
    save(model, tmp_path / "teacher.safetensors")
    ase.io.write(tmp_path / "mgo.xyz", bulk("MgO", "rocksalt", a=4.21, cubic=True))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_step(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        "convert teacher.safetensors -o small.safetensors --species Mg,O",
        "sample mgo.xyz --teacher small.safetensors -n 12 -o samples.xyz --set md_fraction=0",
        "label samples.xyz --teacher small.safetensors -o labelled.xyz --json",
        "prune small.safetensors -o pruned.safetensors --to 4x0+2x1 --calibration labelled.xyz",
        "distil pruned.safetensors --train labelled.xyz --valid labelled.xyz -o done.safetensors --epochs 2",
        "compile done.safetensors -o model.pt --dtype float64",
        "info model.pt --json",
    ]
    for line in lines:
        code, out, err = run_cli(monkeypatch, capsys, line)
        assert code == 0, f"{line}\n{out}\n{err}"
    described = json.loads(out)
    assert described["species"] == "2: O Mg"
    assert described["licence"] == "MIT"
    assert described["dtype"] == "float64"
    assert len(ase.io.read(folder / "labelled.xyz", ":")) == 12
    steps = [step.action for step in read_spec(folder / "done.safetensors").provenance.steps]
    assert steps[0] == "prune" and steps[-1] == "distil"


def test_info_of_a_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run_cli(monkeypatch, capsys, "info teacher.safetensors")
    assert code == 0
    for word in (
        "nequip",
        "H C O Mg Si",
        "layer 1",
        "6x0+4x1",
        "4.0 Angstrom",
        "8.0 Angstrom",
        "float32",
        "MIT",
    ):
        assert word in out, word
    architecture = read_spec(folder / "teacher.safetensors").architecture
    for t, layer in enumerate(architecture["layers"]):
        assert re.search(rf"layer {t}: \S+, {len(layer['paths'])} paths", out)


def test_compile_says_what_the_precision_costs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "compile teacher.safetensors -o coarse.pt --dtype bf16 --tf32 --calibration mgo.xyz"
    code, out, err = run_cli(monkeypatch, capsys, line)
    assert code == 0, err
    assert out.startswith("wrote coarse.pt (torch, bf16, ") and " structures: energy " in out
    assert "6 built-in structures" in out and "1 calibration structures" in out
    code, out, _ = run_cli(monkeypatch, capsys, f"{line} --json")
    found = json.loads(out)
    assert (found["output"], found["dtype"], found["backend"]) == ("coarse.pt", "bf16", "torch")
    (_, calibration) = found["accuracy"]
    assert 1e-6 < calibration["energy_mae"] == calibration["energy_max"] < 0.1  # of one structure
    code, out, _ = run_cli(monkeypatch, capsys, "info coarse.pt")
    assert code == 0 and "bf16, TF32 products on NVIDIA GPUs" in out and "1 calibration structures" in out


def test_parameters_add_up(folder: Path) -> None:
    from compactmlip.checkpoint import load
    from compactmlip.info import describe

    described = describe(folder / "teacher.safetensors")
    counts = [int(row.rpartition(" ")[2]) for row in described["by block"]]
    assert sum(counts) == int(described["parameters"])
    assert sum(counts) == sum(p.numel() for p in load(folder / "teacher.safetensors").parameters())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("info absent.safetensors", "no such file"),
        ("convert 7net-l3i6", "Did you mean '7net-l3i5'"),
        ("convert teacher.safetensors --species Mg,Pu", "Pu"),
        ("convert teacher.safetensors --dtype half", "unknown dtype 'half'"),
        ("sample absent.xyz --teacher teacher.safetensors", "absent.xyz"),
        ("sample mgo.xyz --teacher teacher.safetensors --set tempreture=300", "Did you mean 'temperature'"),
        ("prune teacher.safetensors --calibration mgo.xyz --to 4y0", "cannot read channels"),
        ("prune teacher.safetensors --calibration mgo.xyz --group-key mp_id", "--group-key mp_id"),
        ("distil teacher.safetensors --train mgo.xyz --valid mgo.xyz --epochs 1", "REF_energy"),
        (
            "distil teacher.safetensors --train mgo.xyz --valid mgo.xyz --epochs 1 --energy-key energie",
            "energie",
        ),
        ("validate mgo.xyz --teacher teacher.safetensors --structure mgo.xyz", "mgo.xyz"),
        ("compile mgo.xyz -o model.pt", "mgo.xyz"),
        ("compile teacher.safetensors --dtype bf61", "Did you mean 'bf16'"),
        ("compile teacher.safetensors -o m.pt --backend aoti", "*.pt2"),
        ("compile teacher.safetensors --backend aoti --tf32", "--backend torch"),
    ],
)
def test_errors_are_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    before = sorted(p.name for p in folder.iterdir())
    code, _, err = run_cli(monkeypatch, capsys, line)
    assert code == 1
    assert message in err and err.startswith("error: ") and "Traceback" not in err
    assert sorted(p.name for p in folder.iterdir()) == before


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from compactmlip import __version__

    assert run_cli(monkeypatch, capsys, "--version")[1].strip() == f"compactmlip {__version__}"


def test_interrupt_says_that_it_continues(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import compactmlip.info

    def stop(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compactmlip.info, "describe", stop)
    code, _, err = run_cli(monkeypatch, capsys, "info teacher.safetensors")
    assert code == 130 and "continues" in err


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_threads_do_not_spin_for_long(given: dict[str, str], expected: str) -> None:
    """The bound is set before torch is loaded, and a user's own choice is kept."""
    code = (
        "import os, sys\n"
        "sys.argv = ['compactmlip', '--version']\n"
        "from compactmlip import cli\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment | given, check=True
    )
    assert done.stdout.split()[-2:] == [expected, "False"]


def test_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from compactmlip.kernels import build as building

    source = tmp_path / "tiny.cpp"
    source.write_text('extern "C" int compactmlip_cli_test() { return 1; }\n')
    monkeypatch.setattr(building, "sources", lambda: [source])
    monkeypatch.setattr("compactmlip.lammps.build.installed", lambda: None)  # its plugin takes a minute
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    code, _, err = run_cli(monkeypatch, capsys, "build")
    assert code == 1 and err.startswith("error: ") and "no-such-compiler" in err
    monkeypatch.delenv("CXX")
    try:
        building.find_compiler()
    except CompactMLIPError as error:
        pytest.skip(str(error))
    code, out, _ = run_cli(monkeypatch, capsys, "build --json")
    report = json.loads(out)
    assert code == 0 and report["built"] and Path(report["path"]).is_file() and report["lammps"] is None
    code, out, _ = run_cli(monkeypatch, capsys, "build")
    assert code == 0 and "already there" in out and report["path"] in out
