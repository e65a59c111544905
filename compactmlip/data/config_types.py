"""Frames by their configuration type, ``info["config_type"]``, for tables of errors."""

from __future__ import annotations

from collections.abc import Sequence

from ase import Atoms

MOST_GROUPS = 24
"""Configuration types with groups of their own; the others, with the fewest atoms, share one."""


def grouped(frames: Sequence[Atoms], unnamed: str = "Default") -> dict[str, list[int]]:
    """Indices of the frames of each type, those with most atoms first; empty if there is only one type.

    Parameters
    ----------
    frames
        Structures.
    unnamed
        Name of the type of frames that have none.
    """
    members: dict[str, list[int]] = {}
    for k, atoms in enumerate(frames):
        members.setdefault(str(atoms.info.get("config_type", unnamed)), []).append(k)
    if len(members) < 2:
        return {}
    ranked = sorted(members, key=lambda name: (-sum(len(frames[k]) for k in members[name]), name))
    own = ranked if len(ranked) <= MOST_GROUPS else ranked[: MOST_GROUPS - 1]
    found = {name: members[name] for name in own}
    if rest := ranked[len(own) :]:
        found[f"{len(rest)} other types"] = sorted(k for name in rest for k in members[name])
    return found
