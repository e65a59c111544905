"""Liquid water at 300 K in a teacher and a student: peaks of the radial distribution functions, energy drift.

The paper's table D.10 for a model that is made here: SevenNet fine-tuned on labelled water, then pruned and
distilled.  Both start from one labelled frame.  The labelled frames themselves, snapshots of dynamics with
the method of the labels, stand beside them.  Runs that are finished are kept in --cache, so that models can
be run in processes of their own.

    compactmlip finetune 7net-0 --train train.xyz --test test.xyz --minutes 16 -o teacher
    compactmlip specialize train.xyz --teacher teacher/model.safetensors --config water.yaml -o student
    compactmlip compile teacher/model.safetensors -o teacher.pt
    python benchmarks/water.py teacher=teacher.pt student=student/model.pt --frames train.xyz test.xyz
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from common import header, report, shown, table

from compactmlip import CompactMLIPCalculator
from compactmlip.data.read import read_labelled
from compactmlip.validate.nve import SAMPLE_EVERY, equilibrate, nve
from compactmlip.validate.parity import evaluate_frames, labels_of, parity
from compactmlip.validate.structure import radial_distributions

TEMPERATURE_K, TIMESTEP_FS = 300.0, 0.5

WARM_UP_PS = 1.5

BLOCKS = 5
"""Parts of a run whose scatter gives the standard error."""

WINDOWS = {
    "O-O, first": ("O-O", 2.3, 3.3),
    "O-O, second": ("O-O", 3.8, 5.2),
    "O-H, bond": ("H-O", 0.8, 1.2),
    "O-H, hydrogen bond": ("H-O", 1.5, 2.2),
    "H-H, molecule": ("H-H", 1.3, 1.8),
    "H-H, neighbours": ("H-H", 2.0, 2.8),
}
"""Pair, and where its peak is, Angstrom."""


def peak(distances: np.ndarray, function: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """Position and height of the highest point between two distances, from a parabola through five bins."""
    inside = np.flatnonzero((distances > low) & (distances < high))
    top = inside[np.argmax(function[inside])]
    near = slice(max(top - 2, 0), top + 3)
    a, b, c = np.polyfit(distances[near] - distances[top], function[near], 2)
    if a >= 0:
        return float(distances[top]), float(function[top])
    return float(distances[top] - b / (2 * a)), float(c - b**2 / (4 * a))


def peaks(atoms: Atoms, positions: np.ndarray) -> dict[str, list[float]]:
    """Position, its error, height, its error of every peak."""
    distances, frames = radial_distributions(atoms, positions)
    found = {}
    for name, (pair, low, high) in WINDOWS.items():
        parts = [
            peak(distances, part.mean(axis=0), low, high) for part in np.array_split(frames[pair], BLOCKS)
        ]
        errors = np.std(parts, axis=0, ddof=1) / BLOCKS**0.5
        position, height = peak(distances, frames[pair].mean(axis=0), low, high)
        found[name] = [position, float(errors[0]), height, float(errors[1])]
    return found


def of_frames(frames: list[Atoms]) -> dict[str, Any]:
    """Peaks of snapshots, which share their cell."""
    first = frames[0]
    if any(
        not np.allclose(f.cell, first.cell) or not np.array_equal(f.numbers, first.numbers) for f in frames
    ):
        raise SystemExit("the frames differ in cell or order of atoms; their peaks cannot be averaged")
    return {"peaks": peaks(first, np.array([f.positions for f in frames])), "picoseconds": None}


def simulate(file: Path, start: Atoms, picoseconds: float) -> dict[str, Any]:
    """Equilibrate with a thermostat, then run without."""
    calculator = CompactMLIPCalculator(file)
    state = {"temperature_K": TEMPERATURE_K, "timestep_fs": TIMESTEP_FS}
    warm = round(1000 * WARM_UP_PS / TIMESTEP_FS)
    ready = equilibrate(calculator, start, steps=warm, **state)
    run = nve(calculator, ready, steps=round(1000 * picoseconds / TIMESTEP_FS), progress=True, **state)
    summary = run.summary
    if summary.drift is None:
        raise SystemExit(f"{file}: {summary.reason}")
    return {
        "peaks": peaks(start, run.positions),
        "picoseconds": summary.steps * TIMESTEP_FS / 1000,
        "frames": len(run.positions),
        "temperature": summary.mean_temperature_K,
        "drift": [summary.drift.slope, summary.drift.slope_error],
        "fluctuation": summary.drift.fluctuation,
        "atoms_per_second": len(start) / summary.seconds_per_step,
    }


def errors(file: Path, frames: list[Atoms]) -> list[float]:
    """Mean absolute errors: meV/atom and meV/Angstrom, against the labels."""
    found = parity(frames, labels_of(frames), evaluate_frames(CompactMLIPCalculator(file), frames))
    return [found.energy.mae, found.forces.mae]


def tables(results: dict[str, dict[str, Any]]) -> str:
    """Peaks, then errors and dynamics."""
    names = list(results)
    rows = []
    for name in WINDOWS:
        row: list[object] = [name]
        for who in names:
            position, error, height, scatter = results[who]["peaks"][name]
            row += [f"{position:.3f} ± {error:.3f}", f"{height:.2f} ± {scatter:.2f}"]
        rows.append(row)
    columns = [title for who in names for title in (f"{who} (Å)", "height")]
    text = "\n## Peaks\n\n" + table(("pair", *columns), rows)
    rows = []
    for who in names[1:]:
        found = results[who]
        slope, error = found["drift"]
        rows.append(
            [
                who,
                f"{found['errors'][0]:.3f}",
                f"{found['errors'][1]:.1f}",
                f"{found['picoseconds']:.1f}",
                f"{found['temperature']:.0f}",
                f"{slope:+.4f} ± {error:.4f}",
                f"{found['fluctuation']:.4f}",
                f"{found['atoms_per_second']:.0f}",
            ]
        )
    columns = ["model", "E, labels (meV/atom)", "F, labels (meV/Å)", "NVE (ps)", "T (K)"]
    columns += ["drift (meV/atom/ps)", "rms fluctuation (meV/atom)", "atoms/s"]
    return text + "\n## Errors on the test frames, and energy conservation\n\n" + table(columns, rows)


def main() -> None:
    """Run what is not in the cache, and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="NAME=FILE", help="deployed files")
    parser.add_argument(
        "--frames", type=Path, nargs="+", required=True, help="labelled; the last file is a test set"
    )
    parser.add_argument(
        "--picoseconds", type=float, nargs="+", default=[10.0], help="for each model, or for all"
    )
    parser.add_argument("--cache", type=Path, default=Path("water-runs"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    sets = [read_labelled(path) for path in options.frames]
    test = sets[-1]
    models = dict(pair.split("=", 1) for pair in options.models)
    lengths = options.picoseconds * (len(models) if len(options.picoseconds) == 1 else 1)
    options.cache.mkdir(parents=True, exist_ok=True)
    results = {"labelled frames": of_frames([frame for frames in sets for frame in frames])}
    for (name, file), picoseconds in zip(models.items(), lengths, strict=True):
        kept = options.cache / f"{name}.json"
        if not kept.is_file():
            found = simulate(Path(file), test[0], picoseconds)
            found["errors"] = errors(Path(file), test)
            kept.write_text(json.dumps(found, indent=1))
        results[name] = json.loads(kept.read_text())
    text = header("Water", f"python benchmarks/water.py {shown(sys.argv[1:])}")
    text += (
        f"\n{len(test[0])} atoms at {TEMPERATURE_K:g} K, steps of {TIMESTEP_FS:g} fs: {WARM_UP_PS:g} ps with "
        f"a thermostat, then without; a frame every {SAMPLE_EVERY} steps. Errors are standard errors from "
        f"{BLOCKS} parts of a run. Labelled frames: {sum(map(len, sets))} snapshots.\n"
    )
    report(text + tables(results), options.output)


if __name__ == "__main__":
    main()
