from __future__ import annotations

import gzip
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator

from compactmlip.data.read import read_labelled, read_structures, split_isolated_atoms, write_labelled
from compactmlip.errors import CheckpointError, InputError

VOIGT = np.array([0.11, -0.22, 0.33, 0.04, -0.05, 0.06])
FULL = np.array([[0.11, 0.06, -0.05], [0.06, -0.22, 0.04], [-0.05, 0.04, 0.33]])


def labelled(rng: np.random.Generator, number: int = 3) -> list[Atoms]:
    frames = []
    for k in range(number):
        atoms = bulk("MgO", "rocksalt", a=4.21, cubic=True)
        atoms.positions += 0.1 * rng.standard_normal((8, 3))
        atoms.info = {
            "REF_energy": -47.1234567890123 - k / 3,
            "REF_stress": VOIGT / 3,
            "config_type": "rattle",
        }
        atoms.new_array("REF_forces", rng.standard_normal((8, 3)) * 10.0 ** rng.integers(-9, 2, (8, 3)))
        frames.append(atoms)
    return frames


def written_by_ase(path: Path, **extra: object) -> Path:
    """Two frames with REF labels, written by ASE; ``extra`` replaces info or arrays of the second."""
    frames = []
    for _ in range(2):
        atoms = bulk("MgO", "rocksalt", a=4.21)
        atoms.info["REF_energy"] = -11.5
        atoms.new_array("REF_forces", np.full((2, 3), 0.25))
        frames.append(atoms)
    for key, value in extra.items():
        if value is None:
            frames[1].info.pop(key, None)
            frames[1].arrays.pop(key, None)
        elif isinstance(value, np.ndarray) and len(value) == 2:
            frames[1].arrays[key] = value
        else:
            frames[1].info[key] = value
    ase.io.write(path, frames, format="extxyz")
    return path


def test_written_labels_read_back_exactly(tmp_path: Path, rng: np.random.Generator) -> None:
    frames = labelled(rng)
    frames[1].new_array("tags", np.arange(8))
    frames[1].new_array("frozen", np.arange(8) % 2 == 0)
    frames[1].new_array("name", np.array([f"a{k}" for k in range(8)]))
    frames[2].pbc = (True, False, True)
    frames[2].info["comment"] = 'spaces, = and "quotes"'
    path = write_labelled(tmp_path / "set.extxyz", frames)
    back = read_labelled(path, require=("energy", "forces", "stress"))
    for a, b in zip(frames, back, strict=True):
        assert a.get_chemical_symbols() == b.get_chemical_symbols()
        assert np.array_equal(a.pbc, b.pbc) and np.array_equal(a.cell.array, b.cell.array)
        assert a.arrays.keys() == b.arrays.keys()
        assert all(np.array_equal(a.arrays[name], b.arrays[name]) for name in a.arrays)
        assert a.info["REF_energy"] == b.info["REF_energy"]
        assert np.array_equal(a.info["REF_stress"], b.info["REF_stress"])
    assert back[2].info["comment"] == frames[2].info["comment"]
    assert back[1].arrays["frozen"].dtype == bool


def test_ase_reads_what_is_written(tmp_path: Path, rng: np.random.Generator) -> None:
    frames = [*labelled(rng, 1), molecule("H2O")]
    back = ase.io.read(write_labelled(tmp_path / "set.xyz", frames), ":")
    assert [str(a.symbols) for a in back] == [str(a.symbols) for a in frames]
    assert not back[1].pbc.any() and not back[1].cell.any()
    assert np.array_equal(back[0].positions, frames[0].positions)


def test_failed_write_keeps_the_old_file(tmp_path: Path, rng: np.random.Generator) -> None:
    path = write_labelled(tmp_path / "set.extxyz", labelled(rng, 1))
    before = path.read_bytes()
    bad = labelled(rng, 2)
    bad[1].arrays["REF_hessian"] = np.zeros((8, 3, 3))
    with pytest.raises(InputError, match="REF_hessian"):
        write_labelled(path, bad)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match=r"extxyz"):
        write_labelled(tmp_path / "set.json", bad)
    with pytest.raises(CheckpointError, match="cannot write"):
        write_labelled(tmp_path / "nowhere" / "set.xyz", labelled(rng, 1))


@pytest.mark.parametrize("shape", [(6,), (9,), (3, 3)])
def test_stress_shapes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    value = VOIGT if shape == (6,) else FULL.reshape(shape)
    path = written_by_ase(tmp_path / "set.xyz", REF_stress=value)
    first, second = read_labelled(path)
    assert "REF_stress" not in first.info
    assert second.info["REF_stress"] == pytest.approx(VOIGT, abs=1e-12)


def test_virial_is_minus_volume_times_stress(tmp_path: Path) -> None:
    volume = 4.21**3 / 4
    path = written_by_ase(tmp_path / "set.xyz", REF_virials=-volume * FULL)
    assert read_labelled(path)[1].info["REF_stress"] == pytest.approx(VOIGT, rel=1e-9)
    assert "REF_virials" not in read_labelled(path)[1].info
    both = written_by_ase(tmp_path / "both.xyz", REF_virials=9 * FULL, REF_stress=FULL)
    assert read_labelled(both)[1].info["REF_stress"] == pytest.approx(VOIGT)


def test_stress_needs_a_cell(tmp_path: Path, rng: np.random.Generator) -> None:
    water, slab = molecule("H2O"), bulk("MgO", "rocksalt", a=4.21, cubic=True)
    slab.pbc = (True, True, False)
    for atoms in (water, slab):
        atoms.info.update(REF_energy=-1.0, REF_stress=VOIGT)
        atoms.new_array("REF_forces", np.zeros((len(atoms), 3)))
    path = write_labelled(tmp_path / "set.xyz", [water, slab])
    read = read_labelled(path)
    assert ["REF_stress" in atoms.info for atoms in read] == [False, True]
    with pytest.raises(InputError, match=r"frame 0 has no periodic cell"):
        read_labelled(path, require=("stress",))


def test_renamed_keys(tmp_path: Path) -> None:
    atoms = bulk("Si")
    atoms.info.update(dft_energy=-10.0, dft_virial=FULL)
    atoms.new_array("dft_forces", np.ones((2, 3)))
    path = write_labelled(tmp_path / "set.xyz", [atoms])
    keys = {"energy_key": "dft_energy", "forces_key": "dft_forces", "virials_key": "dft_virial"}
    (read,) = read_labelled(path, **keys)
    assert read.info["REF_energy"] == -10.0
    assert "dft_energy" not in read.info and "dft_forces" not in read.arrays
    assert read.arrays["REF_forces"] == pytest.approx(1.0)
    assert read.info["REF_stress"] == pytest.approx(-VOIGT / atoms.cell.volume)


@pytest.mark.parametrize("name", ["set.xyz", "set.traj", "set.db"])
def test_labels_that_ase_moves_to_a_calculator(tmp_path: Path, name: str) -> None:
    atoms = bulk("Si")
    forces = np.array([[0.1, 0.2, 0.3], [-0.1, -0.2, -0.3]])
    atoms.calc = SinglePointCalculator(atoms, energy=-10.5, forces=forces, stress=VOIGT)
    path = tmp_path / name
    ase.io.write(path, [atoms])
    with pytest.raises(InputError, match=r'frame 0 has no energy label .*energy_key="energy"'):
        read_labelled(path)
    (read,) = read_labelled(path, energy_key="energy", forces_key="forces", stress_key="stress")
    assert read.info["REF_energy"] == pytest.approx(-10.5)
    assert read.arrays["REF_forces"] == pytest.approx(forces)
    assert read.info["REF_stress"] == pytest.approx(VOIGT)
    assert read.calc is None


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"REF_energy": float("nan")}, r"set.xyz, frame 1: label 'REF_energy' holds NaN"),
        ({"REF_forces": np.full((2, 3), np.inf)}, r"frame 1: label 'REF_forces' holds NaN or infinite"),
        ({"REF_stress": np.full(6, np.nan)}, r"frame 1: label 'REF_stress' holds NaN"),
        ({"REF_energy": "none"}, r"frame 1: label 'REF_energy' is not a number: 'none'"),
        ({"REF_energy": np.arange(4.0)}, r"label 'REF_energy' has shape \(4,\), expected \(\) or \(1,\)"),
        ({"REF_forces": np.ones((2, 2))}, r"label 'REF_forces' has shape \(2, 2\), expected \(2, 3\)"),
        ({"REF_stress": np.arange(5.0)}, r"label 'REF_stress' has shape \(5,\)"),
        (
            {"REF_forces": None, "Energy": 1.0},
            r"frame 1 has no forces label 'REF_forces'.*Energy, REF_energy",
        ),
        ({"REF_energy": None, "REF_enrgy": 1.0}, r"no energy label.*arrays REF_forces.*mean 'REF_enrgy'"),
    ],
)
def test_bad_labels_name_frame_and_keys(tmp_path: Path, extra: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_labelled(written_by_ase(tmp_path / "set.xyz", **extra))


def test_require(tmp_path: Path) -> None:
    path = written_by_ase(tmp_path / "set.xyz", REF_forces=None)
    assert "REF_forces" not in read_labelled(path, require=("energy",))[1].arrays
    with pytest.raises(InputError, match=r"frame 0 has no stress label"):
        read_labelled(path, require=("energy", "stress"))
    with pytest.raises(InputError, match="cannot require"):
        read_labelled(path, require=("dipole",))  # type: ignore[arg-type]


def test_isolated_atoms(tmp_path: Path, rng: np.random.Generator) -> None:
    atoms = {"Mg": -1.5, "O": -2.5}
    isolated = [Atoms(s, info={"config_type": "IsolatedAtom", "REF_energy": e}) for s, e in atoms.items()]
    path = write_labelled(tmp_path / "set.xyz", [*labelled(rng, 2), *isolated])
    frames, energies = split_isolated_atoms(read_labelled(path))
    assert energies == atoms
    assert [len(f) for f in frames] == [8, 8]
    isolated[0].info["REF_energy"] = -1.6
    with pytest.raises(InputError, match=r"frame 4: isolated Mg has -1.6 eV here and -1.5"):
        split_isolated_atoms([*read_labelled(path), isolated[0]])
    pair = Atoms("Mg2", info={"config_type": "IsolatedAtom", "REF_energy": 1.0})
    with pytest.raises(InputError, match="exactly one atom"):
        split_isolated_atoms([pair])


def test_read_structures_takes_several_formats(tmp_path: Path) -> None:
    ase.io.write(tmp_path / "a.cif", bulk("Si"))
    ase.io.write(tmp_path / "POSCAR", bulk("MgO", "rocksalt", a=4.2))
    ase.io.write(tmp_path / "c.xyz", [molecule("H2O"), molecule("CO2")])
    with gzip.open(tmp_path / "d.xyz.gz", "wt") as file:
        file.write((tmp_path / "c.xyz").read_text())
    frames = read_structures([tmp_path / name for name in ("a.cif", "POSCAR", "c.xyz", "d.xyz.gz")])
    assert [str(f.symbols) for f in frames] == ["Si2", "MgO", "OH2", "CO2", "OH2", "CO2"]
    assert len(read_structures(str(tmp_path / "c.xyz"))) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.xyz", "", "empty.xyz: the file is empty"),
        ("blank.xyz", "\n\n", "blank.xyz: the file holds no structure"),
        ("noise.xyz", "this is no structure\n", "noise.xyz: line 1 should give frame 0's number of atoms"),
        ("noise.cif", "this is no structure\n", "noise.cif"),
        ("noise.qqq", "this is no structure\n", "noise.qqq: ASE cannot read this file"),
        ("column.xyz", "1\nProperties=species:S:1:pos:R:3\nO 0.0 x 0.0\n", "column.xyz: ASE cannot read"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_structures([tmp_path / name])


def test_missing_files(tmp_path: Path) -> None:
    (tmp_path / "bulk.xyz").write_text("1\n\nO 0 0 0\n")
    with pytest.raises(InputError, match=r"bluk\.xyz: no such file\. Did you mean 'bulk\.xyz'"):
        read_structures([tmp_path / "bulk.xyz", tmp_path / "bluk.xyz"])
    with pytest.raises(InputError, match="is a folder"):
        read_structures([tmp_path])
    with pytest.raises(InputError, match="no structure file"):
        read_structures([])


def test_every_truncation_is_noticed(tmp_path: Path, rng: np.random.Generator) -> None:
    """Cut at any byte: whole frames are left, or an error names the file.  Never a changed label."""
    frames = labelled(rng, 2)
    whole = write_labelled(tmp_path / "whole.xyz", frames).read_bytes()
    boundary = len(write_labelled(tmp_path / "one.xyz", frames[:1]).read_bytes())
    path = tmp_path / "cut.xyz"
    for size in [*range(0, len(whole), 7), boundary, *range(len(whole) - 30, len(whole))]:
        path.write_bytes(whole[:size])
        if size == boundary:
            assert len(read_labelled(path)) == 1
            continue
        with pytest.raises(InputError, match=r"cut\.xyz"):
            read_labelled(path)


def test_blank_line_does_not_hide_frames(tmp_path: Path) -> None:
    frame = "1\n\nO 0.0 0.0 0.0\n"
    path = tmp_path / "gap.xyz"
    path.write_text(frame + "\n" + frame)
    with pytest.raises(InputError, match=r"gap\.xyz: line 4 is blank, and the text from line 5 on"):
        read_structures([path])
    path.write_text(frame + frame + "\n\n")
    assert len(read_structures([path])) == 2
