"""Silicon from your own DFT data: errors on the test set and crystal properties, model by model."""

from __future__ import annotations

import argparse
import json
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ase.build import bulk
from matplotlib.figure import Figure

from compactmlip import CompactMLIPCalculator
from compactmlip.data.read import read_labelled
from compactmlip.validate.crystal import crystal
from compactmlip.validate.defects import vacancy_energy
from compactmlip.validate.parity import evaluate_frames, labels_of, parity

PROPERTIES = {
    "lattice_constant_A": "lattice constant (Angstrom)",
    "bulk_modulus_GPa": "bulk modulus (GPa)",
    "C11_GPa": "C11 (GPa)",
    "C12_GPa": "C12 (GPa)",
    "C44_GPa": "C44 (GPa)",
    "vacancy_eV": "vacancy (eV)",
}


def errors(calculator: Any, frames: list[Any]) -> dict[str, Any]:
    """Mean absolute errors by configuration type: meV/atom without a common shift, and meV/Angstrom."""
    labels, found = labels_of(frames), evaluate_frames(calculator, frames)
    # Another code or pseudopotential puts the zero of energy elsewhere; only differences have a meaning.
    sizes = np.array([len(atoms) for atoms in frames])
    shift = np.median((found.energies - labels.energies) / sizes)
    compared = parity(frames, labels, replace(found, energies=found.energies - shift * sizes))
    rows = {"all": (compared.frames, compared.energy.mae, compared.forces.mae)}
    rows |= {kind: (row.frames, row.energy, row.forces) for kind, row in compared.by_kind.items()}
    names = ("frames", "energy_meV_per_atom", "forces_meV_per_A")
    return {"by_type": {kind: dict(zip(names, row, strict=True)) for kind, row in rows.items()}}


def properties(calculator: Any, smoke: bool) -> dict[str, float]:
    """Lattice, elastic constants and the relaxed vacancy in 64 atoms."""
    at_rest, relaxed = crystal(calculator, bulk("Si", "diamond", a=5.43, cubic=True))
    return {
        "lattice_constant_A": float(relaxed.cell.lengths().mean()),
        "bulk_modulus_GPa": at_rest.bulk_modulus,
        "C11_GPa": at_rest.elastic[0][0],
        "C12_GPa": at_rest.elastic[0][1],
        "C44_GPa": at_rest.elastic[3][3],
        "vacancy_eV": vacancy_energy(calculator, relaxed, 0 if smoke else 60)[1],
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """Force errors by configuration type."""
    kinds = list(next(iter(results.values()))["errors"]["by_type"])
    figure = Figure(figsize=(7, 1.2 + 0.16 * len(kinds) * (1 + len(results))), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(results)
    for k, (name, found) in enumerate(results.items()):
        values = [found["errors"]["by_type"][kind]["forces_meV_per_A"] for kind in kinds]
        axes.barh(np.arange(len(kinds)) + k * width, values, width, label=name)
    names = [textwrap.fill(kind, 36) for kind in kinds]
    axes.set_yticks(np.arange(len(kinds)) + 0.4 - width / 2, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("force error (meV/Å)")
    axes.legend()
    figure.savefig(path, dpi=150)


def show(results: dict[str, Any]) -> None:
    """Print both tables, a column for each model."""
    print(f"{'':32}", *[f"{name:>14}" for name in results])
    for kind in next(iter(results.values()))["errors"]["by_type"]:
        for key, title in (("energy_meV_per_atom", "E (meV/atom)"), ("forces_meV_per_A", "F (meV/Angstrom)")):
            values = [found["errors"]["by_type"][kind][key] for found in results.values()]
            print(f"{f'{title}, {kind}':32}", *[f"{value:14.2f}" for value in values])
    for key, title in PROPERTIES.items():
        print(f"{title:32}", *[f"{found['properties'][key]:14.4g}" for found in results.values()])


def main() -> None:
    """Read the options, compute, write and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--test", type=Path, required=True, help="labelled structures, never trained on")
    parser.add_argument("--model", type=Path, nargs="+", required=True, help="files to compare")
    parser.add_argument("--name", nargs="+", help="a name for each; by default those of the files")
    parser.add_argument("-o", "--output", type=Path, default=Path("silicon"))
    parser.add_argument("--smoke", action="store_true", help="do not relax the vacancy: for tests")
    options = parser.parse_args()
    names = options.name or [f"{file.parent.name}/{file.stem}" for file in options.model]
    if len(names) != len(options.model):
        parser.error(f"{len(options.model)} models and {len(names)} names")
    frames = read_labelled(options.test)
    results = {}
    for name, file in zip(names, options.model, strict=True):
        calculator = CompactMLIPCalculator(file)
        results[name] = {
            "errors": errors(calculator, frames),
            "properties": properties(calculator, options.smoke),
        }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, options.output / "errors.png")
    show(results)


if __name__ == "__main__":
    main()
