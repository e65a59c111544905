"""Layers that see fewer neighbours than the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mace_models
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from torch import nn

import compactmlip.compress.compress as compress_module
from compactmlip import checkpoint
from compactmlip.compress.apply import keep_species, with_layer_cutoffs
from compactmlip.compress.compress import compress
from compactmlip.compress.cost import Shapes
from compactmlip.compress.plan import parse_cutoffs
from compactmlip.compress.plan_file import Plan
from compactmlip.data.graph import build_graph, energy_and_derivatives
from compactmlip.deploy.compile import compile_model
from compactmlip.deploy.engine import load_engine
from compactmlip.deploy.lower.lower import lower
from compactmlip.deploy.lower.splines import Grid
from compactmlip.errors import InputError
from compactmlip.models import build, channel_rows, exact_copy, model_spec, work

CUTOFFS = (None, 4.0, 3.6)


@pytest.fixture(scope="module")
def whole(make_spec: Callable[..., Any], make_model: Callable[..., nn.Module]) -> nn.Module:
    spec = make_spec(channels=(8, 4, 4), num_layers=3, lmax_edge=2, cutoff=4.5)
    return make_model(spec)


@pytest.fixture(scope="module")
def model(whole: nn.Module) -> nn.Module:
    return exact_copy(with_layer_cutoffs(whole, CUTOFFS))


def _structure(model: nn.Module) -> Atoms:
    atoms = bulk("MgO", "rocksalt", a=4.21, cubic=True)
    atoms.symbols[:] = list(model_spec(model).species[:2]) * 4
    atoms.rattle(0.1, seed=1)
    return atoms


def _energy(model: nn.Module, atoms: Atoms) -> float:
    return float(energy_and_derivatives(model, build_graph(atoms, model_spec(model))).energies)


def test_forces_are_derivatives(model: nn.Module) -> None:
    atoms = _structure(model)
    forces = energy_and_derivatives(model, build_graph(atoms, model_spec(model))).forces
    for k, axis in ((0, 0), (3, 1), (6, 2)):
        moved = []
        for step in (1e-4, -1e-4):
            other = atoms.copy()
            other.positions[k, axis] += step
            moved.append(_energy(model, other))
        assert float(forces[k, axis]) == pytest.approx(-(moved[0] - moved[1]) / 2e-4, abs=1e-6)


def test_a_layer_sees_nothing_beyond(whole: nn.Module) -> None:
    """Two atoms know of each other up to the longest of the layers' cutoffs."""
    species = list(model_spec(whole).species)
    near = with_layer_cutoffs(whole, (2.0, 2.0, 2.0))

    def pair(distance: float, model: nn.Module) -> float:
        return _energy(model, Atoms(species[:2], positions=[[0, 0, 0], [distance, 0, 0]]))

    assert pair(2.0001, near) == pytest.approx(pair(30.0, near), abs=1e-12)
    assert abs(pair(2.0001, whole) - pair(30.0, whole)) > 1e-6
    # The first layer still tells of all neighbours.
    later = with_layer_cutoffs(whole, (None, 2.0, 2.0))
    assert abs(pair(2.0001, later) - pair(30.0, later)) > 1e-6


def test_messages_end_smoothly(whole: nn.Module) -> None:
    """Forces vanish as the square of the distance to the cutoff: they and their slope have no step."""
    near = exact_copy(with_layer_cutoffs(whole, (3.0, 3.0, 3.0)))
    species = list(model_spec(whole).species)
    r = 3.0 + 1e-3 * np.array([-2, -1, 0, 1, 2])
    forces = []
    for distance in r:
        atoms = Atoms(species[:2], positions=[[0, 0, 0], [distance, 0, 0]])
        graph = build_graph(atoms, model_spec(near))
        forces.append(float(energy_and_derivatives(near, graph).forces[1, 0]))
    assert forces[2:] == [0.0, 0.0, 0.0]
    assert abs(forces[1]) > 1e-8 and forces[0] == pytest.approx(4 * forces[1], rel=0.02)


def test_the_models_own_cutoff_changes_nothing(whole: nn.Module) -> None:
    cutoff = model_spec(whole).cutoff
    same = with_layer_cutoffs(whole, (cutoff, None, cutoff))
    assert model_spec(same) == model_spec(whole)
    atoms = _structure(whole)
    assert _energy(same, atoms) == _energy(whole, atoms)


def test_files(model: nn.Module, whole: nn.Module, tmp_path: Path) -> None:
    """Cutoffs come back; a model without any is written as before there were any."""
    checkpoint.save(model, tmp_path / "m.safetensors")
    again = checkpoint.load(tmp_path / "m.safetensors", None)
    assert [layer["cutoff"] for layer in model_spec(again).architecture["layers"][1:]] == [4.0, 3.6]
    assert _energy(exact_copy(again), _structure(model)) == pytest.approx(
        _energy(model, _structure(model)), abs=1e-9
    )
    assert "cutoff" not in json.dumps(model_spec(whole).architecture)
    assert [text.rpartition(", ")[2] for _, text in channel_rows(model_spec(model))[2:4]] == [
        "cutoff 4 A",
        "cutoff 3.6 A",
    ]
    assert model_spec(model).receptive_field == pytest.approx(4.5 + 4.0 + 3.6)
    assert model_spec(whole).receptive_field == pytest.approx(3 * 4.5)
    fewer = keep_species(model, model_spec(model).species[:2])
    assert model_spec(fewer).architecture["layers"][2]["cutoff"] == 3.6


def test_static_shapes_give_the_same(model: nn.Module) -> None:
    graph = build_graph(_structure(model), model_spec(model))
    expected = energy_and_derivatives(model, graph)
    other = exact_copy(model)
    other.static_shapes = True  # type: ignore[assignment]
    found = energy_and_derivatives(other, graph)
    assert torch.allclose(found.forces, expected.forces, atol=1e-12)
    assert torch.allclose(found.energies, expected.energies, atol=1e-12)


def test_lowered_models_agree(model: nn.Module) -> None:
    graph = build_graph(_structure(model), model_spec(model))
    made = lower(model, [graph])
    expected, found = (energy_and_derivatives(m, graph) for m in (model, made.module))
    assert torch.allclose(found.forces, expected.forces, atol=1e-5)
    assert torch.allclose(found.energies, expected.energies, atol=1e-5)
    alone = build_graph(Atoms(model_spec(model).species[0]), model_spec(model))
    energies = [float(energy_and_derivatives(m, alone).energies) for m in (model, made.module)]
    assert energies[1] == pytest.approx(energies[0], abs=1e-6)


@pytest.mark.parametrize("backend", ["torch", "kernels", pytest.param("aoti", marks=pytest.mark.slow)])
def test_deployed_files_agree(model: nn.Module, backend: Any, tmp_path: Path) -> None:
    path = tmp_path / ("model.pt2" if backend == "aoti" else "model.pt")
    compile_model(model, path, dtype="float64", backend=backend)
    graph = build_graph(_structure(model), model_spec(model))
    expected, found = energy_and_derivatives(model, graph), load_engine(path).evaluate(graph)
    assert torch.allclose(found.forces, expected.forces, atol=1e-5)


@pytest.mark.parametrize(
    ("grid", "cutoff", "kink", "knots"),
    [
        (Grid(5.0, 101, 3), 4.0, 0.0, 81),
        (Grid(5.0, 103, 3, 4.0, 81), 3.0, 0.0, 61),
        (Grid(5.0, 103, 3, 4.0, 82), 4.5, 4.0, 93),
    ],
)
def test_grids_of_shorter_cutoffs_are_as_dense(grid: Grid, cutoff: float, kink: float, knots: int) -> None:
    made = grid.up_to(cutoff)
    assert made.cutoff == cutoff and made.kink == kink and abs(made.knots - knots) <= 1
    assert made.knots_before_kink == (grid.knots_before_kink if kink else 0)


def test_plans_shorten(whole: nn.Module, tmp_path: Path) -> None:
    plan = Plan.uniform("8x0+4x1", 3, edge_order=1, cutoffs=CUTOFFS)
    assert plan.summary.endswith("cutoffs - 4 3.6")
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan
    assert Plan.uniform("8x0", 2, cutoffs=(None, None)) == Plan.uniform("8x0", 2)
    graphs = []
    for seed in range(4):
        atoms = _structure(whole)
        atoms.rattle(0.05, seed=seed)
        graphs.append(build_graph(atoms, model_spec(whole)))
    made = compress(whole, graphs, plan)
    assert model_spec(made.model).architecture == Shapes(whole).pruned(plan).architecture
    step = model_spec(made.model).provenance.steps[0]
    assert step.options["cutoffs"] == list(CUTOFFS)
    only = compress(whole, graphs, Plan.uniform("8x0+4x1+4x2", 3, odd_paths=True, cutoffs=(None, None, 4.0)))
    assert (
        model_spec(only.model).architecture
        == model_spec(with_layer_cutoffs(whole, (None, None, 4.0))).architecture
    )
    assert only.compensation is not None and only.compensation.after is not None
    assert only.compensation.after.forces < only.compensation.before.forces
    with pytest.raises(InputError, match="2 cutoffs for 3 layers"):
        (tmp_path / "bad.json").write_text(plan.to_json().replace("null,", ""))
        Plan.load(tmp_path / "bad.json")


def test_work_counts_the_edges_of_each_layer(whole: nn.Module) -> None:
    spec = model_spec(whole)
    short = model_spec(with_layer_cutoffs(whole, (None, 3.0, 3.0)))
    assert work(short).dense == work(spec).dense and work(short).kept == work(spec).kept
    none = work(short, lambda _: 0.0).convolution
    assert none < work(short).convolution < work(spec).convolution
    evenly = none + (3.0 / 4.5) ** 3 * (work(spec).convolution - none)
    assert work(short).convolution == pytest.approx(evenly)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("-,4", (None, 4.0, 4.0)),
        ("4.25", (4.25,) * 3),
        ("-, 80%,3", (None, 3.6, 3.0)),
        ("100%,4.5,.5", (None, None, 0.5)),
        ("-", None),
        ("4.5", None),
    ],
)
def test_cutoffs_as_text(whole: nn.Module, text: str, wanted: tuple[float | None, ...] | None) -> None:
    assert parse_cutoffs(text, model_spec(whole)) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read ''"),
        ("-,4A", "cannot read '4A' in the cutoffs '-,4A'"),
        ("4;3", "cannot read '4;3'"),
        ("-4", "cannot read '-4'"),
        ("4,4,4,4", "lists cutoffs of 4 layers, but the model has 3"),
        ("-,101%", "layer 1: the cutoff must be above 0 and at most the model's 4.5"),
        ("0", "layer 0: the cutoff must be above 0"),
        ("0%", "layer 0: the cutoff must be above 0"),
    ],
)
def test_unreadable_cutoffs(whole: nn.Module, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_cutoffs(text, model_spec(whole))


def test_wrong_cutoffs_of_a_plan_are_found_at_once(whole: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before importances are computed."""
    monkeypatch.setattr(compress_module, "importance", lambda *args, **options: pytest.fail("too late"))
    plan = Plan.uniform("8x0+4x1", 3, cutoffs=(None, 9.0, None))
    graph = build_graph(_structure(whole), model_spec(whole))
    with pytest.raises(InputError, match="layer 1: the cutoff must be above 0"):
        compress(whole, [graph], plan)


def test_what_cannot_be(whole: nn.Module) -> None:
    with pytest.raises(InputError, match="2 cutoffs of layers are given, but the model has 3"):
        with_layer_cutoffs(whole, (4.0, 4.0))
    with pytest.raises(InputError, match="layer 1: the cutoff must be above 0 and at most the model's 4.5"):
        with_layer_cutoffs(whole, (None, 5.0, None))
    mace = mace_models.make_model(mace_models.make_spec(lmax_edge=2, correlation=2), seed=1)
    with pytest.raises(InputError, match="'mace' cannot have cutoffs of their own"):
        with_layer_cutoffs(mace, (None, 3.0))
    with pytest.raises(InputError, match="'mace' cannot have cutoffs of their own"):
        parse_cutoffs("-,80%", model_spec(mace))


def test_no_layer_sees_more_than_before(whole: nn.Module) -> None:
    once = with_layer_cutoffs(whole, (None, 3.5, 3.0))
    twice = with_layer_cutoffs(once, (4.0, None, 3.2))
    assert [layer["cutoff"] for layer in model_spec(twice).architecture["layers"]] == [4.0, 3.5, 3.0]
    assert model_spec(once).cutoffs == (4.5, 3.5, 3.0) and model_spec(whole).cutoffs == (4.5,)


def test_random_models_too(model: nn.Module) -> None:
    """A spec with cutoffs builds."""
    assert isinstance(build(model_spec(model)), type(model))
