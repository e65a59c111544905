"""Threads beside one: energies and forces of deployed files, each thread count in a process of its own.

Processors of a shared machine are not equally fast, nor are they at all times, and one of them may be
slower while the others work.  So one-thread processes, pinned to a processor each, are measured alone and
all at once, in turn with one process that has as many threads.  The sum of the rates of the processes that
run at once is what the processors can do; threads cannot do better.

    python benchmarks/threads.py small.pt small.pt compact.pt --systems "Si 64" "Si 512" "MgO 216"
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from pathlib import Path

from common import header, parser, report, structure, table, write_structure
from process import Worker

COLUMNS = (
    "file",
    "structure",
    "1 thread, alone",
    "1 thread, all at once",
    "threads",
    "over one alone",
    "over one of those at once",
    "processors busy",
)


def rates(workers: list[Worker], atoms: int, seconds: float) -> tuple[float, float]:
    """Atoms per second of workers that calculate at once: sum; processors that they keep busy."""
    for worker in workers:
        worker.send("sustain", seconds=seconds)
    found = [worker.answer() for worker in workers]
    busy = sum(t["processor_seconds"] / t["seconds"] for t in found)
    return sum(atoms / t["seconds"] for t in found), busy


def measure(path: Path, system: str, processors: list[int], repeats: int, seconds: float) -> list[object]:
    """One row of the table: medians over rounds."""
    kind, count = system.split()
    atoms = structure(kind, int(count))
    script = [sys.executable, str(Path(__file__).with_name("ours.py"))]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "structure.npz"
        write_structure(file, atoms)
        threads = len(processors)
        workers = [Worker(script, 1) for _ in processors] + [Worker(script, threads)]
        try:
            places = [[k] for k in processors] + [processors]
            for worker, place in zip(workers, places, strict=True):
                worker.ask("pin", processors=place)  # before its threads start
                worker.ask("setup", model=str(path), structure=str(file), threads=len(place), memory=0)
                worker.ask("run"), worker.ask("run")
            *single, several = workers
            rounds = []
            for _ in range(repeats):
                alone = [rates([worker], len(atoms), seconds)[0] for worker in single]
                together, busy = rates([several], len(atoms), seconds)
                at_once = rates(single, len(atoms), seconds)[0] / threads
                rounds.append((statistics.mean(alone), at_once, together, busy))
        finally:
            for worker in workers:
                worker.close()
    alone_, at_once_, together_, busy_ = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratios = [statistics.median(r[2] / r[k] for r in rounds) for k in (0, 1)]
    cells = [f"{ratio:.2f}" for ratio in (*ratios, busy_)]
    return [path.name, f"{kind} {len(atoms)}", alone_, at_once_, together_, *cells]


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.set_defaults(threads=2)
    options_parser.add_argument("models", nargs="+", type=Path, help="deployed files")
    options_parser.add_argument("--systems", nargs="+", default=["MgO 216"], help="for each file, or for all")
    options_parser.add_argument("--repeats", type=int, default=7)
    options_parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    options = options_parser.parse_args()
    processors = sorted(os.sched_getaffinity(0))[: options.threads]
    if len(processors) < options.threads:
        raise SystemExit(f"this process may use {len(processors)} processors only")
    os.environ.setdefault("GOMP_SPINCOUNT", "300000")  # what libgomp itself takes where processors are free
    text = header("Threads", "python benchmarks/threads.py")
    systems = options.systems * (len(options.models) if len(options.systems) == 1 else 1)
    rows = [
        measure(path, system, processors, options.repeats, options.seconds)
        for path, system in zip(options.models, systems, strict=True)
    ]
    text += (
        f"\nAtoms per second of energies and forces, medians of {options.repeats} rounds of "
        f"{options.seconds:g} s each. '1 thread, alone': mean over the {options.threads} processors, one "
        f"process on one of them at a time; 'all at once': mean of {options.threads} such processes that run "
        f"together; 'threads': one process with {options.threads}. The ratios are medians of those of each "
        f"round; the last but one is {options.threads}.00 if threads lose nothing.\n\n"
    )
    report(text + table(COLUMNS, rows), options.output)


if __name__ == "__main__":
    main()
