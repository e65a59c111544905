"""Frames by their configuration type, ``info["config_type"]``, for tables of errors."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ase import Atoms

MOST_GROUPS = 24
"""Configuration types with groups of their own; the others, with the fewest atoms, share one."""

MANY = 12
"""Types, above which those that differ in numbers only ("snapshot 7 at 300 K") are taken as one."""

NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")


def grouped(frames: Sequence[Atoms], unnamed: str = "Default") -> dict[str, list[int]]:
    """Indices of the frames of each type, those with most atoms first; empty if there is only one type.

    Of more than :data:`MANY` types those that differ in numbers only are one, with # for each number.

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
    if len(members) > MANY:
        alike: dict[str, list[int]] = {}
        for name, indices in members.items():
            alike.setdefault(NUMBER.sub("#", name), []).extend(indices)
        if len(alike) > 1:
            members = {name: sorted(indices) for name, indices in alike.items()}
    if len(members) < 2:
        return {}
    ranked = sorted(members, key=lambda name: (-sum(len(frames[k]) for k in members[name]), name))
    own = ranked if len(ranked) <= MOST_GROUPS else ranked[: MOST_GROUPS - 1]
    found = {name: members[name] for name in own}
    if rest := ranked[len(own) :]:
        found[f"{len(rest)} other types"] = sorted(k for name in rest for k in members[name])
    return found
