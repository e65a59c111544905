"""Liquid water at 300 K: radial distribution functions, and how well dynamics conserves energy."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.build import molecule
from ase.io import write
from matplotlib.figure import Figure

from compactmlip import CompactMLIPCalculator
from compactmlip.validate.nve import equilibrate, nve
from compactmlip.validate.structure import first_peak, radial_distributions

TEMPERATURE_K, TIMESTEP_FS, DENSITY = 300.0, 0.5, 0.997

MELT_K, MELT_PS, MELT_FRAMES = 450.0, 2.0, 30
"""Warmer than the liquid that is wanted, so that its own states lie inside."""


def box(molecules_per_edge: int) -> Atoms:
    """Water molecules on a grid at the density of the liquid (g/cm^3), turned at random."""
    one, random = molecule("H2O"), np.random.default_rng(0)
    spacing = (one.get_masses().sum() / units.kg * 1e3 / DENSITY) ** (1 / 3) * units.m / 1e2
    liquid = Atoms(cell=[molecules_per_edge * spacing] * 3, pbc=True)
    for place in np.ndindex(*[molecules_per_edge] * 3):
        turned = one.copy()
        turned.rotate(random.uniform(0, 360), random.normal(size=3), center="COM")
        turned.positions += spacing * (np.array(place) + 0.5) - turned.get_center_of_mass()
        liquid += turned
    return liquid


def melted(calculator: Any, grid: Atoms, picoseconds: float) -> list[Atoms]:
    """Snapshots of molecules that leave their grid, evenly spaced in time."""
    steps = round(1000 * picoseconds / TIMESTEP_FS)
    state = {"temperature_K": MELT_K, "timestep_fs": TIMESTEP_FS}
    frames, system = [], grid
    for k in range(MELT_FRAMES):
        system = equilibrate(calculator, system, steps=steps // MELT_FRAMES, seed=k, **state)
        frames.append(Atoms(system.symbols, system.positions, cell=system.cell, pbc=True))
    return frames


def peaks(liquid: Atoms, positions: Any) -> tuple[Any, dict[str, Any], dict[str, dict[str, float]]]:
    """Distances, functions and first peaks by pair; intramolecular O-H and H-H come first."""
    distances, frames = radial_distributions(liquid, positions)
    functions = {pair: f.mean(axis=0) for pair, f in frames.items()}
    found = {}
    for pair, function in functions.items():
        density = liquid.get_chemical_symbols().count(pair.split("-")[1]) / liquid.get_volume()
        found[pair] = first_peak(distances, function, density).model_dump()
    return distances, functions, found


def main() -> None:
    """Read the options, compute, write and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("water-model/model.pt"))
    parser.add_argument("-o", "--output", type=Path, default=Path("water"))
    parser.add_argument("--picoseconds", type=float, default=20.0)
    parser.add_argument("--smoke", action="store_true", help="eight molecules and 0.1 ps: for tests")
    parser.add_argument(
        "--write", type=Path, help="only write structures of the liquid to this file, melted by the model"
    )
    options = parser.parse_args()
    liquid = box(2 if options.smoke else 4)
    if options.write:
        calculator, grid = CompactMLIPCalculator(options.model), box(2 if options.smoke else 3)
        write(options.write, melted(calculator, grid, 0.05 if options.smoke else MELT_PS))
        return
    steps = round(1000 * (0.1 if options.smoke else options.picoseconds) / TIMESTEP_FS)
    calculator = CompactMLIPCalculator(options.model)
    state = {"temperature_K": TEMPERATURE_K, "timestep_fs": TIMESTEP_FS}
    start = equilibrate(calculator, liquid, steps=steps // 4, **state)
    run = nve(calculator, start, steps=steps, **state)
    distances, functions, found = peaks(liquid, run.positions)
    for pair, peak in found.items():
        print(f"{pair}: {peak['position']:.2f} Angstrom, height {peak['height']:.2f}")
    drift = run.summary.drift
    if drift:
        print(f"drift {drift.slope:+.4f} +- {drift.slope_error:.4f} meV/atom/ps")
    else:
        print(f"no drift: {run.summary.reason}")
    options.output.mkdir(parents=True, exist_ok=True)
    results = {"atoms": len(liquid), "peaks": found, "nve": run.summary.model_dump(mode="json")}
    (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    for pair, function in functions.items():
        axes.plot(distances, function, label=pair)
    axes.set_xlim(0.5, None)
    axes.set_ylim(0, 4)
    axes.set_xlabel("distance (Å)")
    axes.set_ylabel("g(r)")
    axes.legend()
    figure.savefig(options.output / "rdf.png", dpi=150)


if __name__ == "__main__":
    main()
