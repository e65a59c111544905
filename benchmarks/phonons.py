"""Phonons of MgO: deployed files against the model that they were made from, in float64.

Finite displacements with phonopy through the ASE calculator; frequencies on a mesh of wave vectors.  The
model is a checkpoint or a known name; it is compiled with kernels in float32 and float64, or deployed files
of it are given with --deployed.

    OMP_NUM_THREADS=1 python benchmarks/phonons.py 7net-l3i5
    python benchmarks/phonons.py small.safetensors --deployed small.pt --supercell 2 --mesh 4
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from ase.build import bulk
from common import header, parser, report, table
from phonopy import Phonopy
from phonopy.structure.atoms import PhonopyAtoms

from compactmlip import CompactMLIPCalculator
from compactmlip.compress.apply import keep_species
from compactmlip.deploy.archive import inspect
from compactmlip.deploy.compile import compile_model
from compactmlip.families import load_model
from compactmlip.models import model_spec
from compactmlip.validate.phonons import find_force_constants, sorted_frequencies

ALLOWED = 0.05
"""THz"""


def frequencies(calculator: CompactMLIPCalculator, options: argparse.Namespace) -> np.ndarray:
    """Phonon frequencies in THz, (wave vectors, modes); imaginary ones are negative."""
    crystal = bulk("MgO", "rocksalt", a=options.lattice, cubic=True)
    cell = PhonopyAtoms(
        symbols=crystal.get_chemical_symbols(),
        cell=crystal.cell.array,
        scaled_positions=crystal.get_scaled_positions(),
    )
    phonons = Phonopy(cell, supercell_matrix=np.eye(3, dtype=int) * options.supercell, primitive_matrix="F")
    find_force_constants(phonons, calculator, options.displacement)
    phonons.run_mesh([options.mesh] * 3)
    return sorted_frequencies(phonons)


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("model", help="checkpoint, or name of a known model")
    options_parser.add_argument("--deployed", nargs="+", type=Path, help="files to compare; made if missing")
    options_parser.add_argument("--accept-licence", help="as in the command line")
    options_parser.add_argument("--lattice", type=float, default=4.21, help="Angstrom")
    options_parser.add_argument("--supercell", type=int, default=3, help="cubic cells along each direction")
    options_parser.add_argument("--displacement", type=float, default=0.01, help="Angstrom")
    options_parser.add_argument("--mesh", type=int, default=8)
    options = options_parser.parse_args()
    torch.set_num_threads(options.threads)
    loaded = load_model(options.model, dtype=torch.float64, accept_licence=options.accept_licence)
    model = keep_species(loaded, ["Mg", "O"])
    reference = frequencies(CompactMLIPCalculator(model, dtype="float64"), options)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = options.deployed
        if not files:
            files = [Path(folder) / f"{dtype}.pt" for dtype in ("float32", "float64")]
            for path in files:
                compile_model(model, path, dtype=path.stem, backend="kernels")
        for path in files:
            spec, deployment = inspect(path)
            difference = np.abs(frequencies(CompactMLIPCalculator(path), options) - reference)
            label = path.name if options.deployed else ""
            kind = f"{label} {deployment.backend} {spec.dtype}".strip()
            worst = float(difference.max())
            rows.append(
                [kind, f"{worst:.2e}", f"{difference.mean():.2e}", "yes" if worst < ALLOWED else "no"]
            )
    text = header("Phonons of MgO", "python benchmarks/phonons.py")
    text += (
        f"\n{model_spec(model).provenance.name}; a = {options.lattice:g} Å, {8 * options.supercell**3} "
        f"atoms, displacements of {options.displacement:g} Å, {options.mesh}³ mesh; frequencies of the "
        f"native model in float64 are {reference.min():.2f} to {reference.max():.2f} THz. Differences to "
        "them in THz.\n\n"
    )
    columns = ("deployed", "largest difference", "mean difference", f"below {ALLOWED:g} THz")
    report(text + table(columns, rows), options.output)


if __name__ == "__main__":
    main()
