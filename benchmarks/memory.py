"""Peak memory against the number of atoms, MACE-MP-0 small (random weights) in float32 with kernels.

Each size has a process of its own: the neighbour list, then energies, forces and stress on its graph (the
peaks of both apart), then a whole calculation by the ASE calculator.  The slopes are those between the
largest two sizes.

    python benchmarks/memory.py --mace-python ENV/bin/python --atoms 1000 8000 32000 100000
    python benchmarks/memory.py --model small.pt --systems Si --atoms 1000 2000
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Evaluation, header, parser, report, structure, table
from process import GB, Worker, WorkerFailed, forget_peak_memory, peak_memory, serve, timed

from compactmlip import CompactMLIPCalculator
from compactmlip.compress.apply import keep_species
from compactmlip.deploy.compile import compile_model
from compactmlip.families import load_model

MODEL = "MACE small"
SPECIES = {"Si": ["Si"], "water": ["H", "O"], "MgO": ["Mg", "O"]}


def measure(model: str, system: str, atoms: int, threads: int) -> dict[str, Any]:
    """Memory in bytes and seconds of the parts of one calculation; runs in the worker."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    evaluation = Evaluation(Path(model))
    evaluation(evaluation.graph(structure(system, 8)))  # loads what the first call loads
    crystal = structure(system, atoms)
    forget_peak_memory()
    start = peak_memory()
    graph, listing = timed(lambda: evaluation.graph(crystal))
    listed = peak_memory()
    forget_peak_memory()
    edges = len(graph.centers)
    _, evaluating = timed(partial(evaluation, graph))
    evaluated = peak_memory()
    del graph
    forget_peak_memory()
    crystal.calc = CompactMLIPCalculator(model)
    _, calculating = timed(crystal.get_forces)
    return {
        "atoms": len(crystal),
        "edges": edges,
        "start": start,
        "list": listed,
        "evaluation": evaluated,
        "calculator": peak_memory(),
        "list_seconds": listing["seconds"],
        "evaluation_seconds": evaluating["seconds"],
        "calculator_seconds": calculating["seconds"],
    }


def deployed(folder: Path, mace_python: str | None, system: str) -> Path:
    """MACE small for the species of a system."""
    from engine_cases import Files

    source = Files(folder, {"mace": mace_python}).upstream(MODEL)
    path = folder / f"small-{system}.pt"
    compile_model(keep_species(load_model(source), SPECIES[system]), path, dtype="float32", backend="kernels")
    return path


def sized(model: Path, system: str, atoms: int, threads: int, timeout: float) -> dict[str, Any]:
    with Worker([sys.executable, __file__, "--worker"], threads) as worker:
        return worker.ask(
            "measure", timeout=timeout, model=str(model), system=system, atoms=atoms, threads=threads
        )


def slopes(system: str, found: Sequence[dict[str, Any]]) -> list[list[object]]:
    """Bytes per atom and per edge from the last two sizes."""
    few, many = found[-2:]
    rows: list[list[object]] = []
    for key, name in (
        ("list", "neighbour list"),
        ("evaluation", "energies and forces"),
        ("calculator", "calculator"),
    ):
        grown = many[key] - few[key]
        atoms, edges = many["atoms"] - few["atoms"], many["edges"] - few["edges"]
        rows.append([system, name, f"{grown / atoms:,.0f}", f"{grown / edges:,.1f}"])
    return rows


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--mace-python", help="interpreter of an environment with mace-torch")
    options_parser.add_argument("--model", type=Path, help="measure this deployed file instead")
    options_parser.add_argument("--systems", nargs="+", default=["Si", "water"], choices=list(SPECIES))
    options_parser.add_argument("--atoms", nargs="+", type=int, default=[1000, 8000, 32000, 100000])
    options_parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for one size")
    options = options_parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[list[object]] = []
    slope_rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for system in options.systems:
            model = options.model or deployed(Path(folder), options.mace_python, system)
            found = []
            for atoms in sorted(options.atoms):
                try:
                    one = sized(model.absolute(), system, atoms, options.threads, options.timeout)
                except WorkerFailed as failed:
                    rows.append([system, atoms, str(failed), *["–"] * 7])
                    break
                found.append(one)
                memory = [one[key] / GB for key in ("start", "list", "evaluation", "calculator")]
                seconds = [one[f"{key}_seconds"] for key in ("list", "evaluation", "calculator")]
                rows.append([system, one["atoms"], one["edges"], *memory, *seconds])
                print(rows[-1], flush=True)
            if len(found) > 1:
                slope_rows += slopes(system, found)
    what = str(options.model) if options.model else f"{MODEL}, species reduced, float32, kernels"
    text = header("Memory against the number of atoms", "python benchmarks/memory.py")
    text += f"\n{what}; peak memory of the process in GB while each part runs, and seconds.\n\n"
    columns = ("system", "atoms", "edges", "before", "neighbour list", "E+F", "calculator")
    text += table((*columns, "neighbour list (s)", "E+F (s)", "calculator, first call (s)"), rows)
    text += "\nGrowth between the two largest sizes.\n\n"
    text += table(("system", "part", "bytes per atom", "bytes per edge"), slope_rows)
    report(text, options.output)


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        serve({"measure": measure})
    else:
        main()
