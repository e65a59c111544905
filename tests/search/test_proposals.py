"""Plans that a search proposes: those that it begins with, and neighbours of good ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from compactmlip.compress.apply import keep_species
from compactmlip.compress.cost import Shapes
from compactmlip.compress.plan_file import Plan
from compactmlip.models import work
from compactmlip.search.evaluate import PlanError
from compactmlip.search.exchange import exchanged
from compactmlip.search.seeds import seeds
from compactmlip.search.space import EDGE, Space
from compactmlip.search.study import Candidate, Study


@pytest.fixture(scope="module")
def teacher(make_spec: Callable[..., Any], make_model: Callable[..., nn.Module]) -> nn.Module:
    spec = make_spec(channels=(16, 8, 4), num_layers=3, lmax_edge=2, cutoff=2.5)
    return keep_species(make_model(spec), ("Mg", "O"))


def test_plans_are_scaled_to_their_budget(teacher: nn.Module) -> None:
    space = Space(Shapes(teacher), 2)
    plan = space.uniform("8x0+4x1", edge_order=2)  # the last layer has scalars only
    assert space.plan(space.blocks(plan)) == plan
    assert space.blocks(plan)[EDGE] == 1, "one above the features'"

    def load(p: Plan) -> float:
        return sum(map(sum, p.channels)) / 20

    scaled = space.scaled(plan, load)
    assert scaled is not None
    assert load(scaled) <= 1
    assert [len(c) for c in scaled.channels] == [2, 2, 1] and scaled.edge_order == 2
    assert space.scaled(plan, lambda p: 2.0) is None
    assert space.scaled(plan, lambda p: 0.0).channels == ((16, 8), (16, 8), (16,))  # type: ignore[union-attr]


def test_tapered_plans_thin_out(teacher: nn.Module) -> None:
    space = Space(Shapes(teacher), 1)
    plan = space.tapered(space.uniform("16x0+8x1"), 0.25)
    assert [c[1] if len(c) > 1 else 0 for c in plan.channels] == [8, 4, 0]
    assert [c[0] for c in plan.channels] == [16, 16, 16]


def test_exchanges_stay_on_the_budget(teacher: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of channels, and of paths for channels; swaps of paths and cutoffs have tests of their own."""
    monkeypatch.setattr("compactmlip.search.exchange.SWAP", 0.0)
    monkeypatch.setattr("compactmlip.search.exchange.CUTOFFS", 0.0)
    space = Space(Shapes(teacher), 1, ("taylor", "fisher"))
    start = space.uniform("4x0+2x1", 1)

    def load(plan: Plan) -> float:
        return sum(map(sum, plan.channels)) / sum(map(sum, start.channels))

    rng = np.random.default_rng(0)
    made = [exchanged(space, start, load, rng) for _ in range(60)]
    assert all(plan is not None for plan in made)
    plans = [plan for plan in made if plan is not None]
    assert {load(plan) for plan in plans} == {1.0}
    others = [plan for plan in plans if plan.importance == "fisher"]
    assert 4 < len(others) < 20 and {plan.layers for plan in others} == {start.layers}
    assert len({plan.target for plan in plans}) > 20
    assert any(plan.without_paths for plan in plans) and any(not plan.without_paths for plan in plans)
    before = space.blocks(start)
    moved = [sum(abs(count - before[name]) for name, count in space.blocks(p).items()) for p in plans]
    assert np.median(moved) <= 6


def test_exchanges_of_all_kinds(teacher: nn.Module) -> None:
    space = Space(Shapes(teacher), 1)
    start = space.uniform("8x0+4x1", 1)

    def effort(plan: Plan) -> float:
        return work(space.shapes.pruned(plan)).effort(20)

    def load(plan: Plan) -> float:
        return effort(plan) / effort(start)

    rng = np.random.default_rng(0)
    plans = [p for _ in range(60) if (p := exchanged(space, start, load, rng)) is not None]
    loads = [load(p) for p in plans]
    assert len(plans) > 50 and max(loads) <= 1 and np.median(loads) > 0.9, sorted(loads)
    shorter = [p for p in plans if p.cutoffs]
    assert 8 < len(shorter) < 30
    assert any(effort(p.model_copy(update={"cutoffs": None})) > effort(start) for p in shorter), (
        "time is spent"
    )
    assert any("2" in {t[-1] for t in "+".join(p.layers).split("+")} for p in plans), "orders come back"
    assert any(p.channels[0] != start.channels[0] for p in plans)


def test_criteria_that_keep_the_same_make_one_candidate(teacher: nn.Module) -> None:
    shapes = Shapes(teacher)
    rng = np.random.default_rng(0)
    one = {name: rng.random(group.size) for name, group in shapes.graph.groups.items()}
    scores = {"taylor": one, "fisher": {name: values**2 for name, values in one.items()}}
    scores["magnitude"] = {name: -values for name, values in one.items()}
    space = Space(shapes, 1, tuple(scores), scores)
    effects = [
        space.effect(space.uniform("4x0+2x1").model_copy(update={"importance": name})) for name in scores
    ]
    assert effects[0] == effects[1] and effects[0] != effects[2]


def test_paths_that_go_make_room(teacher: nn.Module) -> None:
    """And come back; every layer keeps one."""
    space = Space(Shapes(teacher), 1)
    start = space.uniform("8x0+4x1", 1)
    shapes = space.shapes

    def load(plan: Plan) -> float:
        return work(shapes.pruned(plan)).multiply_adds(10) / work(shapes.pruned(start)).multiply_adds(10)

    rng = np.random.default_rng(0)
    plan, seen = start, []
    for _ in range(40):
        made = exchanged(space, plan, load, rng)
        if made is not None:
            plan = made
            seen.append(plan)
    numbers = [len(plan.without_paths) for plan in seen]
    assert max(numbers) > 4 and min(np.diff(numbers)) < 0, "some came back"
    assert all(load(plan) <= 1 for plan in seen)
    assert max(sum(map(sum, plan.channels)) for plan in seen) > sum(map(sum, start.channels))
    for t in range(3):
        assert f"layers.{t}.path/0-0-0" not in space.paths
        assert any(name.startswith(f"layers.{t}.") for name in space.paths)
    scaled = space.scaled(seen[-1], lambda p: 2 * load(p))
    assert scaled is not None and scaled.without_paths == seen[-1].without_paths


def test_first_plans_lose_paths_before_channels(teacher: nn.Module) -> None:
    """Those first that are worth least for the time that they take."""
    space = Space(Shapes(teacher), 2)
    shapes = space.shapes
    scores = {
        c: {n: np.arange(g.size)[::-1] + 1.0 for n, g in shapes.graph.groups.items()} for c in ("taylor",)
    }
    worth = {name: 1.0 + k for k, name in enumerate(shapes.graph.groups) if ".path/" in name}
    whole = work(shapes.spec).multiply_adds(10)

    def load(plan: Plan) -> float:
        return work(shapes.pruned(plan)).multiply_adds(10) / (0.5 * whole)

    made = [(source, plan) for source, plan in seeds(space, scores, worth, load) if "without" in source]
    assert {source.partition(" ")[0] for source, _ in made} == {"16x0+8x1", "16x0+8x1+4x2"}
    assert all(load(plan) <= 1 for _, plan in made)
    assert made[0][1].layers[0] == "16x0+8x1", "paths alone are enough"


def test_nothing_to_exchange(teacher: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compactmlip.search.exchange.PATHS", 0.0)
    monkeypatch.setattr("compactmlip.search.exchange.CUTOFFS", 0.0)
    space = Space(Shapes(teacher), 1)
    full = Plan.of(space.full, edge_order=space.edge_orders)
    rng = np.random.default_rng(0)
    same = exchanged(space, full, lambda plan: 1.0, rng)
    assert same is None or space.effect(same) == space.effect(full)
    assert exchanged(space, space.uniform("4x0+2x1", 1), lambda plan: 2.0, rng) is None


def test_exchanges_find_what_pays(teacher: nn.Module, tmp_path: Path) -> None:
    """An error that depends on single places, at equal numbers of channels: far below the uniform plan's."""
    space = Space(Shapes(teacher), 1)
    start = space.uniform("4x0+2x1", 1)
    weights = {name: k % 3 for k, name in enumerate(space.bounds)}

    def error(plan: Plan) -> float:
        return sum(weights[name] / (1.0 + count) for name, count in space.blocks(plan).items())

    def load(plan: Plan) -> float:
        return sum(map(sum, plan.channels)) / sum(map(sum, start.channels))

    study = Study(tmp_path, space, lambda c: c.error.forces, seed=0)
    study.add(Candidate(start, PlanError(0.0, error(start)), 1.0, 0.0, 0, "uniform"))
    proposals = study.proposals(lambda: load)
    for _ in range(40):
        source, plan = next(proposals)
        study.add(Candidate(plan, PlanError(0.0, error(plan)), 1.0, 0.0, 0, source))
    best = min(c.error.forces for c in study.candidates)
    assert best < 0.8 * error(start)
    assert {c.source for c in study.candidates} == {"uniform", "exchange", "optuna"}
