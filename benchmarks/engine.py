r"""The engine beside mace-torch and sevenn: energies and forces on one processor, time and memory.

Every calculation has a process of its own, so that its peak memory is its own; upstream's run in other
environments.  The processes take turns, and a ratio is one of medians of the same run.  Upstream has the 89
elements of its models, as in its calculators; ours is reduced to the species of the structure, as
``convert --species`` does, except in the rows "all species".  Finished pairs of model and structure are kept
in the file of --cache: an interrupted run continues, and the tables are made of those that are asked for.

    python benchmarks/engine.py --mace-python ENV/bin/python --sevenn-python ENV/bin/python \
        --cache engine.jsonl --threads 1 2 --max-seconds 120 --output benchmarks/results/engine.md
    python benchmarks/engine.py ... --cache short.jsonl --models "MACE small" --systems "Si 8" --repeats 3
    python benchmarks/engine.py ... --cache own.jsonl --ours-only --output benchmarks/results/engine_forms.md

Where a calculation of upstream fills the memory, ``--variants upstream64 kernels64 kernels32`` leaves its
float32 out, which otherwise keeps its own while it waits for its turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from common import describe_load, report, structure, write_structure
from engine_cases import MODELS, SYSTEMS, VARIANTS, Files, Form
from engine_tables import own_forms, tables
from process import GB, Worker, WorkerFailed

WARM_UP_SECONDS = 10.0
"""A calculation that takes longer is not warmed up a second time."""

UPSTREAM_DTYPES = {"upstream64": "float64", "upstream32": "float32"}


def arguments() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--mace-python", help="interpreter of an environment with mace-torch")
    made.add_argument("--sevenn-python", help="interpreter of an environment with sevenn")
    made.add_argument("--cache", type=Path, default=Path("engine.jsonl"), help="results so far (JSON lines)")
    made.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="MODEL")
    made.add_argument("--systems", nargs="+", default=list(SYSTEMS), metavar="'KIND ATOMS'")
    every = (*UPSTREAM_DTYPES, *VARIANTS)
    made.add_argument("--variants", nargs="+", default=list(every), choices=every)
    made.add_argument("--ours-only", action="store_true", help="a table of our own forms, without upstream")
    made.add_argument("--threads", nargs="+", type=int, default=[1])
    made.add_argument("--repeats", type=int, default=7)
    made.add_argument("--max-seconds", type=float, default=60.0, help="longest call that is measured")
    made.add_argument("--max-memory", type=float, default=14.0, help="GB that a process may use")
    made.add_argument("--output", type=Path, help="write the tables here as well (Markdown)")
    made.add_argument("--tables-only", action="store_true", help="measure nothing, show what there is")
    return made.parse_args()


def measure(
    name: str, system: str, threads: int, files: Files, options: argparse.Namespace
) -> dict[str, Any]:
    """All calculations of one model on one structure, as a record for the cache."""
    kind, count = system.split()
    atoms = structure(kind, int(count))
    limits = {"threads": threads, "memory": options.max_memory * GB}
    run = _Run(options.repeats, options.max_seconds)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "structure.npz"
        write_structure(path, atoms)
        model = MODELS[name]
        upstream = {"package": model.package, "model": files.upstream(name), "structure": str(path)}
        command = files.upstream_command(model.package)
        try:
            for key, dtype in UPSTREAM_DTYPES.items():
                if key not in options.variants or options.ours_only:
                    continue
                run.start(("", key), lambda: Worker(command, threads), dtype=dtype, **upstream, **limits)
            for form in model.forms:
                _start_ours(run, form, files, (name, set(atoms.symbols)), path, limits, options.variants)
            run.repeat()
            run.finish(Path(folder))
        finally:
            run.close()
    return {
        "model": name,
        "system": system,
        "threads": threads,
        "repeats": options.repeats,
        "atoms": len(atoms),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load": describe_load(),
        "calculations": [{"form": key[0], "variant": key[1], **found} for key, found in run.found.items()],
    }


def _start_ours(
    run: _Run,
    form: Form,
    files: Files,
    what: tuple[str, set[str]],
    path: Path,
    limits: dict[str, Any],
    variants: list[str],
) -> None:
    ours = [variant for variant in VARIANTS if variant in variants]
    for compiled in files.ours(what[0], form, what[1], ours):
        key = (form.label, compiled.variant)
        start: Callable[[], Worker] = lambda compiled=compiled: compiled.worker(limits["threads"])  # noqa: E731
        run.start(key, start, model=str(compiled.path), structure=str(path), **limits)


class _Run:
    """Calculations that take turns."""

    def __init__(self, repeats: int, max_seconds: float) -> None:
        self.repeats, self.max_seconds = repeats, max_seconds
        self.workers: dict[tuple[str, str], Worker] = {}
        self.found: dict[tuple[str, str], dict[str, Any]] = {}

    def start(self, key: tuple[str, str], make: Callable[[], Worker], **setup: Any) -> None:
        """Start a worker and warm it up; note why if it cannot keep up."""
        self.found[key] = {}
        try:
            worker = self.workers[key] = make()
            self.found[key] |= worker.ask("setup", **setup)
            first = worker.ask("run", timeout=2 * self.max_seconds)["seconds"]
            if first < WARM_UP_SECONDS:
                first = worker.ask("run", timeout=2 * self.max_seconds)["seconds"]
            if first > self.max_seconds:
                worker.close()
                raise WorkerFailed("too slow")
        except WorkerFailed as failed:
            self._drop(key, failed)

    def repeat(self) -> None:
        """Let every worker calculate in turn."""
        times: dict[tuple[str, str], list[dict[str, float]]] = {key: [] for key in self.workers}
        for _ in range(self.repeats):
            for key in list(self.workers):
                self._ask(key, "run", times[key], timeout=3 * self.max_seconds)
        for key in self.workers:
            self.found[key] |= {
                "seconds": statistics.median(t["seconds"] for t in times[key]),
                "all_seconds": [t["seconds"] for t in times[key]],
                "all_processor_seconds": [t["processor_seconds"] for t in times[key]],
            }

    def finish(self, folder: Path) -> None:
        """Peak memory, forces against those of upstream in float64, and whole steps of the calculator."""
        reference: np.ndarray | None = None
        for k, key in enumerate(list(self.workers)):
            path = folder / f"forces-{k}.npy"
            self._ask(key, "finish", forces=str(path))
            if key not in self.workers:
                continue
            forces = np.load(path)
            if key[1] == "upstream64":
                reference = forces
            elif reference is not None:
                difference = float(np.abs(forces - reference).max())
                self.found[key]["difference"] = difference
                self.found[key]["relative_difference"] = difference / float(np.abs(reference).max())
            if key[1] == "kernels32":
                steps: list[dict[str, float]] = []
                for _ in range(2 + self.repeats):
                    self._ask(key, "step", steps, timeout=3 * self.max_seconds)
                if key in self.workers:
                    self.found[key]["step_seconds"] = statistics.median(t["seconds"] for t in steps[2:])

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()

    def _ask(
        self, key: tuple[str, str], do: str, into: list[dict[str, float]] | None = None, **options: Any
    ) -> None:
        if key not in self.workers:
            return
        try:
            answer = self.workers[key].ask(do, **options)
        except WorkerFailed as failed:
            self._drop(key, failed)
            return
        if into is None:
            self.found[key] |= answer
        else:
            into.append(answer)

    def _drop(self, key: tuple[str, str], failed: WorkerFailed) -> None:
        self.found[key] = {"failed": str(failed)}
        worker = self.workers.pop(key, None)
        if worker is not None:
            worker.close()
        print(f"{key}: {failed}", file=sys.stderr, flush=True)


def read(cache: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Last record of each model, structure and number of threads."""
    records = [json.loads(line) for line in cache.read_text().splitlines()] if cache.is_file() else []
    return {(r["model"], r["system"], r["threads"]): r for r in records}


def main() -> None:
    options = arguments()
    folder = options.cache.with_suffix(".files")
    files = Files(folder, {"mace": options.mace_python, "sevenn": options.sevenn_python})
    found = read(options.cache)
    wanted = [(m, s, t) for m in options.models for s in options.systems for t in options.threads]
    for name, system, threads in wanted if not options.tables_only else []:
        if (name, system, threads) in found:
            continue
        print(f"{name}, {system}, {threads} thread(s)", file=sys.stderr, flush=True)
        record = measure(name, system, threads, files, options)
        found[name, system, threads] = record
        with options.cache.open("a") as cache:
            cache.write(json.dumps(record) + "\n")
    chosen = [found[key] for key in wanted if key in found]
    if options.ours_only:
        report(own_forms(chosen), options.output)
    else:
        report(tables(chosen, options.max_memory, options.max_seconds), options.output)


if __name__ == "__main__":
    main()
