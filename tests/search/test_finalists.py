"""Which candidates are drawn, measured, made smaller and trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from compactmlip.compress.cost import Shapes
from compactmlip.compress.plan_file import Plan
from compactmlip.search.evaluate import PlanError
from compactmlip.search.finalists import Finalist, Finals, Goal
from compactmlip.search.halving import to_train
from compactmlip.search.options import SearchOptions
from compactmlip.search.picture import by_source
from compactmlip.search.space import Space
from compactmlip.search.study import Candidate


def _candidate(source: str, error: float) -> Candidate:
    plan = Plan.uniform(f"{len(source) + int(error)}x0", 1)
    return Candidate(plan, PlanError(1.0, error), 0.1, 1e8, 77, source)


def test_every_candidate_is_in_the_picture_once() -> None:
    sources = ["exchange", "optuna", "uniform 64x0", "ranking", "tapered 64x0", "128x0 without 3 paths"]
    groups = by_source([_candidate(source, 1.0) for source in sources])
    assert [[c.source for c in group] for group in groups.values()] == [
        ["exchange", "optuna"],
        ["ranking", "tapered 64x0", "128x0 without 3 paths"],
        ["uniform 64x0"],
    ]


def test_the_best_of_each_kind_is_trained_as_well() -> None:
    ranked = [_candidate("exchange", 10.0 + k) for k in range(4)]
    ranked += [_candidate("uniform 64x0", 14.0), _candidate("uniform 64x0", 14.5)]
    ranked += [_candidate("ranking", 15.0), _candidate("tapered", 30.0)]
    assert to_train(ranked, 4) == [*ranked[:2], ranked[4], ranked[6]]
    assert to_train(ranked, 6) == [*ranked[:3], ranked[4], ranked[6], ranked[3]], "the tapered one is too bad"
    assert to_train(ranked, 1) == ranked[:1]
    assert to_train(ranked[:2], 5) == ranked[:2]


class _Watch:
    """Plans take so many times what is predicted."""

    def __init__(self, time: Callable[[Plan], float], wrong: float) -> None:
        self.time, self.wrong = time, wrong

    def measure(self, plans: Sequence[Plan], progress: bool = False) -> list[float]:
        return [self.wrong * self.time(plan) for plan in plans]


class _Workers:
    def completed(self, candidates: Sequence[Candidate], advance: object) -> list[Candidate]:
        return [replace(c, error=PlanError(1.0, 20.0)) for c in candidates]


@pytest.fixture(scope="module")
def space(make_spec: Callable[..., Any], make_model: Callable[..., nn.Module]) -> Space:
    return Space(Shapes(make_model(make_spec(channels=(16, 8, 4), num_layers=3, lmax_edge=2))), 1)


def _finals(space: Space, wrong: float, **options: Any) -> list[Finalist]:
    """Of two plans that were predicted to be four times as fast as the uncut model."""
    whole = space.shapes.num_parameters(Plan.of(space.full))

    def time(plan: Plan) -> float:
        return space.shapes.num_parameters(plan) / whole

    ranked = []
    for text in ("16x0+8x1", "8x0+8x1"):
        plan = space.scaled(space.uniform(text), lambda p: 4 * time(p))
        assert plan is not None
        ranked.append(Candidate(plan, PlanError(1.0, 10.0), time(plan), 1e8, 7, "exchange"))
    given = SearchOptions(**{"speedup": "4x", "finalists": 1} | options)
    finals = Finals(given, space, time, lambda plan: 1e8, _Watch(time, wrong))  # type: ignore[arg-type]
    return finals.run(ranked, _Workers())  # type: ignore[arg-type]


def test_finalists_that_are_too_slow_are_made_smaller(space: Space) -> None:
    slow, smaller = _finals(space, 1.1)
    assert slow.speedup < 4 <= smaller.speedup < 4.4
    assert smaller.candidate.error.forces == 20.0 and smaller.candidate.source == "exchange"
    assert smaller.candidate.parameters < space.shapes.num_parameters(slow.candidate.plan)
    assert smaller.candidate.time == pytest.approx(1 / smaller.speedup)


def test_finalists_that_are_fast_enough_stay_as_they_are(space: Space) -> None:
    assert len(_finals(space, 0.99)) == 1
    assert len(_finals(space, 1.1, speedup=None, force_mae=15.0)) == 1, "no speed was asked for"


def test_finalists_that_are_far_too_slow_are_left(space: Space) -> None:
    """Another lot follows only if it promises to be fast enough."""
    (slow,) = _finals(space, 1.5)
    goal = Goal(SearchOptions(speedup="4x", force_mae=5.0))
    assert not goal.is_met(slow.candidate, slow.speedup)
    assert goal.violation(slow) == pytest.approx(math.log(4 / slow.speedup) + math.log(2.0))


def test_more_finalists_where_they_are_trained() -> None:
    assert SearchOptions(speedup="4x").num_finalists == 4
    assert SearchOptions(speedup="4x", distil_minutes=1.0).num_finalists == 8
    assert SearchOptions(speedup="4x", distil_minutes=1.0, finalists=3).num_finalists == 3
