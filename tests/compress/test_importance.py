"""Criteria of importance against their definitions."""

from __future__ import annotations

import contract
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from torch import Tensor, nn

from compactmlip.channels import Mask
from compactmlip.compress.apply import prune
from compactmlip.compress.compress import compress
from compactmlip.compress.importance import CRITERIA, Scores, importance, taylor_importance
from compactmlip.data.graph import GraphBatch, build_graph, energy_and_derivatives
from compactmlip.errors import InputError
from compactmlip.models import channel_graph, linear_stages, start_state

GROUPS = ("layers.1.out/1", "layers.0.up/0", "layers.1.radial.1/0", "embedding/0", "readout.hidden/0")


def _frames() -> list[Atoms]:
    rng = np.random.default_rng(0)
    frames = [bulk("MgO", "rocksalt", a=4.21, cubic=True), molecule("CH3CH2OH"), Atoms("O")]
    for atoms in frames:
        atoms.rattle(0.1, rng=rng)
    return frames


def _graphs(model: nn.Module, frames: list[Atoms]) -> list[GraphBatch]:
    return [build_graph(a, model.spec, torch.float64) for a in frames]


def _watched(model: nn.Module, graph: GraphBatch) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def tap(space: str, order: int, x: Tensor) -> Tensor:
        seen[f"{space}/{order}"] = x.detach()
        return x

    model(graph.species, graph.centers, graph.neighbors, graph.vectors, tap=tap)
    return seen


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_scores_every_channel(small_model: nn.Module, criterion: str) -> None:
    groups = channel_graph(small_model.spec).groups
    scores = importance(small_model, _graphs(small_model, _frames()), criterion)
    assert {n: s.shape for n, s in scores.items()} == {
        n: (g.size,) for n, g in groups.items() if g.space is not None
    }
    assert all(np.isfinite(s).all() and (s >= 0).all() and s.max() > 0 for s in scores.values())


def test_activation_is_the_norm_of_the_feature(small_model: nn.Module) -> None:
    graphs = _graphs(small_model, _frames())
    seen = [_watched(small_model, g) for g in graphs]
    scores = importance(small_model, graphs, "activation")
    for name in GROUPS:
        norms = [s[name].numpy().reshape(-1, s[name].shape[-1]) for s in seen]
        np.testing.assert_allclose(
            scores[name], np.sqrt(np.mean([np.einsum("ic,ic->c", x, x) for x in norms], axis=0)), rtol=1e-12
        )


@pytest.mark.parametrize("criterion", ["taylor-atom", "activation"])
def test_scores_are_invariant_and_independent_of_batching(
    small_model: nn.Module, rng: np.random.Generator, criterion: str
) -> None:
    frames = _frames()
    matrix = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    matrix *= np.linalg.det(matrix)
    turned = [contract.transformed(a, matrix) for a in frames]
    one, two = (
        importance(small_model, _graphs(small_model, part), criterion, max_edges=edges)
        for part, edges in ((frames, 1), (turned, 10**6))
    )
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-9, atol=1e-12)


def test_taylor_by_atom_takes_each_atom_on_its_own(small_model: nn.Module) -> None:
    """Scale a channel on one atom (or on the edges that leave it): -dE/dt is the atom's sum of h dE/dh."""
    (graph,) = _graphs(small_model, _frames()[1:2])
    scores = importance(small_model, [graph], "taylor-atom")
    step = 1e-5
    for name in GROUPS:
        space, _, order = name.rpartition("/")
        channel = int(np.argmax(scores[name]))
        slopes = []
        for atom in range(len(graph.species)):
            owner = graph.centers if ".radial." in space else torch.arange(len(graph.species))

            def energy(
                t: float,
                space: str = space,
                order: str = order,
                channel: int = channel,
                rows: Tensor = owner == atom,
            ) -> float:
                def tap(where: str, l: int, x: Tensor) -> Tensor:
                    if where == space and l == int(order):
                        x = x.clone()
                        x[rows, ..., channel] *= 1 + t
                    return x

                found = small_model(graph.species, graph.centers, graph.neighbors, graph.vectors, tap=tap)
                return float(found.detach().sum())

            slopes.append((energy(step) - energy(-step)) / (2 * step))
        assert scores[name][channel] == pytest.approx(np.abs(slopes).sum(), rel=1e-5, abs=1e-8)


def test_taylor_by_atom_lets_nothing_cancel(small_model: nn.Module) -> None:
    graphs = _graphs(small_model, _frames())
    by_structure, by_atom = (
        taylor_importance(small_model, graphs),
        importance(small_model, graphs, "taylor-atom"),
    )
    for name, score in by_structure.items():
        assert (by_atom[name] >= score - 1e-12).all()
    single = _graphs(small_model, _frames()[2:])
    by_structure, by_atom = (importance(small_model, single, c) for c in ("taylor", "taylor-atom"))
    for name, score in by_structure.items():
        np.testing.assert_allclose(by_atom[name], score, rtol=1e-12, atol=1e-15)


def _squared_norm(model: nn.Module) -> float:
    """Of all effective weights: parameters times the factor beside them."""
    state = model.state_dict()
    total = 0.0
    for name, parameter in model.named_parameters():
        if name != "basis.wave_numbers":
            factor = state.get(f"{name.rpartition('.')[0]}.scale", torch.ones(()))
            total += float((parameter.detach() * factor).square().sum())
    return total


def test_magnitude_is_the_norm_of_what_cutting_the_channel_removes(model_variant: nn.Module) -> None:
    scores = importance(model_variant, [], "magnitude")
    for name, size in (
        ("layers.1.out/1", 6),
        ("layers.1.up/1", 6),
        ("layers.0.out/0", 8),
        ("embedding/0", 8),
    ):
        for channel in (0, size - 1):
            mask: Mask = np.arange(size) != channel
            removed = _squared_norm(model_variant) - _squared_norm(prune(model_variant, {name: mask}))
            assert scores[name][channel] == pytest.approx(removed**0.5, rel=1e-9)


def test_random_scores_follow_the_seed(small_model: nn.Module) -> None:
    one, same, other = (importance(small_model, [], "random", seed=s) for s in (1, 1, 2))

    def flat(scores: Scores) -> np.ndarray:
        return np.concatenate([scores[name] for name in sorted(scores)])

    np.testing.assert_array_equal(flat(one), flat(same))
    assert not np.array_equal(flat(one), flat(other))
    assert len(np.unique(flat(one))) == len(flat(one))


@pytest.mark.parametrize("criterion", ["taylor", "taylor-atom", "activation"])
def test_structures_are_needed(small_model: nn.Module, criterion: str) -> None:
    with pytest.raises(InputError, match="at least one"):
        importance(small_model, [], criterion)


def test_unknown_criterion(small_model: nn.Module) -> None:
    with pytest.raises(InputError, match="unknown importance 'tailor'.*Did you mean 'taylor'"):
        importance(small_model, [], "tailor")


def test_pruning_by_another_criterion(small_model: nn.Module) -> None:
    """The criterion picks the channels, and provenance names it."""
    graphs = _graphs(small_model, _frames())
    kept = {}
    for criterion, seed in (("taylor", 4), ("activation", 4), ("random", 4), ("random", 5)):
        made = compress(
            small_model, graphs, "4x0+3x1", criterion=criterion, seed=seed, with_compensation=False
        )
        (step,) = made.model.spec.provenance.steps
        assert step.options["importance"] == criterion
        assert step.options.get("seed") == (seed if criterion == "random" else None)
        kept[criterion, seed] = made.model.get_parameter("embedding.weight").detach().numpy()
        best = np.sort(np.argsort(-made.scores["embedding/0"], kind="stable")[:4])
        np.testing.assert_array_equal(
            kept[criterion, seed], small_model.get_parameter("embedding.weight").detach().numpy()[:, best]
        )
    assert not np.array_equal(kept["random", 4], kept["random", 5])


def _gated(model: nn.Module, name: str, channel: int, gate: float) -> nn.Module:
    """The model with one channel of one group multiplied by ``gate``."""

    class Gated(nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            def tap(space: str, order: int, x: Tensor) -> Tensor:
                if f"{space}/{order}" != name:
                    return x
                factor = torch.ones(x.shape[-1], dtype=x.dtype)
                factor[channel] = gate
                return x * factor

            result: Tensor = model(*inputs, tap=tap)
            return result

    return Gated()


def test_fisher_is_the_mean_squared_slope_of_the_energy(small_model: nn.Module) -> None:
    graphs = _graphs(small_model, _frames())
    scores = importance(small_model, graphs, "fisher")
    step = 1e-4
    for name, channel in (("layers.0.out/1", 2), ("layers.1.radial.1/0", 3), ("readout.hidden/0", 1)):
        slopes = []
        for graph in graphs:
            up, down = (
                energy_and_derivatives(_gated(small_model, name, channel, 1 + s), graph).energies
                for s in (step, -step)
            )
            slopes.append(float(up - down) / (2 * step))
        assert scores[name][channel] == pytest.approx(np.mean(np.square(slopes)), rel=1e-5)


def test_hessian_is_the_mean_squared_slope_of_the_forces(small_model: nn.Module) -> None:
    """The estimate with random signs, averaged over many seeds, against differences of forces."""
    graphs = _graphs(small_model, _frames()[:1])
    seeds = 30
    names = (("layers.0.out/1", 2), ("layers.1.radial.1/0", 3), ("embedding/0", 1))
    found = [importance(small_model, graphs, "hessian", seed=s) for s in range(seeds)]
    step = 1e-4
    for name, channel in names:
        up, down = (
            energy_and_derivatives(_gated(small_model, name, channel, 1 + s), graphs[0]).forces
            for s in (step, -step)
        )
        exact = float(((up - down) / (2 * step)).square().mean())
        estimates = [scores[name][channel] for scores in found]
        assert abs(np.mean(estimates) - exact) < 4 * np.std(estimates) / np.sqrt(seeds)
        assert exact > 0


@torch.no_grad()
def test_reconstruction_is_the_error_of_the_best_refit(small_model: nn.Module) -> None:
    """Against least squares without the channel's inputs, for a channel that one layer reads."""
    graphs = _graphs(small_model, _frames()[:2])
    name, order = "layers.1.out/0", 0
    scores = importance(small_model, graphs, "reconstruction")
    # Layer 2 reads these scalars twice: up and skip.
    expected = np.zeros(8)
    inputs, outputs = {}, {}
    for kind in ("up", "down"):
        designs, goals, total = [], [], 0.0
        for graph in graphs:
            state = start_state(small_model, graph)
            for stage in linear_stages(small_model):
                value = stage.evaluate(state)
                if stage.name == f"layer 2 {kind}":
                    designs.append(stage.fits[order].design(state).detach().flatten(0, 1).numpy())
                    goals.append(value[order].detach().flatten(0, 1).numpy())
                    total += sum(float(v.square().sum()) for v in value if v is not None)
                state = stage.advance(state, value)
        inputs[kind], outputs[kind] = np.concatenate(designs), np.concatenate(goals)
        first = 0 if kind == "up" else inputs[kind].shape[1] - 8  # messages, then the skip's inputs
        for channel in range(8):
            rest = np.delete(inputs[kind], first + channel, axis=1)
            residual = outputs[kind] - rest @ np.linalg.lstsq(rest, outputs[kind], rcond=1e-10)[0]
            expected[channel] += np.square(residual).sum() / total
    np.testing.assert_allclose(scores[name], expected, rtol=0.35, atol=1e-5)
    assert np.argmax(scores[name]) == np.argmax(expected)
