"""Ethanol with a compact model: relaxed structure, normal modes, and the torsion of the hydroxyl group."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import molecule
from ase.constraints import FixInternals
from ase.io import write
from ase.optimize import BFGS
from ase.vibrations import Vibrations
from matplotlib.figure import Figure

from compactmlip import CompactMLIPCalculator

TOLERANCE = 0.005
"""eV/Angstrom; float32 forces reach it."""


def relaxed(calculator: Any, steps: int) -> tuple[Atoms, bool]:
    """Ethanol at rest, and whether it came to rest."""
    atoms = molecule("CH3CH2OH")
    atoms.calc = calculator
    with BFGS(atoms, logfile=None) as optimiser:
        converged = optimiser.run(fmax=TOLERANCE, steps=steps)
    return atoms, bool(converged)


def modes(atoms: Atoms) -> list[float]:
    """Wave numbers (1/cm) of all 3N modes, sorted; imaginary ones negative.  Six are close to 0 at rest."""
    with TemporaryDirectory() as folder:
        vibrations = Vibrations(atoms, name=str(Path(folder) / "modes"), delta=0.01)
        vibrations.run()
        found = vibrations.get_frequencies()
    return sorted((found.real - abs(found.imag)).tolist())


def hydroxyl_angle(atoms: Atoms) -> list[int]:
    """The four atoms C-C-O-H."""
    carbons, oxygen = [a.index for a in atoms if a.symbol == "C"], atoms.symbols.search("O")[0]
    hydrogens = [a.index for a in atoms if a.symbol == "H"]
    near = min(carbons, key=lambda i: atoms.get_distance(i, oxygen))
    far = next(i for i in carbons if i != near)
    hydroxyl = min(hydrogens, key=lambda i: atoms.get_distance(i, oxygen))
    return [far, near, oxygen, hydroxyl]


def turned(angles: Any) -> list[Atoms]:
    """Ethanol with the hydroxyl group turned, for a model that is to know all of the torsion."""
    found = []
    for angle in angles:
        atoms = molecule("CH3CH2OH")
        four = hydroxyl_angle(atoms)
        atoms.set_dihedral(*four, angle, indices=four[3:])
        found.append(atoms)
    return found


def torsion(atoms: Atoms, angles: np.ndarray, steps: int) -> list[float]:
    """Energies (eV) for angles of C-C-O-H in degrees, all else at rest (0 steps: rigid)."""
    four = hydroxyl_angle(atoms)
    energies, system = [], atoms.copy()
    for angle in angles:
        system.set_constraint()
        system.set_dihedral(*four, angle, indices=four[3:])
        system.calc = atoms.calc
        if steps:
            system.set_constraint(FixInternals(dihedrals_deg=[[float(angle) % 360, four]]))
            with BFGS(system, logfile=None) as optimiser:
                optimiser.run(fmax=0.02, steps=steps)
        energies.append(float(system.get_potential_energy()))
    return energies


def main() -> None:
    """Read the options, compute, write and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("ethanol-model/model.pt"))
    parser.add_argument("-o", "--output", type=Path, default=Path("molecule"))
    parser.add_argument("--smoke", action="store_true", help="few steps and a rigid torsion: for tests")
    parser.add_argument("--write", type=Path, help="only write structures to this file")
    options = parser.parse_args()
    if options.write:
        write(options.write, turned(range(0, 360, 60)))
        return
    calculator = CompactMLIPCalculator(options.model)
    atoms, converged = relaxed(calculator, 5 if options.smoke else 500)
    wave_numbers = modes(atoms)
    angles = np.linspace(-180, 180, 9 if options.smoke else 37)
    energies = torsion(atoms, angles, 0 if options.smoke else 60)
    relative = [1000 * (e - min(energies)) for e in energies]
    options.output.mkdir(parents=True, exist_ok=True)
    results = {"converged": converged, "modes_per_cm": wave_numbers}
    results |= {"angles_deg": angles.tolist(), "torsion_meV": relative}
    (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(angles, relative, "o-")
    axes.set_xlabel("C-C-O-H (degrees)")
    axes.set_ylabel("energy (meV)")
    figure.savefig(options.output / "torsion.png", dpi=150)
    print(f"at rest: {converged}; modes above 100/cm: {sum(w > 100 for w in wave_numbers)} of 21")
    print("wave numbers (1/cm):", *(f"{w:.0f}" for w in wave_numbers))
    print(f"barrier of the torsion: {max(relative):.0f} meV")


if __name__ == "__main__":
    main()
