"""Is it pruning, or is it just training?  The same small architecture, the same data and time.

Trains the student of a finished ``quickstart`` folder from (1) compensated, (2) plainly sliced and
(3) random weights, each with the same budget of wall-clock time, and prints held-out errors.

    compactmlip quickstart
    python benchmarks/distillation.py compactmlip-quickstart --minutes 3
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from common import from_random, header, parser, report, table
from torch import nn

from compactmlip import checkpoint
from compactmlip.data.read import read_labelled
from compactmlip.models import model_spec
from compactmlip.train.dataset import Dataset
from compactmlip.train.distil import DistilOptions, distil
from compactmlip.train.metrics import evaluate

KEPT = ("basis.wave_numbers",)
"""What random models have from the trained one."""


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("folder", type=Path)
    options_parser.add_argument("--minutes", type=float, default=3.0)
    options_parser.add_argument("--lr-random", type=float, nargs="+", default=[5e-3, 1e-2])
    options = options_parser.parse_args()
    torch.set_num_threads(options.threads)
    frames = {name: read_labelled(options.folder / f"{name}.xyz") for name in ("train", "valid", "test")}
    starts = {
        name: checkpoint.load(options.folder / f"{name}.safetensors") for name in ("compensated", "pruned")
    }
    runs: list[tuple[str, nn.Module, float | None]] = [
        ("pruned, compensated", starts["compensated"], None),
        ("pruned by plain slicing", starts["pruned"], None),
    ]
    runs += [
        (f"random weights, lr {lr:g}", from_random(starts["pruned"], 0, KEPT), lr) for lr in options.lr_random
    ]
    rows = []
    for name, start, lr in runs:
        settings = {"max_epochs": None, "max_minutes": options.minutes, **({"lr": lr} if lr else {})}
        with tempfile.TemporaryDirectory() as folder:
            result = distil(
                start, frames["train"], frames["valid"], DistilOptions.model_validate(settings), folder, False
            )
        row: list[object] = [name, int(result.history[-1]["epoch"])]
        for model in (start, result.model):
            test = Dataset.from_frames(frames["test"], model_spec(model), torch.float32, "the test set")
            errors = evaluate(model, test)
            row += [errors.energy.mae, errors.forces.mae, errors.stress.mae]
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    columns = (
        "start",
        "epochs",
        "E before (meV/atom)",
        "F before (meV/A)",
        "S before (meV/A^3)",
        "E",
        "F",
        "S",
    )
    text = header(
        "Distillation from three starts", f"python benchmarks/distillation.py --minutes {options.minutes}"
    )
    note = f"{options.minutes} minutes of training each, {len(frames['train'])} training frames.\n\n"
    report(text + "\n" + note + table(columns, rows), options.output)


if __name__ == "__main__":
    main()
