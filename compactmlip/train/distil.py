"""Distillation: train a pruned model on its teacher's energies, forces, stresses and Hessian."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from torch import nn

from compactmlip import checkpoint
from compactmlip.models import cast, model_spec, record_step
from compactmlip.train.dataset import Dataset
from compactmlip.train.loop import fit
from compactmlip.train.metrics import Errors, evaluate
from compactmlip.train.options import TrainOptions
from compactmlip.train.ranks import current_ranks
from compactmlip.train.state import RunFolder, TrainingState, fingerprint

BEST_FILE = "best.safetensors"


class DistilOptions(TrainOptions):
    """How to train a student on its teacher's labels."""


@dataclass(frozen=True)
class DistilResult:
    """A trained student.

    Attributes
    ----------
    model
        Averaged weights at the lowest validation loss (the student itself if nothing was better).
    history
        One row per validation, as in ``history.csv``; row 0 is the student before training.
    best_epoch
        Epoch of ``model``.
    stopped_because
        Why the training ended.
    errors
        Of ``model`` on the validation frames.
    """

    model: nn.Module
    history: list[dict[str, float]]
    best_epoch: int
    stopped_because: str
    errors: Errors


def distil(
    student: nn.Module,
    train_frames: Sequence[Atoms],
    valid_frames: Sequence[Atoms],
    options: DistilOptions,
    out_dir: str | Path,
    progress: bool = True,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> DistilResult:
    """Train a copy of ``student`` on frames labelled by the teacher.

    Writes into ``out_dir``: ``history.csv``, the resume file and, at the end, ``best.safetensors``.
    Called again with the same arguments after an interruption, it continues; after the end it
    returns the result at once.  Processes that ``torchrun`` started share the work, and each returns the
    result.

    Parameters
    ----------
    student
        A native model; it is not changed.
    train_frames, valid_frames
        Structures with ``REF_energy`` (eV), ``REF_forces`` (eV/Angstrom) and, where they are periodic,
        ``REF_stress`` (eV/Angstrom^3); with a weight of the Hessian also the arrays that
        :func:`compactmlip.data.label.label` writes for it.  The validation frames choose the best epoch.
    options
        How to train.
    out_dir
        Folder of this run.
    progress
        Show a progress bar.
    clock
        Seconds, for the wall-clock budget.

    Raises
    ------
    InputError
        If frames lack labels or hold species that the student does not cover, or the folder holds
        another run.
    CompactMLIPError
        If the loss stays infinite or NaN.
    KeyboardInterrupt
        After the state has been saved.
    """
    dtype = checkpoint.DTYPES[options.dtype]
    model = cast(copy.deepcopy(student), dtype).requires_grad_(True)
    spec = model_spec(model)
    used = options.hessian_directions if options.hessian_weight else 0
    every = sys.maxsize if used else 0
    train = Dataset.from_frames(train_frames, spec, dtype, "the training set", hessian=every)
    valid = Dataset.from_frames(valid_frames, spec, dtype, "the validation set", hessian=used)
    folder = RunFolder(out_dir, fingerprint(model, (train, valid), options, "distil"))
    state = TrainingState(model, options)
    saved = current_ranks().from_first(folder.load)
    if saved is not None:
        state.restore(saved)
    fit(state, train, valid, options, folder, title="distil", progress=progress, clock=clock)
    return _finish(state, train, valid, options, folder)


def _finish(
    state: TrainingState, train: Dataset, valid: Dataset, options: DistilOptions, folder: RunFolder
) -> DistilResult:
    """Save the best weights, with what was done to them."""
    counters = state.counters
    assert counters.stopped is not None
    best = best_model(state)
    errors = evaluate(best, valid)
    record_training(best, "distil", state, options, len(train.structures), len(valid.structures), errors)
    if current_ranks().first:
        checkpoint.save(best, folder.path / BEST_FILE)
    return DistilResult(best, counters.history, counters.best_epoch, counters.stopped, errors)


def best_model(state: TrainingState) -> nn.Module:
    """Copy of the model with the averaged weights of the lowest validation loss."""
    best = copy.deepcopy(state.average.model)
    with torch.no_grad():
        for name, parameter in best.named_parameters():
            parameter.copy_(state.best[name])
    return best.requires_grad_(True)


def record_training(
    model: nn.Module,
    action: str,
    state: TrainingState,
    options: TrainOptions,
    train_frames: int,
    valid_frames: int,
    errors: Errors,
    **more: Any,
) -> None:
    """Write a training into the provenance of its result."""
    done = {
        "train_frames": train_frames,
        "valid_frames": valid_frames,
        "best_epoch": state.counters.best_epoch,
        "stopped_because": state.counters.stopped,
        "valid_errors": errors.row(),
    }
    used = options.model_dump(mode="json") | {"lr": options.lr or state.counters.peak_lr}
    record_step(model, action, **used, **done, **more)
