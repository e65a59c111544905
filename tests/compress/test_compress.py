"""Importance, plans, slicing and compensation."""

from __future__ import annotations

import copy

import contract
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from torch import nn

from compactmlip.compress.apply import keep_species, prune
from compactmlip.compress.compensate import HeldOutError, _is_better, compensate, split_folds
from compactmlip.compress.compress import compress
from compactmlip.compress.importance import taylor_importance
from compactmlip.compress.plan import parse_target, target_sizes, top_channels
from compactmlip.data.graph import GraphBatch, build_graph, energy_and_derivatives
from compactmlip.errors import InputError, SpeciesError
from compactmlip.models import channel_graph


def _frames(count: int, seed: int = 0) -> list[Atoms]:
    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(count):
        atoms = bulk("MgO", "rocksalt", a=4.21 * (1 + 0.02 * rng.normal()), cubic=True)
        atoms.rattle(0.1, rng=rng)
        frames.append(atoms)
    return frames


def _graphs(model: nn.Module, count: int, seed: int = 0) -> list[GraphBatch]:
    return [build_graph(a, model.spec, torch.float64) for a in _frames(count, seed)]


def test_importance_estimates_the_effect_of_a_small_cut(small_model: nn.Module) -> None:
    """First order by definition: scaling a channel by 1 - t changes the energy by -t sum h dE/dh."""
    (graph,) = _graphs(small_model, 1)
    scores = taylor_importance(small_model, [graph])
    step = 1e-5
    for name in ("layers.1.out/1", "layers.0.up/0", "layers.1.radial.1/0", "embedding/0", "readout.hidden/0"):
        space, _, order = name.rpartition("/")
        for channel in range(0, len(scores[name]), 3):

            def scaled(t: float, space: str = space, order: str = order, channel: int = channel) -> float:
                def tap(where: str, l: int, x: torch.Tensor) -> torch.Tensor:
                    if where == space and l == int(order):
                        x = x.clone()
                        x[..., channel] *= 1 + t
                    return x

                energies = small_model(graph.species, graph.centers, graph.neighbors, graph.vectors, tap=tap)
                return float(energies.detach().sum())

            slope = (scaled(step) - scaled(-step)) / (2 * step)
            assert scores[name][channel] == pytest.approx(abs(slope), rel=1e-5, abs=1e-8)


def test_importance_is_invariant_and_independent_of_batching(
    small_model: nn.Module, rng: np.random.Generator
) -> None:
    frames = _frames(3)
    matrix = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    matrix *= np.linalg.det(matrix)
    turned = [contract.transformed(a, matrix) for a in frames]
    one, two = (
        taylor_importance(small_model, [build_graph(a, small_model.spec) for a in part], max_edges=edges)
        for part, edges in ((frames, 1), (turned, 10**6))
    )
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-9, atol=1e-12)


def test_importance_of_a_cut_channel_is_zero(small_model: nn.Module) -> None:
    with torch.no_grad():
        small_model.get_parameter("layers.1.up.orders.1.weight")[:, 2] = 0.0
    assert taylor_importance(small_model, _graphs(small_model, 1))["layers.1.up/1"][2] == 0.0


def test_importance_needs_structures(small_model: nn.Module) -> None:
    with pytest.raises(InputError, match="at least one"):
        taylor_importance(small_model, [])


def test_target_for_all_layers_and_per_layer() -> None:
    assert parse_target("4x0+2x1", 3) == [(4, 2)] * 3
    assert parse_target("4x0,5x0+1x2,6x0", 3) == [(4,), (5, 0, 1), (6,)]
    with pytest.raises(InputError, match="lists 2 layers, but the model has 3"):
        parse_target("4x0,5x0", 3)


def test_plan_keeps_the_highest_scores(small_model: nn.Module) -> None:
    spec = small_model.spec
    groups = channel_graph(spec).groups
    rng = np.random.default_rng(0)
    scores = {n: rng.random(g.size) for n, g in groups.items() if g.space is not None}
    sizes = target_sizes(spec, parse_target("4x0+3x1", 3), radial_hidden=5)
    masks = top_channels(spec, sizes, scores)
    kept = np.sort(scores["layers.0.out/0"])[-4:]
    np.testing.assert_allclose(np.sort(scores["layers.0.out/0"][masks["layers.0.out/0"]]), kept)
    small = prune(small_model, masks).spec.architecture
    assert [layer["out"] for layer in small["layers"]] == [[4, 3], [4, 3], [4]]
    assert [layer["up"] for layer in small["layers"]] == [[4], [4, 3], [4, 3]]
    assert small["lmax_edge"] == 1
    assert small["layers"][0]["radial_hidden"] == [5, 5]


def test_target_without_scalars_is_refused(small_model: nn.Module) -> None:
    with pytest.raises(InputError, match="needs scalar channels"):
        target_sizes(small_model.spec, parse_target("4x1", 3))


def test_pruning_leaves_the_original_alone(small_model: nn.Module) -> None:
    before = copy.deepcopy(small_model.state_dict())
    mask = np.ones(8, bool)
    mask[3:] = False
    smaller = prune(small_model, {"layers.0.out/0": mask})
    with torch.no_grad():
        for parameter in smaller.parameters():
            parameter.zero_()
    for name, tensor in small_model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("name", ["species", "embedding/0", "readout.hidden/0", "layers.2.out/0"])
def test_cutting_everything_is_refused(small_model: nn.Module, name: str) -> None:
    size = channel_graph(small_model.spec).groups[name].size
    with pytest.raises(InputError, match="nothing of|without scalars"):
        prune(small_model, {name: np.zeros(size, bool)})


def test_species_outside_the_model(small_model: nn.Module) -> None:
    with pytest.raises(SpeciesError, match="Pu"):
        keep_species(small_model, ["Mg", "Pu"])
    with pytest.raises(InputError, match="no species given"):
        keep_species(small_model, [])


def test_folds_keep_groups_together() -> None:
    groups = ["a", "b", "a", "c", "b", "d"]
    folds = split_folds(6, groups, 3, seed=0)
    assert folds[0] == folds[2] and folds[1] == folds[4]
    assert len(set(folds)) == 3
    np.testing.assert_array_equal(folds, split_folds(6, groups, 3, seed=0))
    with pytest.raises(InputError, match="at least two"):
        split_folds(3, ["a"] * 3, 5, seed=0)


def _redundant(model: nn.Module) -> nn.Module:
    """Make scalar channels 4-7 of layer 0's output equal to channels 0-3."""
    with torch.no_grad():
        for name in ("down", "skip"):
            weight = model.get_parameter(f"layers.0.{name}.orders.0.weight")
            weight[:, 4:8] = weight[:, 0:4]
    return model


def test_compensation_recovers_redundant_channels(small_model: nn.Module) -> None:
    """Cut channels that are copies of kept ones: a refit can restore the model, slicing cannot."""
    model = _redundant(small_model)
    mask = np.array([True] * 4 + [False] * 4)
    masks = {"layers.0.out/0": mask}
    sliced = prune(model, masks)
    graphs = _graphs(model, 12)
    refit = compensate(sliced, model, masks, graphs)
    test = _graphs(model, 2, seed=9)[0]
    wanted = energy_and_derivatives(model, test).forces
    plain = (energy_and_derivatives(sliced, test).forces - wanted).abs().max()
    after = (energy_and_derivatives(refit.model, test).forces - wanted).abs().max()
    assert plain > 1e-2
    assert after < 1e-3 * plain


def test_compensation_lowers_held_out_errors(small_model: nn.Module) -> None:
    graphs = _graphs(small_model, 24)
    result = compress(small_model, graphs, "5x0+4x1+3x2")
    assert result.compensation is not None and result.compensation.damping is not None
    test = _graphs(small_model, 4, seed=5)
    errors = []
    for model in (result.sliced, result.model):
        differences = [
            energy_and_derivatives(model, g).forces - energy_and_derivatives(small_model, g).forces
            for g in test
        ]
        errors.append(float(torch.cat(differences).square().mean().sqrt()))
    assert errors[1] < 0.85 * errors[0]
    assert result.compensation.after.forces < result.compensation.before.forces
    assert result.compensation.after.energy < result.compensation.before.energy
    steps = [step.action for step in result.model.spec.provenance.steps]
    assert steps == ["prune", "compensate"]
    contract.check_rotation(result.model, _frames(1)[0], np.random.default_rng(0))


def test_compensation_never_returns_something_worse(small_model: nn.Module) -> None:
    """With hardly any data the sliced model may be the best there is; then it is returned."""
    graphs = _graphs(small_model, 2)
    sizes = target_sizes(small_model.spec, parse_target("3x0+2x1", 3))
    masks = top_channels(small_model.spec, sizes, taylor_importance(small_model, graphs))
    sliced = prune(small_model, masks)
    result = compensate(sliced, small_model, masks, graphs)
    assert result.after.forces <= result.before.forces and result.after.energy <= result.before.energy
    if result.damping is None:
        assert result.model is sliced


def test_compensation_needs_the_same_species(small_model: nn.Module) -> None:
    masks = {"species": np.array([True, True, True, True, False])}
    with pytest.raises(InputError, match="same species"):
        compensate(prune(small_model, masks), small_model, masks, _graphs(small_model, 2))


@pytest.mark.parametrize(
    ("energy", "forces", "better"),
    [
        (0.9, 0.9, True),
        (1.0, 0.9, True),
        (0.9, 1.0, True),
        (1.0, 1.0, False),
        (1.01, 0.1, False),
        (0.1, 1.01, False),
    ],
)
def test_a_refit_must_not_trade_energies_for_forces(energy: float, forces: float, better: bool) -> None:
    assert _is_better(HeldOutError(energy, forces), HeldOutError(1.0, 1.0)) is better


def test_compensation_is_deterministic(small_model: nn.Module) -> None:
    graphs = _graphs(small_model, 6)
    one, two = (compress(small_model, graphs, "4x0+3x1", seed=3).model for _ in range(2))
    for (name, a), (_, b) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_nothing_to_cut(small_model: nn.Module) -> None:
    with pytest.raises(InputError, match="cuts nothing"):
        compress(small_model, _graphs(small_model, 2), "99x0+99x1+99x2+99x3", odd_paths=True)


def test_cutting_odd_paths_restores_inversion_symmetry(small_model: nn.Module) -> None:
    """In a chiral structure an SO(3) model differs from its mirror image; without odd paths it cannot."""
    atoms = _frames(1)[0]
    atoms.symbols[:3] = "CHO"
    mirrored = contract.transformed(atoms, -np.eye(3))
    graphs = _graphs(small_model, 4)
    differences = []
    for odd_paths in (True, False):
        model = compress(small_model, graphs, "6x0+5x1+3x2", odd_paths=odd_paths).model
        one, two = contract.evaluate(model, atoms), contract.evaluate(model, mirrored)
        differences.append(float((one.energies - two.energies).abs()))
        if not odd_paths:
            torch.testing.assert_close(one.forces, -two.forces, rtol=0, atol=1e-12)
    assert differences[0] > 1e-6
    assert differences[1] < 1e-12
