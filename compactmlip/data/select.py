"""Choose diverse structures in a model's own feature space; split data sets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms

from compactmlip.errors import InputError

SMALLEST_SPREAD = 1e-3
"""Features that spread less than this times the widest one are not blown up to unit variance."""


def structure_descriptors(frames: Sequence[Atoms], features: Sequence[np.ndarray]) -> np.ndarray:
    """Mean feature of each species, concatenated and standardised: (frames, species x C).

    Parameters
    ----------
    frames
        Structures.
    features
        (N, C) invariant features of the atoms of each structure.
    """
    numbers = sorted({int(z) for atoms in frames for z in atoms.numbers})
    width = features[0].shape[1]
    rows = np.zeros((len(frames), len(numbers), width))
    for row, atoms, x in zip(rows, frames, features, strict=True):
        for s, z in enumerate(numbers):
            mask = atoms.numbers == z
            if mask.any():
                row[s] = x[mask].mean(axis=0)
    flat = rows.reshape(len(frames), -1)
    spread = flat.std(axis=0)
    scale = np.maximum(spread, max(SMALLEST_SPREAD * spread.max(), np.finfo(float).tiny))
    return np.asarray((flat - flat.mean(axis=0)) / scale)


def farthest_points(
    features: np.ndarray, n: int, *, chosen: Sequence[int] = (), among: Sequence[int] | None = None
) -> list[int]:
    """Farthest-point selection: each new point is the one farthest from all chosen ones.

    Parameters
    ----------
    features
        (M, D).
    n
        Number of new points, at most the number of points that are left.
    chosen
        Points that are already taken; without any, the first is the one nearest to the mean.
    among
        Points to choose from; all by default.

    Returns
    -------
    list[int]
        Indices of the new points, in the order of selection.
    """
    left = np.ones(len(features), dtype=bool)
    if among is not None:
        left[:] = False
        left[list(among)] = True
    left[list(chosen)] = False
    if not 0 <= n <= left.sum():
        raise InputError(f"cannot choose {n} of {left.sum()} structures.")
    nearest = np.full(len(features), np.inf)
    for k in chosen:
        nearest = np.minimum(nearest, np.linalg.norm(features - features[k], axis=1))
    picked: list[int] = []
    for _ in range(n):
        if picked or len(chosen):
            k = int(np.argmax(np.where(left, nearest, -1.0)))
        else:
            from_mean = np.linalg.norm(features - features[left].mean(axis=0), axis=1)
            k = int(np.argmin(np.where(left, from_mean, np.inf)))
        picked.append(k)
        left[k] = False
        nearest = np.minimum(nearest, np.linalg.norm(features - features[k], axis=1))
    return picked


def quotas(counts: Sequence[int], n: int) -> list[int]:
    """Share ``n`` places in proportion to ``counts`` (largest remainder), at least one each if possible.

    No quota exceeds its count; ``n`` must not exceed the sum of the counts.
    """
    size = np.asarray(counts)
    exact = n * size / max(size.sum(), 1)
    out = np.floor(exact).astype(int)
    if n >= np.count_nonzero(size):
        out = np.maximum(out, np.minimum(size, 1))
    while out.sum() < n:
        out[np.argmax(np.where(out < size, exact - out, -np.inf))] += 1
    while out.sum() > n:
        out[np.argmax(np.where(out > 1, out - exact, -np.inf))] -= 1
    return [int(x) for x in out]


def random_up_to(sizes: Sequence[int], atoms: int, seed: int) -> list[int]:
    """Indices of random structures, of ``sizes`` atoms each, until they have ``atoms`` atoms together."""
    chosen: list[int] = []
    total = 0
    for k in np.random.default_rng(seed).permutation(len(sizes)):
        if total >= atoms:
            break
        chosen.append(int(k))
        total += sizes[k]
    return chosen


def split(
    frames: Sequence[Atoms], fractions: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 0
) -> tuple[list[Atoms], list[Atoms], list[Atoms]]:
    """Split at random into training, validation and test set.

    Frames with the same ``info["trajectory"]`` (snapshots of one MD run) stay together: neighbours in
    time in training and test set would make the test error look too small.

    Raises
    ------
    InputError
        If there are not three non-negative fractions that add up to one.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise InputError(f"fractions must be three numbers >= 0 that add up to 1, got {tuple(fractions)}.")
    groups: dict[object, list[int]] = {}
    for k, atoms in enumerate(frames):
        groups.setdefault(atoms.info.get("trajectory", f"frame {k}"), []).append(k)
    rng = np.random.default_rng(seed)
    members = list(groups.values())
    order = sorted(rng.permutation(len(members)), key=lambda g: -len(members[g]))  # large groups first
    room = np.array(_part_sizes(len(frames), fractions))
    parts: tuple[list[int], ...] = ([], [], [])
    for group in (members[g] for g in order):
        fits = np.where(room >= len(group), room, 0)
        # A part is drawn in proportion to its free places: for single frames, a random permutation.
        part = int(rng.choice(3, p=fits / fits.sum())) if fits.any() else int(np.argmax(room))
        room[part] -= len(group)
        parts[part].extend(group)
    train, valid, test = ([frames[k] for k in sorted(part)] for part in parts)
    return train, valid, test


def _part_sizes(total: int, fractions: Sequence[float]) -> list[int]:
    """Integer sizes that add up to ``total``; a wanted part gets a frame if there are enough."""
    sizes = np.diff(np.rint(np.cumsum([0, *fractions]) * total)).astype(int)
    wanted = np.array(fractions) > 0
    while total >= wanted.sum() and (wanted & (sizes == 0)).any():
        sizes[np.argmax(sizes)] -= 1
        sizes[np.argmax(wanted & (sizes == 0))] += 1
    return [int(x) for x in sizes]
