"""Compression of small random MACE models: scores, cuts, refit, depth and basis in one call."""

from __future__ import annotations

import copy
from typing import Any

import mace_models
import numpy as np
import pytest
import torch
from ase.build import bulk
from torch import nn

from compactmlip.compress.compress import compress
from compactmlip.compress.importance import CRITERIA
from compactmlip.data.graph import GraphBatch, build_graph, energy_and_derivatives
from compactmlip.errors import InputError, UnsupportedFeatureError


def _teacher(variant: str = "residual", seed: int = 1) -> nn.Module:
    """Later channels matter less, as in a trained model: there is something to choose and to make up for."""
    options = mace_models.VARIANTS[variant] | {"lmax_edge": 2, "correlation": 2}
    model = mace_models.make_model(mace_models.make_spec(**options), seed=seed)
    with torch.no_grad():
        for block in model.layers:
            for order in block.linear.orders.values():
                order.weight *= torch.linspace(1, 0.1, order.weight.shape[0], dtype=torch.float64)[:, None]
    return model


def _graphs(model: nn.Module, count: int, seed: int = 0) -> list[GraphBatch]:
    rng = np.random.default_rng(seed)
    graphs = []
    for _ in range(count):
        atoms = bulk("MgO", "rocksalt", a=4.21 * (1 + 0.02 * rng.normal()), cubic=True)
        atoms.rattle(0.15, rng=rng)
        graphs.append(build_graph(atoms, model.spec))
    return graphs


def _errors(model: nn.Module, teacher: nn.Module, graphs: list[GraphBatch]) -> tuple[float, float]:
    """RMS deviations of energies per structure and of force components."""
    pairs = [(energy_and_derivatives(model, g), energy_and_derivatives(teacher, g)) for g in graphs]
    energies = torch.cat([a.energies - b.energies for a, b in pairs])
    forces = torch.cat([(a.forces - b.forces).flatten() for a, b in pairs])
    return float(energies.square().mean().sqrt()), float(forces.square().mean().sqrt())


def _assert_same_weights(one: nn.Module, two: nn.Module) -> None:
    for (name, a), (_, b) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(("variant", "seed"), [("agnostic first", 3), ("density", 1), ("nonlinear", 1)])
def test_compensation_lowers_errors_on_unseen_structures(variant: str, seed: int) -> None:
    teacher = _teacher(variant, seed)
    before = copy.deepcopy(teacher.state_dict())
    result = compress(teacher, _graphs(teacher, 24), "4x0+4x1")
    unseen = _graphs(teacher, 4, seed=9)
    plain, refitted = (_errors(m, teacher, unseen) for m in (result.sliced, result.model))
    assert refitted[0] < 0.2 * plain[0] and refitted[1] < 0.9 * plain[1]
    assert result.compensation is not None and result.compensation.damping is not None
    assert result.compensation.after.forces < result.compensation.before.forces
    assert result.compensation.after.energy < result.compensation.before.energy
    fitted = {fit.stage.split()[-1] for fit in result.compensation.fits}
    assert fitted >= {"up", "down", "linear", "readout"}
    assert ("contraction" in fitted) == teacher.arch.contraction_per_species
    steps = [step.action for step in result.model.spec.provenance.steps]
    assert steps == ["prune", "compensate"]
    assert result.model.spec.provenance.steps[0].options["target"] == "4x0+4x1"
    assert [step.action for step in result.sliced.spec.provenance.steps] == ["prune"]
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_refit_that_makes_forces_worse_is_not_used() -> None:
    """In this model energies would gain and forces lose, at any penalty."""
    teacher = _teacher("residual", 2)
    result = compress(teacher, _graphs(teacher, 12), "4x0+4x1")
    assert result.compensation is not None and result.compensation.damping is None
    assert result.model is result.sliced and result.compensation.after == result.compensation.before
    assert [step.action for step in result.model.spec.provenance.steps] == ["prune"]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion(criterion: str) -> None:
    teacher = _teacher()
    result = compress(teacher, _graphs(teacher, 3), "4x0+3x1", criterion=criterion, with_compensation=False)
    assert result.compensation is None and result.model is result.sliced
    assert [layer.out for layer in result.model.arch.layers] == [(4, 3), (4,)]
    (step,) = result.model.spec.provenance.steps
    assert step.options["importance"] == criterion
    assert ("seed" in step.options) == (criterion == "random")
    assert all(np.isfinite(score).all() for score in result.scores.values())
    again = compress(teacher, _graphs(teacher, 3), "4x0+3x1", criterion=criterion, with_compensation=False)
    _assert_same_weights(result.model, again.model)


def test_scores_beat_chance() -> None:
    """Channels that matter little are known to be the last ones."""
    teacher = _teacher()
    graphs, unseen = _graphs(teacher, 6), _graphs(teacher, 4, seed=9)
    options: dict[str, Any] = {"with_compensation": False}
    best = _errors(compress(teacher, graphs, "4x0+4x1", **options).model, teacher, unseen)
    chance = [
        _errors(
            compress(teacher, graphs, "4x0+4x1", criterion="random", seed=s, **options).model, teacher, unseen
        )
        for s in range(5)
    ]
    assert best[1] < np.median([forces for _, forces in chance])


def test_depth_channels_and_basis_in_one_call() -> None:
    teacher = _teacher("three layers, four factors")
    graphs = _graphs(teacher, 4)
    result = compress(
        teacher, graphs, "4x0+3x1,5x0", layers=2, num_basis=9, basis_start="random", radial_hidden=6, seed=3
    )
    assert result.compensation is not None
    for model in (result.sliced, result.model):
        assert [layer.out for layer in model.arch.layers] == [(4, 3), (5,)]
        assert [layer.radial_hidden for layer in model.arch.layers] == [(6, 6), (6, 6)]
        assert model.arch.num_basis == 9
        assert torch.isfinite(energy_and_derivatives(model, graphs[0]).forces).all()
    actions = [step.action for step in result.model.spec.provenance.steps]
    assert [a for a in actions if a != "compensate"] == ["cut layers", "prune", "resize basis"]
    assert actions.index("resize basis") == len(actions) - 1
    assert result.model.spec.provenance.steps[-1].options == {"num_basis": 9, "start": "random", "seed": 3}


def test_inherited_basis_does_not_change_the_compressed_model() -> None:
    teacher = _teacher("density")
    graphs, unseen = _graphs(teacher, 8), _graphs(teacher, 2, seed=9)
    plain, larger = (compress(teacher, graphs, "4x0+3x1", num_basis=n) for n in (None, 8))
    assert plain.compensation is not None and larger.compensation is not None
    assert plain.compensation.after == larger.compensation.after
    for one, two in ((plain.model, larger.model), (plain.sliced, larger.sliced)):
        assert (one.arch.num_basis, two.arch.num_basis) == (5, 8)
        assert max(_errors(one, two, unseen)) < 1e-12


def test_layers_or_basis_alone() -> None:
    teacher = _teacher()
    graphs = _graphs(teacher, 3)
    shallow = compress(teacher, graphs, None, layers=1)
    assert shallow.compensation is None and len(shallow.model.layers) == 1
    assert [step.action for step in shallow.model.spec.provenance.steps] == ["cut layers"]
    basis = compress(teacher, [], None, num_basis=7)
    assert basis.model.arch.num_basis == 7 and teacher.arch.num_basis == 5
    with pytest.raises(InputError, match="nothing to cut"):
        compress(teacher, graphs, None)


@pytest.mark.parametrize(
    ("target", "options", "error", "message"),
    [
        ("99x0+99x1+99x2", {}, InputError, "cuts nothing"),
        ("4x0,4x0,4x0", {}, InputError, "lists 3 layers"),
        ("4x0,4x0", {"layers": 1}, InputError, "lists 2 layers, but the model has 1"),
        ("4x0", {"layers": 3}, InputError, "cannot keep 3 layers of 2"),
        ("4x0", {"num_basis": 3}, InputError, "only a larger number"),
        ("4x0", {"num_basis": 9, "basis_start": "zero"}, InputError, "unknown start"),
        ("4x0", {"criterion": "tailor"}, InputError, "Did you mean 'taylor'"),
    ],
)
def test_mistakes_are_told_before_the_work(
    target: str,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teacher = _teacher()

    def work(*args: object, **options: object) -> None:
        raise AssertionError("the mistake was found too late")

    monkeypatch.setattr("compactmlip.compress.compress.prune", work)
    monkeypatch.setattr("compactmlip.compress.importance._taylor_by_structure", work)
    with pytest.raises(error, match=message):
        compress(teacher, _graphs(teacher, 2), target, **options)


def test_other_families_keep_their_basis(small_model: nn.Module) -> None:
    with pytest.raises(UnsupportedFeatureError, match="nequip"):
        compress(small_model, [], "4x0", num_basis=9)
