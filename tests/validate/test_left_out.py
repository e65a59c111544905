"""What could not be judged is said, with the reason; what was judged is not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from compactmlip.validate.left_out import UNJUDGED, no_time, unjudged

RUN = SimpleNamespace(
    steps=90,
    effective=2.5,
    failure="",
    highest=0.0,
    teacher_failure="",
)
"""Stands for any result that is too short."""


def said(name: str, found: Any, judged: tuple[object, ...] = ()) -> list[str]:
    nothing: dict[str, Any] = dict.fromkeys(UNJUDGED)
    verdicts: dict[str, Any] = dict.fromkeys(UNJUDGED, ())
    return [part.reason for part in unjudged(nothing | {name: found}, verdicts | {name: judged})]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("thermostat", "90 steps hold 2.5 independent energies"),
        ("ladder", "nothing was held when the time was over"),
        ("defects", "not positive"),
    ],
)
def test_too_short_for_a_verdict(name: str, words: str) -> None:
    (reason,) = said(name, RUN)
    assert words in reason
    assert said(name, RUN, ("a verdict",)) == [] and said(name, None) == []


def test_what_failed_in_the_teacher() -> None:
    broken = SimpleNamespace(**{**vars(RUN), "teacher_failure": "exploded"})
    assert said("sampling", broken) == ["The teacher's own run ended: exploded"]
    assert said("sampling", RUN) == []  # the distributions have their verdict
    dense = SimpleNamespace(teacher=SimpleNamespace(failure="a gas"))
    assert said("density", dense) == ["The teacher's run ended: a gas"]


def test_a_budget_of_nothing_is_a_wish() -> None:
    assert no_time("x", "nvt_seconds", 0.0, 12.0).reason == "Switched off (nvt_seconds is 0)."
    assert "about 12 s" in no_time("x", "nvt_seconds", 5.0, 12.0).reason
