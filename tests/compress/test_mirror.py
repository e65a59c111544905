"""Mirrored pairs: values and slopes of what a model computes."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from torch import Tensor, nn

from compactmlip.compress.apply import prune
from compactmlip.compress.compensate import kept_columns
from compactmlip.compress.importance import taylor_importance
from compactmlip.compress.mirror import Pairs, displaced
from compactmlip.compress.plan import parse_target, target_sizes, top_channels
from compactmlip.compress.refit import refit, stage_outputs
from compactmlip.data.graph import GraphBatch, build_graph, collate, energy_and_derivatives
from compactmlip.errors import InputError
from compactmlip.models import linear_stages, start_state


def _graphs(model: nn.Module, count: int, seed: int = 0) -> list[GraphBatch]:
    rng = np.random.default_rng(seed)
    frames = [bulk("MgO", "rocksalt", a=4.21 * (1 + 0.02 * rng.normal()), cubic=True) for _ in range(count)]
    for atoms in frames:
        atoms.rattle(0.1, rng=rng)
    return [build_graph(a, model.spec, torch.float64) for a in frames]


def test_displaced_is_what_moving_the_atoms_gives(small_model: nn.Module) -> None:
    """A cluster whose atoms all see each other before and after."""
    atoms = Atoms("MgOMg", [[0, 0, 0], [1.9, 0.2, 0], [0.1, 2.0, 0.3]])
    move = 0.05 * np.random.default_rng(1).normal(size=(3, 3))
    one = displaced(build_graph(atoms, small_model.spec), torch.tensor(move))
    atoms.positions += move
    two = build_graph(atoms, small_model.spec)
    pairs = [sorted(zip(g.centers.tolist(), g.neighbors.tolist(), strict=True)) for g in (one, two)]
    assert pairs[0] == pairs[1]
    forces = [energy_and_derivatives(small_model, g).forces for g in (one, two)]
    torch.testing.assert_close(*forces, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(8, 1), (7, 3), (3,)])
def test_one_displacement_for_each_atom(small_model: nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="one row of three per atom"):
        displaced(_graphs(small_model, 1)[0], torch.zeros(shape))


def test_pairs_are_mirrored_and_batches_bounded(small_model: nn.Module) -> None:
    graphs = _graphs(small_model, 5)
    edges = len(graphs[0].centers)
    made = Pairs(displacement=0.02).batches(graphs, 4 * edges + 8, seed=3)
    assert sum(len(b.num_atoms) for b in made) == 10
    assert len(made) > 1 and all(len(b.centers) <= 4 * edges + 8 for b in made)
    seen, moved = [], []
    for batch in made:
        plus, minus = batch.vectors.chunk(2)
        seen.append((plus + minus) / 2)
        moved.append((plus - minus) / 2)
        for one, two in (batch.species.chunk(2), batch.num_atoms.chunk(2)):
            assert torch.equal(one, two)
        half = len(batch.species) // 2
        assert torch.equal(batch.centers.chunk(2)[0] + half, batch.centers.chunk(2)[1])
    torch.testing.assert_close(torch.cat(seen), collate(graphs).vectors, rtol=0, atol=1e-14)
    # A difference of two displacements, each 0.02 in each component.
    assert float(torch.cat(moved).square().mean().sqrt()) == pytest.approx(0.02 * 2**0.5, rel=0.15)
    again, other = (Pairs(displacement=0.02).batches(graphs, 4 * edges + 8, seed=s) for s in (3, 4))
    assert torch.equal(again[0].vectors, made[0].vectors)
    assert not torch.equal(other[0].vectors, made[0].vectors)


def test_rows_are_values_and_derivatives(small_model: nn.Module) -> None:
    """Against automatic differentiation of every stage of a model."""
    graph = _graphs(small_model, 1)[0]
    pairs = Pairs(displacement=1e-4, slope_weight=0.3)
    (batch,) = pairs.batches([graph], 10**6, seed=0)
    direction = (batch.vectors.chunk(2)[0] - graph.vectors) / pairs.displacement

    def outputs(vectors: Tensor) -> tuple[Tensor, ...]:
        state, made = start_state(small_model, replace(graph, vectors=vectors)), []
        for stage in linear_stages(small_model):
            features = stage.evaluate(state)
            made += [x for x in features if x is not None]
            state = stage.advance(state, features)
        return tuple(made)

    values, slopes = torch.autograd.functional.jvp(outputs, graph.vectors, direction)
    found = [x for (features,) in stage_outputs(small_model, [batch]) for x in features if x is not None]
    assert len(found) == len(values) > 10
    for x, value, slope in zip(found, values, slopes, strict=True):
        expected = torch.cat([value, 0.3 * slope])
        torch.testing.assert_close(pairs.rows(x), expected, rtol=1e-5, atol=1e-6)


def test_slopes_improve_the_forces_of_a_refit(small_model: nn.Module) -> None:
    """With few structures; mean errors on others, over three draws."""
    sizes = target_sizes(small_model.spec, parse_target("5x0+4x1+3x2", 3))
    errors = np.zeros((3, 3))
    for seed in range(3):
        graphs, test = _graphs(small_model, 3, seed), collate(_graphs(small_model, 6, seed=50 + seed))
        masks = top_channels(small_model.spec, sizes, taylor_importance(small_model, graphs))
        sliced, columns = prune(small_model, masks), kept_columns(small_model, masks)
        slopes = [
            (batch, fold) for fold in range(3) for batch in Pairs().batches([graphs[fold]], 10**6, fold)
        ]
        students = [sliced, copy.deepcopy(sliced), copy.deepcopy(sliced)]
        refit(students[1], small_model, columns, [(g, fold) for fold, g in enumerate(graphs)], 1.0)
        refit(students[2], small_model, columns, slopes, 1.0, pairs=Pairs())
        wanted = energy_and_derivatives(small_model, test).forces
        found = [energy_and_derivatives(student, test).forces for student in students]
        errors[seed] = [float((f - wanted).abs().mean()) for f in found]
    plain, values, both = errors.mean(axis=0)
    assert both < 0.85 * values < 0.85 * plain
