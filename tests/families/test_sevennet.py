"""Imported SevenNet models against sevenn 0.13.0 itself, whose results are stored beside the tests.

``tests/reference/make_sevennet_reference.py`` makes the stored files in an environment of its own.
"""

from __future__ import annotations

from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from torch import nn

from compactmlip.data.graph import build_graph, collate, energy_and_derivatives
from compactmlip.families import load_model

FOLDER = Path(__file__).parents[1] / "reference" / "sevennet"
MODELS = {
    "7net-l3i5": ("7net-l3i5", None),
    "7net-0": ("7net-0", None),
    "7net-0_22May2024": ("7net-0_22May2024", None),
    "7net-mf-0__PBE": ("7net-mf-0", "PBE"),
    "7net-mf-0__R2SCAN": ("7net-mf-0", "R2SCAN"),
}
PARAMETERS = {"7net-l3i5": 1171144, "7net-0": 842440}


@pytest.fixture(scope="module", params=list(MODELS))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, dict[str, np.ndarray]]:
    name, modality = MODELS[request.param]
    model = load_model(name, modality=modality, dtype=torch.float64)
    if request.param in PARAMETERS:
        assert sum(p.numel() for p in model.parameters()) == PARAMETERS[request.param]
    return model, dict(np.load(FOLDER / f"{request.param}.npz"))


def _evaluate(model: nn.Module, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    frames = ase.io.read(FOLDER / "structures.xyz", ":")
    assert len(frames) >= 12 and len({z for a in frames for z in a.numbers}) >= 30
    found = energy_and_derivatives(model, collate([build_graph(a, model.spec, dtype) for a in frames]))
    stress = found.stresses.numpy()
    voigt = np.stack([stress[:, i, j] for i, j in ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))], axis=1)
    sizes = np.array([len(a) for a in frames])
    return found.energies.numpy() / sizes, found.forces.numpy(), voigt, sizes


def test_float64_parity(case: tuple[nn.Module, dict[str, np.ndarray]]) -> None:
    model, reference = case
    energies, forces, stress, sizes = _evaluate(model, torch.float64)
    np.testing.assert_allclose(energies, reference["energy_f64"] / sizes, rtol=0, atol=1e-9)
    np.testing.assert_allclose(forces, reference["forces_f64"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(stress, reference["stress_f64"], rtol=0, atol=1e-9, equal_nan=True)
    assert np.abs(reference["forces_f64"]).mean() > 0.5


def test_float32_parity(case: tuple[nn.Module, dict[str, np.ndarray]]) -> None:
    """Tolerances are relative where forces are far above 1 eV/Angstrom (some structures are squeezed)."""
    from copy import deepcopy

    from compactmlip.models import cast

    model, reference = case
    energies, forces, stress, sizes = _evaluate(cast(deepcopy(model), torch.float32), torch.float32)
    np.testing.assert_allclose(energies, reference["energy_f32"] / sizes, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(forces, reference["forces_f32"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stress, reference["stress_f32"], rtol=1e-5, atol=1e-6, equal_nan=True)
