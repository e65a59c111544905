"""Successive halving: train the best few for a short time, keep the better half, train it for longer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ase import Atoms
from torch import nn

from compactmlip.errors import InputError
from compactmlip.train.distil import DistilOptions, DistilResult, distil


@dataclass(frozen=True)
class Trained:
    """One student after one round.

    Attributes
    ----------
    name, round
        Which student, and how many rounds it has been through (from 1).
    result
        Of the training.
    """

    name: str
    round: int
    result: DistilResult

    @property
    def forces(self) -> float:
        """Force error on the validation frames, meV/Angstrom."""
        return self.result.errors.forces.mae


def successive_halving(
    students: Mapping[str, nn.Module],
    train: Sequence[Atoms],
    valid: Sequence[Atoms],
    minutes: float,
    folder: Path,
    *,
    options: DistilOptions | None = None,
    progress: bool = False,
) -> list[Trained]:
    """Train all students; after each round the better half goes on (Jamieson & Talwalkar 2016).

    Every round gets the same share of the time, so those that are left train for longer and longer; a round
    starts from the weights of the one before.  Called again after an interruption, it continues.

    Parameters
    ----------
    students
        Models by name.
    train, valid
        Labelled frames, as :func:`compactmlip.train.distil.distil` takes them.
    minutes
        Time for everything.
    folder
        Where the trainings are kept.
    options
        How to train; its budget is replaced.

    Returns
    -------
    list[Trained]
        All results of all rounds; the last one is the winner's.

    Raises
    ------
    InputError
        If there is no student.
    """
    if not students:
        raise InputError("successive halving needs at least one student.")
    rounds = max(1, math.ceil(math.log2(len(students))) + 1) if len(students) > 1 else 1
    options = options or DistilOptions()
    left = dict(students)
    done: list[Trained] = []
    for k in range(1, rounds + 1):
        share = minutes / rounds / len(left)
        budget = options.model_copy(update={"max_epochs": None, "max_minutes": share})
        results = [
            Trained(name, k, distil(model, train, valid, budget, folder / f"{name}-{k}", progress))
            for name, model in left.items()
        ]
        results.sort(key=lambda trained: -trained.forces)
        done += results
        keep = results[len(results) // 2 :]
        left = {trained.name: trained.result.model for trained in keep}
    return done
