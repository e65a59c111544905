"""The speed model, and measured plans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ase.build import bulk
from torch import nn

from compactmlip.compress.apply import keep_species
from compactmlip.compress.cost import Shapes
from compactmlip.models import model_spec
from compactmlip.models.workload import Work
from compactmlip.search.space import Space
from compactmlip.search.speed import SpeedModel, Stopwatch


@pytest.fixture(scope="module")
def teacher(make_spec: Callable[..., Any], make_model: Callable[..., nn.Module]) -> nn.Module:
    spec = make_spec(channels=(16, 8, 4), num_layers=3, lmax_edge=2, cutoff=2.5)
    return keep_species(make_model(spec), ("Mg", "O"))


def test_speed_model_finds_what_the_times_are_made_of() -> None:
    rng = np.random.default_rng(0)
    works = [Work(*rng.uniform(1, 10, size=7)) for _ in range(12)]
    times = [0.1 + 0.02 * w.dense + 0.5 * 3 * w.convolution for w in works]
    found = SpeedModel.fit(list(zip(works, times, strict=True)), 3.0, 1.0)
    assert found.deviation < 1e-6
    assert found.coefficients["dense"] == pytest.approx(0.02)
    assert found.coefficients["convolution"] == pytest.approx(0.5)
    assert found.constant == pytest.approx(0.1)
    assert [found.relative_time(w) for w in works] == pytest.approx(times)


def test_larger_models_are_measured_to_be_slower(teacher: nn.Module, kernels: None) -> None:
    from compactmlip.data.graph import build_graph

    atoms = bulk("MgO", "rocksalt", a=4.21, cubic=True).repeat(4)
    graph = build_graph(atoms, model_spec(teacher), torch.float32)
    watch = Stopwatch(teacher, graph, Shapes(teacher), repeats=9)
    space = Space(Shapes(teacher), 2)
    (small,) = watch.measure([space.uniform("2x0")])
    assert small < 0.95
    assert watch.fitted().reference_seconds > 0
