"""Which paths of the tensor products go first, and plans without a share of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from ase import Atoms
from ase.build import bulk
from torch import nn

from compactmlip.channels import is_path
from compactmlip.compress.compress import compress
from compactmlip.compress.cost import Setting, Shapes
from compactmlip.compress.defaults import default_cut, default_cuts
from compactmlip.compress.path_importance import path_importance
from compactmlip.compress.plan_file import Plan
from compactmlip.compress.thin import (
    by_price,
    cuttable_paths,
    effort,
    kept_paths,
    thinned,
    thinned_by_share,
    tidied,
    without_paths,
)
from compactmlip.data.graph import GraphBatch, build_graph
from compactmlip.errors import InputError
from compactmlip.models import model_spec, work
from compactmlip.models.workload import COUPLING_COST, convolution_work

SETTING = Setting(64, 10.0)


@pytest.fixture(scope="module")
def teacher(make_spec: Callable[..., Any], make_model: Callable[..., nn.Module]) -> nn.Module:
    return make_model(make_spec(channels=(16, 8, 4), num_layers=3, lmax_edge=2, cutoff=2.5))


@pytest.fixture(scope="module")
def plan(teacher: nn.Module) -> Plan:
    return Plan.uniform("16x0+8x1+4x2", 3)


def _graphs(teacher: nn.Module) -> list[GraphBatch]:
    made = []
    for seed in range(4):
        atoms: Atoms = bulk("MgO", "rocksalt", a=4.21)
        atoms.rattle(0.1, seed=seed)
        made.append(build_graph(atoms, model_spec(teacher)))
    return made


def _worth(shapes: Shapes) -> dict[str, float]:
    return {name: 1.0 + k for k, name in enumerate(filter(is_path, shapes.graph.groups))}


def _layers(shapes: Shapes, plan: Plan) -> object:
    """What is left but for harmonics of edges, which no path may use."""
    return shapes.pruned(plan).architecture["layers"]


def test_the_cheapest_loss_goes_first(teacher: nn.Module, plan: Plan) -> None:
    shapes = Shapes(teacher)
    worth, cost = _worth(shapes), effort(shapes, SETTING)
    whole = cost(plan)
    made = thinned(shapes, plan, worth, cost, 0.3 * whole)
    assert made is not None and cost(made) <= 0.3 * whole
    less = thinned(shapes, plan, worth, cost, 0.8 * whole)
    assert less is not None and set(kept_paths(shapes, made)) < set(kept_paths(shapes, less))
    for name in kept_paths(shapes, plan)[::4]:
        first = thinned(shapes, plan, worth | {name: 1e-9}, cost, 0.9999 * whole)
        assert first is not None
        assert _layers(shapes, first) == _layers(shapes, without_paths(plan, [name])), (
            "worth least for its time"
        )
    assert thinned(shapes, plan, worth, lambda p: 2.0, 1.0) is None
    assert thinned(shapes, plan, worth, cost, whole) == tidied(shapes, plan)
    whole_layers = ("16x0+8x1+4x2", "16x0+8x1+4x2", "16x0")
    assert tidied(shapes, plan).layers == whole_layers, "the last has scalars only"


def test_a_share_of_the_paths(teacher: nn.Module, plan: Plan) -> None:
    shapes = Shapes(teacher)
    worth, cost = _worth(shapes), effort(shapes, SETTING)
    number = len(kept_paths(shapes, plan))
    assert number < len(cuttable_paths(shapes)), "odd paths are cut anyway"
    order = by_price(shapes, plan, worth, cost)
    for share in (0.0, 0.5, 1.0):
        made = thinned_by_share(shapes, plan, worth, cost, share)
        whole = without_paths(plan, order[: round(share * number)])
        assert _layers(shapes, made) == _layers(shapes, whole), "tidied, but the same"
        assert set(made.without_paths) <= set(whole.without_paths)
        assert not any(name.endswith("/0-0-0") for name in made.without_paths)
    # Without paths to scalars but 0-0-0 nothing needs higher orders, and nothing is said of their paths.
    assert made.layers == ("16x0", "16x0", "16x0") and not made.without_paths
    with pytest.raises(InputError, match="between 0 and 1, not 1.5"):
        thinned_by_share(shapes, plan, worth, cost, 1.5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("share", [0.2, 0.35, 0.5, 0.65, 0.8])
def test_nothing_that_still_fits_is_cut(teacher: nn.Module, plan: Plan, share: float, reverse: bool) -> None:
    """The last path may have saved much more than was wanted."""
    shapes = Shapes(teacher)
    worth, cost = _worth(shapes), effort(shapes, SETTING)
    if reverse:
        worth = {name: 1 / value for name, value in worth.items()}
    bound = share * cost(plan)
    made = thinned(shapes, plan, worth, cost, bound)
    assert made is not None and cost(made) <= bound
    for name in made.without_paths:
        left = tuple(other for other in made.without_paths if other != name)
        fuller = made.model_copy(update={"without_paths": left})
        assert cost(fuller) > bound or _layers(shapes, fuller) == _layers(shapes, made)


def test_effort_counts_coupling_entries(teacher: nn.Module) -> None:
    """They are formed for each path and edge, whatever the number of channels."""
    for channels in (1, 8, 64):
        assert convolution_work({(1, 1, 0): channels, (2, 2, 2): channels}).couplings == 3 + 25
    spec = model_spec(teacher)
    found = work(spec)
    # What the edges' own order couples scalars with: three layers of paths of features up to l = 2.
    assert found.couplings > 3 * (1 + 3 + 5)
    assert found.effort(10.0) - found.multiply_adds(10.0) == pytest.approx(
        COUPLING_COST * 10.0 * found.couplings
    )
    assert found.per_atom(10.0)["couplings"] == 10.0 * found.couplings


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 1.0])
def test_cut_with_a_share(teacher: nn.Module, share: float) -> None:
    graphs = _graphs(teacher)
    made = compress(teacher, graphs, "16x0+8x1+4x2", cut_paths=share, with_compensation=False)
    step = model_spec(made.model).provenance.steps[-1].options
    shapes = Shapes(teacher)
    plan = Plan.uniform("16x0+8x1+4x2", 3)
    expected = thinned_by_share(
        shapes, plan, path_importance(teacher, graphs), effort(shapes, Setting.of(graphs)), share
    )
    assert list(step.get("without_paths", ())) == list(expected.without_paths)
    assert _layers(shapes, expected) == model_spec(made.model).architecture["layers"]
    assert len(kept_paths(shapes, expected)) <= (1 - share) * len(kept_paths(shapes, plan)) + 1


def test_a_share_needs_channels(teacher: nn.Module) -> None:
    with pytest.raises(InputError, match="need a target"):
        compress(teacher, _graphs(teacher), None, layers=2, cut_paths=0.5)
    with pytest.raises(InputError, match="need a target"):
        compress(teacher, _graphs(teacher), None, layers=2, cutoffs="-,80%")
    spec = model_spec(teacher)
    assert default_cut(spec).cut_paths > 0 and default_cut(spec).cutoffs == "-,80%"


def test_cutoffs_stay_where_there_is_one_layer(make_spec: Callable[..., Any]) -> None:
    assert {cut.cutoffs for cut in default_cuts(make_spec(num_layers=1))} == {None}
