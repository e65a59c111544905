"""The inputs in recipes/lammps run as they stand, in a small size."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.build import bulk
from lammps_runs import BAR, Lammps

from compactmlip import CompactMLIPCalculator

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "lammps"


def output(lammps: Lammps, folder: Path, name: str, model: Path, **variables: Any) -> str:
    """Output of a recipe whose variables are set before, as ``-var`` does."""
    given = {"model": model, "repeat": 2, **variables}
    start = "".join(f"variable {key} index {value}\n" for key, value in given.items())
    done = lammps.run(folder, start + (RECIPES / name).read_text())
    assert done.status == 0, done.output[-3000:]
    return done.output


def test_all_are_tested() -> None:
    assert {p.name for p in RECIPES.glob("*.in")} == {"nve.in", "nvt-rdf.in", "npt-density.in", "elastic.in"}


def test_nve(lammps: Lammps, models: Any, tmp_path: Path) -> None:
    text = output(lammps, tmp_path, "nve.in", models("mace", dtype="float32"), steps=40)
    drift = float(re.search(r"Energy drift: (\S+) meV/atom/ps", text)[1])  # type: ignore[index]
    assert 0 < abs(drift) < 20


def test_nvt_rdf(lammps: Lammps, models: Any, tmp_path: Path) -> None:
    model = models("trusted", dtype="float32")
    text = output(lammps, tmp_path, "nvt-rdf.in", model, steps=40, temperature=300)
    assert "v_outside" in text
    rows = [line.split() for line in (tmp_path / "rdf.txt").read_text().splitlines() if line[0] != "#"]
    table = np.array([row for row in rows if len(row) == 8], dtype=float)
    r, mg_mg, mg_o = table[-120:, 1], table[-120:, 2], table[-120:, 4]
    assert r[mg_o.argmax()] == pytest.approx(4.21 / 2, abs=0.2)
    assert r[(mg_mg * (r < 3.6)).argmax()] == pytest.approx(4.21 / np.sqrt(2), abs=0.2)


def test_picture(lammps: Lammps, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def plot(log: str) -> None:
        monkeypatch.setattr(sys, "argv", ["plot.py", "--nve", log])
        runpy.run_path(str(RECIPES / "plot.py"), run_name="__main__")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "rdf.txt").write_text("# Time-averaged data\n")
    with pytest.raises(SystemExit, match=r"rdf\.txt has no average"):
        plot("nve.log")
    output(lammps, tmp_path, "nvt-rdf.in", models("trusted", dtype="float32"), steps=40, temperature=300)
    (tmp_path / "nvt.log").write_bytes((tmp_path / "log.lammps").read_bytes())
    output(lammps, tmp_path, "nve.in", models("mace", dtype="float32"), steps=40)
    with pytest.raises(SystemExit, match=r"is it the log of nve\.in"):
        plot("nvt.log")
    plot("log.lammps")
    assert (tmp_path / "lammps.png").stat().st_size > 5000


def test_npt_density(lammps: Lammps, models: Any, tmp_path: Path) -> None:
    text = output(lammps, tmp_path, "npt-density.in", models("mace", dtype="float32"), steps=40)
    found = re.search(r"Density: (\S+) g/cm\^3, lattice constant: (\S+) Angstrom", text.split("print")[-1])
    density, length = (float(word) for word in found.groups())  # type: ignore[union-attr]
    grams = 4 * (24.305 + 15.999) / 6.02214076e23
    assert density == pytest.approx(grams / (length * 1e-8) ** 3, rel=1e-2)
    assert length == pytest.approx(4.21, abs=0.3) and length != 4.21


def test_elastic(lammps: Lammps, models: Any, tmp_path: Path) -> None:
    """Elastic constants are those of strained cells in ASE; atoms of rock salt do not move."""
    model, strain = models("sevennet"), 0.005
    text = output(lammps, tmp_path, "elastic.in", model, repeat=1)
    length = float(re.findall(r"Lattice constant: ([\d.]+) Angstrom", text)[-1])
    found = [float(w) for w in re.findall(r"C11 = (\S+), C12 = (\S+), C44 = (\S+) GPa", text)[-1]]
    calculator = CompactMLIPCalculator(model)

    def stress(deformation: list[tuple[int, int, float]]) -> np.ndarray:
        atoms = bulk("MgO", "rocksalt", a=length, cubic=True)
        matrix = np.eye(3)
        for i, j, size in deformation:
            matrix[i, j] += size
        atoms.set_cell(atoms.cell.array @ matrix, scale_atoms=True)
        atoms.calc = calculator
        result: np.ndarray = atoms.get_stress() * BAR / 1e4
        return result

    x = (stress([(0, 0, strain)]) - stress([(0, 0, -strain)])) / (2 * strain)
    xy = (stress([(1, 0, strain)]) - stress([(1, 0, -strain)])) / (2 * strain)
    assert found == pytest.approx([x[0], x[1], xy[5]], abs=0.3 + 0.01 * abs(x[0]))
    assert abs(x[0]) > 5
