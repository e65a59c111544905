"""Errors of plans as means over several divisions of the structures; the worst run in the first one only.

The best of hundreds of candidates on one held-out set is partly the luckiest one on it, and what an optimiser
learns there it learns partly about that set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from ase import Atoms

from compactmlip.search.evaluate import TINY, Evaluator, Frames, PlanError, split_frames
from compactmlip.search.options import SearchOptions
from compactmlip.search.study import Candidate

LAG = math.log(1.15)
"""How far a candidate may be behind the leader (in the objective) and still run in the next division."""

PUNISHMENT = 4.0
"""Weight of the logarithm of an error that is too large against that of the time."""


class Objective:
    """What a search minimises: the error at the wanted speed, or the time at the wanted error."""

    def __init__(self, options: SearchOptions) -> None:
        self.options = options

    def __call__(self, candidate: Candidate) -> float:
        """Logarithm of the error or of the time, and what is added to it."""
        options = self.options
        error = math.log(max(candidate.error.forces, TINY))
        if options.force_mae is not None and options.factor is None:
            return math.log(candidate.time) + PUNISHMENT * max(0.0, error - math.log(options.force_mae))
        # Where all speeds count, errors are compared at equal speed; they rise about as its square root.
        return error if options.factor is not None else error + 0.5 * math.log(candidate.time)


def is_complete(candidate: Candidate, options: SearchOptions) -> bool:
    """Whether a candidate was measured in all divisions."""
    return len(candidate.divisions) == options.splits


class Race:
    """Measures plans on divisions of the structures, of which each is prepared when it is needed first.

    Parameters
    ----------
    evaluator_of
        Makes the evaluator of a division.
    frames
        All structures.
    options
        Number of divisions and their sizes.
    """

    def __init__(
        self, evaluator_of: Callable[[Frames], Evaluator], frames: Sequence[Atoms], options: SearchOptions
    ) -> None:
        self.evaluator_of, self.frames, self.options = evaluator_of, frames, options
        self.objective = Objective(options)
        self.evaluators: dict[int, Evaluator] = {}

    def run(self, start: Candidate, leader: Candidate | None) -> Candidate:
        """Measure a candidate, in further divisions while it is not far behind the leader.

        Errors of one that fell behind are estimated for all divisions: the leader's there, times the ratio of
        the two in the divisions that both ran in.

        Parameters
        ----------
        start
            The candidate; its errors are ignored.
        leader
            The best one that ran in all divisions, if there is one.
        """
        objective = self.objective
        errors: list[PlanError] = []
        for k in range(self.options.splits):
            errors.append(self._evaluator(k).error(start.plan))
            if leader is None or k + 1 == self.options.splits:
                continue
            so_far = replace(leader, error=PlanError.mean(leader.divisions[: k + 1]))
            if objective(replace(start, error=PlanError.mean(errors))) > objective(so_far) + LAG:
                error = PlanError.mean(errors).scaled(leader.error, so_far.error)
                return replace(start, error=error, divisions=tuple(errors))
        return replace(start, error=PlanError.mean(errors), divisions=tuple(errors))

    def completed(self, candidate: Candidate, advance: Callable[[float], None] = lambda _: None) -> Candidate:
        """The same candidate, measured in all divisions."""
        errors = list(candidate.divisions)
        for k in range(len(errors), self.options.splits):
            errors.append(self._evaluator(k).error(candidate.plan))
            advance(1)
        return replace(candidate, error=PlanError.mean(errors), divisions=tuple(errors))

    def _evaluator(self, k: int) -> Evaluator:
        if k not in self.evaluators:
            options = self.options
            divided = split_frames(self.frames, options.fit_atoms, options.held_out_atoms, options.seed + k)
            self.evaluators[k] = self.evaluator_of(divided)
        return self.evaluators[k]
