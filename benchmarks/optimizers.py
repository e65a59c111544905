"""Which optimiser and learning rate train best in a given time?

Trains the student of a finished ``quickstart`` folder, compensated or with random weights, with each
optimiser and learning rate for the same processor time, and prints errors on structures that no training
saw.

    compactmlip quickstart
    python benchmarks/optimizers.py compactmlip-quickstart --minutes 3
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch
from common import from_random, header, parser, report, shown, table
from distillation import KEPT

from compactmlip import checkpoint
from compactmlip.data.read import read_labelled
from compactmlip.models import model_spec
from compactmlip.train.dataset import Dataset
from compactmlip.train.distil import DistilOptions, distil
from compactmlip.train.metrics import evaluate

COMPENSATED, RANDOM = "compensated", "random weights"

RUNS = {
    COMPENSATED: [
        *(("soap", lr) for lr in (1e-3, 3e-3, 1e-2)),
        *(("adamw", lr) for lr in (1e-3, 2e-3, 5e-3)),
    ],
    RANDOM: [("soap", 3e-3), ("soap", 1e-2), ("adamw", 3e-3), ("adamw", 1e-2)],
}


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("folder", type=Path)
    options_parser.add_argument("--minutes", type=float, default=3.0, help="processor time of each training")
    options = options_parser.parse_args()
    torch.set_num_threads(options.threads)
    frames = {name: read_labelled(options.folder / f"{name}.xyz") for name in ("train", "valid", "test")}
    compensated = checkpoint.load(options.folder / "compensated.safetensors", torch.float32)
    test = Dataset.from_frames(frames["test"], model_spec(compensated), torch.float32, "the test set")
    rows = []
    for start, runs in RUNS.items():
        model = compensated if start == COMPENSATED else from_random(compensated, 0, KEPT)
        for optimizer, lr in runs:
            settings = DistilOptions(optimizer=optimizer, lr=lr, max_epochs=None, max_minutes=options.minutes)
            with tempfile.TemporaryDirectory() as folder:
                result = distil(
                    model, frames["train"], frames["valid"], settings, folder, False, clock=time.process_time
                )
            found = evaluate(result.model, test).row()
            keys = ("energy_mae_meV_per_atom", "forces_mae_meV_per_A", "stress_mae_meV_per_A3")
            valid = min(row["valid_loss"] for row in result.history)
            rows.append([start, optimizer, lr, result.history[-1]["steps"], valid, *(found[k] for k in keys)])
            print(rows[-1], file=sys.stderr, flush=True)
    text = header("Optimisers", f"python benchmarks/optimizers.py {shown(sys.argv[1:])}")
    text += (
        f"\n{options.minutes:g} minutes of processor time each. {len(frames['train'])} training structures, "
        f"labelled by the teacher; {len(frames['valid'])} choose the epoch; mean absolute errors on "
        f"{len(frames['test'])} others, meV/atom, meV/A, meV/A^3.\n\n"
    )
    columns = ("start", "optimiser", "peak lr", "steps", "validation loss", "E", "F", "S")
    report(text + table(columns, rows), options.output)


if __name__ == "__main__":
    main()
