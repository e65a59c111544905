"""Two threads beside one: energies and forces of deployed files, in turn in one process.

    python benchmarks/threads.py small.pt small.pt compact.pt --systems "Si 64" "Si 512" "MgO 216"

Free cores are needed: the last columns say how much of the processors this process got.
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path

import torch
from common import Evaluation, header, parser, report, structure, table
from process import timed


def measure(path: Path, evaluation: Evaluation, system: str, threads: int, repeats: int) -> list[object]:
    """One row: atoms per second with one thread and with several, in turn."""
    kind, count = system.split()
    atoms = structure(kind, int(count))
    graph = evaluation.graph(atoms)
    times: dict[int, list[dict[str, float]]] = {1: [], threads: []}
    for turn in range(repeats + 1):
        for number, found in times.items():
            torch.set_num_threads(number)
            evaluation(graph)  # threads start, and caches belong to this number
            _, seconds = timed(lambda: evaluation(graph))
            if turn:
                found.append(seconds)
    one, several = (statistics.median(t["seconds"] for t in found) for found in times.values())
    shares = [
        statistics.median(t["processor_seconds"] / t["seconds"] for t in found) for found in times.values()
    ]
    return [
        path.name,
        f"{kind} {len(atoms)}",
        len(atoms) / one,
        len(atoms) / several,
        f"{one / several:.2f}",
        *(f"{share:.2f}" for share in shares),
    ]


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.set_defaults(threads=2)
    options_parser.add_argument("models", nargs="+", type=Path, help="deployed files")
    options_parser.add_argument("--systems", nargs="+", default=["MgO 216"], help="for each file, or for all")
    options_parser.add_argument("--repeats", type=int, default=7)
    options = options_parser.parse_args()
    if (os.cpu_count() or 1) < options.threads:
        raise SystemExit(f"this machine has {os.cpu_count()} processors only")
    text = header("Threads", "python benchmarks/threads.py")
    text += (
        f"\nAtoms per second of energies and forces, medians of {options.repeats}, one thread and "
        f"{options.threads} in turn; processors: processor time over wall time.\n\n"
    )
    systems = options.systems * (len(options.models) if len(options.systems) == 1 else 1)
    rows = [
        measure(path, Evaluation(path), system, options.threads, options.repeats)
        for path, system in zip(options.models, systems, strict=True)
    ]
    columns = ("file", "structure", "1 thread", f"{options.threads} threads", "ratio")
    shares = ("processors, 1 thread", f"processors, {options.threads} threads")
    report(text + table((*columns, *shares), rows), options.output)


if __name__ == "__main__":
    main()
