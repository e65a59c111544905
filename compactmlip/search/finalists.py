"""The end of a search: the best candidates are measured, and made smaller where they are too slow."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compactmlip.checkpoint import atomic_write_text
from compactmlip.compress.cost import Cost
from compactmlip.compress.plan_file import Plan
from compactmlip.search.evaluate import PlanError
from compactmlip.search.halving import to_train
from compactmlip.search.options import SearchOptions
from compactmlip.search.race import Objective
from compactmlip.search.space import Space
from compactmlip.search.speed import Stopwatch
from compactmlip.search.study import Candidate
from compactmlip.search.workers import Workers

SLOWEST = 0.8
"""Of the wanted speed: finalists that are slower are not made smaller; their prediction was wrong."""


@dataclass(frozen=True)
class Finalist:
    """A candidate and its measured speed over the uncut model's."""

    candidate: Candidate
    speedup: float


class FinalistsFile:
    """Finalists of a search: measured once for the same candidates, so that their trainings can go on."""

    def __init__(self, path: Path, options: SearchOptions, candidates: int) -> None:
        self.path = path
        self.key = [candidates, options.num_finalists, options.distil_minutes]

    def load(self) -> list[Finalist] | None:
        """What was saved, unless for other candidates or options."""
        content = json.loads(self.path.read_text()) if self.path.is_file() else {}
        if content.get("key") != self.key:
            return None
        return [Finalist(Candidate.of(row), row["speedup"]) for row in content["finalists"]]

    def save(self, finalists: Sequence[Finalist]) -> None:
        """Write them."""
        rows = [f.candidate.row() | {"speedup": f.speedup} for f in finalists]
        atomic_write_text(self.path, json.dumps({"key": self.key, "finalists": rows}, indent=1) + "\n")


def digest_of_plans(plans: Sequence[Plan], options: SearchOptions) -> str:
    """Name of the folder for trainings of these plans, each for its share of the time."""
    text = json.dumps([[plan.to_json() for plan in plans], options.distil_minutes, options.workers])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Goal:
    """What a search was asked for."""

    def __init__(self, options: SearchOptions) -> None:
        self.options = options

    def is_met(self, candidate: Candidate, speedup: float) -> bool:
        """Whether a candidate of some speed meets the targets."""
        options = self.options
        fast = options.factor is None or speedup >= options.factor
        exact = options.force_mae is None or candidate.error.forces <= options.force_mae
        small = options.memory_limit is None or candidate.memory <= options.memory_limit
        return fast and exact and small

    def violation(self, finalist: Finalist) -> float:
        """How far a candidate is from the targets; memory is known beforehand."""
        far = 0.0
        if self.options.factor is not None:
            far += max(0.0, math.log(self.options.factor / finalist.speedup))
        if self.options.force_mae is not None:
            far += max(0.0, math.log(finalist.candidate.error.forces / self.options.force_mae))
        return far


class Finals:
    """Measures the best candidates.

    Parameters
    ----------
    options
        Of the search.
    space
        Its variables.
    time, memory
        Predicted time over the uncut model's, and bytes, of a plan.
    watch
        What measures plans.
    progress
        Show a progress bar.
    """

    def __init__(
        self,
        options: SearchOptions,
        space: Space,
        time: Cost,
        memory: Cost,
        watch: Stopwatch,
        progress: bool = False,
    ) -> None:
        self.options, self.space, self.time, self.memory = options, space, time, memory
        self.watch, self.progress = watch, progress
        self.goal, self.objective = Goal(options), Objective(options)

    def run(self, ranked: Sequence[Candidate], workers: Workers) -> list[Finalist]:
        """The best candidates with their speeds, and smaller ones of those that are somewhat too slow.

        If none of them is fast enough, another lot is measured.

        Parameters
        ----------
        ranked
            Candidates, best first.
        workers
            Evaluate the smaller ones.
        """
        left = list(ranked)
        found: list[Finalist] = []
        for _ in range(2):
            lot = left[: self.options.num_finalists]
            if self.options.distil_minutes is not None:
                lot = to_train(left, self.options.num_finalists)
            if not lot:
                break
            new = self._measured(lot)
            found += [*new, *self._measured(self._smaller(new, workers))]
            if any(self.goal.is_met(f.candidate, f.speedup) for f in found):
                break
            off = float(np.median([1 / (f.speedup * f.candidate.time) for f in new]))
            rest = [c for c in left if c not in lot and self.goal.is_met(c, 1 / (off * c.time))]
            left = sorted(rest, key=self.objective)
        return found

    def _measured(self, candidates: Sequence[Candidate]) -> list[Finalist]:
        if not candidates:
            return []
        times = self.watch.measure([c.plan for c in candidates], self.progress)
        return [Finalist(c, 1 / time) for c, time in zip(candidates, times, strict=True)]

    def _smaller(self, measured: Sequence[Finalist], workers: Workers) -> list[Candidate]:
        """Candidates that are too slow, scaled to the speed that they were predicted to have."""
        factor = self.options.factor
        if factor is None:
            return []
        known = {self.space.effect(f.candidate.plan) for f in measured}
        made: list[Candidate] = []
        for finalist in measured:
            if not SLOWEST * factor <= finalist.speedup < factor:
                continue
            slow = finalist.candidate
            off = 1 / (finalist.speedup * slow.time)
            plan = self._scaled(slow.plan, off * factor)
            if plan is None or self.space.effect(plan) in known:
                continue
            known.add(self.space.effect(plan))
            sizes = off * self.time(plan), self.memory(plan), self.space.shapes.num_parameters(plan)
            made.append(Candidate(plan, PlanError(math.nan, math.nan), *sizes, slow.source))
        return workers.completed(made, lambda _: None)

    def _scaled(self, plan: Plan, factor: float) -> Plan | None:
        """The plan with channels for a predicted time of one over ``factor``."""
        return self.space.scaled(plan, lambda smaller: factor * self.time(smaller))
