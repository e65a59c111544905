"""ASE databases, with labels wherever people put them, and VASP's XML."""

from __future__ import annotations

import sys
from pathlib import Path

import ase.db
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.units import GPa

from compactmlip.data.read import read_labelled, read_structures
from compactmlip.errors import InputError

STRESS = np.array([0.1, 0.2, 0.3, 0.04, 0.05, 0.06])


def frames(rng: np.random.Generator) -> list[Atoms]:
    out = []
    for k in range(3):
        atoms = bulk("MgO", "rocksalt", a=4.2)
        atoms.rattle(0.1, seed=k)
        forces = rng.normal(size=(2, 3))
        atoms.calc = SinglePointCalculator(atoms, energy=-10.5 - k, forces=forces, stress=STRESS)
        out.append(atoms)
    return out


def write(path: Path, structures: list[Atoms], first: int = 0) -> None:
    with ase.db.connect(path) as database:
        for k, atoms in enumerate(structures, start=first):
            database.write(atoms, key_value_pairs={"mp_id": f"mp-{k}", "config_type": "rattled"})


@pytest.mark.parametrize("suffix", ["db", "aselmdb"])
def test_rows_keep_what_is_said_about_them(tmp_path: Path, rng: np.random.Generator, suffix: str) -> None:
    if suffix == "aselmdb":
        pytest.importorskip("ase_db_backends")
    written = frames(rng)
    write(tmp_path / f"set.{suffix}", written)
    found = read_labelled(
        tmp_path / f"set.{suffix}", energy_key="energy", forces_key="forces", stress_key="stress"
    )
    assert [a.info["mp_id"] for a in found] == ["mp-0", "mp-1", "mp-2"]
    assert {a.info["config_type"] for a in found} == {"rattled"}
    for own, atoms in zip(written, found, strict=True):
        assert atoms.info["REF_energy"] == own.get_potential_energy()
        np.testing.assert_allclose(atoms.positions, own.positions)
        np.testing.assert_allclose(atoms.arrays["REF_forces"], own.get_forces())
        np.testing.assert_allclose(atoms.info["REF_stress"], STRESS)


def test_folder_of_lmdb_files(tmp_path: Path, rng: np.random.Generator) -> None:
    pytest.importorskip("ase_db_backends")
    folder = tmp_path / "train"
    folder.mkdir()
    written = frames(rng)
    write(folder / "b.aselmdb", written[1:], first=1)
    write(folder / "a.aselmdb", written[:1])
    assert [a.info["mp_id"] for a in read_structures(folder)] == ["mp-0", "mp-1", "mp-2"]


def test_labels_in_the_data_of_a_row(tmp_path: Path, rng: np.random.Generator) -> None:
    """Of three atoms, where forces have the shape of a tensor."""
    water = molecule("H2O")
    water.set_cell([9, 9, 9])
    water.pbc = True
    forces, tensor = rng.normal(size=(3, 3)), np.diag([1.0, 2.0, 3.0])
    data = {"dft_forces": forces, "dft_stress": tensor, "charges": np.arange(3.0), "origin": {"code": "x"}}
    data["mean_stress"] = tensor
    with ase.db.connect(tmp_path / "set.db") as database:
        database.write(water, key_value_pairs={"dft_energy": -3.25}, data=data)
    keys = {"energy_key": "dft_energy", "forces_key": "dft_forces", "stress_key": "dft_stress"}
    (found,) = read_labelled(tmp_path / "set.db", **keys)
    assert found.info["REF_energy"] == -3.25 and found.info["origin"] == {"code": "x"}
    np.testing.assert_array_equal(found.arrays["REF_forces"], forces)
    np.testing.assert_array_equal(found.info["REF_stress"], [1, 2, 3, 0, 0, 0])
    np.testing.assert_array_equal(found.arrays["charges"], np.arange(3.0))
    assert "mean_stress" in found.info and "mean_stress" not in found.arrays


def test_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "noise.db").write_text("this is no database, but it is long enough to be one\n" * 9)
    with pytest.raises(InputError, match=r"noise.db: ASE cannot read this file"):
        read_structures(tmp_path / "noise.db")
    database = ase.db.connect(tmp_path / "none.db")
    database.delete([database.write(bulk("Cu"))])
    with pytest.raises(InputError, match=r"none.db: the file holds no structure"):
        read_structures(tmp_path / "none.db")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: is a folder, not a file"):
        read_structures(tmp_path / "empty")
    (tmp_path / "set.aselmdb").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "ase_db_backends", None)
    with pytest.raises(InputError, match=r"need the package ase-db-backends \(pip install '.\[lmdb\]'\)"):
        read_structures(tmp_path / "set.aselmdb")


def _rows(values: np.ndarray) -> str:
    return "".join(f"<v>{' '.join(f'{x:.8f}' for x in row)}</v>\n" for row in values)


def test_vasprun(tmp_path: Path) -> None:
    """VASP's stress is in kbar, of the other sign; its forces and energy are eV and Angstrom."""
    atoms = bulk("MgO", "rocksalt", a=4.2)
    forces = np.array([[0.1, -0.2, 0.3], [-0.1, 0.2, -0.3]])
    kbar = np.array([[10.0, 1.0, 2.0], [1.0, 20.0, 3.0], [2.0, 3.0, 30.0]])
    structure = (
        f"<crystal><varray name='basis'>{_rows(atoms.cell.array)}</varray></crystal>"
        f"<varray name='positions'>{_rows(atoms.get_scaled_positions())}</varray>"
    )
    energies = "<i name='e_fr_energy'>-12.5</i><i name='e_wo_entrp'>-12.4</i><i name='e_0_energy'>-12.45</i>"
    kinds = "".join(f"<rc><c>{s}</c><c>{k}</c></rc>" for k, s in ((1, "Mg"), (2, "O")))
    (tmp_path / "vasprun.xml").write_text(
        "<?xml version='1.0'?><modeling><generator><i name='program'>vasp</i></generator>"
        "<kpoints><varray name='kpointlist'><v>0 0 0</v></varray>"
        "<varray name='weights'><v>1</v></varray></kpoints>"
        f"<atominfo><atoms>2</atoms><types>2</types><array name='atoms'><set>{kinds}</set></array></atominfo>"
        f"<structure name='initialpos'>{structure}</structure>"
        f"<calculation><scstep><energy>{energies}</energy></scstep><structure>{structure}</structure>"
        f"<varray name='forces'>{_rows(forces)}</varray><varray name='stress'>{_rows(kbar)}</varray>"
        f"<energy>{energies}</energy></calculation><structure name='finalpos'>{structure}</structure>"
        "</modeling>"
    )
    keys = {"energy_key": "free_energy", "forces_key": "forces", "stress_key": "stress"}
    (found,) = read_labelled(tmp_path / "vasprun.xml", **keys)
    assert str(found.symbols) == "MgO" and found.info["REF_energy"] == -12.5
    np.testing.assert_allclose(found.arrays["REF_forces"], forces)
    expected = -0.1 * GPa * np.array([10, 20, 30, 3, 2, 1])
    np.testing.assert_allclose(found.info["REF_stress"], expected)
