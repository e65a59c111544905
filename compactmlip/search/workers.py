"""Candidates are evaluated here, or in processes of their own, each with one thread."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import torch
from ase import Atoms
from torch import nn

from compactmlip import checkpoint
from compactmlip.compress.cost import Shapes
from compactmlip.compress.scores_file import load_scores
from compactmlip.search.evaluate import Evaluator, Frames
from compactmlip.search.options import SearchOptions
from compactmlip.search.race import Race
from compactmlip.search.study import Candidate

Leader = Callable[[], Candidate | None]


def scores_file(folder: Path, criterion: str) -> Path:
    """Where a search keeps the scores of one criterion."""
    return folder / f"scores-{criterion}.safetensors"


def make_race(teacher: nn.Module, frames: Sequence[Atoms], options: SearchOptions, folder: Path) -> Race:
    """Race of a search whose scores are in the folder."""
    shapes = Shapes(teacher)
    scores = {c: load_scores(scores_file(folder, c), teacher)[0] for c in options.criteria}

    def evaluator_of(divided: Frames) -> Evaluator:
        return Evaluator(teacher, divided, shapes, scores, options.damping, options.seed)

    return Race(evaluator_of, frames, options)


class Workers:
    """Evaluates candidates in this process."""

    def __init__(self, race: Race) -> None:
        self.race = race

    def evaluated(self, starts: Iterator[Candidate], leader: Leader) -> Iterator[Candidate]:
        """Candidates with errors, as they become ready.

        ``leader`` gives the best one so far.  ``starts`` is asked for another one when a process is free.
        """
        for start in starts:
            yield self.race.run(start, leader())

    def completed(self, candidates: Sequence[Candidate], advance: Callable[[float], None]) -> list[Candidate]:
        """The same candidates, measured in all divisions."""
        return [self.race.completed(c, advance) for c in candidates]


class Pool(Workers):
    """Evaluates in several processes; each prepares the structures for itself, which takes memory."""

    def __init__(self, processes: ProcessPoolExecutor, number: int) -> None:
        self.processes, self.number = processes, number

    def evaluated(self, starts: Iterator[Candidate], leader: Leader) -> Iterator[Candidate]:
        """As of the base class."""
        running: set[Future[Candidate]] = set()
        more = True
        while more or running:
            while more and len(running) < self.number:
                start = next(starts, None)
                if start is None:
                    more = False
                else:
                    running.add(self.processes.submit(_run, start, leader()))
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()

    def completed(self, candidates: Sequence[Candidate], advance: Callable[[float], None]) -> list[Candidate]:
        """As of the base class."""
        found = []
        for before, after in zip(candidates, self.processes.map(_complete, candidates), strict=True):
            found.append(after)
            advance(len(after.divisions) - len(before.divisions))
        return found


@contextmanager
def open_workers(
    teacher: nn.Module, frames: Sequence[Atoms], options: SearchOptions, folder: Path
) -> Iterator[Workers]:
    """Workers of a search whose scores are in the folder: this process, or as many as the options say."""
    if options.workers == 1:
        yield Workers(make_race(teacher, frames, options, folder))
        return
    with tempfile.TemporaryDirectory(prefix="workers-", dir=folder) as files:
        file = checkpoint.save(teacher, Path(files) / "teacher.safetensors")
        with spawned(options.workers, _begin, file, list(frames), options, folder) as processes:
            yield Pool(processes, options.workers)


@contextmanager
def spawned(number: int, begin: Callable[..., None], *about: object) -> Iterator[ProcessPoolExecutor]:
    """Processes with one thread each, which begin with a call of ``begin``."""
    processes = ProcessPoolExecutor(number, get_context("spawn"), _prepare, (begin, about))
    try:
        yield processes
    finally:
        processes.shutdown(wait=True, cancel_futures=True)


def _prepare(begin: Callable[..., None], about: tuple[object, ...]) -> None:
    # An interruption ends the search's own process, which ends these.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    begin(*about)


_race: Race | None = None


def _begin(file: Path, frames: list[Atoms], options: SearchOptions, folder: Path) -> None:
    global _race
    _race = make_race(checkpoint.load(file), frames, options, folder)


def _run(start: Candidate, leader: Candidate | None) -> Candidate:
    assert _race is not None
    return _race.run(start, leader)


def _complete(candidate: Candidate) -> Candidate:
    assert _race is not None
    return _race.completed(candidate)
