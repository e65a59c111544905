"""Fine-tune a foundation model on DFT data; beside it pruned ones, and the same from scratch.

Rows, as in table 4 of the paper: the parent as it is, and fine-tuned; the fine-tuned parent cut to smaller
architectures, compensated, distilled on training frames and perturbed ones that it labels, then fine-tuned
on the labels of the data; the same without the distillation, fine-tuned for the whole time; the smaller
architectures with random weights, trained on the same frames for as long.  Errors are those on a test set
that nothing was chosen by.  Each seed divides the frames, draws structures and orders batches in its own way.

The data (mlearn's Si or Li, for instance) are not part of this repository.

    python benchmarks/finetune.py TRAIN.xyz TEST.xyz --work DIR --part parent student scratch --seed 0
    python benchmarks/finetune.py TRAIN.xyz TEST.xyz --work DIR --part speed report --output RESULTS.md

All steps are kept in DIR; a second call goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from ase import Atoms
from common import from_random, header, parser, report, spread, table
from torch import nn

from compactmlip import CompactMLIPCalculator, checkpoint
from compactmlip.compress.apply import keep_species
from compactmlip.compress.compress import compress
from compactmlip.data.graph import build_graph
from compactmlip.data.holdout import hold_out
from compactmlip.data.label import label
from compactmlip.data.read import read_labelled
from compactmlip.deploy.compile import compile_model
from compactmlip.families import load_model
from compactmlip.models import model_spec, num_parameters
from compactmlip.train.dataset import Dataset
from compactmlip.train.distil import DistilOptions, distil
from compactmlip.train.finetune import FinetuneData, FinetuneResult, finetune
from compactmlip.train.finetune_options import FinetuneOptions
from compactmlip.train.forgetting import replay_structures
from compactmlip.train.metrics import dataset_residuals, summarise
from compactmlip.train.options import OptimizerName
from compactmlip.train.reference import fit_reference, shifted
from compactmlip.validate.speed import measure_speed

SHIFT_FRAMES = 24
"""Training frames that give the shift of energies of models that are not trained."""

DISTIL_SHARE = 0.75
"""Of a student's time, for the distillation; the rest is fine-tuning."""

MODEL = "model.safetensors"


class Bench:
    """Data and models of one seed, and the folder of its results."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self.options, self.seed = options, seed
        self.work = Path(options.work) / f"seed-{seed}"
        self.work.mkdir(parents=True, exist_ok=True)

    @cached_property
    def frames(self) -> dict[str, list[Atoms]]:
        train, test = (read_labelled(path) for path in (self.options.train, self.options.test))
        for atoms in (*train, *test):
            # "Snapshot 3 of 20 of AIMD ..." is one frame of the type "AIMD ...".
            kind = re.sub(r"^Snapshot \d+ of \d+ of ", "", str(atoms.info.get("config_type", "")))
            atoms.info["config_type"] = "surface" if "surface" in kind else kind
        train = train[:: self.options.every]
        held = hold_out(train, 0.1, self.seed)
        return {
            "train": [train[k] for k in held.train],
            "valid": [train[k] for k in held.valid],
            "test": test,
        }

    def parent(self) -> nn.Module:
        """The foundation model, of the species of the data."""
        species = {s for a in self.frames["train"] for s in a.get_chemical_symbols()}
        return keep_species(load_model(self.options.parent, dtype=torch.float32), species)

    @cached_property
    def teacher(self) -> nn.Module:
        """The fine-tuned parent."""
        path = self.work / "parent" / MODEL
        if not path.is_file():
            raise SystemExit(f"{path} is missing: run --part parent with --seed {self.seed} first")
        return checkpoint.load(path, torch.float32)

    @cached_property
    def taught(self) -> tuple[list[Atoms], list[Atoms]]:
        """Training frames with copies, and validation frames, labelled by the teacher."""
        copies = self.options.copies * len(self.frames["train"])
        moved = replay_structures(self.frames["train"], (), copies, self.seed, max_atoms=sys.maxsize)
        frames = {"train": [*self.frames["train"], *moved.perturbed], "valid": self.frames["valid"]}
        found = [
            label(f, self.teacher, self.work / f"{name}.xyz", progress=False) for name, f in frames.items()
        ]
        return found[0], found[1]

    def cut(self, target: str) -> nn.Module:
        """The teacher cut to a target and compensated on training frames, without labels."""
        path = self.work / f"cut-{slug(target)}.safetensors"
        if not path.is_file():
            drawn = np.random.default_rng(self.seed).permutation(len(self.frames["train"]))
            chosen = [self.frames["train"][k] for k in drawn[: self.options.calibration]]
            graphs = [build_graph(a, model_spec(self.teacher), torch.float32) for a in chosen]
            text, _, paths = target.partition("/")
            channels, _, edges = text.partition("@")
            order, share = int(edges) if edges else None, float(paths) if paths else 0.0
            made = compress(
                self.teacher, graphs, channels, edge_order=order, cut_paths=share, seed=self.seed
            ).model
            checkpoint.save(made, path)
        return checkpoint.load(path, torch.float32)

    def as_it_is(self) -> dict[str, Any]:
        """Test errors of the parent with its own energies, and with energies shifted per species."""
        model = self.parent()
        few = self.frames["train"][:: max(1, len(self.frames["train"]) // SHIFT_FRAMES)]
        train, test = (
            Dataset.from_frames(frames, model_spec(model), torch.float32, "these frames")
            for frames in (few, self.frames["test"])
        )
        species = model_spec(model).species
        counts = np.stack([np.bincount(s.graph.species, minlength=len(species)) for s in train.structures])
        missing = -dataset_residuals(model, train).energies.numpy() * counts.sum(axis=1)
        fitted = fit_reference("least-squares", species, counts, missing, {}, {})
        raw, moved = (
            summarise(dataset_residuals(m, test), test).row() for m in (model, shifted(model, fitted.shifts))
        )
        return {"raw": raw, "shifted": moved, "parameters": num_parameters(model)}

    def trained(
        self, model: nn.Module, name: str, minutes: float, accept: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        """Errors after training on the labels of the data."""
        settings = FinetuneOptions(
            max_epochs=None,
            max_minutes=minutes,
            patience=None,
            lr=self.options.lr,
            optimizer=self.options.optimizer,
            stress_weight=0.0,
            seed=self.seed,
            e0="least-squares",
            forgetting_structures=0,
            accept=accept,
        )
        data = FinetuneData(self.frames["train"], self.frames["valid"], self.frames["test"])
        folder = self.work / name
        return _errors(finetune(model, data, settings, folder, True, say=_say, clock=time.process_time))

    def student(self, target: str) -> dict[str, Any]:
        """Cut, distil, fine-tune."""
        name = f"student-{slug(target)}"
        options = DistilOptions(
            max_epochs=None,
            max_minutes=DISTIL_SHARE * self.options.student_minutes,
            lr=self.options.lr,
            optimizer=self.options.optimizer,
            seed=self.seed,
        )
        folder = self.work / f"{name}-distil"
        learned = distil(self.cut(target), *self.taught, options, folder, clock=time.process_time)
        epochs = {"distil_epochs": learned.history[-1]["epoch"]}
        rest = (1 - DISTIL_SHARE) * self.options.student_minutes
        return epochs | self.trained(learned.model, name, rest)

    def direct(self, target: str) -> dict[str, Any]:
        """Cut and fine-tune, without a distillation."""
        name = f"direct-{slug(target)}"
        return self.trained(self.cut(target), name, self.options.student_minutes)

    def scratch(self, target: str) -> dict[str, Any]:
        """The same architecture with random weights, for as long as the student."""
        model = from_random(self.cut(target), self.seed)
        # What random weights predict says nothing of the data's units.
        return self.trained(model, f"scratch-{slug(target)}", self.options.student_minutes, ("units",))

    def once(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
        """Run unless the result is there already."""
        file = self.work / f"{name}.json"
        if not file.exists():
            _say(f"seed {self.seed}: {name}")
            file.write_text(json.dumps(run()))

    def result(self, name: str) -> dict[str, Any]:
        file = self.work / f"{name}.json"
        return dict(json.loads(file.read_text())) if file.exists() else {}


def _errors(result: FinetuneResult) -> dict[str, Any]:
    found = result.sets["test"]
    return {
        "parameters": num_parameters(result.model),
        "epochs": result.history[-1]["epoch"],
        "best_epoch": result.best_epoch,
        "lr": max(row["lr"] for row in result.history),
        "before": found.before.row(),
        "after": found.after.row(),
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def slug(target: str) -> str:
    return target.replace("+", "_").replace(",", "__").replace("@", "_edges_").replace("/", "_paths_")


def shown(target: str) -> str:
    """A target for the tables."""
    text, _, paths = target.partition("/")
    cut = f", {float(paths):.0%} of the paths less" if paths else ""
    return text.replace("@", ", edges l <= ") + cut


def run(bench: Bench) -> None:
    """Do the parts that were asked for."""
    options = bench.options
    for part in options.part:
        if part == "untrained":
            bench.once("as-it-is", bench.as_it_is)
        elif part == "parent":
            bench.once("parent", lambda: bench.trained(bench.parent(), "parent", options.minutes))
        elif part in ("student", "direct", "scratch"):
            for target in options.targets:
                bench.once(f"{part}-{slug(target)}", partial(getattr(bench, part), target))
        elif part == "speed":
            bench.once("speed", lambda: speed(bench))


def speed(bench: Bench) -> dict[str, Any]:
    """Atoms per second of the deployed files, on the first structure of the test set, taking turns."""
    models = {"parent": bench.teacher, **{slug(t): bench.cut(t) for t in bench.options.targets}}
    atoms = bench.frames["test"][0]
    with tempfile.TemporaryDirectory() as folder:
        calculators = {}
        for name, model in models.items():
            path = Path(folder) / f"{name}.pt"
            compile_model(model, path, dtype="float32")
            calculators[name] = CompactMLIPCalculator(path)
        found = measure_speed(calculators, [atoms], repeats=7, max_seconds=60.0)[0]
    return {"atoms": len(atoms), "rates": found.atoms_per_second}


COLUMNS = (
    ("E MAE", "energy_mae_meV_per_atom"),
    ("E RMSE", "energy_rmse_meV_per_atom"),
    ("F MAE", "forces_mae_meV_per_A"),
    ("F RMSE", "forces_rmse_meV_per_A"),
)


class Report:
    """Tables of all seeds that have results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.benches = [
            Bench(options, int(folder.name.removeprefix("seed-")))
            for folder in sorted(Path(options.work).glob("seed-*"))
        ]
        self.speed = next((s for b in self.benches if (s := b.result("speed"))), {})

    def rows(self) -> list[list[object]]:
        """Models by their place in the comparison."""
        parent = self.options.parent
        rows = [
            self._row(f"{parent} as it is", "as-it-is", "raw", "parent"),
            self._row(f"{parent}, energies shifted", "as-it-is", "shifted", "parent"),
            self._row(f"{parent}, fine-tuned", "parent", "after", "parent"),
        ]
        for target in self.options.targets:
            name = slug(target)
            rows += [
                self._row(f"cut to {shown(target)}, distilled", f"student-{name}", "before", name),
                self._row("the same, fine-tuned", f"student-{name}", "after", name),
                self._row("the same, not distilled but fine-tuned only", f"direct-{name}", "after", name),
                self._row("the same, from random weights", f"scratch-{name}", "after", name),
            ]
        return [row for row in rows if row]

    def _row(self, title: str, name: str, state: str, speed: str) -> list[object]:
        found = [result for bench in self.benches if (result := bench.result(name))]
        if not found:
            return []
        cells = [spread([f[state][key] for f in found]) for _, key in COLUMNS]
        trained = "epochs" in found[0] and state == "after"
        epochs = spread([f["epochs"] for f in found]) if trained else "–"
        rate = self.speed.get("rates", {}).get(speed)
        fast = "–" if rate is None else f"{rate:,.0f}"
        rates = spread([f["lr"] for f in found]) if trained else "–"
        return [title, found[0]["parameters"], fast, epochs, rates, len(found), *cells]

    def comparison(self) -> list[list[object]]:
        """Ratios that the paper states, and how far the parent is from random weights, seed by seed."""
        rows: list[list[object]] = []
        for target in self.options.targets:
            cells: list[object] = [shown(target)]
            student, scratch = f"student-{slug(target)}", f"scratch-{slug(target)}"
            for one, other in ((student, "parent"), (student, scratch), ("parent", scratch)):
                for _, key in (COLUMNS[0], COLUMNS[2]):
                    pairs = [(b.result(one), b.result(other)) for b in self.benches]
                    ratios = [own["after"][key] / its["after"][key] for own, its in pairs if own and its]
                    cells.append(spread(ratios) if ratios else "–")
            rows.append(cells)
        return rows


def write_report(options: argparse.Namespace) -> None:
    """Print the tables."""
    made = Report(options)
    command = (
        f"python benchmarks/finetune.py TRAIN.xyz TEST.xyz --work DIR --parent {options.parent} "
        f"--minutes {options.minutes:g} --student-minutes {options.student_minutes:g} "
        f"--targets {' '.join(options.targets)} --every {options.every} "
        f"--copies {options.copies} --calibration {options.calibration} --optimizer {options.optimizer}"
    )
    text = header(f"Fine-tuning: {options.title}", command)
    sizes = {name: (len(f), sum(map(len, f))) for name, f in made.benches[0].frames.items()}
    listed = ", ".join(f"{name} {n} frames ({atoms} atoms)" for name, (n, atoms) in sizes.items())
    seeds = ", ".join(str(bench.seed) for bench in made.benches)
    text += (
        f"\n{listed}. Errors on the test set, meV/atom and meV/A. The parent had {options.minutes:g} "
        f"minutes of processor time on one thread, smaller models {options.student_minutes:g}: students "
        f"{DISTIL_SHARE:.0%} of it for the distillation on frames "
        f"that the fine-tuned parent labels ({options.copies} perturbed copies of each training frame among "
        "them) and the rest for fine-tuning; validation frames, held out of the training frames, chose the "
        f"epoch. Seeds: {seeds}; ± is the standard deviation from seed to seed."
    )
    if made.speed:
        text += f" Atoms/s: float32 kernels, {made.speed['atoms']} atoms, one thread, taking turns."
    columns = ("model", "parameters", "atoms/s", "epochs", "peak lr", "seeds", *(name for name, _ in COLUMNS))
    text += "\n\n" + table(columns, made.rows())
    text += "\nMean absolute errors of models over those of others (below 1 is better).\n\n"
    pairs = ("student / fine-tuned parent", "student / random weights", "fine-tuned parent / random weights")
    names = [f"{quantity}: {pair}" for pair in pairs for quantity in ("E", "F")]
    text += table(("student", *names), made.comparison())
    report(text, options.output)


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("train", type=Path)
    options_parser.add_argument("test", type=Path)
    options_parser.add_argument("--work", type=Path, required=True, help="folder of partial results")
    options_parser.add_argument(
        "--part",
        nargs="+",
        choices=("untrained", "parent", "student", "direct", "scratch", "speed", "report"),
        required=True,
    )
    options_parser.add_argument("--title", default="Si of mlearn (PBE)")
    options_parser.add_argument("--parent", default="7net-l3i5")
    options_parser.add_argument(
        "--targets",
        nargs="+",
        default=["128x0+64x1+32x2", "128x0+64x1"],
        help="channels per order; @2 after them keeps harmonics of edges up to that order, /0.6 cuts that "
        "share of the paths",
    )
    options_parser.add_argument("--calibration", type=int, default=12, help="frames for the compensation")
    options_parser.add_argument("--copies", type=int, default=1, help="perturbed copies of a training frame")
    options_parser.add_argument("--minutes", type=float, default=15.0, help="processor time of the parent")
    options_parser.add_argument("--student-minutes", type=float, default=20.0, help="of each other model")
    options_parser.add_argument("--lr", type=float, help="peak rate of all trainings; follows the start")
    options_parser.add_argument("--optimizer", choices=get_args(OptimizerName), default="soap")
    options_parser.add_argument("--every", type=int, default=1, help="use every n-th training frame")
    options_parser.add_argument("--seed", type=int, default=0)
    options = options_parser.parse_args()
    torch.set_num_threads(options.threads)
    run(Bench(options, options.seed))
    if "report" in options.part:
        write_report(options)


if __name__ == "__main__":
    main()
