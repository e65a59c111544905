"""Plans within a budget, by paths or by channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mace_models
import pytest
from ase.build import bulk
from torch import nn

from compactmlip.compress.allocate import full_channels
from compactmlip.compress.cost import Setting, Shapes, multiply_adds
from compactmlip.compress.defaults import DEFAULTS, Cut
from compactmlip.compress.plan_file import Plan
from compactmlip.compress.thin import kept_paths
from compactmlip.data.graph import GraphBatch, build_graph
from compactmlip.errors import InputError
from compactmlip.models import model_spec, work
from compactmlip.search.speed import Stopwatch
from compactmlip.search.within import Planner

TEMPLATE = Plan(layers=("1x0",))


@pytest.fixture(scope="module")
def teacher(make_spec: Callable[..., Any], make_model: Callable[..., nn.Module]) -> nn.Module:
    return make_model(make_spec(channels=(16, 8, 4), num_layers=3, lmax_edge=2, cutoff=2.5))


@pytest.fixture(scope="module")
def graphs(teacher: nn.Module) -> list[GraphBatch]:
    made = []
    for seed in range(4):
        atoms = bulk("MgO", "rocksalt", a=4.21)
        atoms.rattle(0.1, seed=seed)
        made.append(build_graph(atoms, model_spec(teacher)))
    return made


def _cost(teacher: nn.Module, graphs: list[GraphBatch]) -> Callable[[Plan], float]:
    return multiply_adds(Shapes(teacher), Setting.of(graphs))


def _within(
    budget: str, teacher: nn.Module, graphs: list[GraphBatch], to: str | None = None, **options: Any
) -> Plan:
    return Planner(budget, teacher, graphs, TEMPLATE, round_to=2, **options).plan(to)


def test_multiply_adds_are_saved_on_paths(teacher: nn.Module, graphs: list[GraphBatch]) -> None:
    cost = _cost(teacher, graphs)
    plan = _within("flops=40%", teacher, graphs)
    assert all(channels[0] == 16 and {*channels[1:]} <= {0, 8, 4} for channels in plan.channels)
    assert plan.layers[0] != "16x0+8x1+4x2" or plan.without_paths
    assert cost(plan) == plan.made_by["cost"] <= 0.4 * plan.made_by["cost_uncut"]
    other = _within("flops=40%", teacher, graphs, to="16x0+8x1")
    assert other.layers[0] == "16x0+8x1" and len(other.without_paths) < len(plan.without_paths)


def test_channels_go_where_paths_are_not_enough(teacher: nn.Module, graphs: list[GraphBatch]) -> None:
    plan = _within("flops=10%", teacher, graphs, cutoffs="-")
    assert plan.channels[0] == (8,), "no paths are left but 0-0-0"
    assert plan.made_by["cost"] <= 0.1 * plan.made_by["cost_uncut"]
    with pytest.raises(InputError, match="cannot be met by cutting paths and channels"):
        _within("flops=0.001%", teacher, graphs)


def test_layers_see_less_where_much_is_saved(teacher: nn.Module, graphs: list[GraphBatch]) -> None:
    """What shorter cutoffs save is spent on paths."""
    cost = _cost(teacher, graphs)
    plan = _within("flops=40%", teacher, graphs)
    assert plan.cutoffs == (None, 2.0, 2.0)
    whole = _within("flops=40%", teacher, graphs, cutoffs="-")
    kept = [len(kept_paths(Shapes(teacher), made)) for made in (plan, whole)]
    assert whole.cutoffs is None and kept[1] < kept[0]
    nearer = _within("flops=40%", teacher, graphs, cutoffs="-,2.4,2.2")
    assert nearer.cutoffs == (None, 2.4, 2.2)
    assert max(map(cost, (plan, whole, nearer))) <= 0.4 * plan.made_by["cost_uncut"]
    assert _within("flops=60%", teacher, graphs).cutoffs is None
    assert _within("flops=40%", teacher, graphs, first="channels").cutoffs is None
    by_channels = _within("flops=40%", teacher, graphs, first="channels", cutoffs="80%")
    assert by_channels.cutoffs == (2.0, 2.0, 2.0)


def test_channels_grow_where_no_path_has_to_go(
    teacher: nn.Module, graphs: list[GraphBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --to, much is saved by fewer channels of the same proportions; with it they stay."""
    cuts = (Cut("16x0+8x1+4x2", 0.5), Cut("4x0+2x1", cutoffs="-,80%"))
    monkeypatch.setitem(DEFAULTS, "nequip", cuts)
    cost = _cost(teacher, graphs)
    plan = _within("flops=40%", teacher, graphs)
    assert not plan.without_paths and len(plan.channels[0]) == 2 and plan.channels[0][0] > 4
    assert cost(plan) <= 0.4 * plan.made_by["cost_uncut"]
    assert _within("flops=40%", teacher, graphs, to="4x0+2x1").layers[0] == "4x0+2x1"
    assert _within("flops=60%", teacher, graphs).layers[0] == "16x0+8x1+4x2"


def test_parameters_are_saved_on_channels(teacher: nn.Module, graphs: list[GraphBatch]) -> None:
    plan = _within("parameters=40%", teacher, graphs)
    assert not plan.without_paths and plan.channels[0][0] < 16
    by_paths = _within("parameters=80%", teacher, graphs, first="paths")
    assert {channels[0] for channels in by_paths.channels} == {16} and by_paths.layers != plan.layers
    by_channels = _within("flops=40%", teacher, graphs, first="channels")
    assert not by_channels.without_paths
    with pytest.raises(InputError, match="give only one of --to and --budget"):
        _within("parameters=40%", teacher, graphs, to="16x0+8x1")


def test_plans_for_a_latency_are_measured(
    teacher: nn.Module, graphs: list[GraphBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first prediction is 1.5 times too fast; the plan that comes out is not."""
    cost = _cost(teacher, graphs)
    uncut = cost(Plan.of(full_channels(Shapes(teacher)), odd_paths=True))

    def measured(self: Stopwatch, plans: list[Plan], progress: bool = False) -> list[float]:
        self.seconds.append(1e-3)
        found = [1.5 * cost(plan) / uncut for plan in plans]
        for plan, time in zip(plans, found, strict=True):
            # What a model is fitted to is not what the plan for the latency turns out to take.
            self.measured[plan.to_json()] = work(self.shapes.pruned(plan)), time / 1.5
        return found

    monkeypatch.setattr(Stopwatch, "measure", measured)
    plan = _within("latency=4x", teacher, graphs)
    assert plan.made_by["cost_uncut"] == pytest.approx(1e-3)
    assert plan.made_by["cost"] == pytest.approx(1e-3 * 1.5 * cost(plan) / uncut, rel=0.03)
    assert 0.15 * uncut < 1.5 * cost(plan) <= 0.255 * uncut


def test_what_is_measured_serves_several_plans(
    teacher: nn.Module, graphs: list[GraphBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    planner = Planner("flops=50%", teacher, graphs, TEMPLATE, round_to=2)
    all_orders = planner.plan()
    assert planner.known is None, "cutting paths needs no ranking of channels"
    monkeypatch.setattr("compactmlip.search.within.path_importance", lambda *_, **__: pytest.fail("again"))
    fewer = planner.plan("16x0+8x1")
    assert fewer != all_orders
    monkeypatch.undo()
    assert fewer == _within("flops=50%", teacher, graphs, to="16x0+8x1")
    by_channels = Planner("flops=50%", teacher, graphs, TEMPLATE, first="channels", round_to=2)
    by_channels.plan()
    assert by_channels.known is not None


def test_mace_models_lose_channels() -> None:
    model = mace_models.make_model(mace_models.make_spec(lmax_edge=2, correlation=2), seed=1)
    atoms = bulk("MgO", "rocksalt", a=4.21)
    atoms.symbols[:] = model_spec(model).species[:2]
    made = [build_graph(atoms, model_spec(model))]
    assert not _within("flops=60%", model, made).without_paths
    whole = full_channels(Shapes(model))
    assert _within("flops=80%", model, made, first="paths").channels[0][0] == whole[0][0]
