"""What it costs to take atoms out of a crystal, and to cleave it: vacancies and surfaces, relaxed.

Vacancies: one atom of each species is taken out of a supercell of its own.  For an element the energy
E(N-1) - (N-1)/N E(N) is the vacancy formation energy.  For a compound the sum over a formula unit, each
vacancy in its own cell, plus the energy of the formula unit in the crystal is that of a Schottky defect; it
needs no chemical potentials (Freysoldt et al., Rev. Mod. Phys. 86, 253 (2014)).  All cells are neutral.

Surfaces: the energy of a slab of the crystal minus that of as many atoms inside it, over twice its area.  The
plane is the one that the teacher cleaves most easily, cut where the gap between layers is widest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.optimize import BFGS
from pydantic import BaseModel, ConfigDict

from compactmlip.data.slabs import low_index_planes, slab
from compactmlip.errors import CompactMLIPError
from compactmlip.validate.crystal import FORCE_TOLERANCE
from compactmlip.validate.supercells import near_size

VACANCY_ATOMS = 64
"""About how many atoms the cell of a vacancy has."""

SLAB_THICKNESS, VACUUM = 8.0, 10.0
"""Angstrom; the vacuum at least, and more where the cutoff is longer."""

SLAB_ATOMS = 150
"""Planes whose slab would have more atoms are left out."""

LARGEST_FORMULA = 8
"""Atoms of a formula unit; Schottky defects of larger ones (a dozen vacancies at once) say little."""

STEPS = 60
"""Of each relaxation."""

TOLERANCE = 20 * FORCE_TOLERANCE
"""eV/Angstrom; the energy of a defect is second order in it."""

J_PER_M2 = float(units.m**2 / units.J)
"""J/m^2 per eV/Angstrom^2."""


class Defect(BaseModel):
    """One energy in both potentials.

    Attributes
    ----------
    name
        "vacancy", "Schottky defect" or "surface (100)".
    unit
        eV, or J/m^2.
    atoms
        Of the largest cell.
    model, teacher
        Relaxed energies.
    unrelaxed, teacher_unrelaxed
        Those with all atoms where they are in the perfect crystal.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
    name: str
    unit: str
    atoms: int
    model: float
    teacher: float
    unrelaxed: float
    teacher_unrelaxed: float

    @property
    def error(self) -> float:
        """Percent of the teacher's; infinite where that is not positive."""
        return 100 * abs(self.model / self.teacher - 1) if self.teacher > 0 else math.inf


def compare_defects(
    model: Any, teacher: Any, relaxed: tuple[Atoms, Atoms], steps: int = STEPS
) -> tuple[Defect, ...]:
    """Vacancy or Schottky defect, and the easiest surface, where the structure allows.

    Parameters
    ----------
    model, teacher
        ASE calculators.
    relaxed
        The crystal at rest in each, with the same atoms in the same order.
    steps
        Of each relaxation; 0 for unrelaxed energies.
    """
    found, unit, pairs = [], formula(relaxed[1]), tuple(zip((model, teacher), relaxed, strict=True))
    if sum(unit.values()) <= LARGEST_FORMULA:
        name = "vacancy" if len(unit) == 1 else "Schottky defect"
        energies = [vacancy_energy(calculator, atoms, steps) for calculator, atoms in pairs]
        found.append(_defect(name, "eV", len(near_size(relaxed[1], VACANCY_ATOMS)), energies))
    plane = easiest_plane(teacher, relaxed[1])
    if plane is not None:
        name = f"surface ({' '.join(map(str, plane))})"
        energies = [surface_energy(calculator, atoms, plane, steps) for calculator, atoms in pairs]
        found.append(_defect(name, "J/m^2", len(slab(relaxed[1], plane, VACUUM, SLAB_THICKNESS)), energies))
    return tuple(found)


def evaluations(atoms: Atoms) -> int:
    """About how many energies of :data:`VACANCY_ATOMS` atoms each of both calculators needs."""
    return (len(formula(atoms)) + 1) * STEPS // 2 + 13


def _defect(name: str, unit: str, atoms: int, energies: Sequence[tuple[float, float]]) -> Defect:
    (unrelaxed, own), (teacher_unrelaxed, other) = energies
    return Defect(
        name=name,
        unit=unit,
        atoms=atoms,
        model=own,
        teacher=other,
        unrelaxed=unrelaxed,
        teacher_unrelaxed=teacher_unrelaxed,
    )


def formula(atoms: Atoms) -> dict[str, int]:
    """Atoms of each species in the smallest formula unit."""
    symbols = atoms.get_chemical_symbols()
    counts = {s: symbols.count(s) for s in sorted(set(symbols))}
    divisor = reduce(math.gcd, counts.values())
    return {symbol: count // divisor for symbol, count in counts.items()}


def vacancy_energy(calculator: Any, atoms: Atoms, steps: int = STEPS) -> tuple[float, float]:
    """Unrelaxed and relaxed energy in eV of a vacancy, or of a Schottky defect in a compound.

    Parameters
    ----------
    calculator
        ASE calculator.
    atoms
        The crystal at rest; the first atom of each species is taken out of a supercell of it.
    steps
        Of each relaxation, at constant cell.
    """
    cell = near_size(atoms, VACANCY_ATOMS)
    symbols = cell.get_chemical_symbols()
    unit = formula(cell)
    perfect = _energy(calculator, cell)
    totals = np.full(2, perfect / len(cell) * sum(unit.values()))
    for symbol, count in unit.items():
        defective = cell.copy()
        del defective[symbols.index(symbol)]
        totals += count * (np.array(_at_rest(calculator, defective, steps)) - perfect)
    return float(totals[0]), float(totals[1])


def surface_energy(
    calculator: Any, atoms: Atoms, plane: Sequence[int], steps: int = STEPS
) -> tuple[float, float]:
    """Unrelaxed and relaxed energy of a surface in J/m^2.

    Parameters
    ----------
    atoms
        The crystal at rest.
    plane
        Miller indices with respect to its cell.
    """
    system = slab(atoms, plane, _vacuum(calculator), SLAB_THICKNESS)
    inside = _energy(calculator, atoms) / len(atoms) * len(system)
    area = float(np.linalg.norm(np.cross(system.cell[0], system.cell[1])))
    found = [(e - inside) / (2 * area) * J_PER_M2 for e in _at_rest(calculator, system, steps)]
    return found[0], found[1]


def easiest_plane(calculator: Any, atoms: Atoms) -> tuple[int, int, int] | None:
    """Miller indices, each -1, 0 or 1, of the plane with the lowest unrelaxed surface energy.

    None if all slabs would be too large.
    """
    energies: dict[tuple[int, int, int], float] = {}
    for plane in low_index_planes():
        if len(slab(atoms, plane, VACUUM, SLAB_THICKNESS)) <= SLAB_ATOMS:
            try:
                energies[plane] = surface_energy(calculator, atoms, plane, 0)[0]
            except CompactMLIPError:
                continue
    # Equivalent planes differ by rounding; of these the first is taken, which has the plainest indices.
    lowest = min(energies.values(), default=0.0)
    equal = [p for p, energy in energies.items() if energy <= lowest + 1e-3 * abs(lowest)]
    return min(equal, key=lambda p: (sum(map(abs, p)), [-i for i in p])) if equal else None


def _vacuum(calculator: Any) -> float:
    """Angstrom: more than the cutoff, so that the faces do not see each other directly."""
    cutoff = getattr(getattr(calculator, "spec", None), "cutoff", 0.0)
    return max(VACUUM, float(cutoff) + 1.0)


def _at_rest(calculator: Any, atoms: Atoms, steps: int) -> tuple[float, float]:
    """Energy in eV before and after a relaxation of the positions."""
    system = atoms.copy()
    system.calc = calculator
    before = float(system.get_potential_energy())
    if steps:
        with BFGS(system, logfile=None) as optimiser:
            optimiser.run(fmax=TOLERANCE, steps=steps)
    return before, float(system.get_potential_energy())


def _energy(calculator: Any, atoms: Atoms) -> float:
    system = atoms.copy()
    system.calc = calculator
    return float(system.get_potential_energy())
