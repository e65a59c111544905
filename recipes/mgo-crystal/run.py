"""MgO with a compact model: equation of state, elastic constants, phonons; beside the teacher if given."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from ase.build import bulk
from matplotlib.figure import Figure

from compactmlip import CompactMLIPCalculator
from compactmlip.validate.crystal import crystal
from compactmlip.validate.phonons import available, frequencies, heat_capacity

STRAINS = np.linspace(-0.03, 0.03, 9)


def energies(calculator: Any, relaxed: Any) -> tuple[list[float], list[float]]:
    """Volumes (Angstrom^3) and energies (eV) per atom; by symmetry all atoms stay at rest."""
    volumes, found = [], []
    for strain in STRAINS:
        atoms = relaxed.copy()
        atoms.set_cell(relaxed.cell * (1 + strain), scale_atoms=True)
        atoms.calc = calculator
        volumes.append(atoms.get_volume() / len(atoms))
        found.append(float(atoms.get_potential_energy()) / len(atoms))
    return volumes, found


def study(model: Path, repeats: int) -> dict[str, Any]:
    """All numbers of one model."""
    calculator = CompactMLIPCalculator(model)
    at_rest, relaxed = crystal(calculator, bulk("MgO", "rocksalt", a=4.21, cubic=True))
    volumes, found = energies(calculator, relaxed)
    result: dict[str, Any] = {
        "relaxed": at_rest.relaxed,
        "lattice_constant_A": float(relaxed.cell.lengths().mean()),
        "bulk_modulus_GPa": at_rest.bulk_modulus,
        "C11_GPa": at_rest.elastic[0][0],
        "C12_GPa": at_rest.elastic[0][1],
        "C44_GPa": at_rest.elastic[3][3],
        "volumes_A3": volumes,
        "energies_eV": found,
    }
    if available():
        spectrum, _ = frequencies(calculator, relaxed, (repeats, repeats, repeats))
        result["phonons_THz"] = sorted(spectrum.ravel().tolist())
        result["heat_capacity_300K_kB"] = heat_capacity(spectrum, 300.0)
    return result


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Energy against volume, and the density of states."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, found in results.items():
        e = np.array(found["energies_eV"])
        left.plot(found["volumes_A3"], 1000 * (e - e.min()), "o-", label=name)
        if "phonons_THz" in found:
            right.hist(found["phonons_THz"], bins=60, histtype="step", label=name)
    left.set_xlabel("volume (Å³/atom)")
    left.set_ylabel("energy (meV/atom)")
    right.set_xlabel("frequency (THz)")
    right.set_yticks([])
    left.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Read the options, compute, write and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("compactmlip-quickstart/model.pt"))
    parser.add_argument("--teacher", type=Path, help="teacher's checkpoint or deployed file, to compare with")
    parser.add_argument("-o", "--output", type=Path, default=Path("mgo-crystal"))
    parser.add_argument("--smoke", action="store_true", help="a phonon supercell of one cell, for tests")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    files = {"model": options.model, "teacher": options.teacher}
    results = {name: study(file, 1 if options.smoke else 2) for name, file in files.items() if file}
    (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, options.output / "figures.png")
    for key, value in results["model"].items():
        if not isinstance(value, list):
            others = [f"{found[key]:12.4g}" for found in results.values()]
            print(f"{key:24}", *others)


if __name__ == "__main__":
    main()
