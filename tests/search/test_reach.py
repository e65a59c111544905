"""Cutoffs of single layers as variables of a search."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mace_models
import numpy as np
import pytest
from torch import nn

from compactmlip.compress.cost import Shapes
from compactmlip.models import work
from compactmlip.search.reach import first_cutoffs, other_cutoffs
from compactmlip.search.seeds import seeds
from compactmlip.search.space import Space


@pytest.fixture(scope="module")
def space(make_spec: Callable[..., Any], make_model: Callable[..., nn.Module]) -> Space:
    return Space(Shapes(make_model(make_spec(channels=(16, 8, 4), num_layers=3, lmax_edge=2, cutoff=5.0))), 2)


def test_cutoffs_walk_on_a_grid(space: Space) -> None:
    """Mostly towards shorter ones, but never below three fifths of the model's, and back."""
    rng, plan = np.random.default_rng(0), space.uniform("16x0+8x1")
    seen: set[float | None] = set()
    together = 0
    for _ in range(300):
        made = other_cutoffs(space, plan, rng)
        before, after = (p.cutoffs or (None,) * 3 for p in (plan, made))
        changed = [t for t in range(3) if before[t] != after[t]]
        together += len(changed) > 1
        seen |= set(after)
        plan = made
    assert seen == {None, 4.5, 4.0, 3.5, 3.0}
    assert together > 30
    back = space.uniform("16x0").model_copy(update={"cutoffs": (None, None, 4.5)})
    undone = {other_cutoffs(space, back, np.random.default_rng(k)).cutoffs for k in range(40)}
    assert None in undone and (None, None, 4.0) in undone


def test_searches_begin_with_shorter_cutoffs_too(space: Space) -> None:
    assert list(first_cutoffs(space)) == [None, (None, 4.5, 4.5), (None, 4.0, 4.0)]
    shapes = space.shapes
    scores = {"taylor": {n: np.arange(g.size)[::-1] + 1.0 for n, g in shapes.graph.groups.items()}}
    worth = {name: 1.0 + k for k, name in enumerate(space.paths)}
    whole = work(shapes.spec).effort(20)
    plans = list(
        seeds(space, scores, worth, lambda plan: work(shapes.pruned(plan)).effort(20) / (0.3 * whole))
    )
    kept: dict[str | None, int] = {}
    for source, plan in plans:
        if source.startswith("16x0+8x1+4x2 without"):
            short = source.partition("cutoffs ")[2] or None
            assert (plan.cutoffs is None) == (short is None)
            paths = sum(len(layer["paths"]) for layer in shapes.pruned(plan).architecture["layers"])
            kept[short] = max(kept.get(short, 0), paths)
    assert kept["4"] >= kept["4.5"] >= kept[None] < kept["4"], "what shorter cutoffs save is spent on paths"


def test_other_families_have_none() -> None:
    model = mace_models.make_model(mace_models.make_spec(lmax_edge=2, correlation=2), seed=1)
    assert list(first_cutoffs(Space(Shapes(model), 1))) == [None]
