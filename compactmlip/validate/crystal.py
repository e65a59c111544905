"""What a crystal is like at rest: relaxed structure, equation of state, elastic constants.

Each is a function of an ASE calculator, so that model and teacher go through the same; :func:`crystal` does
all from one start.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.eos import EquationOfState
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS
from pydantic import BaseModel, ConfigDict

from compactmlip.errors import InputError
from compactmlip.validate.parity import Array

FORCE_TOLERANCE = 5e-4
"""eV/Angstrom, and eV per atom for the derivative with respect to strain; float32 forces reach it."""

RELAX_STEPS = 300
"""Of the first relaxation; structures that need more are reported as not relaxed."""

STEPS_AT_STRAIN = 60
"""Of the relaxation of atoms in a strained cell, which begins near its end."""

LINEAR_STRAINS = (-0.015, -0.01, -0.005, 0.0, 0.005, 0.01, 0.015)
"""Of the cell's edges, for the equation of state: 9 % of the volume, over which third order is enough."""

ELASTIC_STRAIN = 0.005
"""Elastic constants are central differences of stress over twice this."""

EVALUATIONS = RELAX_STEPS // 3 + (len(LINEAR_STRAINS) + 12) * STEPS_AT_STRAIN // 4
"""What :func:`crystal` needs as a rule."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Crystal(_Frozen):
    """A crystal at rest in one potential.

    Attributes
    ----------
    atoms
        Number of atoms in the cell.
    relaxed
        Whether forces and stress vanished within :data:`RELAX_STEPS`; if not, the rest means little.
    volume
        Angstrom^3 per atom.
    energy
        eV per atom.
    bulk_modulus, pressure_derivative
        GPa, and its derivative with respect to pressure, from the equation of state; NaN where it has no
        minimum.
    elastic
        (6, 6) elastic constants in GPa, Voigt order, symmetrised.
    """

    atoms: int
    relaxed: bool
    volume: float
    energy: float
    bulk_modulus: float
    pressure_derivative: float
    elastic: tuple[tuple[float, ...], ...]

    @property
    def softest(self) -> float:
        """Lowest eigenvalue of the elastic constants in GPa; a crystal with a negative one is not stable."""
        return float(np.linalg.eigvalsh(np.array(self.elastic)).min())


class CrystalComparison(_Frozen):
    """Model and teacher from the same start.

    Attributes
    ----------
    displacement
        Root mean square distance (Angstrom) between the relaxed positions, both in the teacher's cell and
        without a common shift.
    """

    model: Crystal
    teacher: Crystal
    displacement: float

    @property
    def volume_error(self) -> float:
        """Percent."""
        return 100 * abs(self.model.volume / self.teacher.volume - 1)

    @property
    def bulk_modulus_error(self) -> float:
        """Percent."""
        return 100 * abs(self.model.bulk_modulus / self.teacher.bulk_modulus - 1)

    @property
    def elastic_error(self) -> float:
        """Largest deviation of an elastic constant, percent of the largest constant of the teacher."""
        own, other = np.array(self.model.elastic), np.array(self.teacher.elastic)
        return float(100 * abs(own - other).max() / abs(other).max())


def compare_crystals(model: Any, teacher: Any, atoms: Atoms) -> tuple[CrystalComparison, tuple[Atoms, Atoms]]:
    """Relax a structure with both calculators and compare what they find.

    Returns
    -------
    The comparison, and the relaxed structures of model and teacher.

    Raises
    ------
    InputError
        If the structure is not periodic in all directions.
    """
    found, relaxed = zip(*(crystal(calculator, atoms) for calculator in (model, teacher)), strict=True)
    compared = CrystalComparison(model=found[0], teacher=found[1], displacement=displacement(*relaxed))
    return compared, relaxed


def crystal(calculator: Any, atoms: Atoms) -> tuple[Crystal, Atoms]:
    """Relax a structure, and find its equation of state and elastic constants.

    Returns
    -------
    The numbers, and the relaxed structure.
    """
    relaxed, converged = relax(calculator, atoms)
    bulk_modulus, derivative = equation_of_state(calculator, relaxed)
    constants = elastic_constants(calculator, relaxed)
    number = len(relaxed)
    found = Crystal(
        atoms=number,
        relaxed=converged,
        volume=relaxed.get_volume() / number,
        energy=float(relaxed.get_potential_energy()) / number,
        bulk_modulus=bulk_modulus,
        pressure_derivative=derivative,
        elastic=tuple(tuple(float(c) for c in row) for row in constants),
    )
    return found, relaxed


def relax(calculator: Any, atoms: Atoms) -> tuple[Atoms, bool]:
    """Positions and cell at rest, from a copy of a structure; and whether they came to rest.

    Raises
    ------
    InputError
        If the structure is not periodic in all directions.
    """
    if not atoms.pbc.all():
        raise InputError("only structures that are periodic in all directions have elastic constants.")
    found = atoms.copy()
    found.set_constraint()
    found.calc = calculator
    cell_too: Any = FrechetCellFilter(found)
    with BFGS(cell_too, logfile=None) as optimiser:
        converged = optimiser.run(fmax=FORCE_TOLERANCE, steps=RELAX_STEPS)
    return found, bool(converged)


def equation_of_state(calculator: Any, atoms: Atoms) -> tuple[float, float]:
    """Bulk modulus (GPa) and its pressure derivative from energies against volume, atoms at rest at each.

    The cell keeps its shape.  Birch-Murnaghan of third order (Birch, Phys. Rev. 71, 809 (1947)).

    Parameters
    ----------
    calculator
        ASE calculator.
    atoms
        Relaxed structure; it is not changed.
    """
    volumes, energies = [], []
    for strain in LINEAR_STRAINS:
        strained = _strained(calculator, atoms, (1 + strain) * np.eye(3))
        volumes.append(strained.get_volume())
        energies.append(strained.get_potential_energy())
    try:
        state = EquationOfState(volumes, energies, eos="birchmurnaghan")
        _, _, modulus = state.fit(warn=False)
    except (ValueError, RuntimeError):  # no minimum in the range
        return math.nan, math.nan
    return float(modulus / units.GPa), float(state.eos_parameters[2])


def elastic_constants(calculator: Any, atoms: Atoms) -> Array:
    """(6, 6) elastic constants in GPa from stresses of strained cells with atoms at rest, symmetrised.

    Strains are those of Voigt (xx yy zz yz xz xy; shears are twice the tensor component); C_ij is the
    derivative of stress i with respect to strain j (Nielsen and Martin, Phys. Rev. B 32, 3780 (1985)).
    """
    constants = np.empty((6, 6))
    for j in range(6):
        stresses = []
        for sign in (1, -1):
            voigt = np.zeros(6)
            voigt[j] = sign * ELASTIC_STRAIN
            stresses.append(_strained(calculator, atoms, deformation(voigt)).get_stress())
        constants[:, j] = (stresses[0] - stresses[1]) / (2 * ELASTIC_STRAIN) / units.GPa
    return 0.5 * (constants + constants.T)


def deformation(voigt: Array) -> Array:
    """(3, 3) symmetric deformation of a cell for a strain in Voigt's notation."""
    xx, yy, zz, yz, xz, xy = voigt
    return np.eye(3) + np.array([[xx, xy / 2, xz / 2], [xy / 2, yy, yz / 2], [xz / 2, yz / 2, zz]])


def displacement(one: Atoms, other: Atoms) -> float:
    """Root mean square distance of atoms in Angstrom, both structures in the cell of the second.

    A shift of all atoms together does not count.
    """
    difference = one.get_scaled_positions(wrap=False) - other.get_scaled_positions(wrap=False)
    difference -= np.round(difference)
    difference -= difference.mean(axis=0)
    return float(np.sqrt(((difference @ other.cell.array) ** 2).sum(axis=1).mean()))


def _strained(calculator: Any, atoms: Atoms, matrix: Array) -> Atoms:
    """Structure in a deformed cell, atoms at rest."""
    strained = atoms.copy()
    strained.set_cell(atoms.cell.array @ matrix, scale_atoms=True)
    strained.calc = calculator
    with BFGS(strained, logfile=None) as optimiser:
        optimiser.run(fmax=FORCE_TOLERANCE, steps=STEPS_AT_STRAIN)
    return strained
