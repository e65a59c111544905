"""Take validation frames out of a training set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from ase import Atoms

from compactmlip.data.read import FORCES
from compactmlip.data.select import quotas
from compactmlip.errors import InputError

Method = Literal["auto", "random", "blocks", "groups"]

NEIGHBOURS_ALIKE = 0.5
"""Neighbours in a file that differ by less than this times what two frames anywhere differ by are taken for
steps of one trajectory."""

BLOCK = 8
"""Validation frames of a trajectory that are taken next to each other."""

SHORTEST_RUN = 8
"""Frames with the same atoms, one after the other, that are looked at."""


@dataclass(frozen=True)
class Holdout:
    """Indices of training and validation frames, and how they were chosen."""

    train: tuple[int, ...]
    valid: tuple[int, ...]
    how: str


def hold_out(
    frames: Sequence[Atoms],
    fraction: float,
    seed: int = 0,
    method: Method = "auto",
    group_key: str | None = None,
) -> Holdout:
    """Choose validation frames.

    "random" takes frames at random, of small, middle and large forces alike.  "blocks" takes contiguous
    blocks out of each run of frames with the same atoms, so that few validation frames have a neighbour in
    time in the training set.  "groups" keeps frames with the same ``info[group_key]`` together.  "auto" is
    "groups" if there is a ``group_key``, else "blocks" for the runs in which neighbouring frames resemble
    each other, and "random" for all other frames.

    Raises
    ------
    InputError
        If there are fewer than two frames, the fraction is not between 0 and 1, or the key is missing.
    """
    count = len(frames)
    if count < 2 or not 0 < fraction < 1:
        raise InputError(
            f"cannot hold out a fraction of {fraction:g} of {count} training frames for validation; give "
            "--valid, or more frames."
        )
    rng = np.random.default_rng(seed)
    wanted = min(max(1, round(fraction * count)), count - 1)
    if method == "groups" or (method == "auto" and group_key is not None):
        return _groups(frames, wanted, rng, group_key)
    runs = [] if method == "random" else _runs(frames)
    if method == "auto":
        runs = [run for run in runs if _is_trajectory(frames, run, rng)]
    inside = {k for run in runs for k in run}
    loose = [k for k in range(count) if k not in inside]
    shares = quotas([len(loose), *map(len, runs)], wanted)
    valid = _typical(frames, loose, shares[0], rng)
    for run, share in zip(runs, shares[1:], strict=True):
        valid.update(_blocks(run, share, rng))
    how = f"{len(valid)} of {count} frames, " + _explained(len(runs), len(loose), wanted)
    return _holdout(count, valid, how)


def _typical(frames: Sequence[Atoms], among: Sequence[int], share: int, rng: np.random.Generator) -> set[int]:
    """Frames of small, middle and large forces: one from the middle half of each of ``share`` equal parts.

    A few frames at random may all be perfect crystals, whose forces vanish: they would judge energies only.
    """
    sizes = np.array([_mean_force(frames[k]) for k in among])
    order = [among[k] for k in np.lexsort((rng.permutation(len(among)), sizes))]
    taken: set[int] = set()
    for part in np.array_split(order, share) if share else []:
        margin = len(part) // 4
        taken.add(int(rng.choice(part[margin : len(part) - margin])))
    return taken


def _mean_force(atoms: Atoms) -> float:
    """Root mean square of the force components that are known; 0 where none is."""
    forces = atoms.arrays.get(FORCES)
    known = np.zeros(0) if forces is None else forces[np.isfinite(forces)]
    return float(np.sqrt(np.mean(known**2))) if known.size else 0.0


def _blocks(run: Sequence[int], share: int, rng: np.random.Generator) -> list[int]:
    """Contiguous blocks spread over a run, ``share`` frames in all, none much longer than BLOCK."""
    number = -(-share // BLOCK)
    parts = np.array_split(np.asarray(run), number)
    taken: list[int] = []
    for part, length in zip(parts, quotas([len(p) for p in parts], share), strict=True):
        start = int(rng.integers(len(part) - length + 1))
        taken += [int(k) for k in part[start : start + length]]
    return taken


def _explained(runs: int, loose: int, wanted: int) -> str:
    if not runs:
        return "at random from those of small, middle and large forces"
    text = (
        f"in blocks of up to {BLOCK} neighbours from {runs} runs of consecutive frames that look like steps"
    )
    text += " of a trajectory"
    return f"{text}, and others at random" if loose else text


def _holdout(count: int, valid: set[int], how: str) -> Holdout:
    return Holdout(tuple(k for k in range(count) if k not in valid), tuple(sorted(valid)), how)


def _groups(frames: Sequence[Atoms], wanted: int, rng: np.random.Generator, group_key: str | None) -> Holdout:
    """Whole groups in random order until there are enough frames."""
    if group_key is None:
        raise InputError("splitting by groups needs --group-key, the info key that names a frame's group.")
    without = [k for k, a in enumerate(frames) if group_key not in a.info]
    if without:
        raise InputError(f"--group-key {group_key}: training frame {without[0]} has no such info key.")
    groups: dict[str, list[int]] = {}
    for k, a in enumerate(frames):
        groups.setdefault(str(a.info[group_key]), []).append(k)
    if len(groups) < 2:
        raise InputError(f"--group-key {group_key}: all frames are of one group; nothing can be held out.")
    names = list(groups)
    valid: set[int] = set()
    taken = 0
    for g in rng.permutation(len(names))[:-1]:
        members = groups[names[g]]
        if not valid or len(valid) + len(members) <= wanted:
            valid.update(members)
            taken += 1
    how = f"{len(valid)} of {len(frames)} frames: {taken} of {len(groups)} groups by '{group_key}'"
    return _holdout(len(frames), valid, how)


def _runs(frames: Sequence[Atoms]) -> list[list[int]]:
    """Consecutive frames with the same atoms, long enough to look at."""
    runs: list[list[int]] = []
    for k, a in enumerate(frames):
        last = frames[runs[-1][-1]] if runs else None
        same = last is not None and np.array_equal(last.numbers, a.numbers) and (last.pbc == a.pbc).all()
        if same:
            runs[-1].append(k)
        else:
            runs.append([k])
    return [run for run in runs if len(run) >= SHORTEST_RUN]


def _is_trajectory(frames: Sequence[Atoms], run: Sequence[int], rng: np.random.Generator) -> bool:
    """Whether neighbours differ by much less than frames anywhere in the run."""
    steps = np.median([_difference(frames[a], frames[b]) for a, b in pairwise(run)])
    pairs = [rng.choice(run, 2, replace=False) for _ in range(min(64, 2 * len(run)))]
    anywhere = np.median([_difference(frames[a], frames[b]) for a, b in pairs])
    return bool(steps < NEIGHBOURS_ALIKE * anywhere)


def _difference(a: Atoms, b: Atoms) -> float:
    """Root mean square displacement in Angstrom, nearest images, plus the change of the cell."""
    moved = b.positions - a.positions
    if a.pbc.any() and a.cell.rank == 3:
        scaled = np.linalg.solve(a.cell.array.T, moved.T)
        scaled[a.pbc] -= np.rint(scaled[a.pbc])
        moved = scaled.T @ a.cell.array
    moved = moved - moved.mean(axis=0)
    return float(np.sqrt((moved**2).sum(axis=1).mean()) + np.linalg.norm(b.cell.array - a.cell.array) / 3)
