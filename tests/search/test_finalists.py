"""Which candidates are drawn, and which are trained."""

from __future__ import annotations

from compactmlip.compress.plan_file import Plan
from compactmlip.search.evaluate import PlanError
from compactmlip.search.halving import to_train
from compactmlip.search.picture import by_source
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
