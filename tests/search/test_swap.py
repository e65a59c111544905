"""Paths that make way for others at the same budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from torch import nn

from compactmlip.channels import is_path, parse_path, path_group
from compactmlip.compress.cost import Shapes
from compactmlip.compress.plan_file import Plan
from compactmlip.compress.thin import kept_paths, thinned, tidied
from compactmlip.models import work
from compactmlip.search.space import Space
from compactmlip.search.swap import opened, swapped

Setup = tuple[Space, Plan, Callable[[Plan], float]]


@pytest.fixture(scope="module")
def setup(make_spec: Callable[..., Any], make_model: Callable[..., nn.Module]) -> Setup:
    """A space, the plan that a ranking of paths leaves at two thirds of the work, and the load."""
    shapes = Shapes(make_model(make_spec(channels=(16, 8, 4), num_layers=3, lmax_edge=2)))
    names = [name for name in shapes.graph.groups if is_path(name)]
    drawn = np.random.default_rng(3).lognormal(size=len(names))
    worth = dict(zip(names, map(float, drawn), strict=True))
    space = Space(shapes, 2, worth=worth, odd_paths=False)
    whole = work(shapes.pruned(space.uniform("16x0+8x1+4x2", 2))).effort(10)

    def load(plan: Plan) -> float:
        return work(shapes.pruned(plan)).effort(10) / (0.66 * whole)

    plan = thinned(shapes, space.uniform("16x0+8x1+4x2", 2), worth, load, 1.0)
    assert plan is not None
    return space, plan, load


def test_names_of_paths() -> None:
    assert parse_path(path_group(12, (0, 1, 2))) == (12, (0, 1, 2))


def test_swaps_keep_the_load(setup: Setup) -> None:
    space, plan, load = setup
    before = set(kept_paths(space.shapes, plan))
    came = went = 0
    for seed in range(20):
        made = swapped(space, plan, load, np.random.default_rng(seed))
        assert made is not None and 0.8 < load(made) <= 1
        after = set(kept_paths(space.shapes, made))
        came, went = came + len(after - before), went + len(before - after)
        assert made == swapped(space, plan, load, np.random.default_rng(seed)), "the same seed, the same plan"
    assert came > 20 and went > 20


def test_all_orders_can_come_back(setup: Setup) -> None:
    """Even those that a plan has in no layer, with paths that make and that read them."""
    space, _, load = setup
    plan = space.uniform("16x0+8x1", 1)
    wide = opened(space, plan)
    assert all(len(channels) == 3 for channels in wide.channels[:-1])
    assert space.effect(tidied(space.shapes, wide)) == space.effect(tidied(space.shapes, plan))
    found = set()
    for seed in range(20):
        made = swapped(space, plan, load, np.random.default_rng(seed))
        assert made is not None
        kept = [parse_path(name) for name in kept_paths(space.shapes, made)]
        makes, reads = (any(p[k] == 2 and t == layer for t, p in kept) for k, layer in ((2, 0), (0, 1)))
        assert len(made.channels[0]) < 3 or makes
        found.add((makes, reads))
    assert (True, True) in found, "made by the first layer and read by the second"


def test_important_paths_come_back_more_often(setup: Setup) -> None:
    space, plan, load = setup
    cut = opened(space, plan).without_paths
    favourite = cut[-1]
    biased = Space(space.shapes, 2, worth=dict.fromkeys(space.worth, 1.0) | {favourite: 1e6}, odd_paths=False)
    even = Space(space.shapes, 2, odd_paths=False)

    def times(chosen: Space) -> int:
        made = (swapped(chosen, plan, load, np.random.default_rng(seed)) for seed in range(30))
        return sum(favourite in kept_paths(space.shapes, p) for p in made if p is not None)

    assert times(biased) > 25 > times(even)


def test_swaps_find_paths_that_a_ranking_missed(setup: Setup) -> None:
    """The error depends on paths by numbers that the importance does not know."""
    space, plan, load = setup
    values = dict(zip(space.worth, np.random.default_rng(5).lognormal(size=len(space.worth)), strict=True))

    def error(p: Plan) -> float:
        return sum(values.values()) - sum(values[name] for name in kept_paths(space.shapes, p))

    rng, best = np.random.default_rng(0), plan
    for _ in range(60):
        made = swapped(space, best, load, rng)
        if made is not None and error(made) < error(best):
            best = made
    assert load(best) <= 1
    assert error(best) < 0.8 * error(plan)


def test_nothing_to_swap(setup: Setup) -> None:
    space, plan, _ = setup
    rng = np.random.default_rng(0)
    assert swapped(space, plan, lambda _: 2.0, rng) is None
    whole = Plan.of(space.full, edge_order=space.edge_orders)
    assert swapped(space, whole, lambda _: 0.5, rng) is None
