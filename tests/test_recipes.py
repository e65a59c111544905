"""The scripts in recipes/ run as they stand, in their smoke size and with tiny models."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from ase.build import bulk, molecule

from compactmlip import CompactMLIPCalculator, checkpoint

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


@pytest.fixture(scope="module")
def tiny(
    tmp_path_factory: pytest.TempPathFactory, make_spec: Callable[..., Any], make_model: Callable[..., Any]
) -> Callable[..., Path]:
    """``tiny(*species)``: checkpoint of a weak, smooth model."""

    def make(*species: str) -> Path:
        spec = make_spec(species=species, channels=(4, 3), lmax_edge=1, num_layers=2)
        model = make_model(spec, dtype=torch.float64)
        with torch.no_grad():
            model.get_buffer("energy_scale").mul_(0.1)
        return checkpoint.save(model, tmp_path_factory.mktemp("model") / "model.safetensors")

    return make


def run(monkeypatch: pytest.MonkeyPatch, recipe: str, *arguments: object) -> None:
    script = RECIPES / recipe / "run.py"
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    runpy.run_path(str(script), run_name="__main__")


def test_all_are_tested_and_explained() -> None:
    scripts = {p.parent.name for p in RECIPES.glob("*/run.py")}
    assert scripts == {"mgo-crystal", "silicon", "electrolyte", "molecule", "water"}
    index = (RECIPES / "README.md").read_text()
    for name in scripts | {"lammps"}:
        assert (RECIPES / name / "README.md").is_file() and f"({name}/README.md)" in index


def test_mgo(tiny: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    model = tiny("Mg", "O")
    run(monkeypatch, "mgo-crystal", "--smoke", "--model", model, "--teacher", model, "-o", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    found = results["model"]
    assert (tmp_path / "figures.png").stat().st_size > 5000 and "C44_GPa" in capsys.readouterr().out
    np.testing.assert_equal(found, results["teacher"])  # one file, and nothing that depends on chance
    atoms = bulk("MgO", "rocksalt", a=1.0, cubic=True)
    atoms.set_cell(atoms.cell * (8 * found["volumes_A3"][4]) ** (1 / 3), scale_atoms=True)
    assert atoms.cell.lengths()[0] == pytest.approx(found["lattice_constant_A"], rel=1e-4)
    atoms.calc = CompactMLIPCalculator(model)
    assert atoms.get_potential_energy() / 8 == pytest.approx(found["energies_eV"][4], abs=1e-4)
    if "phonons_THz" in found:
        assert len(found["phonons_THz"]) == 6**3 * 6 and np.isfinite(found["phonons_THz"]).all()


def test_silicon(tiny: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """Labels of one model with another zero of energy: it has no errors, and another model has some."""
    teacher, other = tiny("Si"), tiny("Si", "O")
    frames = []
    for k in range(4):
        atoms = bulk("Si", cubic=True, a=5.4)
        atoms.rattle(0.05, seed=k)
        atoms.calc = CompactMLIPCalculator(teacher)
        atoms.info["REF_energy"] = atoms.get_potential_energy() - 7.9 * len(atoms)
        atoms.new_array("REF_forces", atoms.get_forces())
        atoms.info["config_type"] = "warm" if k % 2 else "cold"
        atoms.calc = None
        frames.append(atoms)
    ase.io.write(tmp_path / "test.xyz", frames)
    models = ["--model", teacher, other, "--name", "teacher", "other"]
    run(monkeypatch, "silicon", "--smoke", "--test", tmp_path / "test.xyz", *models, "-o", tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())
    assert (tmp_path / "errors.png").stat().st_size > 5000 and "C44 (GPa)" in capsys.readouterr().out
    for kind, number in (("all", 4), ("warm", 2), ("cold", 2)):
        own, wrong = (found[name]["errors"]["by_type"][kind] for name in ("teacher", "other"))
        assert own["frames"] == number
        assert own["energy_meV_per_atom"] < 0.01 and own["forces_meV_per_A"] < 0.01
        assert wrong["forces_meV_per_A"] > 1
    assert np.isfinite(list(found["teacher"]["properties"].values())).all()


def test_molecule(tiny: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    model = tiny("H", "C", "O")
    run(monkeypatch, "molecule", "--smoke", "--model", model, "-o", tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())
    assert len(found["modes_per_cm"]) == 27 and found["modes_per_cm"] == sorted(found["modes_per_cm"])
    energies = np.array(found["torsion_meV"])
    assert energies.min() == 0 and energies.max() > 1e-3
    assert energies[0] == pytest.approx(energies[-1], abs=1e-6)  # a whole turn
    assert (tmp_path / "torsion.png").is_file() and "wave numbers" in capsys.readouterr().out
    run(monkeypatch, "molecule", "--write", tmp_path / "ethanol.xyz")
    written = ase.io.read(tmp_path / "ethanol.xyz", ":")
    assert {str(atoms.symbols) for atoms in written} == {str(molecule("CH3CH2OH").symbols)}
    functions = runpy.run_path(str(RECIPES / "molecule" / "run.py"))
    angles = [atoms.get_dihedral(*functions["hydroxyl_angle"](atoms)) for atoms in written]
    assert angles == pytest.approx([0, 60, 120, 180, 240, 300], abs=0.01)


def test_electrolyte(tiny: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    run(monkeypatch, "electrolyte", "--write", tmp_path / "start.xyz")
    start = ase.io.read(tmp_path / "start.xyz")
    counts = {s: start.get_chemical_symbols().count(s) for s in ("Li", "O", "Cl")}
    assert counts == {"Li": 77, "O": 27, "Cl": 23}
    lengths = start.get_all_distances(mic=True)[np.triu_indices(len(start), 1)]
    assert lengths.min() == pytest.approx(3.91 / 2, abs=1e-6)  # Li-O
    run(monkeypatch, "electrolyte", "--smoke", "--model", tiny("Li", "O", "Cl"), "-o", tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())
    (row,) = found["rows"]
    assert found["atoms"] == 38 and found["arrhenius"] is None
    assert (tmp_path / "diffusion.png").stat().st_size > 5000
    assert row["target_K"] == 800 and row["kind"] in {"diffuses", "vibrates", "undecided"}
    assert (
        row["exponent"] > 0 and row["D_error"] > 0 and f"{row['measured_K']:.0f} K" in capsys.readouterr().out
    )


def test_water(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    model = tiny("H", "O")
    run(monkeypatch, "water", "--smoke", "--model", model, "--write", tmp_path / "melt.xyz")
    first, *others = ase.io.read(tmp_path / "melt.xyz", ":")
    grams = first.get_masses().sum() / 6.02214076e23
    assert len(first) == 24 and grams / first.get_volume() * 1e24 == pytest.approx(0.997, rel=1e-6)
    moved = [np.abs(frame.positions - first.positions).max() for frame in others]
    assert len(others) == 29 and moved[0] > 1e-3 and moved[-1] > moved[0]
    run(monkeypatch, "water", "--smoke", "--model", model, "-o", tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["atoms"] == 24 and found["nve"]["steps"] == 200 and found["nve"]["stable"]
    assert abs(found["nve"]["drift"]["slope"]) < 50 and (tmp_path / "rdf.png").is_file()
    assert set(found["peaks"]) == {"H-H", "H-O", "O-O"}


def test_activation_energy() -> None:
    """D = 3 exp(-0.25 eV / kB T); what is not certain does not count."""
    from ase.units import kB

    functions = runpy.run_path(str(RECIPES / "electrolyte" / "run.py"))
    rows = [
        {"kind": "diffuses", "measured_K": t, "D": d, "D_error": 0.1 * d}
        for t in (600.0, 900.0, 1300.0)
        for d in [3 * np.exp(-0.25 / kB / t)]
    ]
    rows.append({"kind": "undecided", "measured_K": 300.0, "D": 1.0})
    energy, error, prefactor = functions["arrhenius"](rows)
    assert energy == pytest.approx(0.25) and prefactor == pytest.approx(3)
    inverse = np.array([1 / (kB * row["measured_K"]) for row in rows[:3]])
    assert error == pytest.approx(0.1 / np.sqrt(3 * inverse.var()))  # of a line through equal errors
    assert functions["arrhenius"](rows[-2:]) is None
