from __future__ import annotations

import numpy as np
import pytest

from compactmlip.channels import ChannelGraph, ChannelGroup, Slot, format_channels, parse_channels
from compactmlip.errors import InputError


@pytest.mark.parametrize(
    ("text", "channels"),
    [("64x0+32x1+16x2", (64, 32, 16)), ("128x0e + 32x2e", (128, 0, 32)), ("8x0", (8,))],
)
def test_parse(text: str, channels: tuple[int, ...]) -> None:
    assert parse_channels(text) == channels
    assert parse_channels(format_channels(channels)) == channels


@pytest.mark.parametrize("text", ["", "64", "64x0+32x0", "axb", "64x0,32x1", "-4x0"])
def test_malformed_channels_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="64x0\\+32x1\\+16x2"):
        parse_channels(text)


def _graph() -> ChannelGraph:
    groups = [
        ChannelGroup("a/0", 3, (Slot("w", 0), Slot("v", 1, offset=1, block=2))),
        ChannelGroup("b/0", 4, (Slot("w", 1),), requires=("a/0",)),
        ChannelGroup("c/0", 1, (), requires_any=("a/0", "b/0")),
    ]
    return ChannelGraph.build(groups, {"w": (3, 4), "v": (2, 8)})


def test_kept_indices_follow_offset_and_block() -> None:
    graph = _graph()
    masks = graph.complete({"a/0": np.array([True, False, True])})
    kept = graph.kept_indices(masks)
    np.testing.assert_array_equal(kept["w"][0], [0, 2])
    np.testing.assert_array_equal(kept["w"][1], [0, 1, 2, 3])
    np.testing.assert_array_equal(kept["v"][1], [0, 1, 2, 5, 6, 7])


def test_dependants_of_an_empty_group_die() -> None:
    masks = _graph().complete({"a/0": np.zeros(3, bool)})
    assert not masks["b/0"].any()
    assert not masks["c/0"].any()


def test_alternatives_keep_a_group_alive() -> None:
    masks = _graph().complete({"b/0": np.zeros(4, bool)})
    assert masks["c/0"].all()


def test_given_masks_are_not_changed() -> None:
    mask = np.ones(4, bool)
    _graph().complete({"a/0": np.zeros(3, bool), "b/0": mask})
    assert mask.all()


def test_unknown_group_suggests_the_right_one() -> None:
    with pytest.raises(InputError, match="Did you mean 'a/0'"):
        _graph().complete({"a/1": np.ones(3, bool)})


def test_wrong_mask_length_is_refused() -> None:
    with pytest.raises(InputError, match=r"expected \(3,\)"):
        _graph().complete({"a/0": np.ones(2, bool)})


@pytest.mark.parametrize(
    "group",
    [
        ChannelGroup("x/0", 5, (Slot("w", 1),)),
        ChannelGroup("x/0", 1, (), requires=("missing/0",)),
    ],
)
def test_inconsistent_declarations_are_refused(group: ChannelGroup) -> None:
    with pytest.raises(ValueError, match="exceeds|unknown groups"):
        ChannelGraph.build([group], {"w": (3, 4)})
