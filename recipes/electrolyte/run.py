"""Diffusion of lithium in Li3OCl with LiCl vacancies at several temperatures, and its activation energy."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.spacegroup import crystal
from matplotlib.figure import Figure

from compactmlip import CompactMLIPCalculator
from compactmlip.validate.motion import motion, segment_displacements, segment_lags, without_drift
from compactmlip.validate.nve import equilibrate, nve

TIMESTEP_FS = 2.0
"""Thirty steps for the fastest vibration."""

EVERY = 10
"""Steps between positions, as :func:`compactmlip.validate.nve.nve` keeps them."""


def electrolyte(repeats: int, vacancies: int) -> Atoms:
    """Li3OCl, cubic, without some pairs of Li and Cl: neutral, and room for Li to hop."""
    cell = crystal(
        ("Li", "O", "Cl"),
        [(0.5, 0.5, 0), (0.5, 0.5, 0.5), (0, 0, 0)],
        spacegroup=221,
        cellpar=[3.91, 3.91, 3.91, 90, 90, 90],
    )
    atoms = Atoms(cell.symbols, cell.positions, cell=cell.cell, pbc=True).repeat(repeats)
    random = np.random.default_rng(0)
    symbols = np.array(atoms.get_chemical_symbols())
    gone = [random.choice(np.flatnonzero(symbols == s), vacancies, replace=False) for s in ("Li", "Cl")]
    del atoms[np.concatenate(gone)]
    return atoms


def diffusion(calculator: Any, atoms: Atoms, temperature_K: float, steps: int) -> tuple[Any, float, Any]:
    """Motion of lithium without thermostat after an equilibration with one; temperature; MSD by lag."""
    state = {"temperature_K": temperature_K, "timestep_fs": TIMESTEP_FS}
    system = equilibrate(calculator, atoms, steps=steps // 10, **state)
    run = nve(calculator, system, steps=steps, **state)
    if not run.summary.stable:
        raise SystemExit(f"{temperature_K:g} K: the run was not stable: {run.summary.reason}")
    positions = without_drift(system, run.positions)[:, system.symbols == "Li"]
    interval = EVERY * TIMESTEP_FS / 1000
    lags = interval * np.array(segment_lags(len(positions)))
    curve = np.array([lags, segment_displacements(positions).mean(axis=0)])
    return motion(positions, interval, distance=2.0), run.summary.mean_temperature_K, curve


def arrhenius(rows: list[dict[str, Any]]) -> tuple[float, float, float] | None:
    """Activation energy, its error (eV), prefactor (10^-5 cm^2/s), of two temperatures or more with a D."""
    known = [row for row in rows if row["kind"] == "diffuses"]
    if len(known) < 2:
        return None
    inverse = [1 / (units.kB * row["measured_K"]) for row in known]
    weights = [row["D"] / row["D_error"] for row in known]  # one over the error of the logarithm
    logarithms = np.log([row["D"] for row in known])
    (slope, intercept), covariance = np.polyfit(inverse, logarithms, 1, w=weights, cov="unscaled")
    return float(-slope), float(covariance[0, 0] ** 0.5), float(np.exp(intercept))


def picture(rows: list[dict[str, Any]], curves: list[Any], path: Path) -> None:
    """Mean square displacements, and D against the inverse temperature."""
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for row, (times, squares) in zip(rows, curves, strict=True):
        left.plot(times, squares, label=f"{row['measured_K']:.0f} K")
    left.set_xlabel("time (ps)")
    left.set_ylabel("mean square displacement of Li (Å²)")
    left.legend()
    known = [row for row in rows if row["kind"] == "diffuses"]
    inverse = [1000 / row["measured_K"] for row in known]
    right.errorbar(inverse, [r["D"] for r in known], [r["D_error"] for r in known], fmt="o", capsize=3)
    right.set_yscale("log")
    right.set_xlabel("1000 K / temperature")
    right.set_ylabel("D of Li (10⁻⁵ cm²/s)")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Read the options, compute, write and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("electrolyte-model/model.pt"))
    parser.add_argument("-o", "--output", type=Path, default=Path("electrolyte"))
    parser.add_argument("--temperatures", type=float, nargs="+", default=[800.0, 1000.0, 1200.0])
    parser.add_argument("--picoseconds", type=float, default=100.0)
    parser.add_argument("--smoke", action="store_true", help="small cell, 1 ps, one temperature: for tests")
    parser.add_argument("--write", type=Path, help="only write the structure to this file")
    options = parser.parse_args()
    atoms = electrolyte(*((2, 1) if options.smoke else (3, 4)))
    if options.write:
        atoms.write(options.write)
        return
    picoseconds = 1.0 if options.smoke else options.picoseconds
    temperatures = options.temperatures[:1] if options.smoke else options.temperatures
    calculator, rows, curves = CompactMLIPCalculator(options.model), [], []
    for temperature in temperatures:
        steps = round(1000 * picoseconds / TIMESTEP_FS)
        found, measured, curve = diffusion(calculator, atoms, temperature, steps)
        curves.append(curve)
        row = {"target_K": temperature, "measured_K": measured, "kind": found.kind}
        row |= {"D": found.diffusion, "D_error": found.diffusion_error, "exponent": found.exponent}
        rows.append(row)
        print(
            f"{measured:7.0f} K: Li {found.kind}, D = {found.diffusion:.3g} +- {found.diffusion_error:.2g} "
            f"x 10^-5 cm^2/s (exponent {found.exponent:.2f})"
        )
    fit = arrhenius(rows)
    if fit:
        print(f"activation energy {fit[0]:.2f} +- {fit[1]:.2g} eV")
    options.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"atoms": len(atoms), "rows": rows, "arrhenius": fit}, indent=1)
    (options.output / "results.json").write_text(text + "\n")
    picture(rows, curves, options.output / "diffusion.png")


if __name__ == "__main__":
    main()
