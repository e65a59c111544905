"""What a finished quickstart (or specialize) folder says about time, memory and errors, as a table.

compactmlip quickstart
python benchmarks/quickstart.py compactmlip-quickstart
"""

from __future__ import annotations

import json
from pathlib import Path

from common import parser, report, table

from compactmlip.validate.certificate import Certificate


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("folder", type=Path)
    options = options_parser.parse_args()
    state = json.loads((options.folder / "state.json").read_text())
    found = Certificate.load(options.folder / "certificate.json")
    machine = found.machine
    software = ", ".join(f"{name} {version}" for name, version in found.software.items())
    text = (
        f"# quickstart\n\n`compactmlip quickstart`\n\n{found.created_utc:%Y-%m-%d}; {machine.processor}, "
        f"{machine.threads} thread(s) of {machine.cores} cores, load average {machine.load_average}; "
        f"{software}.\n\n"
    )
    steps = [[name, f"{seconds:.0f}"] for name, seconds in state["seconds"].items()]
    steps.append(["all", f"{sum(state['seconds'].values()):.0f}"])
    text += table(("step", "time (s)"), steps)
    text += f"\nPeak memory {state['peak_memory_GB']:.1f} GB.\n\n"
    rows = [[r.name, r.parameters, r.energy_mae, r.forces_mae, r.stress_mae] for r in found.stages]
    parity = found.parity
    stress = None if parity.stress is None else parity.stress.mae
    rows.append(["deployed file", found.model.parameters, parity.energy.mae, parity.forces.mae, stress])
    cells = [["-" if value is None else value for value in row] for row in rows]
    text += table(("model", "parameters", "E MAE (meV/atom)", "F MAE (meV/A)", "S MAE (meV/A^3)"), cells)
    text += f"\nHeld-out structures: {parity.frames}, mean |F| {parity.mean_force:.0f} meV/A.\n\n"
    runs = [("model", found.nve), ("teacher", found.teacher_nve)]
    nve = []
    for name, run in runs:
        if run is not None and run.drift is not None:
            drift = f"{run.drift.slope:+.4f} +- {run.drift.slope_error:.4f}"
            nve.append([name, run.atoms, run.steps, drift, f"{run.drift.fluctuation:.4f}"])
    text += table(("NVE", "atoms", "steps", "drift (meV/atom/ps)", "rms fluctuation (meV/atom)"), nve) + "\n"
    speeds = [
        [
            row.atoms,
            *(f"{row.atoms_per_second.get(n, float('nan')):.0f}" for n in ("teacher", "model")),
            row.ratio() or "-",
        ]
        for row in found.speed
    ]
    text += table(("atoms", "teacher (atoms/s)", "model (atoms/s)", "ratio"), speeds)
    report(text + f"\nVerdict: {found.verdict}.\n", options.output)


if __name__ == "__main__":
    main()
