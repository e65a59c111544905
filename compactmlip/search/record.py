"""What a search keeps in its folder: who it is and how long it took, and its results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from torch import nn

from compactmlip.checkpoint import atomic_write_text
from compactmlip.compress.compensate import HeldOutError
from compactmlip.data.label import fingerprint
from compactmlip.errors import InputError
from compactmlip.search.options import SearchOptions
from compactmlip.search.picture import plot_front
from compactmlip.search.study import Candidate, front

CONTINUES = {"minutes", "candidates", "finalists", "distil_minutes", "workers"}
"""Options that may differ when a search is continued: they change none of its candidates."""


@dataclass(frozen=True)
class Found:
    """Outcome of :func:`compactmlip.search.run.search`.

    Attributes
    ----------
    chosen
        The best candidate that meets the target, or the one closest to it.
    meets_target
        Whether it does.
    speedup
        Measured with the finalists in turns; None if nothing was measured.
    errors
        Of the written checkpoint on structures that its refit had not seen; None if it was trained.
    candidates
        Number of plans that were evaluated.
    """

    chosen: Candidate
    meets_target: bool
    speedup: float | None
    errors: HeldOutError | None
    candidates: int

    def text(self, folder: Path) -> str:
        """One line for people."""
        speed = "" if self.speedup is None else f", {self.speedup:.1f} times as fast"
        verdict = "" if self.meets_target else "; the target was NOT met, this comes closest"
        return (
            f"wrote {folder / 'plan.json'} and {folder / 'pruned.safetensors'}: {self.chosen.plan.summary}, "
            f"held-out force MAE {self.chosen.error.forces:.1f} meV/A{speed} ({self.candidates} candidates)"
            f"{verdict}"
        )

    def values(self, folder: Path) -> dict[str, Any]:
        """The same for scripts."""
        return {
            "output": folder,
            "plan": self.chosen.plan.target,
            "without_paths": list(self.chosen.plan.without_paths),
            "force_mae_meV_per_A": self.chosen.error.forces,
            "speedup": self.speedup,
            "meets_target": self.meets_target,
            "candidates": self.candidates,
            "parameters": self.chosen.parameters,
        }


class State:
    """Identity of the run in the folder and the time that it has taken so far."""

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self.identity, self.seconds = path, identity, 0.0
        if path.is_file():
            found = json.loads(path.read_text())
            if found["identity"] != identity:
                raise InputError(
                    f"{path.parent} holds a search with another model, other structures or options; give "
                    "another folder with -o, or delete this one."
                )
            self.seconds = float(found["seconds"])
        self.save(self.seconds)

    def save(self, seconds: float) -> None:
        """Remember the time."""
        self.seconds = seconds
        atomic_write_text(self.path, json.dumps({"identity": self.identity, "seconds": seconds}) + "\n")


def identity_of(teacher: nn.Module, frames: Sequence[Atoms], options: SearchOptions) -> str:
    """Digest of all that decides what a search's candidates are worth."""
    settings = options.model_dump_json(exclude=CONTINUES)
    return hashlib.sha256((fingerprint(frames, teacher) + settings).encode()).hexdigest()


def digest_of(atoms: Atoms) -> str:
    """Structure as it reads from a file with eight digits."""
    positions = np.round(atoms.positions, 6) + 0.0
    return hashlib.sha256(atoms.numbers.tobytes() + positions.tobytes()).hexdigest()


def write_results(
    folder: Path,
    options: SearchOptions,
    about: dict[str, Any],
    candidates: Sequence[Candidate],
    chosen: Candidate,
    measured: dict[str, Any],
) -> None:
    """Write ``plan.json``, ``front.json`` and ``front.png``.

    Parameters
    ----------
    about
        Further entries of ``front.json``: the uncut model, the speed model.
    measured
        Speed-ups of the finalists, and of the chosen one under "speedup".
    """
    targets = options.model_dump(mode="json", include={"speedup", "force_mae", "memory"}, exclude_none=True)
    made_by = {
        "search": targets,
        "force_mae_meV_per_A": round(chosen.error.forces, 3),
        "measured_speedup": round(measured["speedup"], 3),
    }
    chosen.plan.model_copy(update={"made_by": made_by}).save(folder / "plan.json")
    content = {
        "target": targets,
        **about,
        "chosen": chosen.row() | measured,
        "front": [c.row() for c in front(candidates)],
        "candidates": [c.row() for c in candidates],
    }
    atomic_write_text(folder / "front.json", json.dumps(content, indent=1) + "\n")
    plot_front(folder / "front.png", candidates, chosen, options.factor)
