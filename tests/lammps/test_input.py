"""Scripts and data files that start a simulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.io import read, write
from lammps_runs import Lammps
from trust_structures import squeezed
from typer.testing import CliRunner

from compactmlip.cli import app
from compactmlip.errors import InputError, SpeciesError
from compactmlip.lammps.input import ROOM, boxed, write_data, write_input


def test_data_file_holds_the_structure(tmp_path: Path) -> None:
    atoms = bulk("MgO", "rocksalt", a=4.21)
    atoms.rattle(0.1, seed=1)
    write_data(tmp_path / "data.lammps", atoms, ["O", "Mg"])
    back: Any = read(tmp_path / "data.lammps", format="lammps-data", atom_style="atomic")
    assert back.get_chemical_symbols() == ["Mg", "O"]
    assert np.allclose(back.get_all_distances(mic=True), atoms.get_all_distances(mic=True), atol=1e-12)
    assert back.get_volume() == pytest.approx(atoms.get_volume(), rel=1e-12)


def test_structure_without_cell_gets_a_box() -> None:
    made = boxed(Atoms("CO", [[0, 0, 0], [0, 0, 1.1]]))
    assert np.allclose(made.cell.lengths(), [2 * ROOM, 2 * ROOM, 2 * ROOM + 1.1]) and not made.pbc.any()
    assert np.allclose(made.positions[1] - made.positions[0], [0, 0, 1.1])
    slab = Atoms("CO", [[0, 0, 0], [0, 0, 1.1]], cell=[3, 3, 50], pbc=(True, True, False))
    assert np.allclose(boxed(slab).cell.lengths(), [3, 3, 2 * ROOM + 1.1])


@pytest.mark.parametrize("ensemble", ["nve", "nvt", "npt"])
def test_script_runs(lammps: Lammps, models: Any, tmp_path: Path, ensemble: str) -> None:
    atoms = bulk("MgO", "rocksalt", a=4.21, cubic=ensemble != "npt")
    folder = tmp_path / "with space"
    write(tmp_path / "MgO.xyz", atoms)
    command = f"--ensemble {ensemble} --temperature 400 --repeat 2 --model {models('mace', dtype='float32')}"
    words = ["lammps-input", str(tmp_path / "MgO.xyz"), *command.split(), "-o", str(folder)]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0 and "lmp -in in.lammps" in result.output
    assert f"{8 * len(atoms)} atoms" in (folder / "data.lammps").read_text()
    script = (folder / "in.lammps").read_text().replace("index 1000", "index 10")
    done = lammps.run(folder, script)
    assert done.status == 0, done.output[-2000:]
    thermo = done.thermo()
    assert thermo["Temp"][0] == pytest.approx(400) and thermo["Step"][-1] == 10
    assert "Mg" in (folder / "trajectory.lammpstrj").read_text()
    if ensemble == "npt":
        assert thermo["Density"][0] != thermo["Density"][-1]


def test_script_looks_for_atoms_outside_the_trust_region(lammps: Lammps, models: Any, tmp_path: Path) -> None:
    written = write_input(squeezed(), models("trusted"), tmp_path, ensemble="nve", temperature=1)
    done = lammps.run(tmp_path, written.script.read_text().replace("index 1000", "index 1"))
    assert done.status == 0, done.output[-2000:]
    assert (done.thermo()["v_outside"] > 0).all() and "outside the model's trust region" in done.output
    plain = write_input(squeezed(), models("mace"), tmp_path / "plain")
    assert "check" not in plain.script.read_text() and "outside" not in plain.script.read_text()


def test_what_cannot_be_written(models: Any, tmp_path: Path) -> None:
    model, atoms = models("sevennet"), bulk("MgO", "rocksalt", a=4.21)
    with pytest.raises(SpeciesError, match="contains Cu, which the model does not cover"):
        write_input(bulk("Cu"), model, tmp_path)
    with pytest.raises(InputError, match="unknown ensemble 'nvp'; known: nve, nvt, npt"):
        write_input(atoms, model, tmp_path, ensemble="nvp")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="above 0 K, not -5"):
        write_input(atoms, model, tmp_path, temperature=-5)
    with pytest.raises(InputError, match="periodic in all directions"):
        write_input(Atoms("MgO", [[0, 0, 0], [2, 0, 0]]), model, tmp_path, ensemble="npt")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="--repeat must be at least 1, not 0"):
        CliRunner().invoke(
            app, ["lammps-input", "MgO.xyz", "--model", str(model), "--repeat", "0"], catch_exceptions=False
        )
