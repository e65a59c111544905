"""What each process of ``tests/train/test_ranks.py`` does, and what one process alone does in its place."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compactmlip.checkpoint import load
from compactmlip.data.read import read_labelled
from compactmlip.train import loop, state
from compactmlip.train.dataset import Dataset
from compactmlip.train.distil import DistilOptions, distil
from compactmlip.train.ranks import current_ranks

RANK = int(os.environ.get("RANK", "0"))
BATCHES = ([0, 1, 2, 3, 4, 5, 6], [3], [6, 0])
"""One that is split unevenly, one of a single structure, one with a structure that has no stress."""


class Clock:
    """One second passes with each look; a hundred in the second process."""

    def __init__(self) -> None:
        self.time = 1e6 * RANK

    def __call__(self) -> float:
        self.time += 1.0 + 99.0 * RANK
        return self.time


def options(**changes: Any) -> DistilOptions:
    settings = {"batch_atoms": 16, "lr": 0.01, "dtype": "float64", "hessian_weight": 1.0, "hessian_every": 2}
    return DistilOptions.parse(**{**settings, **changes})


def gradients(folder: Path) -> list[dict[str, Any]]:
    """Gradient and loss terms of each of BATCHES."""
    model = load(folder / "student.safetensors", None).requires_grad_(True)
    frames = read_labelled(folder / "frames.xyz")
    data = Dataset.from_frames(frames, model.spec, torch.float64, hessian=3)
    chosen = options(hessian_directions=2)
    own = state.RunFolder(folder / f"unused-{RANK}", "none")
    run = loop._Run(state.TrainingState(model, chosen), data, data, chosen, own, Clock())
    found = []
    for indices in BATCHES:
        parameters = [p for p in model.parameters() if p.requires_grad]
        model.zero_grad(set_to_none=True)
        terms = run.gradients(np.array(indices), parameters)
        gradient = [None if p.grad is None else p.grad.flatten().tolist() for p in parameters]
        found.append({"terms": terms.tolist(), "gradient": gradient})
    return found


def train(folder: Path, name: str) -> dict[str, Any]:
    """Distil for a number of minutes of the clock; what was written, and the result."""
    written = []
    for method in ("save", "write_history"):
        original = getattr(state.RunFolder, method)

        def noted(self: Any, *args: Any, _original: Any = original, _method: str = method) -> None:
            written.append(_method)
            _original(self, *args)

        setattr(state.RunFolder, method, noted)
    frames = read_labelled(folder / "frames.xyz")
    student = load(folder / "student.safetensors", None)
    budget = options(max_epochs=None, max_minutes=2.0)
    result = distil(student, frames[:5], frames[5:], budget, folder / name, clock=Clock(), progress=False)
    return {
        "written": written,
        "stopped": result.stopped_because,
        "history": result.history,
        "weights": torch.cat([p.detach().flatten() for p in result.model.parameters()]).tolist(),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    ranks = current_ranks()
    torch.set_num_threads(1)
    found = {"size": ranks.size, "gradients": gradients(folder), "training": train(folder, "both")}
    (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
