"""Active distillation: the student's own dynamics finds the structures that it does not know.

After a first training the student runs molecular dynamics.  From its snapshots, those farthest from all that
it was trained on (in its own invariant features) go to the teacher, whose labels join the training set, and
the training goes on.  Snapshots from just before a run broke are among them: there the student is wrong.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from pydantic import Field
from torch import nn

from compactmlip.checkpoint import DTYPES, atomic_write_text
from compactmlip.data.label import fingerprint, label
from compactmlip.data.md import FORCE_LIMIT, trajectory
from compactmlip.data.read import read_structures, write_labelled
from compactmlip.data.select import farthest_points, structure_descriptors
from compactmlip.data.teacher import scalar_features
from compactmlip.errors import InputError
from compactmlip.models import model_spec
from compactmlip.progress import Track
from compactmlip.train.dataset import Dataset
from compactmlip.train.distil import DistilOptions, DistilResult, distil
from compactmlip.train.metrics import Errors, evaluate
from compactmlip.train.ranks import current_ranks
from compactmlip.train.state import make_folder

CHOSEN, ADDED, ROUNDS, IDENTITY = "chosen.xyz", "added.xyz", "rounds.json", "active.json"

LAST_SHARE = 0.5
"""Of the budget, for the training after the last round; those before share the rest."""

TO_VALIDATION = 10
"""One of so many new structures helps to choose the best epoch instead of being trained on."""


class ActiveOptions(DistilOptions):
    """How to train and explore in turn; the budget is that of all trainings together."""

    rounds: int = Field(default=2, ge=1, description="explorations, each followed by a training")
    add: int = Field(default=20, ge=1, description="structures that the teacher labels after each")
    temperature: tuple[float, ...] = Field(
        default=(300.0, 600.0, 1000.0), min_length=1, description="of the student's dynamics, K, in turn"
    )
    md_runs: int = Field(default=24, ge=1, description="runs of the student in each exploration")
    md_steps: int = Field(default=200, ge=1, description="steps of a run (2 fs, with hydrogen 1 fs)")
    md_interval: int = Field(default=20, ge=1, description="steps between snapshots")

    def training(self, number: int) -> DistilOptions:
        """Options of training ``number``, from 0 to ``rounds``."""
        share = LAST_SHARE if number == self.rounds else (1 - LAST_SHARE) / self.rounds
        given = self.model_dump(exclude=set(ActiveOptions.model_fields) - set(DistilOptions.model_fields))
        if self.max_minutes is not None:
            given["max_minutes"] = share * self.max_minutes
        if self.max_epochs is not None:
            given["max_epochs"] = math.ceil(share * self.max_epochs)
        return DistilOptions(**given)


def distil_actively(
    student: nn.Module,
    teacher: nn.Module,
    train_frames: Sequence[Atoms],
    valid_frames: Sequence[Atoms],
    options: ActiveOptions,
    out_dir: str | Path,
    progress: bool = True,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> DistilResult:
    """Train a copy of ``student``, and let it find structures that it should learn as well.

    Writes into ``out_dir`` one folder for each training (:func:`compactmlip.train.distil.distil`) with the
    structures that were added before it, and ``rounds.json``.  Called again after an interruption, it
    continues.

    Parameters
    ----------
    student, teacher
        Native models; they are not changed.
    train_frames, valid_frames
        Structures labelled by the teacher; dynamics starts from those to train on.
    clock
        Seconds, for the budgets of the trainings.

    Raises
    ------
    InputError
        If frames or options cannot be used, the folder holds another run, or processes of ``torchrun`` share
        the work, which dynamics does not support.
    """
    if current_ranks().size > 1:
        raise InputError("active distillation runs in one process; start it without torchrun.")
    out = Path(out_dir)
    make_folder(out)
    _claim(out, [*train_frames, *valid_frames], student, teacher, options)
    train, valid = list(train_frames), list(valid_frames)
    model, rows = student, []
    for number in range(options.rounds + 1):
        folder = out / f"training-{number}"
        row: dict[str, Any] = {"round": number}
        if number:
            make_folder(folder)
            new = _explore(model, teacher, train, options, number, folder, progress)
            row |= {"added": len(new), "errors_on_added": _errors(model, new, options).row() if new else None}
            kept = len(new) // TO_VALIDATION
            valid, train = valid + new[:kept], train + new[kept:]
        result = distil(model, train, valid, options.training(number), folder, progress, clock=clock)
        model = result.model
        rows.append(row | {"train": len(train), "valid": len(valid), "valid_errors": result.errors.row()})
        atomic_write_text(out / ROUNDS, json.dumps(rows, indent=1) + "\n")
    return result


def _claim(
    out: Path, frames: Sequence[Atoms], student: nn.Module, teacher: nn.Module, options: ActiveOptions
) -> None:
    """Remember what this folder is for, or refuse it."""
    settings = options.model_dump_json(exclude={"checkpoint_minutes", "tensorboard"})
    digests = [fingerprint(frames, model) for model in (student, teacher)]
    identity = hashlib.sha256(json.dumps([settings, *digests]).encode()).hexdigest()
    path = out / IDENTITY
    if path.is_file() and json.loads(path.read_text())["identity"] != identity:
        raise InputError(
            f"{out} holds an active distillation with other models, structures or options; give another "
            "folder or delete this one."
        )
    atomic_write_text(path, json.dumps({"identity": identity}) + "\n")


def _explore(
    model: nn.Module,
    teacher: nn.Module,
    known: Sequence[Atoms],
    options: ActiveOptions,
    number: int,
    folder: Path,
    progress: bool,
) -> list[Atoms]:
    """Structures far from the known ones with the teacher's labels, without those that it finds unphysical.

    They are in the order of their distance, so that the first ones differ most.
    """
    if not (folder / CHOSEN).is_file():
        snapshots = _dynamics(model, known, options, number, progress)
        if not snapshots:
            raise InputError(
                "all runs of the student broke at once, so that there is nothing to learn from: train it for "
                "longer first, or lower the temperature."
            )
        write_labelled(folder / CHOSEN, _novel(model, known, snapshots, options.add))
    chosen = read_structures([folder / CHOSEN])
    products = options.hessian_directions if options.hessian_weight else 0
    labelled = label(chosen, teacher, folder / ADDED, hessian=products, progress=progress)
    return [a for a in labelled if np.linalg.norm(a.arrays["REF_forces"], axis=1).max() < FORCE_LIMIT]


def _dynamics(
    model: nn.Module, starts: Sequence[Atoms], options: ActiveOptions, number: int, progress: bool
) -> list[Atoms]:
    """Snapshots of runs from random structures; those before a run broke are kept."""
    rng = np.random.default_rng((options.seed, number))
    order = np.resize(rng.permutation(len(starts)), options.md_runs).tolist()
    total = options.md_steps * sum(len(starts[k]) for k in order)
    found: list[Atoms] = []
    with Track("Student MD", total, "atoms", enabled=progress) as track:
        for run, k in enumerate(order):
            temperature = options.temperature[run % len(options.temperature)]
            frames = trajectory(
                starts[k],
                model,
                temperature,
                steps=options.md_steps,
                interval=min(options.md_interval, options.md_steps),
                rng=rng,
                advance=track.advance,
            )
            for atoms in frames:
                atoms.info |= {"config_type": "active", "temperature": temperature}
            found += frames
    return found


def _novel(model: nn.Module, known: Sequence[Atoms], snapshots: Sequence[Atoms], wanted: int) -> list[Atoms]:
    """The snapshots farthest from all known structures and from each other."""
    frames = [*known, *snapshots]
    features = [x for _, x in scalar_features(frames, model)]
    descriptors = structure_descriptors(frames, features)
    taken = range(len(known))
    picked = farthest_points(descriptors, min(wanted, len(snapshots)), chosen=taken)
    return [frames[k] for k in picked]


def _errors(model: nn.Module, frames: Sequence[Atoms], options: ActiveOptions) -> Errors:
    dataset = Dataset.from_frames(frames, model_spec(model), DTYPES[options.dtype], "the added structures")
    return evaluate(model, dataset)
