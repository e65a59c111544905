from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from ase import Atoms

from compactmlip.data.select import farthest_points, quotas, split, structure_descriptors
from compactmlip.errors import InputError

# Selection


def test_farthest_points_of_a_line() -> None:
    line = np.array([[0.0], [1.0], [2.0], [3.0], [10.0], [6.4]])
    assert farthest_points(line, 4) == [3, 4, 5, 0]
    assert farthest_points(line, 2, chosen=[4]) == [0, 5]
    assert farthest_points(line, 2, chosen=[4], among=[1, 2, 3]) == [1, 3]
    assert sorted(farthest_points(line, 6)) == list(range(6))
    with pytest.raises(InputError, match="cannot choose 6 of 5"):
        farthest_points(line, 6, chosen=[0])


def test_farthest_points_spread_more_than_random_ones(rng: np.random.Generator) -> None:
    cloud = rng.standard_normal((400, 5))

    def closest(indices: Any) -> float:
        d = np.linalg.norm(cloud[indices][:, None] - cloud[indices][None], axis=-1)
        return float((d + 1e9 * np.eye(len(d))).min())

    chosen = closest(farthest_points(cloud, 40))
    assert chosen > 2 * max(closest(rng.choice(400, 40, replace=False)) for _ in range(20))


def test_descriptors_are_standardised_species_means(rng: np.random.Generator) -> None:
    frames = [Atoms("MgO"), Atoms("MgO2"), Atoms("OMg2")]
    features = [rng.standard_normal((len(a), 2)) for a in frames]
    features[2][:, 1] = features[1][:, 1].mean()
    out = structure_descriptors(frames, features)
    assert out.shape == (3, 4)
    oxygen = np.array([features[0][1, 0], features[1][1:, 0].mean(), features[2][0, 0]])
    assert out[:, 0] == pytest.approx((oxygen - oxygen.mean()) / oxygen.std())
    assert out.mean(axis=0) == pytest.approx(0.0, abs=1e-12)
    same = structure_descriptors(frames[:1] * 2, features[:1] * 2)
    assert not same.any(), "identical structures have no distance, and no division by zero"


@pytest.mark.parametrize(
    ("counts", "n", "expected"),
    [
        ([10, 10], 4, [2, 2]),
        ([98, 1, 1], 10, [8, 1, 1]),
        ([5, 5, 5], 2, None),
        ([3, 1], 4, [3, 1]),
        ([], 0, []),
    ],
)
def test_quotas(counts: list[int], n: int, expected: list[int] | None) -> None:
    out = quotas(counts, n)
    assert sum(out) == n and all(0 <= q <= c for q, c in zip(out, counts, strict=True))
    assert expected is None or out == expected


def test_split_keeps_trajectories_together() -> None:
    frames = [Atoms("O", info={"k": k}) for k in range(100)]
    for k in range(40):
        frames[k].info["trajectory"] = k // 10
    parts = split(frames, (0.7, 0.2, 0.1), seed=3)
    assert [len(p) for p in parts] == [70, 20, 10]
    assert sorted(a.info["k"] for p in parts for a in p) == list(range(100))
    homes = [{k for k, p in enumerate(parts) for a in p if a.info.get("trajectory") == t} for t in range(4)]
    assert all(len(home) == 1 for home in homes)
    assert [[a.info["k"] for a in p] for p in split(frames, (0.7, 0.2, 0.1), seed=3)] == [
        [a.info["k"] for a in p] for p in parts
    ]
    other = split(frames, (0.7, 0.2, 0.1), seed=4)
    assert {a.info["k"] for a in other[2]} != {a.info["k"] for a in parts[2]}


@pytest.mark.parametrize(
    ("total", "fractions", "sizes"),
    [
        (10, (0.8, 0.1, 0.1), [8, 1, 1]),
        (3, (0.8, 0.1, 0.1), [1, 1, 1]),
        (3, (0.0, 0.5, 0.5), [0, 2, 1]),
        (7, (1.0, 0.0, 0.0), [7, 0, 0]),
        (0, (0.8, 0.1, 0.1), [0, 0, 0]),
    ],
)
def test_split_sizes(total: int, fractions: tuple[float, ...], sizes: list[int]) -> None:
    assert [len(p) for p in split([Atoms("O")] * total, fractions)] == sizes


def test_split_is_a_random_permutation() -> None:
    frames = [Atoms("O", info={"k": k}) for k in range(20)]
    tested = Counter(a.info["k"] for s in range(400) for a in split(frames, (0.8, 0.1, 0.1), seed=s)[2])
    assert len(tested) == 20 and max(tested.values()) < 70 and min(tested.values()) > 15
    with pytest.raises(InputError, match="add up to 1"):
        split(frames, (0.8, 0.1))
