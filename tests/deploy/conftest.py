"""Fixtures of the tests of deployed files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from compactmlip.deploy.compile import compile_model
from compactmlip.spec import ModelSpec


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """Models this small only get slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def deployed(
    make_model: Callable[..., nn.Module],
    make_spec: Callable[..., ModelSpec],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A float64 file of ``small_model``."""
    path = tmp_path_factory.mktemp("deployed") / "small.pt"
    return compile_model(make_model(make_spec()), path, dtype="float64").path


@pytest.fixture(scope="package")
def deployed_quick(
    make_model: Callable[..., nn.Module],
    make_spec: Callable[..., ModelSpec],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A float64 file of a model with two layers of 6x0+4x1, for tests that take many steps."""
    spec = make_spec(channels=(6, 4), num_layers=2, lmax_edge=2)
    path = tmp_path_factory.mktemp("deployed") / "quick.pt"
    return compile_model(make_model(spec, seed=3), path, dtype="float64").path


@pytest.fixture(scope="package")
def tiny_model(make_model: Callable[..., nn.Module], make_spec: Callable[..., ModelSpec]) -> nn.Module:
    """One layer of two scalars for Mg and O, with weights per species."""
    spec = make_spec(species=("O", "Mg"), channels=(2,), num_layers=1, lmax_edge=0, self_connection="species")
    return make_model(spec, seed=4)


@pytest.fixture(scope="package")
def packaged(tiny_model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float64 file with machine code of ``tiny_model``; it takes most of a minute to make."""
    path = tmp_path_factory.mktemp("packaged") / "tiny.pt2"
    return compile_model(tiny_model, path, dtype="float64", backend="aoti").path
