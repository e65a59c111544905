"""A part of each material: how many, which, and that the choice is stable."""

from __future__ import annotations

import pytest
from ase import Atoms

from compactmlip.data.subset import choose_per_group, group_names
from compactmlip.errors import InputError

GROUPS = ["a"] * 7 + ["b"] * 2 + ["a"] * 3 + ["c"] * 10


def per_group(chosen: list[int]) -> dict[str, int]:
    names = [GROUPS[k] for k in chosen]
    return {name: names.count(name) for name in "abc"}


def test_so_many_of_each_material() -> None:
    chosen = choose_per_group(GROUPS, 3, None, [0])
    assert chosen == sorted(set(chosen))
    assert per_group(chosen) == {"a": 3, "b": 2, "c": 3}
    assert per_group(choose_per_group(GROUPS, None, 0.25, [0])) == {"a": 2, "b": 1, "c": 2}
    assert choose_per_group(GROUPS, None, None, [0]) == list(range(22))


def test_choice_is_random_seeded_and_nested() -> None:
    chosen = choose_per_group(GROUPS, 3, None, [0])
    assert chosen == choose_per_group(GROUPS, 3, None, [0])
    assert len({tuple(choose_per_group(GROUPS, 3, None, [0, e])) for e in range(20)}) > 15
    assert set(chosen) < set(choose_per_group(GROUPS, 5, None, [0]))
    counts = [sum(k in choose_per_group(GROUPS, 5, None, [s]) for s in range(400)) for k in range(12, 22)]
    assert all(150 < n < 250 for n in counts), counts


def test_other_materials_do_not_change_the_choice() -> None:
    alone = choose_per_group(["c"] * 10, 4, None, [7])
    among = [k - 12 for k in choose_per_group(GROUPS, 4, None, [7]) if GROUPS[k] == "c"]
    assert alone == among


def test_missing_key_names_the_frame() -> None:
    frames = [Atoms("H", info={"mp_id": 3}), Atoms("He", info={"name": "x"})]
    assert group_names(frames[:1], "mp_id") == ["3"]
    with pytest.raises(
        InputError, match=r"frame 1 of the training set \(He\) has no such info key; it has name"
    ):
        group_names(frames, "mp_id")
