"""Search for the plan that meets a target on this machine with the least error."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch
from ase import Atoms
from torch import nn

from compactmlip import checkpoint
from compactmlip.compress.compensate import HeldOutError
from compactmlip.compress.compress import Compressed, compress, some_structures
from compactmlip.compress.cost import Setting, Shapes, memory as memory_cost
from compactmlip.compress.importance import importance
from compactmlip.compress.path_importance import path_importance
from compactmlip.compress.plan_file import Plan
from compactmlip.compress.scores_file import load_scores, save_scores
from compactmlip.compress.tapped import Scores
from compactmlip.data.graph import GraphBatch, build_graph
from compactmlip.data.label import label
from compactmlip.data.select import random_up_to
from compactmlip.errors import InputError
from compactmlip.models import model_dtype, model_spec, num_parameters, record_step, work
from compactmlip.progress import Track
from compactmlip.search.evaluate import Frames, PlanError, split_frames
from compactmlip.search.exchange import wandered
from compactmlip.search.finalists import Finalist, FinalistsFile, Finals, Goal, digest_of_plans
from compactmlip.search.halving import successive_halving, to_train
from compactmlip.search.options import SearchOptions
from compactmlip.search.race import Objective, is_complete
from compactmlip.search.record import Found, State, digest_of, identity_of, write_results
from compactmlip.search.seeds import seeds
from compactmlip.search.space import EDGE, Space
from compactmlip.search.speed import SpeedModel, Stopwatch, key, probe_plans, shares_within
from compactmlip.search.study import Candidate, Study
from compactmlip.search.workers import Workers, open_workers, scores_file
from compactmlip.validate.supercells import near_size

SPEEDS = (2.0, 4.0, 8.0, 16.0)
"""Speed-ups that are explored where none is asked for."""

MARGIN = 0.97
"""Candidates aim at this share of the time that is allowed: predictions err by a few per cent."""

START_ATOMS = 2000
"""Plans that are trained afterwards are refitted on structures of so many atoms: training does the rest."""

STATE, FINALISTS = "search.json", "finalists.json"


def search(
    teacher: nn.Module,
    frames: Sequence[Atoms],
    options: SearchOptions,
    folder: str | Path,
    *,
    progress: bool = True,
    clock: Callable[[], float] = time.monotonic,
) -> Found:
    """Find a plan, and write it with the cut and refitted model.

    Candidates are cut, refitted in closed form and compared with the uncut model on held-out structures;
    their speed is predicted from measurements on this machine, and that of the best is measured again in the
    end.  The folder gets ``plan.json``, ``pruned.safetensors``, ``front.json``, ``front.png``, with
    ``distil_minutes`` also ``distilled.safetensors``; and what is needed to continue after an interruption,
    which costs one candidate at most.

    Parameters
    ----------
    teacher
        A native model.
    frames
        Structures; labels are not needed (the teacher makes them where students are trained).
    options
        Target and budget.
    folder
        Where everything is written.

    Raises
    ------
    InputError
        If there are too few structures, the folder holds another search, or no plan is small enough.
    """
    return _Search(teacher, list(frames), options, Path(folder), progress, clock).run()


class _Search:
    def __init__(
        self,
        teacher: nn.Module,
        frames: list[Atoms],
        options: SearchOptions,
        folder: Path,
        progress: bool,
        clock: Callable[[], float],
    ) -> None:
        self.teacher, self.options, self.folder, self.progress = teacher, options, folder, progress
        self.clock = clock
        folder.mkdir(parents=True, exist_ok=True)
        self.state = State(folder / STATE, identity_of(teacher, frames, options))
        self.shapes = Shapes(teacher)
        self.frames: Frames = split_frames(frames, options.fit_atoms, options.held_out_atoms, options.seed)
        self.all_frames = frames
        self.objective, self.goal = Objective(options), Goal(options)
        big = near_size(frames[0], options.atoms)
        self.graph = build_graph(big, model_spec(teacher), torch.float32)
        self.within = shares_within(self.graph)
        self.setting = Setting(options.atoms, len(self.graph.centers) / len(big))
        self.memory = memory_cost(self.shapes, self.setting)
        self.scores, self.path_scores = self._scores(), self._path_scores()
        self.space = Space(
            self.shapes,
            options.round_to,
            options.criteria,
            self.scores,
            self.path_scores,
            odd_paths=options.odd_paths,
        )
        self.speed = self._speed()

    def run(self) -> Found:
        study = Study(self.folder, self.space, self.objective, self.options.seed)
        with open_workers(self.teacher, self.all_frames, self.options, self.folder) as workers:
            self._explore(study, workers)
            finalists = self._finalists(study.candidates, workers) if study.candidates else []
        return self._finish(study.candidates, finalists)

    def _explore(self, study: Study, workers: Workers) -> None:
        """Evaluate candidates until the time is up."""
        begin = self.clock() - self.state.seconds
        total = 60 * self.options.minutes
        with Track("search", total, "s", enabled=self.progress) as track:
            track.advance(min(self.state.seconds, total))
            for candidate in workers.evaluated(self._starts(study, begin), lambda: self._leader(study)):
                study.add(candidate)
                best = self._ranked(study.candidates)[0]
                note = f"{best.error.forces:.1f} meV/A at {1 / best.time:.1f}x"
                track.advance(self.clock() - begin - self.state.seconds, note)
                self.state.save(seconds=self.clock() - begin)

    def _starts(self, study: Study, begin: float) -> Iterator[Candidate]:
        """Candidates to evaluate, each once, until time or number are used up."""
        most = math.inf if self.options.candidates is None else self.options.candidates
        count = len(study.candidates)
        for source, plan in self._plans(study):
            if count >= most or (count and self.clock() - begin > 60 * self.options.minutes):
                return
            if self.space.cuts(plan) and not study.knows(plan):
                study.expect(plan)
                count += 1
                sizes = self._time(plan), self.memory(plan), self.shapes.num_parameters(plan)
                yield Candidate(plan, PlanError(math.nan, math.nan), *sizes, source)

    def _leader(self, study: Study) -> Candidate | None:
        """The best candidate that was measured in all divisions."""
        whole = [c for c in study.candidates if is_complete(c, self.options)]
        return min(whole, key=self.objective) if whole else None

    def _plans(self, study: Study) -> Iterator[tuple[str, Plan]]:
        """First plans of known kinds, then the optimiser's."""
        bounds = (
            [MARGIN / self.options.factor] if self.options.factor else [self._reachable(s) for s in SPEEDS]
        )
        for bound in bounds:
            yield from self._seeds(bound)
        yield from study.proposals(lambda: self._next_load(study.candidates))

    def _seeds(self, bound: float) -> Iterator[tuple[str, Plan]]:
        """Plans of known kinds, at one speed."""
        return seeds(self.space, self.scores, self.path_scores, self._load(bound))

    def _load(self, bound: float) -> Callable[[Plan], float]:
        """Largest of what a plan needs over what is allowed."""
        allowed = self.options.memory_limit

        def load(plan: Plan) -> float:
            needed = self._time(plan) / bound
            return needed if allowed is None else max(needed, self.memory(plan) / allowed)

        return load

    def _next_load(self, candidates: Sequence[Candidate]) -> Callable[[Plan], float]:
        """Load that the next proposal is scaled to."""
        if self.options.factor is not None:
            return self._load(MARGIN / self.options.factor)
        if self.options.force_mae is not None:
            # A little faster than the fastest that is accurate enough; slower while there is none.
            good = [c.time for c in candidates if c.error.forces <= self.options.force_mae]
            return self._load(0.95 * min(good) if good else min(1.0, 1.3 * max(c.time for c in candidates)))
        return self._load(self._reachable(SPEEDS[len(candidates) % len(SPEEDS)]))

    def _reachable(self, speedup: float) -> float:
        """Relative time for a speed-up, or that of the smallest plan where it is not as fast."""
        return max(1 / speedup, 1.02 * self._time(self.space.plan({EDGE: 0})))

    def _ranked(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Candidates that meet the target first, best first."""
        return sorted(candidates, key=lambda c: (not self.goal.is_met(c, 1 / c.time), self.objective(c)))

    def _time(self, plan: Plan) -> float:
        return self.speed.relative_time(work(self.shapes.pruned(plan), self.within))

    def _scores(self) -> dict[str, Scores]:
        return {criterion: self._scores_of(criterion) for criterion in self.options.criteria}

    def _scores_of(self, criterion: str) -> Scores:
        path = scores_file(self.folder, criterion)
        if path.is_file():
            return load_scores(path, self.teacher)[0]
        scores = importance(
            self.teacher, self._calibration, criterion, seed=self.options.seed, progress=self.progress
        )
        save_scores(path, scores, self.teacher, criterion=criterion)
        return scores

    def _path_scores(self) -> dict[str, float]:
        # More structures than channels need: with many species few of them say too little about a path.
        return path_importance(self.teacher, self._graphs(self.frames.fit), progress=self.progress)

    @cached_property
    def _calibration(self) -> list[GraphBatch]:
        return some_structures(self._graphs(self.frames.fit), self.options.seed)

    def _graphs(self, frames: Sequence[Atoms]) -> list[GraphBatch]:
        return [build_graph(a, model_spec(self.teacher), model_dtype(self.teacher)) for a in frames]

    def _speed(self) -> SpeedModel:
        path = self.folder / "speed.json"
        if path.is_file():
            return SpeedModel.model_validate_json(path.read_text())
        watch = Stopwatch(self.teacher, self.graph, self.shapes, self.options.repeats)
        watch.measure(probe_plans(self.shapes, odd_paths=self.options.odd_paths), self.progress)
        self.speed = watch.fitted()
        # Then plans of the kind that is going to be predicted.
        bound = MARGIN / (self.options.factor or SPEEDS[1])
        near = {key(plan): plan for _, plan in self._seeds(bound)}
        far = (
            wandered(self.space, p, self._load(bound), self.options.seed + k)
            for k, p in enumerate(near.values())
        )
        near |= {key(plan): plan for plan in far}
        if near:
            watch.measure(list(near.values()), self.progress)
        made = watch.fitted(bound)
        checkpoint.atomic_write_text(path, made.model_dump_json(indent=1) + "\n")
        return made

    def _finish(self, candidates: list[Candidate], finalists: list[Finalist]) -> Found:
        if not candidates:
            fastest = 1 / self._time(self.space.plan({EDGE: 0}))
            raise InputError(
                f"no plan meets the target: the smallest one is predicted to be {fastest:.1f} times as fast "
                f"as the uncut model with {len(self.graph.species)} atoms. Ask for less, or time more atoms "
                "(--set atoms=512)."
            )
        good = [f for f in finalists if self.goal.is_met(f.candidate, f.speedup)]
        best = (
            min(good, key=lambda f: self.objective(f.candidate))
            if good
            else min(finalists, key=self.goal.violation)
        )
        errors: HeldOutError | None = None
        if self.options.distil_minutes is not None:
            pool = [f.candidate for f in good or [best]]
            winner = self._train(pool)
            best = next(f for f in finalists if f.candidate is winner)
        else:
            made = self._compressed(best.candidate.plan)
            errors = None if made.compensation is None else made.compensation.after
            checkpoint.save(made.model, self.folder / "pruned.safetensors")
        measured = {
            "speedup": best.speedup,
            "finalists": [
                {
                    "plan": f.candidate.plan.summary,
                    "force_mae_meV_per_A": f.candidate.error.forces,
                    "speedup": f.speedup,
                }
                for f in finalists
            ],
        }
        uncut = {
            "parameters": num_parameters(self.teacher),
            "seconds_per_atom": self.speed.reference_seconds,
            "atoms": len(self.graph.species),
        }
        about = {"uncut": uncut, "speed_model": self.speed.model_dump()}
        write_results(self.folder, self.options, about, candidates, best.candidate, measured)
        return Found(best.candidate, best in good, best.speedup, errors, len(candidates))

    def _checked(self, candidates: list[Candidate], workers: Workers) -> list[Candidate]:
        """The best candidates, and those that are going to be trained, measured in all divisions."""
        ranked = self._ranked(candidates)
        best = ranked[: self.options.checked]
        if self.options.distil_minutes is not None:
            best += [c for c in to_train(ranked, self.options.num_finalists) if c not in best]
        left = sum(self.options.splits - len(c.divisions) for c in best)
        with Track("check", max(left, 1), "plans", enabled=self.progress) as track:
            return self._ranked(workers.completed(best, track.advance))

    def _finalists(self, candidates: list[Candidate], workers: Workers) -> list[Finalist]:
        """The best candidates with their measured speeds; the same ones if their training was interrupted."""
        kept = FinalistsFile(self.folder / FINALISTS, self.options, len(candidates))
        if (known := kept.load()) is not None:
            return known
        watch = Stopwatch(self.teacher, self.graph, self.shapes, 2 * self.options.repeats)
        finals = Finals(self.options, self.space, self._time, self.memory, watch, self.progress)
        found = finals.run(self._checked(candidates, workers), workers)
        kept.save(found)
        return found

    def _compressed(self, plan: Plan, atoms: int | None = None) -> Compressed:
        """Cut model, refitted on all structures or on some with about so many atoms."""
        frames = self.all_frames
        if atoms is not None:
            frames = [frames[k] for k in random_up_to([len(a) for a in frames], atoms, self.options.seed)]
        made = compress(
            self.teacher,
            self._graphs(frames),
            plan,
            scores=self.scores[plan.importance],
            seed=self.options.seed,
            progress=self.progress,
        )
        record_step(made.model, "search", **self.options.model_dump(mode="json", exclude_none=True))
        return made

    def _train(self, pool: list[Candidate]) -> Candidate:
        """Successive halving; writes the winner before and after its training."""
        assert self.options.distil_minutes is not None
        labelled = label(self.all_frames, self.teacher, self.folder / "labelled.xyz", progress=self.progress)
        held = {digest_of(a) for a in self.frames.held_out}
        valid = [a for a in labelled if digest_of(a) in held]
        train = [a for a in labelled if digest_of(a) not in held]
        students = {f"plan-{k}": self._compressed(c.plan, START_ATOMS).model for k, c in enumerate(pool)}
        results = successive_halving(
            students,
            train,
            valid,
            self.options.distil_minutes,
            self.folder / "distil" / digest_of_plans([c.plan for c in pool], self.options),
            workers=self.options.workers,
            progress=self.progress,
        )
        winner = results[-1]
        checkpoint.save(students[winner.name], self.folder / "pruned.safetensors")
        checkpoint.save(winner.result.model, self.folder / "distilled.safetensors")
        rows = [
            {
                "plan": pool[int(r.name.partition("-")[2])].plan.target,
                "round": r.round,
                "force_mae_meV_per_A": r.forces,
            }
            for r in results
        ]
        checkpoint.atomic_write_text(self.folder / "halving.json", json.dumps(rows, indent=1) + "\n")
        return pool[int(winner.name.partition("-")[2])]
