"""Validation frames: at random, in blocks of a trajectory, by groups."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from compactmlip.data.holdout import BLOCK, hold_out
from compactmlip.errors import InputError


def rattled(count: int, seed: int) -> list[Atoms]:
    made = []
    for k in range(count):
        atoms = bulk("MgO", "rocksalt", a=4.21, cubic=True)
        atoms.rattle(0.1, seed=1000 * seed + k)
        made.append(atoms)
    return made


def walk(count: int, seed: int, repeat: int = 1) -> list[Atoms]:
    """Frames that move a little from one to the next."""
    rng = np.random.default_rng(seed)
    atoms = bulk("MgO", "rocksalt", a=4.21, cubic=True).repeat((1, 1, repeat))
    made = []
    for _ in range(count):
        atoms = atoms.copy()
        atoms.positions += 0.02 * rng.standard_normal(atoms.positions.shape)
        atoms.wrap()
        made.append(atoms)
    return made


def test_parts_are_a_partition_and_depend_on_the_seed_alone() -> None:
    frames = [*rattled(30, 1), *walk(40, 2, repeat=2)]
    first, again, other = (hold_out(frames, 0.2, seed) for seed in (0, 0, 1))
    assert first == again and first.valid != other.valid
    assert sorted([*first.train, *first.valid]) == list(range(70))
    assert len(first.valid) == 14 and "14 of 70 frames" in first.how


def test_independent_frames_are_taken_at_random() -> None:
    held = hold_out(rattled(40, 1), 0.1)
    assert len(held.valid) == 4 and "at random" in held.how


def test_few_frames_at_random_are_typical_ones() -> None:
    sizes = np.random.default_rng(0).permutation(np.repeat((0.0, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 9.0), 3))
    frames = rattled(len(sizes), 1)
    for atoms, size in zip(frames, sizes, strict=True):
        atoms.arrays["REF_forces"] = np.full((len(atoms), 3), size)
    frames[0].arrays["REF_forces"][0] = np.nan  # unknown forces of some atoms do not matter
    chosen = {seed: [sizes[k] for k in hold_out(frames, 0.02, seed).valid] for seed in range(12)}
    assert {s for found in chosen.values() for s in found} <= {0.5, 1.0, 1.5, 2.0}
    assert len({tuple(found) for found in chosen.values()}) > 2
    # Several frames are drawn from small to large.
    many = [sorted(sizes[k] for k in hold_out(frames, 0.25, seed).valid) for seed in range(12)]
    assert all(len(found) == 6 and found[0] == 0.0 and found[-1] >= 2.5 for found in many)


def test_frames_without_forces_are_taken_at_random_as_well() -> None:
    chosen = {hold_out(rattled(20, 1), 0.05, seed).valid for seed in range(20)}
    assert len(chosen) > 5


def test_trajectories_are_taken_in_blocks() -> None:
    frames = [*walk(60, 1), *walk(60, 2, repeat=2)]
    held = hold_out(frames, 0.2)
    assert "2 runs" in held.how and len(held.valid) == 24
    starts = [k for k in held.valid if k - 1 not in held.valid]
    assert len(starts) == 4  # two blocks in each run
    assert sum(k < 60 for k in held.valid) == 12
    # Few of the validation frames have a neighbour in the training set.
    edges = sum((k + d) in held.train for k in held.valid for d in (-1, 1))
    assert edges <= 8
    apart = hold_out(frames, 0.2, method="random")
    assert sum((k + d) in apart.train for k in apart.valid for d in (-1, 1)) > 24


def test_one_block_is_at_most_as_long_as_it_says() -> None:
    held = hold_out(walk(200, 1), 0.3)
    lengths, last = [], -2
    for k in held.valid:
        if k == last + 1:
            lengths[-1] += 1
        else:
            lengths.append(1)
        last = k
    assert sum(lengths) == 60 and max(lengths) <= 2 * BLOCK


def test_groups_stay_together() -> None:
    frames = rattled(30, 1)
    for k, atoms in enumerate(frames):
        atoms.info["mp_id"] = f"mp-{k % 6}"
    held = hold_out(frames, 0.3, group_key="mp_id")
    inside = {frames[k].info["mp_id"] for k in held.valid}
    assert inside.isdisjoint({frames[k].info["mp_id"] for k in held.train})
    assert 5 <= len(held.valid) <= 10 and "groups by 'mp_id'" in held.how
    del frames[3].info["mp_id"]
    with pytest.raises(InputError, match="training frame 3 has no such"):
        hold_out(frames, 0.3, group_key="mp_id")
    with pytest.raises(InputError, match="one group"):
        hold_out(frames[:1] * 3, 0.3, group_key="mp_id")


@pytest.mark.parametrize(("count", "fraction"), [(1, 0.1), (10, 0.0), (10, 1.0)])
def test_impossible_splits_are_refused(count: int, fraction: float) -> None:
    with pytest.raises(InputError, match="--valid"):
        hold_out(rattled(count, 1), fraction)
    with pytest.raises(InputError, match="--group-key"):
        hold_out(rattled(4, 1), 0.5, method="groups")
