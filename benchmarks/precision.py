"""What the precisions of a compiled file cost and give: errors against float64, and energy conservation.

First which part of a model limits float32 (precision_parts.py), then errors of float32, mixed and bf16
files, then the drift of the total energy in NVE dynamics of MgO with SevenNet-l3i5 (downloaded on first
use).  All modes start from the same positions and momenta.

    OMP_NUM_THREADS=1 python benchmarks/precision.py [--mace FILE --mace-structures FILE]
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from ase.io import read
from common import header, parser, report, table
from precision_parts import rows_for
from torch import nn

from compactmlip.compress.apply import keep_species
from compactmlip.deploy.archive import Precision
from compactmlip.deploy.ase import CompactMLIPCalculator
from compactmlip.deploy.compile import compile_model
from compactmlip.families import load_model
from compactmlip.validate.nve import equilibrate, nve

MODES: tuple[Precision, ...] = get_args(Precision)
LOWER = [mode for mode in MODES if mode != "float64"]
COLUMNS = ("energy, µeV/atom: mean", "max", "forces, µeV/Å: mean", "max", "stress, µeV/Å³: mean", "max")


def crystals(count: int) -> list[Atoms]:
    """MgO with 64 atoms, rattled."""
    found = []
    for seed in range(count):
        atoms = bulk("MgO", "rocksalt", a=4.21, cubic=True) * (2, 2, 2)
        atoms.rattle(0.1, seed=seed)
        found.append(atoms)
    return found


def errors(model: nn.Module, frames: Sequence[Atoms], folder: Path, backend: str) -> list[list[object]]:
    """One row for each precision below float64, as the compiled file itself reports it."""
    rows: list[list[object]] = []
    for mode in LOWER:
        made = compile_model(
            model, folder / f"{mode}.pt", dtype=mode, backend=backend, calibration=frames  # type: ignore[arg-type]
        )  # fmt: skip
        found = made.accuracy[-1]
        names = (f"{what}_{kind}" for what in ("energy", "force", "stress") for kind in ("mae", "max"))
        values = [getattr(found, name) for name in names]
        rows.append([mode, *("-" if v is None else 1e6 * v for v in values)])
        print(rows[-1], flush=True)
    return rows


def drifts(model: nn.Module, options: object, folder: Path) -> list[list[object]]:
    """One row for each precision and run."""
    calculators = {}
    for mode in MODES:
        path = folder / f"nve-{mode}.pt"
        compile_model(model, path, dtype=mode, backend=options.backend)  # type: ignore[attr-defined]
        calculators[mode] = CompactMLIPCalculator(path)
    rows: list[list[object]] = []
    for temperature in options.temperatures:  # type: ignore[attr-defined]
        starts = []
        for seed in range(options.runs):  # type: ignore[attr-defined]
            atoms = bulk("MgO", "rocksalt", a=4.21, cubic=True)
            start = equilibrate(
                calculators["float64"], atoms, temperature_K=temperature, steps=300, seed=seed
            )
            starts.append(start)
        for mode in options.modes:  # type: ignore[attr-defined]
            calculator = calculators[mode]
            found = [
                nve(calculator, start, temperature_K=temperature, steps=options.steps).summary  # type: ignore[attr-defined]
                for start in starts
            ]
            slopes = [s.drift.slope if s.drift else np.nan for s in found]
            error = np.sqrt(sum(s.drift.slope_error**2 if s.drift else np.nan for s in found)) / len(found)
            fluctuation = np.mean([s.drift.fluctuation if s.drift else np.nan for s in found])
            measured = np.mean([s.mean_temperature_K for s in found])
            rows.append(
                [
                    mode,
                    f"{measured:.0f} K",
                    f"{np.mean(slopes):+.5f} ± {error:.5f}",
                    ", ".join(f"{s:+.5f}" for s in slopes),
                    float(fluctuation),
                ]
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--mace", help="a MACE model, for instance a .model file")
    options_parser.add_argument("--mace-structures", type=Path, help="structures for it")
    options_parser.add_argument("--backend", default="torch", help="of the compiled files")
    options_parser.add_argument("--steps", type=int, default=3000, help="of 1 fs in each NVE run")
    options_parser.add_argument("--temperatures", type=float, nargs="+", default=[300.0, 1000.0], help="K")
    options_parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="of NVE runs")
    options_parser.add_argument("--nve-only", action="store_true", help="leave the other tables out")
    options_parser.add_argument("--runs", type=int, default=3, help="NVE runs for each mode and temperature")
    options = options_parser.parse_args()
    torch.set_num_threads(options.threads)
    sevennet = keep_species(load_model("7net-l3i5"), ["Mg", "O"])
    cases = {"SevenNet-l3i5, MgO": (sevennet, crystals(3))}
    if options.mace:
        given = read(options.mace_structures, ":20")
        species = sorted({s for a in given for s in a.symbols})
        cases["MACE, molecules"] = (keep_species(load_model(options.mace), species), given)
    text = header(
        "Precisions of compiled files", f"python benchmarks/precision.py --backend {options.backend}"
    )
    if options.nve_only:
        cases = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case, (model, frames) in cases.items():
            sizes = ", ".join(map(str, sorted({len(a) for a in frames})))
            text += f"\n## {case}: {len(frames)} structures of {sizes} atoms\n\n"
            text += table(("precision", *COLUMNS), errors(model, frames, folder, options.backend))
            text += "\nForce errors in µeV/Å with one part of the model in the other precision:\n\n"
            columns = ("part", "float32, part raised: mean", "max", "float64, part lowered: mean", "max")
            text += table(columns, rows_for(model, frames))
        text += f"\n## NVE: MgO with 8 atoms, SevenNet-l3i5, 1 fs, {options.steps} steps\n\n"
        columns = (
            "precision",
            "temperature",
            "drift, meV/atom/ps",
            "each run",
            "fluctuation, meV/atom (RMS)",
        )
        text += table(columns, drifts(sevennet, options, folder))
    report(text, options.output)


if __name__ == "__main__":
    main()
