"""Phonons by finite displacements (phonopy): frequencies, imaginary modes, heat capacity.

Togo and Tanaka, Scr. Mater. 108, 1 (2015).  Model and teacher each at its own minimum, on the same wave
vectors.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.cell import Cell
from pydantic import BaseModel, ConfigDict

from compactmlip.validate.parity import Array
from compactmlip.validate.supercells import supercell

DISPLACEMENT = 0.02
"""Angstrom; forces change by far more than float32 rounds, and anharmonicity is even in it."""

SYMMETRY = 1e-2
"""Angstrom; a structure relaxed to small forces is this close to its symmetry."""

MESH = 6
"""Wave vectors along each reciprocal axis."""

BAND_POINTS = 120
"""Wave vectors along lines between points of high symmetry."""

IMAGINARY = -0.3
"""THz; what rounding and the sum rule leave of acoustic modes is above."""

SUPERCELL_ATOMS = 216
"""A supercell is not made larger than this."""

PLANCK = 2 * np.pi * units._hbar * units.J * units.s
"""eV in ASE's unit of time."""
THZ = 1e12 / units.s
"""1/THz in ASE's unit of time, as a frequency."""


class Phonons(BaseModel):
    """Model beside teacher.

    Attributes
    ----------
    atoms
        Of the supercell.
    mean_error, largest_error
        THz, over all wave vectors and modes.
    highest, lowest, teacher_highest, teacher_lowest
        Frequencies in THz; imaginary ones are negative.
    temperature_K, heat_capacity, teacher_heat_capacity
        Harmonic, at constant volume, in units of kB per atom.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
    atoms: int
    mean_error: float
    largest_error: float
    highest: float
    lowest: float
    teacher_highest: float
    teacher_lowest: float
    temperature_K: float
    heat_capacity: float
    teacher_heat_capacity: float


@dataclass(frozen=True)
class Bands:
    """Frequencies along lines between points of high symmetry.

    Attributes
    ----------
    distances
        (points,) along the path in 1/Angstrom, with the factor 2 pi.
    ticks
        Distance and name of each point of high symmetry; "K,U" where the path jumps.
    model, teacher
        (points, modes) THz, sorted along modes.
    """

    distances: Array
    ticks: tuple[tuple[float, str], ...]
    model: Array
    teacher: Array


@dataclass(frozen=True)
class Spectra:
    """Frequencies in THz, (wave vectors, modes), sorted along modes."""

    model: Array
    teacher: Array
    bands: Bands | None = None


def available() -> bool:
    """Whether phonopy is installed."""
    return find_spec("phonopy") is not None


def compare_phonons(
    model: Any, teacher: Any, relaxed: tuple[Atoms, Atoms], temperature_K: float = 300.0
) -> tuple[Phonons, Spectra]:
    """Phonons of two calculators.

    Parameters
    ----------
    model, teacher
        ASE calculators.
    relaxed
        The minimum of each, with the same atoms in the same order.
    temperature_K
        For the heat capacity.
    """
    repeats = _repeats(relaxed[1])
    theirs = force_constants(teacher, relaxed[1], repeats)
    ours = force_constants(model, relaxed[0], repeats, np.asarray(theirs.primitive_matrix))
    own, other = on_mesh(ours), on_mesh(theirs)
    difference = np.abs(own - other)
    found = Phonons(
        atoms=len(relaxed[0]) * int(np.prod(repeats)),
        mean_error=float(difference.mean()),
        largest_error=float(difference.max()),
        highest=float(own.max()),
        lowest=float(own.min()),
        teacher_highest=float(other.max()),
        teacher_lowest=float(other.min()),
        temperature_K=temperature_K,
        heat_capacity=heat_capacity(own, temperature_K),
        teacher_heat_capacity=heat_capacity(other, temperature_K),
    )
    return found, Spectra(own, other, compare_bands(ours, theirs))


def compare_bands(model: Any, teacher: Any) -> Bands | None:
    """Frequencies of two Phonopy objects along the path of the teacher's lattice.

    The path is that of Setyawan and Curtarolo (Comput. Mater. Sci. 49, 299 (2010)), as ASE has it; None where
    the lattice is not recognised.
    """
    try:
        path = Cell(teacher.primitive.cell).bandpath(npoints=BAND_POINTS, eps=SYMMETRY)
    except (RuntimeError, ValueError):
        return None
    distances, ticks, labels = path.get_linear_kpoint_axis()
    names: list[tuple[float, str]] = []
    for tick, label in zip(ticks, labels, strict=True):
        if names and np.isclose(tick, names[-1][0]):  # the path jumps
            names[-1] = (names[-1][0], f"{names[-1][1]},{label}")
        else:
            names.append((float(tick), str(label)))
    found = []
    for phonons in (model, teacher):
        phonons.run_qpoints(path.kpts)
        found.append(np.sort(np.asarray(phonons.qpoints.frequencies, dtype=float), axis=1))
    return Bands(distances, tuple(names), *found)


def displacements(atoms: Atoms) -> tuple[int, int]:
    """How many supercells with one atom displaced are needed, and how many atoms each has."""
    repeats = _repeats(atoms)
    phonons = _phonopy(atoms, repeats, "auto")
    phonons.generate_displacements(distance=DISPLACEMENT)
    return len(phonons.supercells_with_displacements or ()), len(atoms) * int(np.prod(repeats))


def frequencies(
    calculator: Any, atoms: Atoms, repeats: tuple[int, int, int], primitive: Any = "auto"
) -> tuple[Array, Array]:
    """Frequencies on a mesh of wave vectors.

    Parameters
    ----------
    calculator, atoms, repeats, primitive
        As for :func:`force_constants`.

    Returns
    -------
    (wave vectors, modes) THz, sorted along modes, imaginary ones negative; and the primitive matrix.
    """
    phonons = force_constants(calculator, atoms, repeats, primitive)
    return on_mesh(phonons), np.asarray(phonons.primitive_matrix)


def force_constants(
    calculator: Any, atoms: Atoms, repeats: tuple[int, int, int], primitive: Any = "auto"
) -> Any:
    """Phonopy object with force constants.

    Parameters
    ----------
    calculator
        ASE calculator.
    atoms
        Structure at rest.
    repeats
        Cells of the supercell along each axis.
    primitive
        (3, 3) matrix of the primitive cell in units of the cell; "auto" finds it.
    """
    phonons = _phonopy(atoms, repeats, primitive)
    find_force_constants(phonons, calculator, DISPLACEMENT)
    return phonons


def on_mesh(phonons: Any) -> Array:
    """Frequencies of a Phonopy object on the mesh, (wave vectors, modes) THz, sorted along modes."""
    phonons.run_mesh([MESH] * 3, is_mesh_symmetry=False, is_gamma_center=True)
    return sorted_frequencies(phonons)


def find_force_constants(phonons: Any, calculator: Any, displacement: float) -> None:
    """Give a Phonopy object symmetrised force constants, from displacements in Angstrom."""
    phonons.generate_displacements(distance=displacement)
    forces = []
    for displaced in phonons.supercells_with_displacements or ():
        system = Atoms(displaced.symbols, displaced.positions, cell=displaced.cell, pbc=True)
        system.calc = calculator
        forces.append(system.get_forces())
    phonons.forces = np.array(forces)
    phonons.produce_force_constants()
    phonons.symmetrize_force_constants()


def sorted_frequencies(phonons: Any) -> Array:
    """Frequencies of a mesh, (wave vectors, modes) THz, sorted along modes."""
    return np.sort(np.asarray(phonons.mesh.frequencies, dtype=float), axis=1)


def heat_capacity(frequencies_THz: Array, temperature_K: float) -> float:
    """Harmonic heat capacity at constant volume in units of kB per atom; 3 at high temperature.

    Modes at rest or imaginary are left out of sum and count.
    """
    real = frequencies_THz[frequencies_THz > 1e-3]
    if not real.size:
        return float("nan")
    x = PLANCK * THZ * real / (units.kB * temperature_K)
    return float(3 * np.mean((x / 2 / np.sinh(np.minimum(x / 2, 300.0))) ** 2))


def _repeats(atoms: Atoms) -> tuple[int, int, int]:
    """Cells of the supercell, as :func:`compactmlip.validate.supercells.supercell` chooses them."""
    large = supercell(atoms, max_atoms=SUPERCELL_ATOMS)
    n = np.round(large.cell.lengths() / atoms.cell.lengths()).astype(int)
    return int(n[0]), int(n[1]), int(n[2])


def _phonopy(atoms: Atoms, repeats: tuple[int, int, int], primitive: Any) -> Any:
    from phonopy import Phonopy
    from phonopy.structure.atoms import PhonopyAtoms

    cell = PhonopyAtoms(
        symbols=atoms.get_chemical_symbols(),
        cell=atoms.cell.array,
        scaled_positions=atoms.get_scaled_positions(),
        masses=atoms.get_masses(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # phonopy 4 says that older versions understood "auto" otherwise
        return Phonopy(cell, supercell_matrix=np.diag(repeats), primitive_matrix=primitive, symprec=SYMMETRY)
