"""General-purpose compression: SevenNet-l3i5 cut, compensated and distilled on frames of many materials.

The frames (of MPtrj, for instance; not part of this repository) are split by trajectory.  The teacher labels
the training frames and displaced, strained copies of them; students learn these labels only.  Tested on
trajectories that nothing was chosen by, against the frames' own DFT labels and against the teacher, beside
7net-0, which its authors trained from scratch and which is about as large.

    python benchmarks/general.py FRAMES.xyz --work DIR --minutes 20 --output RESULTS.md

All steps are kept in DIR; a second call goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from common import header, parser, report, table
from torch import nn

from compactmlip import checkpoint
from compactmlip.compress.compress import compress
from compactmlip.data.graph import build_graph
from compactmlip.data.label import label
from compactmlip.data.read import read_labelled, read_structures
from compactmlip.families import load_model
from compactmlip.models import model_spec, num_parameters
from compactmlip.search.speed import deployed, relative, time_models
from compactmlip.train.dataset import Dataset
from compactmlip.train.distil import DistilOptions, distil
from compactmlip.train.metrics import evaluate
from compactmlip.validate.supercells import near_size

ALL = "128x0+64x1+32x2+32x3"
TARGETS = {
    "l <= 2": ("128x0+64x1+32x2", 0.0),
    "l <= 1": ("128x0+64x1", 0.0),
    "l <= 3, 60 % of the paths less": (ALL, 0.60),
    "l <= 3, 81 % of the paths less": (ALL, 0.81),
}
"""Channels and share of the paths to cut; the last two are about as fast as the first two."""

TEST_SHARE, VALID_SHARE = 0.2, 0.05
"""Of the trajectories."""

SPEED_ATOMS = 256

RATTLE, STRAIN = 0.08, 0.02
"""Angstrom and relative: standard deviations of the copies."""


class Bench:
    """Frames, models and the folder of partial results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work = options, Path(options.work)
        self.work.mkdir(parents=True, exist_ok=True)

    @cached_property
    def teacher(self) -> nn.Module:
        return load_model("7net-l3i5", dtype=torch.float32)

    @cached_property
    def frames(self) -> dict[str, list[Atoms]]:
        """Frames with DFT labels: train, valid, test."""
        found = [a for a in read_labelled(self.options.frames) if len(a) <= self.options.max_atoms]
        groups = [str(a.info[self.options.group_key]) for a in found]
        order = list(dict.fromkeys(groups))
        np.random.default_rng(self.options.seed).shuffle(order)
        test = round(TEST_SHARE * len(order))
        valid = test + round(VALID_SHARE * len(order))
        names = {"test": order[:test], "valid": order[test:valid], "train": order[valid:]}
        return {
            part: [a for a, g in zip(found, groups, strict=True) if g in set(chosen)]
            for part, chosen in names.items()
        }

    @cached_property
    def more(self) -> list[Atoms]:
        """Further frames to train on, of no trajectory that is tested or validated on."""
        key = self.options.group_key
        taken = {str(a.info[key]) for part in ("test", "valid") for a in self.frames[part]}
        found = [a for file in self.options.more for a in read_structures([file])]
        return [a for a in found if len(a) <= self.options.max_atoms and str(a.info[key]) not in taken]

    def labelled(self, part: str) -> list[Atoms]:
        """Frames with the teacher's labels; training frames with their copies."""
        frames = self.frames[part]
        if part == "train":
            rng = np.random.default_rng(self.options.seed)
            frames = [*frames, *self.more]
            frames = [*frames, *(moved(a, rng) for a in frames for _ in range(self.options.copies))]
        return label(frames, self.teacher, self.work / f"{part}.xyz", progress=False)

    def start(self, target: str, compensated: bool) -> nn.Module:
        """The teacher cut to a target."""
        name = "compensated" if compensated else "sliced"
        file = self.work / f"{slug(target)}-{name}.safetensors"
        if not file.exists():
            chosen, atoms = [], 0
            for frame in self.frames["train"]:
                if atoms < self.options.calibration:
                    chosen.append(frame)
                    atoms += len(frame)
            graphs = [build_graph(a, model_spec(self.teacher), torch.float32) for a in chosen]
            groups = [str(a.info[self.options.group_key]) for a in chosen]
            channels, cut_paths = TARGETS[target]
            made = compress(
                self.teacher,
                graphs,
                channels,
                cut_paths=cut_paths,
                groups=groups,
                with_compensation=compensated,
            )
            checkpoint.save(made.model, file)
        return checkpoint.load(file, torch.float32)

    @cached_property
    def speeds(self) -> dict[str, float]:
        """Deployed, over the deployed teacher, in turns: how much faster each target is."""
        atoms = near_size(self.frames["test"][0], SPEED_ATOMS)
        graph = build_graph(atoms, model_spec(self.teacher), torch.float32)
        models = {"teacher": deployed(self.teacher)}
        models |= {target: deployed(self.start(target, True)) for target in self.options.targets}
        found = relative(time_models(models, graph, repeats=7), "teacher")
        return {target: 1 / time for target, time in found.items()}

    def distilled(self, target: str) -> nn.Module:
        """The compensated model, trained for a time that the processor works on it."""
        settings = DistilOptions(
            max_epochs=None,
            max_minutes=self.options.minutes,
            lr=self.options.lr,
            batch_atoms=self.options.batch_atoms,
            seed=self.options.seed,
        )
        result = distil(
            self.start(target, True),
            self.labelled("train"),
            self.labelled("valid"),
            settings,
            self.work / f"{slug(target)}-run",
            progress=True,
            clock=time.process_time,
        )
        return result.model


def moved(atoms: Atoms, rng: np.random.Generator) -> Atoms:
    """A displaced and strained copy."""
    copy = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    strain = STRAIN * rng.standard_normal((3, 3))
    copy.set_cell(copy.cell.array @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)
    copy.positions += RATTLE * rng.standard_normal(copy.positions.shape)
    return copy


def slug(target: str) -> str:
    return re.sub(r"[ <=,%]", "", target)


def row(model: nn.Module, tests: Sequence[list[Atoms]]) -> list[object]:
    """Parameters of one model, and errors on each test set."""
    cells: list[object] = [num_parameters(model)]
    for frames in tests:
        errors = evaluate(
            model, Dataset.from_frames(frames, model_spec(model), torch.float32, "the test set")
        )
        cells += [errors.energy.mae, errors.forces.mae, errors.stress.mae]
    print(*cells, file=sys.stderr, flush=True)
    return cells


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("frames", type=Path)
    options_parser.add_argument("--work", type=Path, required=True, help="folder of partial results")
    options_parser.add_argument("--group-key", default="mptrj_traj_id")
    options_parser.add_argument("--max-atoms", type=int, default=30)
    options_parser.add_argument("--more", type=Path, nargs="*", default=[], help="more frames to train on")
    options_parser.add_argument("--copies", type=int, default=1, help="copies of each training frame")
    options_parser.add_argument("--calibration", type=int, default=2300, help="atoms for compensation")
    options_parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    options_parser.add_argument(
        "--minutes", type=float, default=20.0, help="processor time of a training; 0 leaves it out"
    )
    options_parser.add_argument("--lr", type=float, help="peak rate; follows the start")
    options_parser.add_argument("--batch-atoms", type=int, default=32)
    options_parser.add_argument("--seed", type=int, default=0)
    options = options_parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    tests = [bench.frames["test"], bench.labelled("test")]
    rows = [["7net-l3i5 (teacher)", 1.0, *row(bench.teacher, tests)]]
    for target in options.targets:
        speed = bench.speeds[target]
        rows.append([f"{target}, plain slicing", speed, *row(bench.start(target, False), tests)])
        rows.append([f"{target}, compensated", speed, *row(bench.start(target, True), tests)])
        if options.minutes:
            rows.append([f"{target}, distilled", speed, *row(bench.distilled(target), tests)])
    rows.append(["7net-0", "–", *row(load_model("7net-0", dtype=torch.float32), tests)])
    sizes = {name: (len(f), sum(map(len, f))) for name, f in bench.frames.items()}
    given = "" if options.lr is None else f" --lr {options.lr:g}"
    text = header(
        "General-purpose compression",
        f"python benchmarks/general.py FRAMES.xyz --work DIR --minutes {options.minutes:g} "
        f"--more FRAMES.xyz --copies {options.copies} --max-atoms {options.max_atoms} "
        f"--batch-atoms {options.batch_atoms}{given}",
    )
    listed = ", ".join(f"{name} {n} frames ({atoms} atoms)" for name, (n, atoms) in sizes.items())
    text += (
        f"\nSplit by trajectory: {listed}; {len(bench.more)} more frames to train on, and {options.copies} "
        f"displaced and strained copies of each training frame. Compensated on {options.calibration} atoms, "
        f"then {options.minutes:g} minutes of processor time on one thread, seed {options.seed}. Mean "
        "absolute errors on the test trajectories: meV/atom, meV/Angstrom, meV/Angstrom^3; against the "
        f"frames' DFT labels and against the teacher. Speed-up: deployed, {SPEED_ATOMS} atoms, one thread, "
        "in turns.\n\n"
    )
    quantities = [f"{q} {of}" for of in ("DFT", "teacher") for q in ("E", "F", "S")]
    report(text + table(("model", "speed-up", "parameters", *quantities), rows), options.output)


if __name__ == "__main__":
    main()
