"""Native MACE, with compiled kernels, beside mace-torch: loading, energies and forces, training steps.

Models of released sizes (89 elements) with random weights, made and saved by mace-torch, in float32.  Times
of both are taken alternately in this one process; medians.  Needs mace-torch (`pip install '.[mace]'`).

    OMP_NUM_THREADS=1 python benchmarks/mace_upstream.py
"""

from __future__ import annotations

import os

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from ase.build import bulk, molecule
from common import header, parser, report, table
from torch import nn
from upstream import mace_batch, mace_model

from compactmlip.compress.apply import keep_species
from compactmlip.data.graph import build_graph, energy_and_derivatives
from compactmlip.families import load_model
from compactmlip.models import build, cast, model_spec, num_parameters

MODELS: dict[str, dict[str, Any]] = {
    "MP-0 small (128x0e)": {"hidden_irreps": "128x0e"},
    "MP-0 medium (128x0e+128x1o)": {"hidden_irreps": "128x0e+128x1o"},
    "128x0e+128x1o+128x2e": {"hidden_irreps": "128x0e+128x1o+128x2e"},
    "256x0e+256x1o": {"hidden_irreps": "256x0e+256x1o", "num_bessel": 8},
    "OMAT medium (density)": {"hidden_irreps": "128x0e+128x1o", "density": True},
}


def structures() -> dict[str, Atoms]:
    silicon = bulk("Si", "diamond", a=5.43, cubic=True) * (2, 2, 1)
    water = molecule("H2O")
    water.set_cell([3.1, 3.1, 3.1])
    water.pbc = True
    water = water * (2, 2, 2)
    for atoms in (silicon, water):
        atoms.rattle(0.05, seed=0)
    return {"Si": silicon, "H2O": water}


def medians(runs: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Seconds of each, run in turn; the first round warms up."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats + 1):
        for k, run in enumerate(runs):
            start = time.perf_counter()
            run()
            times[k].append(time.perf_counter() - start)
    return [statistics.median(t[1:]) for t in times]


def speed(upstream: Any, ours: nn.Module, atoms: Atoms, repeats: int) -> tuple[list[float], float]:
    """Seconds of E+F and of a training step, upstream and ours, and the largest difference of forces."""
    batch = mace_batch(upstream, atoms)
    small = keep_species(ours, atoms.get_chemical_symbols())
    graph = build_graph(atoms, model_spec(small), torch.float32)

    def train(model: nn.Module, forces: Callable[[], torch.Tensor]) -> None:
        model.zero_grad()
        forces().square().sum().backward()

    runs = (
        lambda: upstream(batch),
        lambda: energy_and_derivatives(small, graph),
        lambda: train(upstream, lambda: upstream(batch, training=True)["forces"]),
        lambda: train(small, lambda: energy_and_derivatives(small, graph, create_graph=True).forces),
    )
    theirs = upstream(batch)["forces"].detach()
    difference = (theirs - energy_and_derivatives(small, graph).forces).abs().max() / theirs.abs().max()
    return medians(runs, repeats), float(difference)


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--repeats", type=int, default=5)
    options = options_parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    loading, speeds = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in MODELS.items():
            path = Path(folder) / "random.model"
            made = medians([lambda s=settings: mace_model(**s)], 1)[0]
            torch.save(mace_model(**settings), path)
            load, ours_load = medians(
                [lambda p=path: torch.load(p, weights_only=False), lambda p=path: load_model(p)], 3
            )
            upstream, ours = torch.load(path, weights_only=False), cast(load_model(path), torch.float32)
            ours_made = medians([lambda m=ours: build(model_spec(m))], 1)[0]
            loading.append([name, num_parameters(ours), made, ours_made, load, ours_load])
            for label, atoms in structures().items():
                times, difference = speed(upstream, ours, atoms, options.repeats)
                rates = [len(atoms) / t for t in times]
                ratios = [times[0] / times[1], times[2] / times[3]]
                row = [
                    name,
                    f"{label} {len(atoms)}",
                    *rates[:2],
                    ratios[0],
                    *rates[2:],
                    ratios[1],
                    difference,
                ]
                speeds.append(row)
                print(row, flush=True)
    text = header("Native MACE with kernels beside mace-torch, float32", "python benchmarks/mace_upstream.py")
    text += "\nSeconds to build a model and to load it from a file.\n\n"
    columns = ("model", "parameters", "build, upstream", "build, ours", "load, upstream", "load, ours")
    text += table(columns, loading)
    text += (
        f"\nAtoms per second, medians of {options.repeats}; ours keeps the weights of the species at "
        "hand only, as "
        "any calculation does.  Last column: largest difference of forces over the largest force.\n\n"
    )
    columns = (
        "model",
        "atoms",
        "E+F, upstream",
        "E+F, ours",
        "ratio",
        "training, upstream",
        "training, ours",
    )
    text += table((*columns, "ratio", "force difference"), speeds)
    report(text, options.output)


if __name__ == "__main__":
    main()
