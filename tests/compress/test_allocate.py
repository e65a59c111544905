"""Budgets and the plans that they give."""

from __future__ import annotations

import numpy as np
import pytest
from mace_native import native_model, native_spec
from torch import nn

from compactmlip.compress.allocate import allocate, full_channels
from compactmlip.compress.apply import prune
from compactmlip.compress.cost import Budget, Setting, Shapes, cost_of
from compactmlip.compress.plan_file import Plan
from compactmlip.compress.tapped import Scores, group_sizes
from compactmlip.errors import InputError
from compactmlip.models import num_parameters

SETTING = Setting(atoms=100, edges_per_atom=30.0)


def _scores(model: nn.Module, seed: int = 0) -> Scores:
    rng = np.random.default_rng(seed)
    return {name: rng.random(size) for name, size in group_sizes(model).items()}


@pytest.mark.parametrize(
    ("text", "kind", "value", "relative"),
    [
        ("parameters=20%", "parameters", 0.2, True),
        ("parameters=1.5M", "parameters", 1.5e6, False),
        ("flops=8x", "flops", 0.125, True),
        ("memory=2GB", "memory", 2e9, False),
        ("latency=40us", "latency", 4e-5, False),
    ],
)
def test_budgets_are_read(text: str, kind: str, value: float, relative: bool) -> None:
    found = Budget.parse(text)
    assert (found.kind, found.relative) == (kind, relative)
    assert found.value == pytest.approx(value)
    assert found.bound(100.0) == pytest.approx(100 * value if relative else value)


@pytest.mark.parametrize("text", ["params=20%", "memory=2", "parameters=-3", "latency", "flops=0"])
def test_bad_budgets_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="cannot read"):
        Budget.parse(text)


@pytest.mark.parametrize("kind", ["parameters", "flops", "memory"])
@pytest.mark.parametrize("family", ["nequip", "mace"])
def test_plans_meet_their_budget(small_model: nn.Module, family: str, kind: str) -> None:
    model = small_model if family == "nequip" else native_model(native_spec())
    shapes, scores = Shapes(model), _scores(model)
    cost = cost_of(kind, shapes, SETTING)  # type: ignore[arg-type]
    full = Plan.of(full_channels(shapes), odd_paths=True)
    least = cost(Plan.uniform("2x0", len(full.layers)))  # of memory, mostly what a process needs at rest
    bound = least + 0.4 * (cost(full) - least)
    plan = allocate(shapes, scores, cost, bound, round_to=2, template=full)
    assert cost(plan) <= bound
    assert all(
        c % 2 == 0 or c == f
        for got, was in zip(plan.channels, full.channels, strict=True)
        for c, f in zip(got, was, strict=False)
    )
    pruned = prune(model, shapes.masks(plan, scores))
    assert num_parameters(pruned) == shapes.num_parameters(plan)
    assert num_parameters(pruned) < num_parameters(model)


def test_channels_that_matter_stay(small_model: nn.Module) -> None:
    shapes, scores = Shapes(small_model), _scores(small_model)
    scores["layers.0.out/3"] = scores["layers.0.out/3"] * 1e6
    cost = cost_of("parameters", shapes, SETTING)
    full = Plan.of(full_channels(shapes))
    plan = allocate(shapes, scores, cost, 0.4 * cost(full), round_to=1)
    assert plan.channels[0][3] == 3
    other = allocate(shapes, _scores(small_model), cost, 0.4 * cost(full), round_to=1, weights={(0, 3): 1e-9})
    assert len(other.channels[0]) <= 3


def test_budget_that_cannot_be_met(small_model: nn.Module) -> None:
    shapes = Shapes(small_model)
    with pytest.raises(InputError, match="cannot be met"):
        allocate(shapes, _scores(small_model), cost_of("parameters", shapes, SETTING), 10.0)


def test_latency_has_to_be_measured(small_model: nn.Module) -> None:
    with pytest.raises(InputError, match="measured"):
        cost_of("latency", Shapes(small_model), SETTING)


def test_work_falls_with_channels_and_orders(small_model: nn.Module) -> None:
    shapes = Shapes(small_model)
    cost = cost_of("flops", shapes, SETTING)
    plans = ["8x0+6x1+4x2+3x3", "8x0+6x1+4x2", "8x0+6x1", "8x0"]
    costs = [cost(Plan.uniform(text, 3)) for text in plans]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) == len(costs)
    more = [cost(Plan.uniform("8x0+6x1", 3, edge_order=k)) for k in (1, 2)]
    assert more[0] < more[1]
