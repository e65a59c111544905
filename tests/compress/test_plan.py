"""Which channels are kept: ranking, ties and followers, on graphs made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from compactmlip.channels import ChannelGraph, ChannelGroup
from compactmlip.compress.importance import Scores
from compactmlip.compress.plan import choose
from compactmlip.errors import InputError
from compactmlip.models.targets import Follow, Targets, Tie


def _graph() -> ChannelGraph:
    """Two layers' streams of four channels, a contraction without a feature, a wider group, a path."""
    return ChannelGraph.build(
        [
            ChannelGroup("in/0", 4, (), "in", 0),
            ChannelGroup("in/1", 4, (), "in", 1),
            ChannelGroup("out/0", 4, (), "out", 0),
            ChannelGroup("union/0", 4, (), "union", 0),
            ChannelGroup("contraction", 4, ()),
            ChannelGroup("wide/0", 5, (), "wide", 0),
            ChannelGroup("path", 1, ()),
        ],
        {},
    )


def _scores() -> Scores:
    return {
        "in/0": np.array([4.0, 3.0, 2.0, 1.0]),
        "in/1": np.array([0.0, 0.5, 5.0, 4.0]),
        "out/0": np.array([0.0, 9.0, 0.0, 8.0]),
        "union/0": np.array([1.0, 0.0, 0.0, 0.0]),
        "wide/0": np.array([1.0, 2.0, 2.0, 2.0, 3.0]),
    }


def _kept(targets: Targets) -> dict[str, list[int]]:
    return {name: np.flatnonzero(m).tolist() for name, m in choose(_graph(), targets, _scores()).items()}


def test_groups_alone() -> None:
    """Equal scores go by index; groups without a feature are kept or cut whole; others are not named."""
    kept = _kept(Targets({"in/0": 2, "in/1": 2, "wide/0": 3, "path": 0, "contraction": 1}))
    assert kept == {
        "in/0": [0, 1],
        "in/1": [2, 3],
        "wide/0": [1, 2, 4],
        "path": [],
        "contraction": [0, 1, 2, 3],
    }


def test_tied_groups_are_ranked_by_the_sum_of_their_scores() -> None:
    """in/0 alone keeps 0 1, in/1 alone 2 3; together (4, 3.5, 7, 5) they keep 2 3.

    The contraction has no score and gets the same channels; it needs no target of its own.
    """
    tie = Tie(("in/0", "contraction", "in/1"))
    assert _kept(Targets({"in/0": 2, "in/1": 2}, (tie,))) == {
        name: [2, 3] for name in ("in/0", "in/1", "contraction")
    }
    assert _kept(Targets({"in/0": 1, "in/1": 1, "contraction": 1}, (tie,)))["in/0"] == [2]


def test_tie_scored_by_another_group() -> None:
    kept = _kept(Targets({"in/0": 2, "in/1": 2, "out/0": 3}, (Tie(("in/0", "in/1"), scored_by=("out/0",)),)))
    assert kept == {"in/0": [1, 3], "in/1": [1, 3], "out/0": [0, 1, 3]}


def test_tied_masks_are_separate_arrays() -> None:
    masks = choose(_graph(), Targets({"in/0": 2}, (Tie(("in/0", "in/1")),)), _scores())
    masks["in/0"][:] = False
    assert masks["in/1"].sum() == 2


def test_follower_keeps_what_any_leader_keeps() -> None:
    sizes = {"in/0": 2, "out/0": 1}
    kept = _kept(Targets(sizes, follows=(Follow("union/0", ("in/0", "out/0")),)))
    assert kept["union/0"] == [0, 1]
    chain = (Follow("union/0", ("in/0", "out/0")), Follow("contraction", ("union/0",)))
    assert _kept(Targets({"in/0": 1, "out/0": 1}, follows=chain))["contraction"] == [0, 1]
    assert _kept(Targets(sizes, follows=(Follow("union/0", ("in/0", "in/1")),)))["union/0"] == [0, 1, 2, 3]


def test_follower_of_tied_groups() -> None:
    targets = Targets(
        {"in/0": 2, "out/0": 1}, (Tie(("in/0", "in/1")),), (Follow("union/0", ("in/1", "out/0")),)
    )
    assert _kept(targets)["union/0"] == [1, 2, 3]


def test_tied_groups_with_different_targets_are_refused() -> None:
    with pytest.raises(InputError, match="2 of in/0, 3 of in/1.*same number"):
        _kept(Targets({"in/0": 2, "in/1": 3}, (Tie(("in/0", "in/1")),)))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (Targets({"in/0": 2}, (Tie(("in/0", "wide/0")),)), "different sizes"),
        (Targets({"in/0": 2}, (Tie(("in/0",), scored_by=("wide/0",)),)), "different sizes"),
        (Targets({"in/0": 2}, follows=(Follow("wide/0", ("in/0",)),)), "different sizes"),
        (Targets({"in/0": 2}, (Tie(("in/0", "nowhere")),)), "unknown groups"),
        (Targets({"in/0": 2}, follows=(Follow("nowhere", ("in/0",)),)), "unknown groups"),
        (Targets({"in/0": 2}, (Tie(("in/0", "in/1")), Tie(("in/1", "out/0")))), "more than one rule"),
        (Targets({"in/0": 2}, follows=(Follow("in/0", ("in/1",)),)), "more than one rule"),
        (Targets({"in/1": 2}, (Tie(("in/0", "in/1")),), (Follow("in/0", ("out/0",)),)), "more than one rule"),
        (Targets({}, (Tie(("in/0", "in/1")),)), "has a target"),
        (Targets({"contraction": 2}, (Tie(("contraction",)),)), "has scores"),
    ],
)
def test_rules_that_contradict_each_other(targets: Targets, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _kept(targets)
