"""Checks that need no reference: symmetry, and forces and stress as derivatives of the energy."""

from __future__ import annotations

from typing import Any

import numpy as np
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress
from pydantic import BaseModel, ConfigDict
from scipy.spatial.transform import Rotation

from compactmlip.spec import DTypeName
from compactmlip.validate.parity import MILLI, Array, Labels, evaluate_frames

DISPLACEMENT: dict[DTypeName, float] = {"float32": 0.03, "float64": 0.01}
"""Angstrom; step of the finite difference along a unit vector in the space of all coordinates: large
enough that the rounding of the energy does not matter."""

STRAIN: dict[DTypeName, float] = {"float32": 2e-3, "float64": 5e-4}
"""Step of the finite difference along a strain of unit norm."""

NUM_DIRECTIONS = 3
"""Random displacement directions of all atoms, and of single atoms, that are probed."""

STENCIL = ((-2, 1 / 12), (-1, -8 / 12), (1, 8 / 12), (2, -1 / 12))
"""Fourth-order central difference: (step, weight)."""


class Deviation(BaseModel):
    """Largest deviations under one operation, meV/atom and meV/Angstrom."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    operation: str
    energy: float
    forces: float


class Consistency(BaseModel):
    """Results of the checks on one structure.

    ``derivative_forces`` is the largest |F.d + dE/dd| over unit directions d (meV/Angstrom) and
    ``derivative_stress`` the same along strains (meV/Angstrom^3), None without a periodic cell
    or a stress.  ``largest_force`` (meV/Angstrom) and ``largest_stress`` (meV/Angstrom^3) give the scale.
    ``teacher_inversion`` is what the teacher does under inversion: a model that is equivariant under
    rotations only, as the SevenNet ones, is not symmetric under inversion by construction.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    atoms: int
    largest_force: float
    largest_stress: float | None
    symmetry: tuple[Deviation, ...]
    teacher_inversion: Deviation | None
    derivative_forces: float
    derivative_stress: float | None

    @property
    def proper_symmetry(self) -> float:
        """Largest force deviation over all operations but the inversion, meV/Angstrom."""
        return float(np.max([d.forces for d in self.symmetry if d.operation != "inversion"]))

    @property
    def inversion(self) -> float:
        """Force deviation under inversion, meV/Angstrom."""
        return next(d.forces for d in self.symmetry if d.operation == "inversion")


def check_consistency(
    model: Any, atoms: Atoms, *, dtype: DTypeName = "float32", seed: int = 0, teacher: Any = None
) -> Consistency:
    """Run all checks on one structure.

    Symmetry: energy and forces after a random rotation, an inversion, a permutation of the atoms and a
    translation (wrapped back into a periodic cell).  Derivatives: fourth-order central differences.

    Parameters
    ----------
    model, teacher
        ASE calculators or native models; the teacher is only asked about the inversion.
    atoms
        A distorted structure of a few ten atoms, best without symmetry of its own.
    dtype
        Precision of the model; sets the steps of the finite differences.
    seed
        Of rotation, permutation, translation and directions.
    """
    rng = np.random.default_rng(seed)
    base = evaluate_frames(model, [atoms])
    stress = base.stresses[0]
    has_stress = bool(np.isfinite(stress).all())
    inverted = _transformed(atoms, -np.eye(3))
    return Consistency(
        atoms=len(atoms),
        largest_force=float(np.linalg.norm(base.forces[0], axis=1).max() * MILLI),
        largest_stress=float(np.abs(stress).max() * MILLI) if has_stress else None,
        symmetry=_symmetry(model, atoms, base, rng),
        teacher_inversion=None
        if teacher is None
        else _deviation("inversion", *_pair(evaluate_frames(teacher, [atoms, inverted])), -1.0),
        derivative_forces=_derivative_forces(model, atoms, base.forces[0], rng, DISPLACEMENT[dtype]),
        derivative_stress=_derivative_stress(model, atoms, stress, rng, STRAIN[dtype])
        if has_stress
        else None,
    )


def _symmetry(model: Any, atoms: Atoms, base: Labels, rng: np.random.Generator) -> tuple[Deviation, ...]:
    order = rng.permutation(len(atoms))
    rotation = Rotation.from_quat(rng.normal(size=4)).as_matrix()  # uniform over rotations
    moved = _transformed(atoms, np.eye(3))
    moved.translate(rng.uniform(-5, 5, size=3))
    moved.wrap()
    forces = base.forces[0]
    images = {
        "rotation": (_transformed(atoms, rotation), forces @ rotation.T),
        "inversion": (_transformed(atoms, -np.eye(3)), -forces),
        "permutation": (_transformed(atoms, np.eye(3))[order], forces[order]),
        "translation": (moved, forces),
    }
    found = evaluate_frames(model, [image for image, _ in images.values()])
    return tuple(
        _deviation(operation, (base.energies[0], expected), (found.energies[k], found.forces[k]))
        for k, (operation, (_, expected)) in enumerate(images.items())
    )


def _pair(labels: Labels) -> tuple[tuple[float, Array], tuple[float, Array]]:
    return (labels.energies[0], labels.forces[0]), (labels.energies[1], labels.forces[1])


def _deviation(
    operation: str, expected: tuple[float, Array], found: tuple[float, Array], sign: float = 1.0
) -> Deviation:
    return Deviation(
        operation=operation,
        energy=float(abs(found[0] - expected[0]) / len(found[1]) * MILLI),
        forces=float(np.abs(found[1] - sign * expected[1]).max() * MILLI),
    )


def _transformed(atoms: Atoms, matrix: Array) -> Atoms:
    """Apply an orthogonal matrix or a deformation to positions and cell."""
    image = atoms.copy()
    image.set_constraint()
    image.set_cell(atoms.cell.array @ matrix.T)
    image.set_positions(atoms.positions @ matrix.T)
    return image


def _derivative_forces(
    model: Any, atoms: Atoms, forces: Array, rng: np.random.Generator, step: float
) -> float:
    directions = [*rng.normal(size=(NUM_DIRECTIONS, *forces.shape))]
    for atom in rng.choice(len(atoms), size=min(NUM_DIRECTIONS, len(atoms)), replace=False):
        single = np.zeros_like(forces)
        single[atom] = rng.normal(size=3)
        directions.append(single)
    if np.any(forces):
        directions.append(forces)  # where a wrong factor shows best
    units = [d / np.linalg.norm(d) for d in directions]
    images = []
    for unit in units:
        for k, _ in STENCIL:
            images.append(_transformed(atoms, np.eye(3)))
            images[-1].positions += k * step * unit
    energies = evaluate_frames(model, images).energies.reshape(len(units), len(STENCIL))
    slopes = energies @ np.array([w for _, w in STENCIL]) / step
    expected = np.array([-np.sum(forces * unit) for unit in units])
    return float(np.abs(slopes - expected).max() * MILLI)


def _derivative_stress(
    model: Any, atoms: Atoms, stress: Array, rng: np.random.Generator, step: float
) -> float:
    tensor = voigt_6_to_full_3x3_stress(stress)
    directions = [d + d.T for d in rng.normal(size=(NUM_DIRECTIONS - 1, 3, 3))]
    if np.any(tensor):
        directions.append(tensor)
    strains = [d / np.linalg.norm(d) for d in directions]
    images = [_transformed(atoms, np.eye(3) + k * step * s) for s in strains for k, _ in STENCIL]
    energies = evaluate_frames(model, images).energies.reshape(len(strains), len(STENCIL))
    slopes = energies @ np.array([w for _, w in STENCIL]) / step / atoms.cell.volume
    return float(np.abs(slopes - [np.sum(tensor * s) for s in strains]).max() * MILLI)
