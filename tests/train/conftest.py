"""A tiny teacher, a student that is wrong by a random amount, and frames with the teacher's labels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from torch import nn

from compactmlip.data.graph import build_graph, energy_and_derivatives
from compactmlip.spec import ModelSpec


def label(model: nn.Module, frames: list[Atoms]) -> list[Atoms]:
    """Write the model's energy, forces and, for periodic frames, stress as labels."""
    for atoms in frames:
        found = energy_and_derivatives(model, build_graph(atoms, model.spec))
        atoms.info["REF_energy"] = float(found.energies.detach())
        atoms.arrays["REF_forces"] = found.forces.numpy()
        if atoms.pbc.all():
            stress = found.stresses[0].numpy()
            atoms.info["REF_stress"] = np.array(
                [stress[k, l] for k, l in ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))]
            )
    return frames


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Steps of a tiny model are too short for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_spec(make_spec: Callable[..., ModelSpec]) -> ModelSpec:
    """Two layers of 4x0+3x1 for Mg and O."""
    return make_spec(species=("Mg", "O"), channels=(4, 3), num_layers=2, lmax_edge=1, cutoff=3.2)


@pytest.fixture
def teacher(tiny_spec: ModelSpec, make_model: Callable[..., nn.Module]) -> nn.Module:
    return make_model(tiny_spec, seed=3)


@pytest.fixture
def student(teacher: nn.Module) -> nn.Module:
    """The teacher with every weight off by about a third."""
    model = copy.deepcopy(teacher)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        model.basis.wave_numbers.copy_(teacher.basis.wave_numbers)
    return model


@pytest.fixture
def frames(teacher: nn.Module) -> list[Atoms]:
    """Six labelled cells of rattled MgO, 4 or 8 atoms."""
    made = []
    for k in range(6):
        atoms = bulk("MgO", "rocksalt", a=4.21, cubic=True) if k % 2 else bulk("MgO", "rocksalt", a=4.3)
        atoms = atoms if k % 2 else atoms.repeat((2, 1, 1))
        atoms.rattle(0.1, seed=k)
        made.append(atoms)
    return label(teacher, made)


@pytest.fixture
def molecule_frame(teacher: nn.Module) -> Atoms:
    """A labelled molecule: no cell, no stress."""
    return label(teacher, [Atoms("MgO2", [[0.0, 0, 0], [1.7, 0, 0.1], [-1.6, 0.3, 0]])])[0]
