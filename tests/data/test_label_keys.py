"""Names and units of the user's own labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ase.db
import ase.io
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator

from compactmlip.data.label_keys import LabelOptions, group_weights, read_set
from compactmlip.errors import InputError

ENERGY, FORCES, STRESS = -11.5, np.full((2, 3), 0.25), np.array([0.01, 0.02, 0.03, 0.0, 0.0, 0.001])


def crystal(**labels: Any) -> Atoms:
    atoms = bulk("MgO", "rocksalt", a=4.21)
    for key, value in labels.items():
        (atoms.arrays if np.shape(value) == (2, 3) else atoms.info)[key] = value
    return atoms


def stored(atoms: Atoms) -> Atoms:
    atoms = atoms.copy()
    atoms.calc = SinglePointCalculator(atoms, energy=ENERGY, forces=FORCES, stress=STRESS)
    return atoms


@pytest.mark.parametrize("name", ["a.xyz", "a.db", "a.traj"])
def test_labels_of_ase_calculators_are_found(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith(".db"):
        with ase.db.connect(path) as database:
            for _ in range(2):
                database.write(stored(crystal()))
    else:
        ase.io.write(path, [stored(crystal())] * 2)
    found = read_set([path], LabelOptions())
    assert found.keys == {"energy": "energy", "forces": "forces", "stress": "stress"}
    assert len(found.frames) == 2 and "energy from 'energy'" in found.describe()
    for atoms in found.frames:
        assert atoms.info["REF_energy"] == ENERGY
        np.testing.assert_allclose(atoms.arrays["REF_forces"], FORCES, rtol=1e-7)
        np.testing.assert_allclose(atoms.info["REF_stress"], STRESS, rtol=1e-7)


def test_reference_names_come_before_those_of_calculators(tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    ase.io.write(path, [stored(crystal(REF_energy=-12.0, REF_forces=2 * FORCES))], format="extxyz")
    (atoms,) = read_set([path], LabelOptions()).frames
    assert atoms.info["REF_energy"] == -12.0 and atoms.arrays["REF_forces"][0, 0] == 0.5
    (atoms,) = read_set([path], LabelOptions(energy_key="energy", forces_key="forces")).frames
    assert atoms.info["REF_energy"] == ENERGY and atoms.arrays["REF_forces"][0, 0] == 0.25


def test_unknown_names_are_listed_with_a_proposal(tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    ase.io.write(path, [crystal(e_pbe=ENERGY, f_pbe=FORCES, comment="x")], format="extxyz")
    with pytest.raises(InputError, match=r"no frame has energy labels.*info keys: comment, e_pbe;.*f_pbe"):
        read_set([path], LabelOptions())
    with pytest.raises(InputError, match=r"no frame has forces labels.*--forces-key f_pbe"):
        read_set([path], LabelOptions(energy_key="e_pbe"))
    with pytest.raises(InputError, match=r"labels under 'epbe'.*--energy-key e_pbe"):
        read_set([path], LabelOptions(energy_key="epbe"))
    (atoms,) = read_set([path], LabelOptions(energy_key="e_pbe", forces_key="f_pbe")).frames
    assert atoms.info["REF_energy"] == ENERGY and atoms.info["comment"] == "x"


def test_truncated_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    ase.io.write(path, [crystal(REF_energy=ENERGY, REF_forces=FORCES)] * 2, format="extxyz")
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(InputError, match=r"a\.xyz: frame 1 .*truncated"):
        read_set([path], LabelOptions())


@pytest.mark.parametrize(
    ("options", "factors"),
    [
        ({"energy_unit": "Hartree", "forces_unit": "Hartree/Bohr"}, (27.211386, 51.422067, 1.0)),
        ({"energy_unit": "kcal/mol", "forces_unit": "kcal/mol/Angstrom"}, (0.0433641, 0.0433641, 1.0)),
        ({"energy_unit": "kJ/mol", "forces_unit": "kJ/mol/nm"}, (0.01036427, 0.001036427, 1.0)),
        ({"energy_per_atom": True, "gradients": True}, (2.0, -1.0, 1.0)),
        ({"stress_unit": "kbar", "compression_positive": True}, (1.0, 1.0, -0.1 * units.GPa)),
    ],
)
def test_units(tmp_path: Path, options: dict[str, Any], factors: tuple[float, float, float]) -> None:
    path = tmp_path / "a.xyz"
    labels = {"REF_energy": ENERGY, "REF_forces": FORCES, "REF_stress": STRESS}
    free = Atoms("O", info={"REF_energy": -1.5, "config_type": "IsolatedAtom"})
    ase.io.write(path, [crystal(**labels), free], format="extxyz")
    atoms, free = read_set([path], LabelOptions.model_validate(options)).frames
    assert atoms.info["REF_energy"] == pytest.approx(factors[0] * ENERGY, rel=1e-6)
    np.testing.assert_allclose(atoms.arrays["REF_forces"], factors[1] * FORCES, rtol=1e-6)
    np.testing.assert_allclose(atoms.info["REF_stress"], factors[2] * STRESS, rtol=1e-6)
    per_atom = 2 if options.get("energy_per_atom") else 1
    assert free.info["REF_energy"] == pytest.approx(-1.5 * factors[0] / per_atom, rel=1e-6)


def test_virials_have_the_unit_of_energies(tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    virials = -np.diag([1.0, 2.0, 3.0])
    ase.io.write(path, [crystal(energy_=ENERGY, REF_forces=FORCES, virial=virials)], format="extxyz")
    options = LabelOptions(energy_key="energy_", energy_unit="Hartree", stress_unit="GPa")
    (atoms,) = read_set([path], options).frames
    expected = units.Hartree * np.array([1.0, 2.0, 3.0]) / atoms.cell.volume
    np.testing.assert_allclose(atoms.info["REF_stress"][:3], expected, rtol=1e-12)


def test_weights_multiply() -> None:
    frames = [Atoms("O"), Atoms("O", info={"config_type": "bulk", "head": "pbe", "config_weight": 2.0})]
    frames[1].info["config_forces_weight"] = 0.5
    assert group_weights(frames[:1], {}, {}) is None
    found = group_weights(frames, {"bulk": 3.0}, {"pbe": 5.0})
    np.testing.assert_allclose(found, [[1.0, 1.0, 1.0], [30.0, 15.0, 30.0]])
    with pytest.raises(InputError, match=r"config_type 'bluk'.*Default, bulk"):
        group_weights(frames, {"bluk": 3.0}, {})
    assert group_weights(frames[:1], {"bluk": 3.0}, {}, strict=False) is None
    for wrong in (-1.0, "much", np.nan):
        frames[1].info["config_weight"] = wrong
        with pytest.raises(InputError, match="training frame 1"):
            group_weights(frames, {}, {})
