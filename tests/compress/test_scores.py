"""Scores as files and pictures, their stability, and the relevance of layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import bulk
from torch import nn

from compactmlip.compress.importance import importance
from compactmlip.compress.relevance import layer_relevance
from compactmlip.compress.scores_file import load_scores, save_scores
from compactmlip.compress.scores_plot import output_groups, plot_scores
from compactmlip.compress.stability import agreement, compare, stability, summary
from compactmlip.data.graph import GraphBatch, build_graph
from compactmlip.errors import CheckpointError, InputError


def _graphs(model: nn.Module, count: int = 4) -> list[GraphBatch]:
    graphs = []
    for seed in range(count):
        atoms = bulk("MgO", "rocksalt", a=4.21)
        atoms.rattle(0.1, seed=seed)
        graphs.append(build_graph(atoms, model.spec, torch.float64))
    return graphs


def test_scores_round_trip_and_belong_to_one_architecture(
    small_model: nn.Module, make_model: object, make_spec: object, tmp_path: Path
) -> None:
    scores = importance(small_model, [], "magnitude")
    path = save_scores(tmp_path / "scores.safetensors", scores, small_model, criterion="magnitude")
    again, header = load_scores(path, small_model)
    assert header["criterion"] == "magnitude"
    assert again.keys() == scores.keys()
    assert all(np.array_equal(again[name], scores[name]) for name in scores)
    other = make_model(make_spec(channels=(8, 6, 4, 2)))  # type: ignore[operator]
    with pytest.raises(InputError, match="another architecture"):
        load_scores(path, other)
    with pytest.raises(CheckpointError, match="safetensors"):
        save_scores(tmp_path / "scores.json", scores, small_model)
    with pytest.raises(CheckpointError, match="no such file"):
        load_scores(tmp_path / "none.safetensors", small_model)


def test_picture_has_a_panel_per_layer(small_model: nn.Module, tmp_path: Path) -> None:
    scores = importance(small_model, [], "magnitude")
    assert {k: sorted(v) for k, v in output_groups(scores).items()} == {
        "embedding": [0],
        "layer 0": [0, 1, 2, 3],
        "layer 1": [0, 1, 2, 3],
        "layer 2": [0],
    }
    path = plot_scores(tmp_path / "scores.svg", scores, "magnitude", [0.5, 0.3, 0.2])
    assert path.read_text().count("layer ") >= 3 or "<svg" in path.read_text()


def test_agreement() -> None:
    a = np.arange(8.0)
    assert agreement(a, 2 * a + 1) == agreement(a, a**3)
    assert (agreement(a, a).spearman, agreement(a, a).overlap) == (1.0, 1.0)
    assert agreement(a, -a).spearman == pytest.approx(-1.0)
    assert agreement(a, -a).overlap == 0.0
    swapped = a[[1, 0, 3, 2, 5, 4, 7, 6]]
    assert agreement(a, swapped, top=3).overlap == pytest.approx(2 / 3)
    assert compare({"one": np.ones(1)}, {"one": np.ones(1)}) == {}


def test_stability_tells_a_criterion_from_chance(small_model: nn.Module) -> None:
    graphs = _graphs(small_model)
    taylor, chance, weights = (
        summary(stability(small_model, graphs, criterion, resamples=1))
        for criterion in ("taylor", "random", "magnitude")
    )
    assert weights.spearman == pytest.approx(1.0)
    assert taylor.spearman > 0.8 > chance.spearman
    with pytest.raises(InputError, match="two"):
        stability(small_model, graphs[:1], "taylor")


def test_layer_without_influence_is_irrelevant(small_model: nn.Module) -> None:
    graphs = _graphs(small_model, 2)
    found = layer_relevance(small_model, graphs)
    assert sum(found) == pytest.approx(1.0)
    assert all(r > 0 for r in found)
    with torch.no_grad():
        for name, parameter in small_model.named_parameters():
            if name.startswith(("layers.2.up", "layers.2.skip", "layers.2.down")):
                parameter.zero_()
    cut = layer_relevance(small_model, graphs)
    assert cut == [0.0, 0.0, 0.0], "nothing reaches the energy through a last layer of zeros"
    with pytest.raises(InputError, match="at least one"):
        layer_relevance(small_model, [])
