"""Successive halving: train the best few for a short time, keep the better half, train it for longer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ase import Atoms
from torch import nn

from compactmlip.errors import InputError
from compactmlip.progress import Track
from compactmlip.search.study import PROPOSED, Candidate
from compactmlip.search.workers import spawned
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


LARGEST_LAG = 2.5
"""Error after compensation, over the best one, with which the best of a kind is still trained.

For silicon, uniform plans with 1.7 times the error of the best one learned as well as any."""


def to_train(ranked: Sequence[Candidate], number: int) -> list[Candidate]:
    """Candidates to train: the best half by rank, then the best of each kind that a search begins with.

    Errors after compensation do not say what training makes of plans of different kinds, while close
    relatives of the best one hardly differ.

    Parameters
    ----------
    ranked
        Best first.
    number
        How many.
    """
    chosen = list(ranked[: -(-number // 2)])
    kinds: dict[str, Candidate] = {}
    for candidate in ranked:
        if (
            candidate.source not in PROPOSED
            and candidate.error.forces <= LARGEST_LAG * ranked[0].error.forces
        ):
            kinds.setdefault(candidate.source, candidate)
    chosen += [c for c in kinds.values() if c not in chosen][: number - len(chosen)]
    return [*chosen, *(c for c in ranked if c not in chosen)][:number]


Job = tuple[str, int, nn.Module, DistilOptions, Path]
"""Name, round, student, options and folder of a training."""


def successive_halving(
    students: Mapping[str, nn.Module],
    train: Sequence[Atoms],
    valid: Sequence[Atoms],
    minutes: float,
    folder: Path,
    *,
    options: DistilOptions | None = None,
    workers: int = 1,
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
    workers
        Processes that train at the same time, with one thread each; 1 trains in this process.

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
    rounds = math.ceil(math.log2(len(students))) + 1
    options = options or DistilOptions()
    left = dict(students)
    done: list[Trained] = []
    with _trainers(train, valid, min(workers, len(students)), progress) as run:
        for k in range(1, rounds + 1):
            share = minutes / rounds / math.ceil(len(left) / workers)
            budget = options.model_copy(update={"max_epochs": None, "max_minutes": share})
            jobs = [(name, k, model, budget, folder / f"{name}-{k}") for name, model in left.items()]
            results = sorted(run(jobs), key=lambda trained: -trained.forces)
            done += results
            keep = results[len(results) // 2 :]
            left = {trained.name: trained.result.model for trained in keep}
    return done


@contextmanager
def _trainers(
    train: Sequence[Atoms], valid: Sequence[Atoms], workers: int, progress: bool
) -> Iterator[Callable[[list[Job]], list[Trained]]]:
    """What trains the students of a round, here or in several processes."""
    if workers == 1:
        yield lambda jobs: [_train(train, valid, job, progress) for job in jobs]
        return
    with spawned(workers, _begin, list(train), list(valid)) as processes:
        yield lambda jobs: _shown(processes.map(_train_in_worker, jobs), len(jobs), progress)


def _shown(results: Iterable[Trained], number: int, progress: bool) -> list[Trained]:
    """Results, shown as they come."""
    found: list[Trained] = []
    with Track("training", number, "students", enabled=progress) as track:
        for trained in results:
            found.append(trained)
            track.advance(1, f"{trained.name}, round {trained.round}: {trained.forces:.1f} meV/A")
    return found


def _train(train: Sequence[Atoms], valid: Sequence[Atoms], job: Job, progress: bool) -> Trained:
    name, k, model, options, folder = job
    return Trained(name, k, distil(model, train, valid, options, folder, progress))


_sets: tuple[list[Atoms], list[Atoms]] | None = None


def _begin(train: list[Atoms], valid: list[Atoms]) -> None:
    global _sets
    _sets = train, valid


def _train_in_worker(job: Job) -> Trained:
    assert _sets is not None
    return _train(*_sets, job, progress=False)
