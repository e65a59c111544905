"""Imported SevenNet models against sevenn 0.13.0 itself, whose results are stored beside the tests.

``tests/reference/make_sevennet_reference.py`` makes the stored files in an environment of its own.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from torch import nn

from compactmlip.data.graph import build_graph, collate, energy_and_derivatives
from compactmlip.families import load_model
from compactmlip.models import cast

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
    """1e-6 eV/atom, 1e-5 eV/Angstrom, 1e-6 eV/Angstrom^3, beside the rounding of sevenn itself.

    Some structures are squeezed (forces of 100 eV/Angstrom), so tolerances grow with the values, and
    sevenn's own distance from its float64 result is allowed on top.
    """
    model, reference = case
    energies, forces, stress, sizes = _evaluate(cast(deepcopy(model), torch.float32), torch.float32)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    # Energies of isolated atoms, which were not trained on, are small differences of large numbers.
    of_energy = np.where(reference["n_edges"] == 0, 1e-5, 1e-6)
    for name, values, tolerance in (
        ("energy", energies, of_energy),
        ("forces", forces, 1e-5),
        ("stress", stress, 1e-6),
    ):
        per_atom = sizes if name == "energy" else 1
        single, double = (reference[f"{name}_{kind}"] / per_atom for kind in ("f32", "f64"))
        rounding, scale = np.abs(single - double), np.abs(double)
        if name == "forces":
            rounding, scale = (_largest_per_structure(x, owner) for x in (rounding, scale))
        deviation = np.abs(values - single)
        assert np.nanmedian(deviation / tolerance) < 1
        assert not (deviation > tolerance * np.maximum(scale, 1.0) + 2 * rounding).any(), name


def _largest_per_structure(values: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Largest component within each structure, repeated for its atoms."""
    largest = np.zeros(owner.max() + 1)
    np.maximum.at(largest, owner, values.max(axis=1))
    return largest[owner][:, None]


@pytest.mark.parametrize("name", ["species-skip", "linear-lmax-edge"])
def test_options_that_no_released_checkpoint_has(name: str) -> None:
    """Weights per species, fewer orders on edges than on nodes, and the file layout since SevenNet 0.11."""
    from ase.build import bulk, molecule

    model = load_model(FOLDER / f"toy-{name}.pth", dtype=torch.float64)
    expected = np.load(FOLDER / f"toy-{name}.npz")
    crystal, ethanol = bulk("MgO", "rocksalt", a=4.2, cubic=True), molecule("CH3CH2OH")
    crystal.rattle(0.1, seed=1)
    ethanol.rattle(0.1, seed=2)
    for k, atoms in enumerate((crystal, ethanol)):
        found = energy_and_derivatives(model, build_graph(atoms, model.spec, torch.float64))
        np.testing.assert_allclose(found.energies, expected[f"energy_{k}"], rtol=0, atol=1e-10)
        np.testing.assert_allclose(found.forces, expected[f"forces_{k}"], rtol=0, atol=1e-10)
    assert np.abs(expected["forces_0"]).max() > 1e-2
