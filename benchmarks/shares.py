"""Does pruning spare data and time? A pruned SevenNet against the same architecture from random weights.

Takes the folder of a finished ``compactmlip quickstart`` (or any with ``teacher.safetensors`` and labelled
``train.xyz``, ``valid.xyz`` and ``test.xyz``).  The teacher is cut and compensated on a share of the training
structures, then distilled on the same share; beside it the same architecture with random weights is trained
on them for as long, with the same settings but for the peak learning rate, which follows the error of the
start in both.  Then all structures and shares of the time.  Errors are those against the teacher on the test
structures; rows without training say what it is worth.

    python benchmarks/shares.py FOLDER --work DIR --target 64x0+32x1+16x2 --cut-paths 0.35 --minutes 3

Shares of less data are parts of those of more.  A second call with the same DIR goes on where the first one
stopped; ``--only`` does some of the runs, so that several processes can share the work.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from common import from_random, header, parser, report, shown, table
from torch import nn

from compactmlip import checkpoint
from compactmlip.compress.compress import compress
from compactmlip.data.graph import build_graph
from compactmlip.data.read import read_labelled
from compactmlip.models import model_dtype, model_spec, num_parameters
from compactmlip.train.dataset import Dataset
from compactmlip.train.distil import DistilOptions, distil
from compactmlip.train.metrics import evaluate

SHARES = (0.1, 0.25, 0.5, 1.0)
STARTS = ("pruned", "random")
UNTRAINED = ("sliced", "compensated")
Errors = list[float]


class Bench:
    """Teacher, structures and the folder of partial results."""

    def __init__(self, given: Namespace) -> None:
        self.given, self.work = given, Path(given.work)
        self.work.mkdir(parents=True, exist_ok=True)
        self.teacher: nn.Module = checkpoint.load(given.folder / "teacher.safetensors")
        self.train, self.valid, self.test = (
            read_labelled(given.folder / f"{part}.xyz") for part in ("train", "valid", "test")
        )
        order = np.random.default_rng(given.seed).permutation(len(self.train))
        self.train = [self.train[k] for k in order]

    @cached_property
    def data(self) -> Dataset:
        return Dataset.from_frames(
            self.test, model_spec(self.teacher), model_dtype(self.teacher), "the test set"
        )

    def frames(self, share: float) -> int:
        """Number of training structures in a share."""
        return max(1, round(share * len(self.train)))

    def cut(self, share: float) -> nn.Module:
        """The cut and compensated model; the errors on the way are written down."""
        path = self.work / f"cut-{share:g}.safetensors"
        if not path.is_file():
            few = self.train[: self.frames(share)]
            graphs = [build_graph(a, model_spec(self.teacher), model_dtype(self.teacher)) for a in few]
            options = {"cut_paths": self.given.cut_paths, "seed": self.given.seed}
            made = compress(self.teacher, graphs, self.given.target, **options)
            models = dict(zip(UNTRAINED, (made.sliced, made.model), strict=True))
            for name, model in models.items():
                self.write(f"{name}-{share:g}", {"errors": self.errors(model)})
            checkpoint.save(made.model, path)
        return checkpoint.load(path)

    def errors(self, model: nn.Module) -> Errors:
        """Energy, forces and stress: meV/atom, meV/A, meV/A^3."""
        found = evaluate(model, self.data)
        return [found.energy.mae, found.forces.mae, found.stress.mae]

    def run(self, start: str, data: float, duration: float) -> None:
        """Train on a share of the structures for a share of the time, unless that is done."""
        name = run_name(start, data, duration)
        if self.result(name):
            return
        model = self.cut(data)
        if start == "random":
            model = from_random(model, self.given.seed)
        settings = DistilOptions(
            max_epochs=None, max_minutes=duration * self.given.minutes, seed=self.given.seed
        )
        few = self.train[: self.frames(data)]
        made = distil(model, few, self.valid, settings, self.work / name, clock=time.process_time)
        rate = max(row["lr"] for row in made.history)
        found = {"errors": self.errors(made.model), "epochs": int(made.history[-1]["epoch"]), "lr": rate}
        print(name, found, file=sys.stderr, flush=True)
        self.write(name, found)

    def write(self, name: str, found: dict) -> None:
        (self.work / f"{name}.json").write_text(json.dumps(found))

    def result(self, name: str) -> dict:
        file = self.work / f"{name}.json"
        return dict(json.loads(file.read_text())) if file.is_file() else {}

    def row(self, first: Sequence[object], data: float, duration: float) -> list[object]:
        """Errors of both starts, and those of the pruned one over those of the other."""
        pruned, random = (self.result(run_name(start, data, duration)) for start in STARTS)
        if not (pruned and random):
            return [*first, *["–"] * 11]
        pairs = list(zip(pruned["errors"], random["errors"], strict=True))
        cells = [error for pair in pairs for error in pair]
        return [*first, pruned["epochs"], random["epochs"], *cells, *(p / r for p, r in pairs)]

    def tables(self) -> str:
        """All results."""
        names = ["epochs, pruned", "epochs, random"]
        names += [f"{q}, {start}" for q in "EFS" for start in STARTS]
        names += [f"{q}, pruned / random" for q in "EFS"]
        rows = [self.row([f"{s:.0%}", self.frames(s)], s, 1.0) for s in SHARES]
        text = "\n## Shares of the data, all of the time\n\n" + table(["data", "structures", *names], rows)
        rows = [self.row([f"{s:.0%}", f"{s * self.given.minutes:.2g}"], 1.0, s) for s in SHARES]
        text += "\n## Shares of the time, all of the data\n\n" + table(["time", "minutes", *names], rows)
        rows = [
            [name, f"{s:.0%}", *errors]
            for s in SHARES
            for name in UNTRAINED
            if (errors := self.result(f"{name}-{s:g}").get("errors"))
        ]
        return text + "\n## Without training\n\n" + table(["model", "data", "E", "F", "S"], rows)


def run_name(start: str, data: float, duration: float) -> str:
    return f"{start}-data-{data:g}-time-{duration:g}"


def main(arguments: Sequence[str]) -> None:
    options = parser(__doc__)
    options.add_argument("folder", type=Path)
    options.add_argument("--work", type=Path, required=True, help="folder of partial results")
    options.add_argument("--target", default="64x0+32x1+16x2", help="channels to keep")
    options.add_argument("--cut-paths", type=float, default=0.35, help="share of the paths to cut")
    options.add_argument("--minutes", type=float, default=3.0, help="processor time of a training")
    options.add_argument("--only", nargs="+", choices=STARTS, default=list(STARTS))
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args(arguments)
    torch.set_num_threads(given.threads)
    bench = Bench(given)
    title = header("Shares of data and time", f"python benchmarks/shares.py {shown(arguments)}")
    for share in SHARES:
        for start in given.only:
            bench.run(start, share, 1.0)
            bench.run(start, 1.0, share)
    cut = bench.cut(1.0)
    text = title + (
        f"\n{given.target}, {given.cut_paths:.0%} of the paths less: {num_parameters(cut)} of "
        f"{num_parameters(bench.teacher)} parameters. "
        f"{len(bench.train)} training and {len(bench.test)} test structures, labelled by the teacher; "
        "errors against it, meV/atom, meV/Angstrom, meV/Angstrom^3. All of the time is "
        f"{given.minutes:g} minutes of one processor; seed {given.seed}.\n"
    )
    report(text + bench.tables(), given.output)


if __name__ == "__main__":
    main(sys.argv[1:])
