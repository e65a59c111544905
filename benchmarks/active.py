"""Does active distillation pay, at equal numbers of teacher labels and equal time of training?

Per crystal: a first set of structures, sampled around it; then either as many more sampled ones, or those
that the student's own dynamics finds.  All students start from the same cut model and train for the same
processor time.  They are tested on sampled structures, on the teacher's dynamics at each temperature, and by
how often their own dynamics breaks at the highest one times two.

    OMP_NUM_THREADS=1 python benchmarks/active.py --minutes 4 --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from common import header, parser, report, table
from torch import nn

from compactmlip.compress.apply import keep_species
from compactmlip.compress.compress import compress
from compactmlip.data.graph import build_graph
from compactmlip.data.label import label
from compactmlip.data.md import trajectory
from compactmlip.data.sample import SampleOptions, sample
from compactmlip.data.select import split
from compactmlip.families import load_model
from compactmlip.models import model_dtype, model_spec
from compactmlip.train.active import ActiveOptions, distil_actively
from compactmlip.train.dataset import Dataset
from compactmlip.train.distil import DistilOptions, distil
from compactmlip.train.metrics import evaluate

CRYSTALS = {
    "MgO": lambda: bulk("MgO", "rocksalt", a=4.21, cubic=True),
    "Si": lambda: bulk("Si", "diamond", a=5.43, cubic=True),
}
STEPS, INTERVAL = 300, 50
"""Of the runs that test."""


@dataclass
class Case:
    """One crystal: models and labelled sets; ``hot`` by temperature."""

    teacher: nn.Module
    start: nn.Module
    crystal: Atoms
    first: list[Atoms]
    more: list[Atoms]
    valid: list[Atoms]
    test: list[Atoms]
    hot: dict[float, list[Atoms]]


def prepare(name: str, options: argparse.Namespace, folder: Path) -> Case:
    """Sample, label, cut."""
    crystal = CRYSTALS[name]()
    loaded = load_model(options.teacher, dtype=None, accept_licence=options.accept_licence)
    teacher = keep_species(loaded, sorted(set(crystal.get_chemical_symbols())))
    settings = SampleOptions(n=3 * options.frames, seed=options.sample_seed)
    frames = label(sample([crystal], teacher, settings, False), teacher, folder / "all.xyz", progress=False)
    train, valid, test = split(frames, (2 / 3, 1 / 15, 4 / 15), seed=options.sample_seed)
    order = np.random.default_rng(options.sample_seed).permutation(len(train)).tolist()
    first, more = ([train[k] for k in part] for part in (order[: options.frames], order[options.frames :]))
    hot = {}
    for temperature in options.temperatures:
        rng = np.random.default_rng((options.sample_seed, int(temperature)))
        found = trajectory(
            crystal.repeat((2, 1, 1)), teacher, temperature, steps=STEPS, interval=INTERVAL, rng=rng
        )
        hot[temperature] = label(found, teacher, folder / f"{temperature:g}.xyz", progress=False)
    graphs = [build_graph(a, model_spec(teacher), model_dtype(teacher)) for a in first]
    start = compress(teacher, graphs, options.to, seed=options.sample_seed).model
    return Case(teacher, start, crystal, first, more, valid, test, hot)


def measured(case: Case, model: nn.Module, options: argparse.Namespace) -> list[object]:
    """Force errors on all sets, and how many of ten runs broke."""

    def error(frames: list[Atoms]) -> float:
        return evaluate(model, Dataset.from_frames(frames, model_spec(model), model_dtype(model))).forces.mae

    temperature, broken = 2 * max(options.temperatures), 0
    for seed in range(10):
        rng = np.random.default_rng((seed, 1))
        cell = case.crystal.repeat((2, 1, 1))
        kept = trajectory(cell, model, temperature, steps=STEPS, interval=INTERVAL, rng=rng)
        broken += len(kept) < STEPS // INTERVAL
    return [error(case.test), *(error(frames) for frames in case.hot.values()), broken]


def trained(name: str, case: Case, how: str, seed: int, options: argparse.Namespace) -> list[object]:
    """Train one student and measure it."""
    given = {"max_epochs": None, "max_minutes": options.minutes, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        if how == "active":
            active = ActiveOptions.model_validate(
                given
                | {"rounds": options.rounds, "add": options.frames // options.rounds}
                | {"temperature": tuple(options.temperatures)}
            )
            model = distil_actively(
                case.start,
                case.teacher,
                case.first,
                case.valid,
                active,
                folder,
                False,
                clock=time.process_time,
            ).model
        else:
            frames = case.first + (case.more if how == "more sampled" else [])
            plain = DistilOptions.model_validate(given)
            model = distil(
                case.start, frames, case.valid, plain, folder, False, clock=time.process_time
            ).model
    row = [name, how, seed, *measured(case, model, options)]
    print(row, file=sys.stderr, flush=True)
    return row


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--teacher", default="7net-0", help="name or checkpoint")
    options_parser.add_argument("--accept-licence", help="as in the command line")
    options_parser.add_argument("--materials", nargs="+", choices=list(CRYSTALS), default=list(CRYSTALS))
    options_parser.add_argument("--to", default="24x0+12x1", help="channels of the student")
    options_parser.add_argument("--frames", type=int, default=40, help="of the first set, and of the second")
    options_parser.add_argument("--rounds", type=int, default=2)
    options_parser.add_argument("--temperatures", type=float, nargs="+", default=[300.0, 1000.0])
    options_parser.add_argument("--minutes", type=float, default=4.0)
    options_parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options_parser.add_argument("--sample-seed", type=int, default=0)
    options = options_parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.materials:
        with tempfile.TemporaryDirectory() as folder:
            case = prepare(name, options, Path(folder))
        rows.append([name, "before training", "-", *measured(case, case.start, options)])
        kinds = ("first set only", "more sampled", "active")
        rows += [trained(name, case, how, seed, options) for seed in options.seeds for how in kinds]
    columns = ["crystal", "training", "seed", "F sampled (meV/Å)"]
    columns += [f"F teacher's MD, {t:g} K" for t in options.temperatures]
    columns.append(f"runs of 10 that broke at {2 * max(options.temperatures):g} K")
    how = f"--minutes {options.minutes:g} --frames {options.frames} --rounds {options.rounds}"
    text = header("Active distillation", f"python benchmarks/active.py {how}")
    text += (
        f"\n{options.frames} sampled structures, then as many more sampled or found by the student's "
        f"dynamics in {options.rounds} rounds; {options.minutes:g} minutes of processor time for each; "
        f"{options.teacher} -> {options.to}.\n\n"
    )
    report(text + table(columns, rows), options.output)


if __name__ == "__main__":
    main()
