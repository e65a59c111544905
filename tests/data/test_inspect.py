"""Bad data: every kind is found, named, and can be accepted or dropped."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from compactmlip.data.inspect import (
    CHECKS,
    Finding,
    check_species,
    inspect_sets,
    repeated_structures,
    settle,
)
from compactmlip.errors import InputError, SpeciesError
from compactmlip.spec import ModelSpec


def frames(count: int = 6, seed: int = 0) -> list[Atoms]:
    made = []
    for k in range(count):
        atoms = bulk("MgO", "rocksalt", a=4.21, cubic=True)
        atoms.rattle(0.05, seed=100 * seed + k)
        atoms.info["REF_energy"] = -47.0 + 0.1 * k
        atoms.new_array("REF_forces", np.full((8, 3), 0.1 * k))
        made.append(atoms)
    return made


def spoil_nan(train: list[Atoms]) -> None:
    train[2].arrays["REF_forces"][3, 1] = np.nan


def spoil_missing(train: list[Atoms]) -> None:
    del train[2].arrays["REF_forces"], train[4].arrays["REF_forces"]


def spoil_pbc(train: list[Atoms]) -> None:
    train[2].pbc = False


def spoil_force(train: list[Atoms]) -> None:
    train[2].arrays["REF_forces"][0, 0] = -250.0


def spoil_duplicate(train: list[Atoms]) -> None:
    train[2] = train[1].copy()


SPOILED: dict[str, tuple[Callable[[list[Atoms]], None], str, int]] = {
    "nan-labels": (spoil_nan, "1 frames have REF_forces that is NaN", 1),
    "missing-forces": (spoil_missing, "2 of 6 frames have no forces (train frame 2, train frame 4)", 2),
    "mixed-pbc": (spoil_pbc, "TTT: 5, FFF: 1; FFF is train frame 2", 1),
    "absurd-forces": (spoil_force, "is 250 eV/Angstrom in train frame 2", 1),
    "duplicates": (spoil_duplicate, "1 frames repeat an earlier structure of their set (train frame 2)", 1),
}


def test_good_data_have_no_findings() -> None:
    assert inspect_sets({"train": frames(), "valid": frames(seed=1)}, 100.0) == []


@pytest.mark.parametrize("check", list(SPOILED))
def test_each_check(check: str) -> None:
    spoil, message, count = SPOILED[check]
    sets = {"train": frames()}
    spoil(sets["train"])
    (found,) = inspect_sets(sets, 100.0)
    assert found.check == check and check in CHECKS and message in found.message
    with pytest.raises(InputError, match=rf"(?s)cannot be used as they are.*{check}: .*--drop {check}"):
        settle(sets, [found], (), ())
    kept, notes = settle(sets, [found], (), (check,))
    assert len(kept["train"]) == 6 - count and f"{count} frames left out" in notes[0]
    if check == "nan-labels":
        with pytest.raises(InputError, match="NaN"):
            settle(sets, [found], (check,), ())
    else:
        kept, notes = settle(sets, [found], (check,), ())
        assert len(kept["train"]) == 6 and message in notes[0]


def test_all_findings_are_in_one_message() -> None:
    sets = {"train": frames()}
    spoil_duplicate(sets["train"])
    spoil_nan(sets["train"])
    with pytest.raises(InputError) as raised:
        settle(sets, inspect_sets(sets, 100.0), (), ())
    assert "nan-labels: " in str(raised.value) and "duplicates: " in str(raised.value)


def test_structures_in_two_sets() -> None:
    sets = {"test": frames(2), "train": frames()}
    (found,) = inspect_sets(sets, 100.0)
    assert found.check == "leaks" and "2 in test and train" in found.message
    kept, _ = settle(sets, [found], (), ("leaks",))
    assert [len(kept["test"]), len(kept["train"])] == [2, 4]  # the training set gives way


def test_duplicates_with_other_labels_are_said() -> None:
    train = frames()
    spoil_duplicate(train)
    train[2].info["REF_energy"] += 1.0
    (found,) = inspect_sets({"train": train}, 100.0)
    assert "1 such structures have energies that differ" in found.message


def test_molecules_beside_crystals_are_only_noted() -> None:
    train = frames()
    train.append(Atoms("O2", [[0, 0, 0], [0, 0, 1.2]], info={"REF_energy": -9.0}))
    train[-1].new_array("REF_forces", np.zeros((2, 3)))
    (found,) = inspect_sets({"train": train}, 100.0)
    assert found.check == "mixed-pbc" and not found.fatal
    assert settle({"train": train}, [found], (), ())[1] == [f"mixed-pbc: {found.message}"]


def test_isolated_atoms_are_left_alone() -> None:
    free = Atoms("O", info={"REF_energy": -1.5, "config_type": "IsolatedAtom"})
    assert inspect_sets({"train": [*frames(), free]}, 100.0) == []


def test_unknown_checks_are_refused() -> None:
    with pytest.raises(InputError, match="unknown check 'nan'; the checks are nan-labels"):
        settle({}, [], ("nan",), ())
    assert settle({}, [Finding("units", "odd.", fatal=False)], (), ())[1] == ["units: odd."]


def test_repeated_structures_up_to_periodic_images() -> None:
    made = frames(4)
    image = made[1].copy()
    image.positions += image.cell.array[0] - 2 * image.cell.array[2]
    image.positions[0] += image.cell.array[1]
    near = made[2].copy()
    near.positions[0, 0] += 1e-3
    strained = made[3].copy()
    strained.set_cell(1.001 * strained.cell.array)
    assert repeated_structures([*made, image, near, strained, made[1]]) == [[1, 4, 7]]


def test_unknown_species_are_all_named(small_spec: ModelSpec) -> None:
    strange = [Atoms("PuO"), Atoms("Xe")]
    with pytest.raises(
        SpeciesError, match=r"Pu \(first in train frame 0\), Xe \(first in train frame 1\).*toy"
    ):
        check_species({"train": strange}, small_spec, "toy")
    check_species({"train": frames()}, small_spec, "toy")
