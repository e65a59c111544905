"""Fine-tune a foundation model on DFT data; beside it a pruned one, and the same from scratch.

Rows: the parent as it is (energies as they are, and shifted per species), fine-tuned; the parent cut to a
small architecture and compensated, before and after fine-tuning; the small architecture with random weights,
trained on the same frames.  All trainings have the same processor time.  Errors are those on a test set that
nothing was chosen by.

The data (mlearn's Si or Li, for instance) are not part of this repository.

    python benchmarks/finetune.py TRAIN.xyz TEST.xyz --work DIR --part compact --part scratch --part parent
    python benchmarks/finetune.py TRAIN.xyz TEST.xyz --work DIR --part report --output RESULTS.md
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from common import header, parser, report, table
from torch import nn

from compactmlip.compress.apply import keep_species
from compactmlip.compress.compress import compress
from compactmlip.data.graph import build_graph
from compactmlip.data.holdout import hold_out
from compactmlip.data.read import read_labelled
from compactmlip.families import load_model
from compactmlip.models import build, cast, model_spec, num_parameters
from compactmlip.train.dataset import Dataset
from compactmlip.train.finetune import FinetuneData, finetune
from compactmlip.train.finetune_options import FinetuneOptions
from compactmlip.train.metrics import dataset_residuals, summarise
from compactmlip.train.reference import fit_reference, shifted

SHIFT_FRAMES = 24
"""Training frames that give the shift of energies of models that are not trained."""


class Bench:
    """Data, models and the folder of partial results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work = options, Path(options.work)
        self.work.mkdir(parents=True, exist_ok=True)

    @cached_property
    def frames(self) -> dict[str, list[Atoms]]:
        train, test = (read_labelled(path) for path in (self.options.train, self.options.test))
        for atoms in (*train, *test):
            # "Snapshot 3 of 20 of AIMD ..." is one frame of the type "AIMD ...".
            kind = re.sub(r"^Snapshot \d+ of \d+ of ", "", str(atoms.info.get("config_type", "")))
            atoms.info["config_type"] = "surface" if "surface" in kind else kind
        train = train[:: self.options.every]
        held = hold_out(train, 0.1, self.options.seed)
        return {
            "train": [train[k] for k in held.train],
            "valid": [train[k] for k in held.valid],
            "test": test,
        }

    def parent(self, name: str) -> nn.Module:
        species = {s for a in self.frames["train"] for s in a.get_chemical_symbols()}
        return keep_species(load_model(name, dtype=torch.float32), species)

    @cached_property
    def compact(self) -> nn.Module:
        """The parent cut to the target and compensated on training frames, without labels."""
        parent = self.parent(self.options.parent)
        order = np.random.default_rng(self.options.seed).permutation(len(self.frames["train"]))
        chosen = [self.frames["train"][k] for k in order[: self.options.calibration]]
        graphs = [build_graph(a, model_spec(parent), torch.float32) for a in chosen]
        return compress(parent, graphs, self.options.target, seed=self.options.seed, progress=False).model

    def dataset(self, name: str, model: nn.Module, most: int | None = None) -> Dataset:
        frames = self.frames[name]
        frames = frames if most is None else frames[:: max(1, len(frames) // most)]
        return Dataset.from_frames(frames, model_spec(model), torch.float32, name)

    def as_it_is(self, model: nn.Module) -> dict[str, Any]:
        """Test errors with the model's own energies, and with energies shifted per species."""
        train, test = self.dataset("train", model, SHIFT_FRAMES), self.dataset("test", model)
        species = model_spec(model).species
        counts = np.stack([np.bincount(s.graph.species, minlength=len(species)) for s in train.structures])
        missing = -dataset_residuals(model, train).energies.numpy() * counts.sum(axis=1)
        fitted = fit_reference("least-squares", species, counts, missing, {}, {})
        raw, moved = (
            summarise(dataset_residuals(m, test), test).row() for m in (model, shifted(model, fitted.shifts))
        )
        return {"raw": raw, "shifted": moved, "parameters": num_parameters(model)}

    def trained(self, model: nn.Module, name: str, lr: float) -> dict[str, Any]:
        """Errors after training for a time that the processor works on it."""
        settings = FinetuneOptions(
            max_epochs=None,
            max_minutes=self.options.minutes,
            patience=None,
            lr=lr,
            stress_weight=0.0,
            seed=self.options.seed,
            e0="least-squares",
        )
        data = FinetuneData(self.frames["train"], self.frames["valid"], self.frames["test"])
        folder = self.work / name
        result = finetune(model, data, settings, folder, True, say=_say, clock=time.process_time)
        found = result.sets["test"]
        return {
            "parameters": num_parameters(result.model),
            "epochs": result.history[-1]["epoch"],
            "best_epoch": result.best_epoch,
            "lr": lr,
            "before": found.before.row(),
            "after": found.after.row(),
            "types": [asdict(row) for row in found.rows_after],
            "forgetting": [asdict(f) for f in result.forgetting],
        }

    def once(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
        """Run unless the result is there already."""
        file = self.work / f"{name}.json"
        if not file.exists():
            _say(name)
            file.write_text(json.dumps(run()))

    def result(self, name: str) -> dict[str, Any]:
        file = self.work / f"{name}.json"
        return dict(json.loads(file.read_text())) if file.exists() else {}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def from_random(model: nn.Module, seed: int) -> nn.Module:
    """The same architecture, factors and energies of atoms, with upstream's random initialisation."""
    torch.manual_seed(seed)
    fresh = cast(build(model_spec(model)), torch.float32)
    state, drawn = model.state_dict(), dict(fresh.named_parameters())
    fresh.load_state_dict({n: t if n in drawn else state[n] for n, t in fresh.state_dict().items()})
    return fresh


def run(bench: Bench) -> None:
    """Do the parts that were asked for."""
    options = bench.options
    for part in options.part:
        if part == "untrained":
            for name in options.others:
                bench.once(f"as-it-is-{name}", lambda n=name: bench.as_it_is(bench.parent(n)))
        elif part == "parent":
            model = bench.parent(options.parent)
            bench.once("parent", lambda m=model: bench.trained(m, "parent-run", options.lr))
        elif part == "compact":
            bench.once("compact", lambda: bench.trained(bench.compact, "compact-run", options.lr_compact))
        elif part == "scratch":
            bench.once(
                "scratch",
                lambda: bench.trained(
                    from_random(bench.compact, options.seed), "scratch-run", options.lr_scratch
                ),
            )


COLUMNS = (
    ("E MAE", "energy_mae_meV_per_atom"),
    ("E RMSE", "energy_rmse_meV_per_atom"),
    ("F MAE", "forces_mae_meV_per_A"),
    ("F RMSE", "forces_rmse_meV_per_A"),
)


def write_report(bench: Bench) -> None:
    """Print the tables."""
    options = bench.options
    command = (
        f"python benchmarks/finetune.py TRAIN.xyz TEST.xyz --work DIR --minutes {options.minutes:g} "
        f"--target {options.target} --every {options.every} --calibration {options.calibration}"
    )
    text = header("Fine-tuning", command)
    sizes = {name: (len(f), sum(map(len, f))) for name, f in bench.frames.items()}
    listed = ", ".join(f"{name} {n} frames ({atoms} atoms)" for name, (n, atoms) in sizes.items())
    text += (
        f"\n{options.title}: {listed}.  Errors on the test set, meV/atom and meV/A.  Each training had "
        f"{options.minutes:g} minutes of processor time on one thread, seed {options.seed} (one seed only); "
        "the validation set, held out of the training frames, chose the epoch.\n\n"
    )
    rows: list[list[object]] = []

    def add(name: str, parameters: int, training: str, errors: dict[str, float]) -> None:
        rows.append([name, parameters, training, *(errors[key] for _, key in COLUMNS)])

    for name in options.others:
        if found := bench.result(f"as-it-is-{name}"):
            add(f"{name} as it is", found["parameters"], "none", found["raw"])
            add(f"{name}, energies shifted", found["parameters"], "none", found["shifted"])
    titles = {
        "parent": f"{options.parent} ",
        "compact": f"{options.parent} cut to {options.target}, compensated ",
        "scratch": f"{options.target} from random weights ",
    }
    for name, title in titles.items():
        if found := bench.result(name):
            epochs = f"{int(found['epochs'])} epochs, lr {found['lr']:g}"
            add(f"{title}before", found["parameters"], "none", found["before"])
            add(f"{title}after", found["parameters"], epochs, found["after"])
    text += table(("model", "parameters", "training", *(name for name, _ in COLUMNS)), rows)
    for name, title in titles.items():
        if name != "scratch" and (found := bench.result(name)):
            text += f"\n{title.strip()}: forgetting, against the labels of the model before training.\n\n"
            forgotten = [
                [
                    f["name"],
                    f["frames"],
                    f["errors"]["energy"]["mae"],
                    f["errors"]["forces"]["mae"],
                    f["mean_force"],
                ]
                for f in found["forgetting"]
            ]
            text += table(("structures", "frames", "E MAE", "F MAE", "mean force"), forgotten)
    names = [n for n in titles if bench.result(n)]
    if names:
        text += "\nForce MAE on the test set by configuration type, after the training.\n\n"
        tables = {n: {row["name"]: row for row in bench.result(n)["types"]} for n in names}
        kinds = list(tables[names[0]])
        text += table(
            ("type", "atoms", *names),
            [
                [k, tables[names[0]][k]["atoms"], *(tables[n][k]["forces"]["mae"] for n in names)]
                for k in kinds
            ],
        )
    report(text, options.output)


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("train", type=Path)
    options_parser.add_argument("test", type=Path)
    options_parser.add_argument("--work", type=Path, required=True, help="folder of partial results")
    options_parser.add_argument(
        "--part",
        action="append",
        choices=("untrained", "parent", "compact", "scratch", "report"),
        required=True,
    )
    options_parser.add_argument("--title", default="Si of mlearn (PBE)")
    options_parser.add_argument("--parent", default="7net-0")
    options_parser.add_argument("--others", nargs="*", default=["7net-0", "7net-l3i5"])
    options_parser.add_argument("--target", default="32x0+16x1+8x2")
    options_parser.add_argument("--calibration", type=int, default=12, help="frames for the compensation")
    options_parser.add_argument("--minutes", type=float, default=15.0)
    options_parser.add_argument("--lr", type=float, default=2e-3)
    options_parser.add_argument("--lr-compact", type=float, default=5e-3)
    options_parser.add_argument("--lr-scratch", type=float, default=1e-2)
    options_parser.add_argument("--every", type=int, default=1, help="use every n-th training frame")
    options_parser.add_argument("--seed", type=int, default=0)
    options = options_parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    run(bench)
    if "report" in options.part:
        write_report(bench)


if __name__ == "__main__":
    main()
