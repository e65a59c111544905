"""Whether a ranking of channels would come out the same from other structures of the same kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import nn

from compactmlip.compress.importance import importance
from compactmlip.compress.tapped import Scores
from compactmlip.data.graph import GraphBatch
from compactmlip.errors import InputError


@dataclass(frozen=True)
class Agreement:
    """How far two rankings of one group's channels agree.

    Attributes
    ----------
    spearman
        Rank correlation, 1 for the same order.
    overlap
        Share of the upper half of the channels that both rankings have in their upper half.
    """

    spearman: float
    overlap: float


def agreement(a: NDArray[np.float64], b: NDArray[np.float64], top: int | None = None) -> Agreement:
    """Compare two scorings of the same channels; ``top`` channels count for the overlap, half by default."""
    count = top or (len(a) + 1) // 2
    best = [set(np.argsort(-x, kind="stable")[:count].tolist()) for x in (a, b)]
    constant = np.ptp(a) == 0 or np.ptp(b) == 0
    correlation = float(np.array_equal(a, b)) if constant else float(spearmanr(a, b).statistic)
    return Agreement(correlation, len(best[0] & best[1]) / count)


def compare(a: Scores, b: Scores) -> dict[str, Agreement]:
    """Compare scores of the same model, group by group; groups of one channel have no order."""
    return {name: agreement(a[name], b[name]) for name in a if len(a[name]) > 1}


def stability(
    model: nn.Module,
    graphs: Sequence[GraphBatch],
    criterion: str,
    *,
    resamples: int = 3,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Agreement]:
    """Agreement between scores from two disjoint random halves of the structures, by group.

    Parameters
    ----------
    graphs
        Calibration structures.
    criterion
        See :func:`compactmlip.compress.importance.importance`; random scores of the two halves are drawn
        independently.
    resamples
        Ways to halve the structures; their mean is returned.  Each costs as much as one scoring.

    Raises
    ------
    InputError
        If there are fewer than two structures.
    """
    if len(graphs) < 2:
        raise InputError("the stability of scores needs at least two calibration structures.")
    rng = np.random.default_rng(seed)
    found: list[dict[str, Agreement]] = []
    for k in range(resamples):
        order = rng.permutation(len(graphs))
        halves = order[: len(graphs) // 2], order[len(graphs) // 2 :]
        scores = [
            importance(
                model, [graphs[i] for i in half], criterion, seed=seed + 2 * k + which, progress=progress
            )
            for which, half in enumerate(halves)
        ]
        found.append(compare(*scores))
    return {name: _mean([one[name] for one in found]) for name in found[0]}


def _mean(parts: Sequence[Agreement]) -> Agreement:
    return Agreement(float(np.mean([p.spearman for p in parts])), float(np.mean([p.overlap for p in parts])))


def summary(agreements: Mapping[str, Agreement]) -> Agreement:
    """Mean over groups."""
    return _mean(list(agreements.values()))
