r"""Deployed files on an NVIDIA GPU: plain torch, cuequivariance, each also with CUDA graphs, and upstream.

Energies and forces of MgO; neighbour lists are made before.  SevenNet has its own weights; MACE has random
ones in the released architectures, made by mace-torch with --mace-python and natively without.  Calculations
take turns, and medians are reported.  With --device cpu it shows that the script works, and no useful times.

    python benchmarks/gpu.py --mace-python ENV/bin/python --sevenn-python ENV/bin/python \
        --output benchmarks/results/gpu.md
    python benchmarks/gpu.py --device cpu --atoms 8 --models "MACE small" --repeats 1
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from ase import Atoms
from common import header, parser, report, structure, table, write_structure
from engine_cases import MODELS, Files
from kernels import MACE_CHANNELS, mace
from process import Worker, WorkerFailed
from torch import Tensor, nn

from compactmlip.compress.apply import keep_species
from compactmlip.data.graph import build_graph
from compactmlip.deploy.compile import compile_model
from compactmlip.deploy.engine import load_engine
from compactmlip.errors import CompactMLIPError
from compactmlip.families import load_model

ATOMS = (64, 216, 1000, 8000)
Kind = Literal["torch", "cueq"]
BACKENDS: tuple[Kind, ...] = ("torch", "cueq")
DTYPES = ("float64", "float32")
COLUMNS = ("atoms", "calculation", "precision", "ms", "atoms/s", "upstream / this", "force difference", "GB")


def arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--device", default="cuda")
    made.add_argument("--atoms", nargs="+", type=int, default=list(ATOMS))
    made.add_argument(
        "--models", nargs="+", default=["MACE small", "MACE medium", "7net-0"], choices=list(MODELS)
    )
    made.add_argument("--repeats", type=int, default=20)
    made.add_argument("--mace-python", help="interpreter of an environment with mace-torch")
    made.add_argument("--sevenn-python", help="interpreter of an environment with sevenn")
    options = made.parse_args()
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "There is no NVIDIA GPU that this torch can use, so there is nothing to measure. "
            "--device cpu --atoms 8 --repeats 1 checks the script."
        )
    return options


def native(name: str, files: Files) -> nn.Module:
    """The model for Mg and O; of upstream where that is there."""
    model = MODELS[name]
    if model.package == "mace" and files.pythons["mace"] is None:
        return mace(MACE_CHANNELS[model.settings["hidden_irreps"]])
    return keep_species(load_model(files.upstream(name), progress=False), ["Mg", "O"])


class Calculations:
    """Calculations of one model on one structure."""

    def __init__(self, options: argparse.Namespace, atoms: Atoms) -> None:
        self.options, self.atoms = options, atoms
        self.device = torch.device(options.device)
        self.runs: dict[tuple[str, str], Callable[[], float]] = {}
        self.failed: dict[tuple[str, str], str] = {}
        self.forces: dict[tuple[str, str], Tensor] = {}
        self.memory: dict[tuple[str, str], float] = {}

    def add_ours(self, backend: Kind, dtype: str, path: Path, *, cuda_graph: bool) -> None:
        """A deployed file, warmed up; the reason if it cannot run."""
        key = f"{backend}{', CUDA graph' if cuda_graph else ''}", dtype
        on_gpu = self.device.type == "cuda"
        try:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(self.device)
                before = torch.cuda.memory_allocated(self.device)
            engine = load_engine(path, self.device, cuda_graph=cuda_graph)
            graph = build_graph(self.atoms, engine.spec, engine.dtype).to(device=engine.device)
            for _ in range(2):
                self.forces[key] = engine.evaluate(graph).forces.double().cpu()
            if on_gpu:
                self.memory[key] = (torch.cuda.max_memory_allocated(self.device) - before) / 1e9
        except (CompactMLIPError, RuntimeError) as error:
            self.failed[key] = str(error).strip().splitlines()[0]
            return

        def run() -> float:
            start = perf_counter()
            engine.evaluate(graph)
            if on_gpu:
                torch.cuda.synchronize(self.device)
            return perf_counter() - start

        self.runs[key] = run

    def add_upstream(self, worker: Worker, dtype: str, **setup: Any) -> None:
        """The same model in its own package and process."""
        key = "upstream", dtype
        try:
            worker.ask(
                "setup",
                dtype=dtype,
                device=self.options.device,
                threads=self.options.threads,
                memory=0,
                **setup,
            )
            for _ in range(2):
                worker.ask("run")
        except WorkerFailed as failed:
            self.failed[key] = str(failed)
            return
        self.runs[key] = lambda: float(worker.ask("run")["seconds"])

    def rows(self) -> list[list[object]]:
        """A row for each calculation."""
        times: dict[tuple[str, str], list[float]] = {key: [] for key in self.runs}
        for _ in range(self.options.repeats):
            for key, run in self.runs.items():
                times[key].append(run())
        seconds = {key: statistics.median(values) for key, values in times.items()}
        reference, count = self.forces.get(("torch", "float64")), len(self.atoms)
        rows: list[list[object]] = []
        for key, median in seconds.items():
            ratio: object = seconds["upstream", key[1]] / median if ("upstream", key[1]) in seconds else ""
            difference: object = ""
            if reference is not None and key in self.forces:
                difference = float((self.forces[key] - reference).abs().max())
            rows.append(
                [count, *key, 1e3 * median, count / median, ratio, difference, self.memory.get(key, "")]
            )
        rows += [[count, *key, reason, "", "", "", ""] for key, reason in self.failed.items()]
        return rows


def measure(name: str, options: argparse.Namespace, files: Files, folder: Path) -> list[list[object]]:
    """All rows of one model."""
    model, package = native(name, files), MODELS[name].package
    paths: dict[tuple[Kind, str], Path] = {}
    for backend in BACKENDS:
        for dtype in DTYPES:
            path = paths[backend, dtype] = folder / f"{name}-{backend}-{dtype}.pt".replace(" ", "-")
            compile_model(model, path, dtype=dtype, backend=backend)  # type: ignore[arg-type]
    rows = []
    for count in options.atoms:
        atoms = structure("MgO", count)
        case = Calculations(options, atoms)
        for (backend, dtype), path in paths.items():
            case.add_ours(backend, dtype, path, cuda_graph=False)
            if case.device.type == "cuda":
                case.add_ours(backend, dtype, path, cuda_graph=True)
        workers = []
        if files.pythons[package] is not None:
            write_structure(folder / "structure.npz", atoms)
            what = {
                "package": package,
                "model": files.upstream(name),
                "structure": str(folder / "structure.npz"),
            }
            for dtype in DTYPES:
                workers.append(Worker(files.upstream_command(package), options.threads))
                case.add_upstream(workers[-1], dtype, **what)
        try:
            rows += case.rows()
        finally:
            for worker in workers:
                worker.close()
        print(table(COLUMNS, rows[-(len(case.runs) + len(case.failed)) :]), flush=True)
    return rows


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    place = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else "processor: the times say nothing"
    )
    text = header("Deployed files on a GPU", "python benchmarks/gpu.py")
    text += f"\nDevice: {place}. MgO; energies and forces, medians of {options.repeats}. Force differences "
    text += (
        "(eV/Angstrom) are to the float64 file of plain torch; GB are the peak of the GPU's memory beyond "
    )
    text += "what was in use before.\n"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = Files(folder, {"mace": options.mace_python, "sevenn": options.sevenn_python})
        for model in options.models:
            text += f"\n## {model}\n\n{table(COLUMNS, measure(model, options, files, folder))}"
    report(text, options.output)


if __name__ == "__main__":
    main()
