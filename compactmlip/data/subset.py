"""A part of a data set that has something of each material.

Relaxation trajectories are of very unequal length; taking some configurations of each unique material keeps
the chemistry of all of them ("Structural pruning of SO(3)-equivariant atomistic foundation models",
appendix D.2: so many random configurations per unique structure of MPtrj make 9, 25 or 40 % of it; for SPICE,
a uniform share of each category).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from ase import Atoms

from compactmlip.errors import InputError


def group_names(frames: Sequence[Atoms], key: str, name: str = "the training set") -> list[str]:
    """Value of ``info[key]`` of each frame, as text.

    Raises
    ------
    InputError
        If a frame has no such key.
    """
    for k, atoms in enumerate(frames):
        if key not in atoms.info:
            raise InputError(
                f"--group-key {key}: frame {k} of {name} ({atoms.get_chemical_formula()}) has no such info "
                f"key; it has {', '.join(sorted(atoms.info)) or 'none'}."
            )
    return [str(a.info[key]) for a in frames]


def choose_per_group(
    groups: Sequence[str], number: int | None, share: float | None, seed: Sequence[int]
) -> list[int]:
    """Indices of a random part of each group, in ascending order.

    The choice in a group depends on the seed, the group's name and its own members only, and what is chosen
    for a number contains what is chosen for a smaller one.

    Parameters
    ----------
    groups
        Name of the group of each frame.
    number
        How many of each group; all of a smaller one.  None: see ``share``.
    share
        Which fraction of each group, rounded, at least one; all if both are None.
    seed
        Seeds of the choice.
    """
    members: dict[str, list[int]] = {}
    for k, name in enumerate(groups):
        members.setdefault(name, []).append(k)
    chosen: list[int] = []
    for name, own in members.items():
        wanted = len(own)
        if number is not None:
            wanted = min(number, len(own))
        elif share is not None:
            wanted = max(1, round(share * len(own)))
        order = np.random.default_rng([*seed, zlib.crc32(name.encode())]).permutation(len(own))
        chosen += [own[k] for k in order[:wanted]]
    return sorted(chosen)
