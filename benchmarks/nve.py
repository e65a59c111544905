"""Energy conservation of a compact model: MgO with 216 atoms, 10 ps at 300 K and at 1000 K, 1 fs.

A checkpoint is compiled with kernels in float32 and in float64, which run beside each other from the same
start; a deployed file runs as it is.  State and energies are kept in --work, so that an interrupted run
continues with the same command.

    OMP_NUM_THREADS=1 python benchmarks/nve.py compactmlip-quickstart/distilled.safetensors
    python benchmarks/nve.py small.pt --picoseconds 0.3 --temperatures 300 --atoms 64 --work short
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms, units
from ase.io import read, write
from ase.md.verlet import VelocityVerlet
from common import header, parser, report, structure, table

from compactmlip import CompactMLIPCalculator
from compactmlip.checkpoint import atomic_write, sha256
from compactmlip.deploy.archive import inspect
from compactmlip.deploy.compile import compile_model
from compactmlip.validate.nve import MIN_STEPS_FOR_DRIFT, equilibrate, fit_drift

ALLOWED_DRIFT = 0.01
"""meV/atom/ps"""


@dataclass
class Run:
    """One trajectory and its file.

    Attributes
    ----------
    energies
        (steps + 1, 2) potential and kinetic energy in eV, the first row those of the start.
    seconds
        Wall time of all steps.
    """

    path: Path
    atoms: Atoms
    energies: np.ndarray
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        return max(len(self.energies) - 1, 0)

    def advance(self, steps: int, timestep_fs: float) -> None:
        """Go on, and write the new state."""
        rows: list[tuple[float, float]] = []

        def record() -> None:
            rows.append((self.atoms.get_potential_energy(), self.atoms.get_kinetic_energy()))

        dynamics = VelocityVerlet(self.atoms, timestep_fs * units.fs)
        started = time.perf_counter()
        for _ in dynamics.irun(steps):
            record()
        self.seconds += time.perf_counter() - started
        # The state at hand is recorded once more at the start of each piece.
        known = rows[1:] if len(self.energies) else rows
        self.energies = np.concatenate([self.energies, np.array(known).reshape(-1, 2)])
        self.write()

    def write(self) -> None:
        state = {"positions": self.atoms.positions, "momenta": self.atoms.get_momenta()}

        def to_file(path: Path) -> None:
            with path.open("wb") as file:
                np.savez(file, energies=self.energies, seconds=self.seconds, **state)

        atomic_write(self.path, to_file)

    def read(self) -> None:
        """Continue from the file, if there is one."""
        if not self.path.is_file():
            return
        with np.load(self.path) as state:
            self.atoms.positions = state["positions"]
            self.atoms.set_momenta(state["momenta"])
            self.energies, self.seconds = state["energies"], float(state["seconds"])


def deployed(model: Path, folder: Path) -> dict[str, Path]:
    """Label -> deployed file."""
    if model.suffix == ".pt":
        spec, deployment = inspect(model)
        return {f"{model.stem}, {deployment.backend} {spec.dtype}": model}
    files = {}
    for dtype in ("float32", "float64"):
        path = folder / f"{model.stem}-{dtype}.pt"
        if not path.is_file():
            compile_model(model, path, dtype=dtype, backend="kernels")
        files[f"{model.stem}, kernels {dtype}"] = path
    return files


def start(calculator: CompactMLIPCalculator, options: argparse.Namespace, temperature: float) -> Atoms:
    """Equilibrated crystal, the same for all models."""
    path = options.work / f"start-{temperature:g}K.extxyz"
    if not path.is_file():
        crystal = structure("MgO", options.atoms, rattle=0.0)
        steps = round(1000 * options.equilibration_ps / options.timestep_fs)
        ready = equilibrate(
            calculator, crystal, temperature_K=temperature, timestep_fs=options.timestep_fs, steps=steps
        )
        write(path, ready)
    found: Any = read(path)
    assert isinstance(found, Atoms)
    return found


def check_settings(options: argparse.Namespace) -> None:
    """Refuse to continue a run with other files or settings."""
    settings = {
        "models": {str(p): sha256(p) for p in options.models},
        "atoms": options.atoms,
        "timestep_fs": options.timestep_fs,
    }
    path = options.work / "settings.json"
    options.work.mkdir(parents=True, exist_ok=True)
    if path.is_file() and json.loads(path.read_text()) != settings:
        raise SystemExit(f"{options.work} holds a run of other models or settings; choose another --work.")
    path.write_text(json.dumps(settings))


def runs(options: argparse.Namespace) -> Iterator[tuple[str, float, list[Run]]]:
    """Each temperature with the runs that take turns, and their labels."""
    for model in options.models:
        files = deployed(model, options.work)
        calculators = {label: CompactMLIPCalculator(path) for label, path in files.items()}
        most_precise = list(calculators.values())[-1]
        for temperature in options.temperatures:
            atoms = start(most_precise, options, temperature)
            together = []
            for label, calculator in calculators.items():
                name = f"{label.replace(', ', '-').replace(' ', '-')}-{temperature:g}K.npz"
                run = Run(options.work / name, atoms.copy(), np.empty((0, 2)))
                run.atoms.calc = calculator
                run.read()
                together.append(run)
            yield "\n".join(calculators), temperature, together


def row(label: str, temperature: float, run: Run, timestep_fs: float) -> list[object]:
    atoms = len(run.atoms)
    potential, kinetic = run.energies.T
    mean = float(np.mean(2 * kinetic / (3 * atoms * units.kB)))
    cells: list[object] = [label, f"{temperature:g}", f"{mean:.0f}", run.steps]
    if run.steps < MIN_STEPS_FOR_DRIFT:
        return [*cells, "too short", "–", "–", 1e3 * run.seconds / max(run.steps, 1), "–"]
    times = np.arange(run.steps + 1) * timestep_fs / 1000
    drift = fit_drift(times, (potential + kinetic) / atoms, kinetic / atoms)
    good = "yes" if abs(drift.slope) < ALLOWED_DRIFT else "no"
    return [
        *cells,
        f"{drift.slope:+.1e} ± {drift.slope_error:.1e}",
        f"{drift.fluctuation:.1e}",
        f"{drift.fluctuation_ratio:.1e}",
        1e3 * run.seconds / run.steps,
        good,
    ]


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("models", nargs="+", type=Path, help="checkpoints or deployed files")
    options_parser.add_argument("--atoms", type=int, default=216)
    options_parser.add_argument("--picoseconds", type=float, default=10.0)
    options_parser.add_argument("--timestep-fs", type=float, default=1.0)
    options_parser.add_argument("--equilibration-ps", type=float, default=0.5)
    options_parser.add_argument("--temperatures", nargs="+", type=float, default=[300.0, 1000.0])
    options_parser.add_argument("--piece", type=int, default=250, help="steps between checkpoints")
    options_parser.add_argument("--work", type=Path, default=Path("nve-run"))
    options = options_parser.parse_args()
    torch.set_num_threads(options.threads)
    check_settings(options)
    steps = round(1000 * options.picoseconds / options.timestep_fs)
    rows = []
    for labels, temperature, together in runs(options):
        while any(run.steps < steps for run in together):
            for run in together:
                if run.steps < steps:
                    run.advance(min(options.piece, steps - run.steps), options.timestep_fs)
            print(f"{temperature:g} K: {together[-1].steps} of {steps} steps", flush=True)
        for label, run in zip(labels.splitlines(), together, strict=True):
            rows.append(row(label, temperature, run, options.timestep_fs))
    text = header("Energy conservation", "python benchmarks/nve.py")
    text += (
        f"\nMgO, velocity Verlet with {options.timestep_fs:g} fs after a Langevin equilibration of "
        f"{options.equilibration_ps:g} ps; all precisions start from the same state. Drift of the total "
        "energy (meV/atom/ps) with its standard error from block averages, after the first tenth of the run; "
        "RMS fluctuation (meV/atom), and relative to that of the kinetic energy.\n\n"
    )
    columns = ("model", "T (K)", "mean T (K)", "steps", "drift", "fluctuation", "relative", "ms per step")
    report(text + table((*columns, f"below {ALLOWED_DRIFT:g}"), rows), options.output)


if __name__ == "__main__":
    main()
