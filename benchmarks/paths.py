"""What to cut for a speed: channels, paths of the tensor products, or neighbours of the later layers?

Takes the folder of a finished ``compactmlip quickstart`` (or ``specialize``).  For each speed-up over the
deployed teacher, measured on this machine, plans of several kinds are made, compensated on the training
structures and distilled for equal times of one processor; errors against the teacher are those on the test
structures and on more of them, which nothing else has seen.

    python benchmarks/paths.py compactmlip-quickstart --test more.xyz --work DIR --speedup 5.6x 8x

A second call with the same DIR goes on where the first one stopped.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from common import header, parser, report, shown, spread, table
from torch import nn

from compactmlip import checkpoint
from compactmlip.channels import format_channels
from compactmlip.compress.allocate import full_channels
from compactmlip.compress.compress import compress
from compactmlip.compress.cost import Setting, Shapes
from compactmlip.compress.plan import parse_cutoffs
from compactmlip.compress.plan_file import Plan
from compactmlip.data.graph import build_graph
from compactmlip.data.label import label
from compactmlip.data.read import read_labelled, read_structures
from compactmlip.models import model_dtype, model_spec, num_parameters
from compactmlip.search.space import Space
from compactmlip.search.speed import Latency, Stopwatch
from compactmlip.search.within import First, Planner
from compactmlip.train.dataset import Dataset
from compactmlip.train.distil import DistilOptions, distil
from compactmlip.train.metrics import evaluate
from compactmlip.validate.supercells import near_size

KINDS = {
    "uniform": "channels, the same proportions in all layers ({uniform})",
    "ranked": "channels, by a ranking of all (taylor)",
    "paths": "paths, of all channels",
    "both": "paths, of fewer channels ({narrow})",
}

SHORT = "-short"
"""Added to a kind: cutoffs of the layers are those of ``--cutoffs``, and less is cut otherwise."""


class Bench:
    """Structures, plans and the folder of partial results."""

    def __init__(self, given: Namespace) -> None:
        self.given, self.work = given, Path(given.work)
        self.work.mkdir(parents=True, exist_ok=True)
        self.teacher: nn.Module = checkpoint.load(given.folder / "teacher.safetensors")
        self.train, self.valid, own = (
            read_labelled(given.folder / f"{part}.xyz") for part in ("train", "valid", "test")
        )
        self.test = own
        if given.test:
            more = read_structures(given.test)
            self.test += label(more, self.teacher, self.work / "test.xyz", progress=False)
        self.shapes = Shapes(self.teacher)
        self.graphs = [
            build_graph(a, model_spec(self.teacher), model_dtype(self.teacher)) for a in self.train
        ]
        big = near_size(self.train[0], given.atoms)
        self.graph = build_graph(big, model_spec(self.teacher), torch.float32)

    def run(self) -> str:
        text = ""
        for speedup in self.given.speedup:
            plans = {kind: self.plan(kind, speedup) for kind in self.given.kinds}
            times = Stopwatch(self.teacher, self.graph, self.shapes, 10).measure(list(plans.values()))
            rows = []
            for (kind, plan), relative in zip(plans.items(), times, strict=True):
                made = [self.result(kind, speedup, plan, seed) for seed in range(self.given.seeds)]
                first = made[0]
                cells = [first["parameters"], 1 / relative, *first["compensated"]]
                trained = np.array([m["trained"] for m in made])
                cells += [spread(trained[:, k]) for k in range(3)]
                name = KINDS[kind.removesuffix(SHORT)]
                name = name.format(uniform=self.given.uniform, narrow=self.given.narrow)
                rows.append([f"{name}: {plan.summary}", *cells, first["epochs"]])
            columns = ["cut", "parameters", "speed-up", "E compensated", "F compensated"]
            columns += ["E", "F", "S", "epochs"]
            text += f"\n## {speedup} as fast as the teacher\n\n" + table(columns, rows)
        return text

    def plan(self, kind: str, speedup: str) -> Plan:
        path = self.work / f"{kind}-{speedup}.json"
        if not path.is_file():
            cut = kind.removesuffix(SHORT)
            cutoffs = "-" if cut == kind else self.given.cutoffs
            if cut == "uniform":
                plan = self.uniform(float(speedup.rstrip("x")), cutoffs)
            else:
                planner = self.planner(speedup, "channels" if cut == "ranked" else "paths", cutoffs)
                whole = ",".join(format_channels(c) for c in full_channels(self.shapes))
                plan = planner.plan({"both": self.given.narrow, "paths": whole}.get(cut))
            plan.save(path)
        return Plan.load(path)

    @cache  # noqa: B019 - one bench lives as long as the program
    def planner(self, speedup: str, first: First, cutoffs: str) -> Planner:
        template = Plan(layers=("1x0",))
        options = {"first": first, "cutoffs": cutoffs}
        return Planner(f"latency={speedup}", self.teacher, self.graphs, template, **options)

    @cached_property
    def latency(self) -> Latency:
        return Latency(self.teacher, self.graphs, self.shapes, Setting.of(self.graphs))

    def uniform(self, speedup: float, cutoffs: str) -> Plan:
        space = Space(self.shapes, 8, odd_paths=False)
        limit = self.latency.uncut / speedup
        reach = parse_cutoffs(cutoffs, model_spec(self.teacher))
        start = space.uniform(self.given.uniform).model_copy(update={"cutoffs": reach})

        def scaled() -> Plan:
            plan = space.scaled(start, lambda p: self.latency(p) / limit)
            assert plan is not None, "this speed cannot be reached"
            return plan

        return self.latency.settled(scaled)

    def result(self, kind: str, speedup: str, plan: Plan, seed: int) -> dict:
        """Errors after compensation and after training: meV/atom, meV/A, meV/A^3."""
        name = f"{kind}-{speedup}-{seed}"
        file = self.work / f"{name}-result.json"
        if not file.is_file():
            start = self.compensated(kind, speedup, plan)
            settings = DistilOptions(max_epochs=None, max_minutes=self.given.minutes, seed=seed)
            folder = self.work / name
            trained = distil(start, self.train, self.valid, settings, folder, clock=time.process_time)
            data = Dataset.from_frames(self.test, model_spec(start), model_dtype(start), "the test set")
            errors = {"compensated": evaluate(start, data), "trained": evaluate(trained.model, data)}
            found: dict = {k: (e.energy.mae, e.forces.mae, e.stress.mae) for k, e in errors.items()}
            found["compensated"] = found["compensated"][:2]
            found |= {"parameters": num_parameters(start), "epochs": int(trained.history[-1]["epoch"])}
            print(name, found, file=sys.stderr, flush=True)
            file.write_text(json.dumps(found))
        return dict(json.loads(file.read_text()))

    def compensated(self, kind: str, speedup: str, plan: Plan) -> nn.Module:
        file = self.work / f"{kind}-{speedup}.safetensors"
        if not file.is_file():
            checkpoint.save(compress(self.teacher, self.graphs, plan).model, file)
        return checkpoint.load(file)


def main(arguments: Sequence[str]) -> None:
    options = parser(__doc__)
    options.add_argument("folder", type=Path)
    options.add_argument("--test", type=Path, nargs="+", default=[], help="more structures, without labels")
    options.add_argument("--work", type=Path, required=True, help="folder of partial results")
    options.add_argument("--speedup", nargs="+", default=["5.6x"])
    options.add_argument(
        "--kinds", nargs="+", default=list(KINDS), choices=[k + s for k in KINDS for s in ("", SHORT)]
    )
    options.add_argument("--cutoffs", default="-,80%", help="of the layers, in kinds that end in -short")
    options.add_argument("--uniform", default="64x0+32x1+16x2", help="proportions of the uniform plan")
    options.add_argument("--narrow", default="64x0+32x1+16x2", help="channels of which paths are cut as well")
    options.add_argument("--atoms", type=int, default=512, help="size of the structure that is timed")
    options.add_argument("--minutes", type=float, default=4.0, help="processor time of a training")
    options.add_argument("--seeds", type=int, default=1)
    given = options.parse_args(arguments)
    torch.set_num_threads(given.threads)
    title = header("Paths or channels", f"python benchmarks/paths.py {shown(arguments)}")
    bench = Bench(given)
    sizes = [f"{len(part)} {name}" for name, part in (("training", bench.train), ("test", bench.test))]
    text = title + (
        f"\n{' and '.join(sizes)} structures; compensated on the training structures, then distilled for "
        f"{given.minutes:g} minutes of processor time on one thread; {given.seeds} seed(s). Speed: deployed, "
        f"{len(bench.graph.species)} atoms, over the deployed teacher, in turns. meV/atom, meV/Angstrom, "
        "meV/Angstrom^3.\n"
    )
    report(text + bench.run(), given.output)


if __name__ == "__main__":
    main(sys.argv[1:])
