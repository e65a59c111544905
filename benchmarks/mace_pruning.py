"""Prune a trained two-layer MACE, then retrain it; beside it the same small model from scratch.

Cuts orders (L2 -> L1, L2 -> L0), channels (32 -> 16) and depth (2 -> 1 layers) of a MACE model of
acetylacetone, and measures errors against DFT on the 300 K and 600 K test sets: as cut, compensated, and
after training both the compensated model and one with random weights for the same processor time.  Then the
ranking of channels: random, magnitude, activation, Taylor, and Taylor with compensation, for several
calibration sets.  Then shares of the time and of the data: does pruning spare them?

The model (mace-torch's) and the BOTNet acetylacetone data set are not part of this repository.

    python benchmarks/mace_pruning.py MODEL DATA --work DIR --part cuts  # --only NAME: run several at once
    python benchmarks/mace_pruning.py MODEL DATA --work DIR --part ranking
    python benchmarks/mace_pruning.py MODEL DATA --work DIR --part shares  # --only NAME as well
    python benchmarks/mace_pruning.py MODEL DATA --work DIR --part report --output benchmarks/results/FILE.md
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from ase import Atoms
from common import from_random, header, parser, report, table
from torch import nn

from compactmlip.compress.compress import compress
from compactmlip.compress.reshape import cut_layers
from compactmlip.data.graph import GraphBatch, build_graph
from compactmlip.data.read import read_labelled
from compactmlip.families import load_model
from compactmlip.models import cast, mace_stages, model_spec, num_parameters
from compactmlip.models.reshape import LastReadout
from compactmlip.models.stages import Stage
from compactmlip.train.dataset import Dataset
from compactmlip.train.distil import DistilOptions, distil
from compactmlip.train.metrics import dataset_residuals

CUTS: dict[str, dict[str, Any]] = {
    "L2 to L1": {"target": "32x0+32x1"},
    "L2 to L0": {"target": "32x0"},
    "C32 to C16": {"target": "16x0+16x1+16x2"},
    "2 to 1 layers": {"target": None, "layers": 1},
}
RANKINGS = {
    "random": ("random", False),
    "magnitude": ("magnitude", False),
    "activation": ("activation", False),
    "Taylor": ("taylor", False),
    "Taylor + compensation": ("taylor", True),
}
STAGE_CUTS = ("L2 to L0", "C32 to C16")
STAGES = ("", "up", "down", "species_map", "contraction", "linear", "readout")
"""Refits of these stages are left out in turn; the first leaves out none."""
RANKING_EVERY = 5
"""The ranking is tested on every fifth frame."""
SHARES = (0.1, 0.25, 0.5, 1.0)
"""Of the time with all frames, and of the frames with all the time."""
SHARES_CUTS = ("C32 to C16", "L2 to L1", "L2 to L0")
CALIBRATION = 100
"""Calibration frames of the cuts (1,500 atoms), without labels."""


class Bench:
    """Models, data and the folder of partial results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work = options, Path(options.work)
        self.work.mkdir(parents=True, exist_ok=True)

    @cached_property
    def teacher(self) -> nn.Module:
        return cast(load_model(self.options.model), torch.float32)

    def frames(self, name: str, every: int = 1) -> list[Atoms]:
        return read_labelled(Path(self.options.data) / f"{name}.xyz")[::every]

    @cached_property
    def train(self) -> list[Atoms]:
        """The frames that the teacher was trained on; the last 50 of the file validate."""
        return self.frames("train_300K")[:450]

    @cache  # noqa: B019
    def tests(self, every: int) -> dict[str, Dataset]:
        spec = model_spec(self.teacher)
        return {
            name: Dataset.from_frames(self.frames(f"test_MD_{name}", every), spec, torch.float32, name)
            for name in ("300K", "600K")
        }

    def graphs(self, chosen: Sequence[int]) -> list[GraphBatch]:
        spec = model_spec(self.teacher)
        return [build_graph(self.train[k], spec, torch.float32) for k in chosen]

    def calibration(self, seed: int = 0) -> list[GraphBatch]:
        """Random training frames, without labels."""
        return self.graphs(np.random.default_rng(seed).permutation(450)[:CALIBRATION])

    def errors(self, model: nn.Module, every: int = 1) -> dict[str, float]:
        """RMS errors against DFT: energy of the molecule (meV), force components (meV/A)."""
        found = {}
        for name, data in self.tests(every).items():
            residuals = dataset_residuals(model, data)
            atoms = len(self.train[0])
            found[f"E {name}"] = 1e3 * atoms * float(residuals.energies.square().mean().sqrt())
            found[f"F {name}"] = 1e3 * float(residuals.forces.double().square().mean().sqrt())
        return found

    def trained(
        self, model: nn.Module, name: str, minutes: float, lr: float, every: int = 1, share: float = 1.0
    ) -> dict[str, float]:
        """Errors after training on DFT labels for a time that the processor works on it."""
        settings = DistilOptions(
            max_epochs=None,
            max_minutes=minutes,
            lr=lr,
            batch_atoms=75,
            stress_weight=0.0,
            energy_weight=self.options.energy_weight,
            energy_delta=0.001,
        )
        valid = self.frames("train_300K")[450:]
        folder = self.work / "training" / name.replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        clock = time.process_time
        order = np.random.default_rng(1).permutation(len(self.train))
        chosen = [self.train[k] for k in sorted(order[: round(share * len(self.train))])]
        result = distil(model, chosen, valid, settings, folder, False, clock=clock)
        return {"epochs": result.history[-1]["epoch"], **self.errors(result.model, every)}

    def once(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
        """Run unless the result is there already."""
        file = self.work / f"{name.replace(' ', '_')}.json"
        if file.exists():
            return
        print(name, file=sys.stderr, flush=True)
        result = run()
        file.write_text(json.dumps(result))
        print(name, result, file=sys.stderr, flush=True)

    def result(self, name: str) -> dict[str, Any]:
        file = self.work / f"{name.replace(' ', '_')}.json"
        return dict(json.loads(file.read_text())) if file.exists() else {}


def cuts(bench: Bench) -> None:
    """Cut, compensate, retrain, and train from scratch."""
    options = bench.options
    bench.once(
        "teacher", lambda: {"parameters": num_parameters(bench.teacher), **bench.errors(bench.teacher)}
    )
    for name, settings in CUTS.items():
        if options.only and options.only != name:
            continue
        graphs = bench.calibration()
        start = time.process_time()
        made = compress(bench.teacher, graphs, with_compensation=True, **settings)
        seconds = time.process_time() - start
        plain = made.sliced
        if settings.get("layers"):
            plain = compress(bench.teacher, graphs[:0], **settings).sliced
        first = {"parameters": num_parameters(made.model), "seconds": seconds}
        bench.once(f"{name} cut", lambda m=plain, f=first: {**f, **bench.errors(m)})
        bench.once(f"{name} compensated", lambda m=made.model, f=first: {**f, **bench.errors(m)})
        for kind, lr in (("retrained", options.lr), ("scratch", options.lr_scratch)):
            start_model = made.model if kind == "retrained" else from_random(made.model, 0)
            label = f"{name} {kind}"
            bench.once(label, lambda m=start_model, n=label, lr=lr: bench.trained(m, n, options.minutes, lr))


def shares(bench: Bench) -> None:
    """Shares of the time, and of the frames, for pruned models and random weights."""
    options = bench.options
    for name in SHARES_CUTS:
        if options.only and options.only != name:
            continue
        made = compress(bench.teacher, bench.calibration(), **CUTS[name]).model
        starts = {"retrained": (made, options.lr), "scratch": (from_random(made, 0), options.lr_scratch)}
        for what, share, (kind, (start, lr)) in product(("time", "data"), options.shares, starts.items()):
            if what == "data" and (share == 1.0 or name != SHARES_CUTS[0]):
                continue
            label = f"{name} {kind} {share:.0%} {what}"
            minutes, frames = (options.minutes * share, 1.0) if what == "time" else (options.minutes, share)

            def run(
                m: nn.Module = start, n: str = label, t: float = minutes, r: float = lr, f: float = frames
            ) -> dict[str, float]:
                return bench.trained(m, n, t, r, share=f)

            bench.once(label, run)


def depth(bench: Bench) -> None:
    """One layer instead of two, with each kind of last readout, before and after training."""
    for kind in get_args(LastReadout):
        made = cut_layers(bench.teacher, 1, graphs=bench.calibration(), readout=kind)
        label = f"depth {kind}"

        def run(model: nn.Module = made, label: str = label) -> dict[str, Any]:
            before = {f"{k} before": v for k, v in bench.errors(model).items()}
            found = bench.trained(model, label, bench.options.minutes, bench.options.lr)
            return {"parameters": num_parameters(model), **before, **found}

        bench.once(label, run)


def ranking(bench: Bench) -> None:
    """Errors of C32 to C16 for each criterion and calibration set, before and after a short training."""
    for seed in range(bench.options.seeds):
        graphs = bench.calibration(100 + seed)
        for name, (criterion, refit) in RANKINGS.items():
            label = f"ranking {name} {seed}"
            made = None
            if not bench.result(label):
                made = compress(
                    bench.teacher,
                    graphs,
                    CUTS["C32 to C16"]["target"],
                    criterion=criterion,
                    with_compensation=refit,
                    seed=seed,
                ).model
                model = made

                def run(model: nn.Module = model, label: str = label) -> dict[str, Any]:
                    before = {f"{k} before": v for k, v in bench.errors(model, RANKING_EVERY).items()}
                    return before | bench.trained(
                        model, label, bench.options.ranking_minutes, 5e-3, RANKING_EVERY
                    )

                bench.once(label, run)


def stages(bench: Bench) -> None:
    """Errors after refits that leave out one kind of stage each."""
    everything = mace_stages.linear_stages
    graphs = bench.calibration()
    for cut in STAGE_CUTS:
        for left_out in STAGES:

            def some(model: nn.Module, left_out: str = left_out) -> Iterator[Stage[Any]]:
                for stage in everything(model):
                    kept = not (left_out and stage.name.endswith(left_out))
                    yield stage if kept else replace(stage, fits=())

            mace_stages.linear_stages = some  # type: ignore[assignment]

            def run(cut: str = cut) -> dict[str, Any]:
                made = compress(bench.teacher, graphs, **CUTS[cut])
                assert made.compensation is not None
                return {"damping": made.compensation.damping, **bench.errors(made.model)}

            bench.once(f"stages {cut} {left_out}", run)
    mace_stages.linear_stages = everything


KEYS = ("E 300K", "F 300K", "E 600K", "F 600K")


def shown(errors: dict[str, Any]) -> list[str]:
    """Errors with three digits and no exponents."""
    return [f"{errors[k]:,.0f}" if errors[k] >= 100 else f"{errors[k]:.3g}" for k in KEYS]


def write_report(bench: Bench) -> None:
    """Print both tables."""
    options = bench.options
    command = f"python benchmarks/mace_pruning.py MODEL DATA --work DIR --minutes {options.minutes:g}"
    text = header("Pruning a trained MACE", command)
    text += (
        "\nTwo layers, 32x0+32x1+32x2, correlation 3, acetylacetone; RMS errors against DFT: energy of the "
        "molecule (meV), force components (meV/A), each on 650 frames.  Calibration: "
        f"{CALIBRATION} frames without labels.  Training: 450 frames at 300 K, {options.minutes:g} minutes "
        f"of processor time on one thread; peak learning rate {options.lr:g} for retraining, "
        f"{options.lr_scratch:g} from scratch (the better one of 0.005 and 0.01 in a trial of 1.5 minutes), "
        "everything else the same.\n\n"
    )
    teacher = bench.result("teacher")
    rows: list[list[object]] = [["teacher", teacher["parameters"], "", *shown(teacher)]]
    for name in CUTS:
        for kind in ("cut", "compensated"):
            found = bench.result(f"{name} {kind}")
            if found:
                rows.append([f"{name}, {kind}", found["parameters"], "", *shown(found)])
        for kind in ("retrained", "scratch"):
            found = bench.result(f"{name} {kind}")
            if found:
                note = f"{int(found['epochs'])} epochs"
                rows.append([f"{name}, {kind}", "", note, *shown(found)])
    text += table(("model", "parameters", "training", *KEYS), rows)
    text += (
        f"\nRanking of channels, C32 to C16: mean and standard deviation over {options.seeds} calibration "
        "sets (and seeds of the random ranking), before training and after "
        f"{options.ranking_minutes:g} minutes; on every fifth frame.\n\n"
    )
    ranked: list[list[object]] = []
    for name in RANKINGS:
        runs = [r for seed in range(options.seeds) if (r := bench.result(f"ranking {name} {seed}"))]
        if runs:
            columns = [f"{k} before" for k in KEYS] + list(KEYS)
            values = [[r[c] for r in runs] for c in columns]
            ranked.append([name, *[f"{np.mean(v):.1f} ± {np.std(v):.1f}" for v in values]])
    text += table(("ranking", *[f"{k} before" for k in KEYS], *KEYS), ranked)
    text += "\nRefits that leave out the stages of one kind, without training.\n\n"
    kinds: list[list[object]] = []
    for cut in STAGE_CUTS:
        for left_out in STAGES:
            found = bench.result(f"stages {cut} {left_out}")
            if found:
                kinds.append([cut, left_out or "none", *shown(found)])
    text += table(("cut", "left out", *KEYS), kinds)
    report(text, options.output)


def write_shares(bench: Bench) -> None:
    """Print the tables of the shares."""
    options = bench.options
    command = "python benchmarks/mace_pruning.py MODEL DATA --work DIR --part shares "
    command += f"--minutes {options.minutes:g} --lr-scratch {options.lr_scratch:g}"
    text = header("A pruned MACE against random weights: shares of time and data", command)
    text += (
        "\nTwo layers, 32x0+32x1+32x2, correlation 3, acetylacetone; RMS errors against DFT: energy of the "
        "molecule (meV), force components (meV/A), each on 650 frames.  All of the time: "
        f"{options.minutes:g} minutes of the processor, one thread; all of the data: 450 frames at 300 K.  "
        "The compensated model "
        f"(SOAP, peak learning rate {options.lr:g}) and the same architecture from random weights "
        f"({options.lr_scratch:g}); the rest is the same.\n"
    )
    for name, what in product(SHARES_CUTS, ("time", "data")):
        rows: list[list[object]] = []
        for share in SHARES:
            found = {
                kind: bench.result(f"{name} {kind} {share:.0%} {'time' if share == 1.0 else what}")
                for kind in ("retrained", "scratch")
            }
            if all(found.values()):
                epochs = [int(f["epochs"]) for f in found.values()]
                cells = [shown(f)[k] for k in range(len(KEYS)) for f in found.values()]
                rows.append([f"{share:.0%}", *epochs, *cells])
        if len(rows) > 1:
            columns = ["epochs", *KEYS]
            names = [f"{c}, {kind}" for c in columns for kind in ("pruned", "random")]
            text += f"\n{name}, shares of the {what}.\n\n" + table((what, *names), rows)
    rows = [
        [kind, found["parameters"], int(found["epochs"]), *shown(found)]
        for kind in get_args(LastReadout)
        if (found := bench.result(f"depth {kind}"))
    ]
    if rows:
        text += "\nTwo layers cut to one, and trained for all of the time; kinds of the last readout.\n\n"
        text += table(("readout", "parameters", "epochs", *KEYS), rows)
    report(text, options.output)


PARTS = {
    "cuts": cuts,
    "shares": shares,
    "depth": depth,
    "ranking": ranking,
    "stages": stages,
    "report": write_report,
    "report-shares": write_shares,
}


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("model")
    options_parser.add_argument("data", type=Path)
    options_parser.add_argument("--work", type=Path, required=True, help="folder of partial results")
    options_parser.add_argument("--part", choices=tuple(PARTS), required=True)
    options_parser.add_argument("--only", help="one of the cuts")
    options_parser.add_argument("--minutes", type=float, default=20.0)
    options_parser.add_argument("--ranking-minutes", type=float, default=2.0)
    options_parser.add_argument("--lr", type=float, default=5e-3, help="of retraining")
    options_parser.add_argument("--lr-scratch", type=float, default=1e-2)
    options_parser.add_argument("--energy-weight", type=float, default=1.0)
    options_parser.add_argument("--seeds", type=int, default=3)
    options_parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES))
    options = options_parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    PARTS[options.part](bench)


if __name__ == "__main__":
    main()
