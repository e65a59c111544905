"""What the compiled kernels are worth: energies and forces, and training steps, with and without them.

The same model, structure and process, alternately; medians.  SevenNet has its real weights (downloaded on
first use), MACE random ones.

    OMP_NUM_THREADS=1 python benchmarks/kernels.py
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from time import perf_counter

import torch
from ase.build import bulk
from common import header, parser, report, table
from torch import nn

from compactmlip.compress.apply import keep_species
from compactmlip.data.graph import build_graph, energy_and_derivatives
from compactmlip.families import load_model
from compactmlip.kernels import build as kernels
from compactmlip.models import build, cast, model_spec
from compactmlip.models.mace_architecture import MACEArchitecture, MACEReadout, upstream_layer
from compactmlip.models.radial import PolynomialEnvelope
from compactmlip.spec import ModelSpec

MACE_CHANNELS = {"128x0e": (128,), "128x0e+128x1o": (128, 128), "128x0e+128x1o+128x2e": (128, 128, 128)}


def mace(hidden: tuple[int, ...]) -> nn.Module:
    """Random weights in the architecture of MACE-MP-0, for two species."""
    first = upstream_layer(
        hidden[:1],
        width=hidden[0],
        out=hidden,
        lmax_edge=3,
        correlation=3,
        readout=MACEReadout(kind="linear"),
    )
    last = upstream_layer(
        hidden,
        width=hidden[0],
        out=hidden[:1],
        lmax_edge=3,
        correlation=3,
        readout=MACEReadout(kind="nonlinear", hidden=(16,)),
    )
    shape = MACEArchitecture(
        embedding=hidden[0], num_basis=10, envelope=PolynomialEnvelope(p=5), lmax_edge=3, layers=(first, last)
    )
    spec = ModelSpec(
        family="mace",
        species=("O", "Mg"),
        cutoff=6.0,
        num_message_passing_layers=2,
        architecture=shape.model_dump(mode="json"),
    )
    torch.manual_seed(0)
    model = build(spec)
    with torch.no_grad():
        for block in model.layers:  # type: ignore[union-attr]
            block.interaction.convolution.normalisation.fill_(1 / 60)
    return model


def times(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds of each, run in turn; the first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = perf_counter()
            run()
            found[name].append(perf_counter() - start)
    return {name: median(values[1:]) for name, values in found.items()}


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--repeats", type=int, default=5)
    options_parser.add_argument("--cells", type=int, default=2, help="MgO with 8 n^3 atoms")
    options = options_parser.parse_args()
    torch.set_num_threads(options.threads)
    if not kernels.load():
        raise SystemExit("there are no kernels to measure: see 'compactmlip build'")
    crystal = bulk("MgO", "rocksalt", a=4.21, cubic=True) * ((options.cells,) * 3)
    crystal.rattle(0.05, seed=0)
    models = {name: keep_species(load_model(name), ["Mg", "O"]) for name in ("7net-l3i5", "7net-0")}
    models |= {f"MACE {name}": mace(hidden) for name, hidden in MACE_CHANNELS.items()}
    rows: list[list[object]] = []
    for name, model in models.items():
        for dtype in (torch.float32, torch.float64):
            cast(model, dtype)
            graph = build_graph(crystal, model_spec(model), dtype)

            def evaluate(context: Callable[[], AbstractContextManager[object]], model=model, graph=graph):  # type: ignore[no-untyped-def]
                with context():
                    return energy_and_derivatives(model, graph).forces

            def train(context: Callable[[], AbstractContextManager[object]], model=model, graph=graph):  # type: ignore[no-untyped-def]
                with context():
                    forces = energy_and_derivatives(model, graph, create_graph=True).forces
                    forces.square().sum().backward(inputs=list(model.parameters()))
                model.zero_grad()

            found = times(
                {
                    "E+F, plain": lambda run=evaluate: run(kernels.without_kernels),
                    "E+F, kernels": lambda run=evaluate: run(nullcontext),
                    "training, plain": lambda run=train: run(kernels.without_kernels),
                    "training, kernels": lambda run=train: run(nullcontext),
                },
                options.repeats,
            )
            ours, plain = evaluate(nullcontext), evaluate(kernels.without_kernels)
            ms = [1e3 * t for t in found.values()]
            difference = float((ours - plain).abs().max() / plain.abs().max())
            kind = str(dtype).removeprefix("torch.")
            row = [name, kind, ms[0], ms[1], ms[0] / ms[1], ms[2], ms[3], ms[2] / ms[3], difference]
            rows.append(row)
            print(row, flush=True)
    text = header("Compiled kernels against plain PyTorch", "python benchmarks/kernels.py")
    text += f"\nMgO with {len(crystal)} atoms; milliseconds, medians of {options.repeats}.\n\n"
    columns = (
        "model",
        "precision",
        "E+F, plain",
        "E+F, kernels",
        "ratio",
        "training, plain",
        "training, kernels",
    )
    report(text + table((*columns, "ratio", "force difference"), rows), options.output)


if __name__ == "__main__":
    main()
