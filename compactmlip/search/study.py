"""The search for plans: proposals by optuna, each brought to its budget, evaluated and written down."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from compactmlip.compress.plan_file import Plan
from compactmlip.search.evaluate import PlanError
from compactmlip.search.exchange import exchanged
from compactmlip.search.space import Space

JOURNAL = "candidates.journal"
"""File of the folder that holds all candidates; lines are appended, so that a stop costs one at most."""

MOST_REPEATED = 200
"""Proposals in a row that are known already, after which the search is exhausted."""

RANDOM_AFTER = 5
"""Proposals in a row that are known already, after which random ones are tried."""

PARENTS = 5
"""The best candidates, whose neighbours are proposed; the better, the more often."""

EXCHANGES = 3
"""Of four proposals, so many are neighbours of a good candidate; the others are the optimiser's."""


PROPOSED = EXCHANGE, OPTUNA = "exchange", "optuna"
"""Sources of plans that a search proposes itself; the others are names of the kinds that it begins with."""


@dataclass(frozen=True)
class Candidate:
    """One plan that was evaluated.

    Attributes
    ----------
    plan
        What was kept.
    error
        On held-out structures after compensation: the mean over divisions of the structures, estimated where
        not all were measured.
    time
        Predicted time of a calculation over the uncut model's.
    memory
        Estimated bytes of a calculation.
    parameters
        Number of parameters.
    source
        Where the plan came from: a seed's name, "exchange" or "optuna".
    divisions
        Errors on the divisions that it was measured in.
    """

    plan: Plan
    error: PlanError
    time: float
    memory: float
    parameters: int
    source: str
    divisions: tuple[PlanError, ...] = ()

    def row(self) -> dict[str, Any]:
        """Entry of a JSON file."""
        return {
            "plan": json.loads(self.plan.to_json()),
            "force_mae_meV_per_A": self.error.forces,
            "energy_mae_meV_per_atom": self.error.energy,
            "relative_time": self.time,
            "memory_bytes": self.memory,
            "parameters": self.parameters,
            "source": self.source,
            "divisions": [[e.energy, e.forces] for e in self.divisions],
        }

    @staticmethod
    def of(row: dict[str, Any]) -> Candidate:
        """Inverse of :meth:`row`."""
        error = PlanError(row["energy_mae_meV_per_atom"], row["force_mae_meV_per_A"])
        return Candidate(
            Plan.model_validate(row["plan"]),
            error,
            row["relative_time"],
            row["memory_bytes"],
            row["parameters"],
            row["source"],
            # Rows of older searches: they measured the first division only.
            tuple(PlanError(*pair) for pair in row["divisions"]) if "divisions" in row else (error,),
        )


Objective = Callable[[Candidate], float]


class Study:
    """All candidates of a folder and the optimiser that proposes further ones.

    Parameters
    ----------
    folder
        Where the journal is, or is going to be.
    space
        Variables.
    objective
        What is minimised.
    seed
        Of the optimiser.
    """

    def __init__(self, folder: Path, space: Space, objective: Objective, seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space, self.objective = space, objective
        storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.study = optuna.create_study(
                storage=storage, study_name="search", direction="minimize", load_if_exists=True
            )
            started = len(self.study.trials)
            # A continued search goes on with other random numbers than it began with.
            self.sampler = optuna.samplers.TPESampler(
                seed=seed + started, multivariate=True, n_startup_trials=1, n_ei_candidates=64
            )
            self.random = optuna.samplers.RandomSampler(seed=seed + started)
        self.rng = np.random.default_rng((seed, started))
        self.expected: set[str] = set()
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self.study.tell(trial.number, state=TrialState.FAIL)

    @property
    def candidates(self) -> list[Candidate]:
        """All that were evaluated."""
        done = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return [Candidate.of(trial.user_attrs["candidate"]) for trial in done]

    def knows(self, plan: Plan) -> bool:
        """Whether a plan was evaluated or is expected, or another one that leaves the same."""
        wanted = self.space.effect(plan)
        return wanted in self.expected or any(self.space.effect(c.plan) == wanted for c in self.candidates)

    def expect(self, plan: Plan) -> None:
        """Remember that a plan is being evaluated."""
        self.expected.add(self.space.effect(plan))

    def add(self, candidate: Candidate) -> None:
        """Write a candidate down."""
        trial = optuna.trial.create_trial(
            params=dict(self.space.blocks(candidate.plan)),
            distributions=self.space.distributions,
            value=self.objective(candidate),
            user_attrs={"candidate": candidate.row()},
        )
        self.study.add_trial(trial)

    def proposals(self, load: Callable[[], Callable[[Plan], float]]) -> Iterator[tuple[str, Plan]]:
        """Sources and new plans with a load of at most one; ends when only known ones come.

        What the optimiser proposes is never evaluated as it is: the plan scaled to a load of one takes its
        place in the journal, so that all that it learns from lies on the budget.
        """
        repeated = count = 0
        while repeated < MOST_REPEATED:
            count += 1
            source = EXCHANGE if count % (EXCHANGES + 1) and self.candidates else OPTUNA
            plan = self._neighbour(load()) if source == EXCHANGE else self._sampled(load(), repeated)
            if plan is None or self.knows(plan):
                repeated += 1
                continue
            repeated = 0
            yield source, plan

    def _sampled(self, load: Callable[[Plan], float], repeated: int) -> Plan | None:
        self.study.sampler = self.random if repeated >= RANDOM_AFTER else self.sampler
        trial = self.study.ask(self.space.distributions)
        # Paths and cutoffs are too many variables for the optimiser: it proposes channels for a good plan's.
        parent = self._parent().plan if self.candidates else None
        proposed = self.space.plan(trial.params, parent)
        self.study.tell(trial, state=TrialState.FAIL)
        return self.space.scaled(proposed, load)

    def _neighbour(self, load: Callable[[Plan], float]) -> Plan | None:
        return exchanged(self.space, self._parent().plan, load, self.rng)

    def _parent(self) -> Candidate:
        best = sorted(self.candidates, key=self.objective)[:PARENTS]
        chances = 1 / np.arange(1, len(best) + 1)
        return best[self.rng.choice(len(best), p=chances / chances.sum())]


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Candidates that no other one beats in both error and time, fastest first."""
    best = math.inf
    kept = []
    for candidate in sorted(candidates, key=lambda c: (c.time, c.error.forces)):
        if candidate.error.forces < best:
            kept.append(candidate)
            best = candidate.error.forces
    return kept
