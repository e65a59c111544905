"""Frames by configuration type: most atoms first, the smallest together."""

from __future__ import annotations

from ase import Atoms

from compactmlip.data.config_types import MOST_GROUPS, grouped


def frames(*names: str | None) -> list[Atoms]:
    """One frame for each name, None for no type; each larger than the one before."""
    made = [Atoms(f"H{k + 1}") for k in range(len(names))]
    for atoms, name in zip(made, names, strict=True):
        if name is not None:
            atoms.info["config_type"] = name
    return made


def test_groups() -> None:
    found = grouped(frames("b", None, "b", "a"))
    assert list(found.items()) == [("a", [3]), ("b", [0, 2]), ("Default", [1])]
    assert list(grouped(frames(None, "x"), unnamed="other")) == ["x", "other"]
    assert grouped(frames("a", "a")) == grouped(frames(None)) == grouped([]) == {}


def test_the_smallest_share_a_group() -> None:
    names = [f"type {'x' * k}" for k in range(MOST_GROUPS + 6)]
    found = grouped(frames(*names))
    assert len(found) == MOST_GROUPS and found["7 other types"] == list(range(7))
    assert next(iter(found)) == names[-1] and len(grouped(frames(*names[:MOST_GROUPS]))) == MOST_GROUPS


def test_many_types_that_differ_in_numbers() -> None:
    """As data sets have them that name each snapshot."""
    names = [f"snapshot {k} of AIMD at {t} K" for k in range(4) for t in (300, 1518.5)]
    few = grouped(frames(*names, "strain -0.06"))
    assert len(few) == 9  # still few enough to be told apart
    many = grouped(
        frames(*names, *(f"strain {x:.2f}" for x in (-0.1, -0.05, -0.02, -0.01, 0, 0.01, 0.02, 0.05, 0.1)))
    )
    assert {name: len(members) for name, members in many.items()} == {
        "snapshot # of AIMD at # K": 8,
        "strain #": 9,
    }
    assert sorted(k for members in many.values() for k in members) == list(range(17))
    alone = grouped(frames(*(f"frame {k}" for k in range(20))))
    assert len(alone) == 20  # nothing else to tell them apart by
