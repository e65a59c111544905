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
    names = [f"type {k}" for k in range(MOST_GROUPS + 6)]
    found = grouped(frames(*names))
    assert len(found) == MOST_GROUPS and found["7 other types"] == list(range(7))
    assert next(iter(found)) == names[-1] and len(grouped(frames(*names[:MOST_GROUPS]))) == MOST_GROUPS
