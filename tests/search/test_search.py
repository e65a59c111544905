"""The search end to end on a small random model, its variables, its speed model and its journal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from torch import nn

from compactmlip import checkpoint
from compactmlip.compress.apply import keep_species
from compactmlip.compress.cost import Shapes
from compactmlip.compress.plan_file import Plan
from compactmlip.compress.scores_file import load_scores
from compactmlip.errors import InputError
from compactmlip.models import model_spec, work
from compactmlip.models.workload import Work
from compactmlip.search import evaluate, run as module
from compactmlip.search.evaluate import Evaluator, PlanError, split_frames
from compactmlip.search.options import SearchOptions
from compactmlip.search.race import Race, is_complete
from compactmlip.search.run import search
from compactmlip.search.space import Space
from compactmlip.search.speed import SpeedModel, Stopwatch
from compactmlip.search.study import Candidate, Study, front
from compactmlip.search.workers import open_workers, scores_file

SMALL = {"atoms": 16, "round_to": 2, "fit_atoms": 24, "held_out_atoms": 8, "repeats": 1, "minutes": 5.0}
SMALL |= {"splits": 1}


@pytest.fixture(scope="module")
def teacher(make_spec: Callable[..., Any], make_model: Callable[..., nn.Module]) -> nn.Module:
    spec = make_spec(channels=(16, 8, 4), num_layers=3, lmax_edge=2, cutoff=2.5)
    return keep_species(make_model(spec), ("Mg", "O"))


@pytest.fixture(scope="module")
def frames() -> list[Atoms]:
    made = []
    for seed in range(24):
        atoms = bulk("MgO", "rocksalt", a=4.21)
        atoms.rattle(0.1, seed=seed)
        made.append(atoms)
    return made


@pytest.fixture
def fake_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that are the counted work: nothing depends on how busy the machine is."""

    def measure(self: Stopwatch, plans: list[Plan], progress: bool = False) -> list[float]:

        def amount(spec: Any) -> float:
            return work(spec).multiply_adds(self.edges_per_atom) + 1000.0

        whole = amount(self.shapes.spec)
        self.seconds.append(1e-3)
        found = []
        for plan in plans:
            spec = self.shapes.pruned(plan)
            found.append(amount(spec) / whole)
            self.measured[plan.target] = (work(spec), found[-1])
        return found

    monkeypatch.setattr(Stopwatch, "measure", measure)


def test_search_writes_a_plan_that_meets_its_target(
    teacher: nn.Module, frames: list[Atoms], tmp_path: Path, fake_speed: None
) -> None:
    options = SearchOptions(speedup="3x", candidates=6, **SMALL)
    found = search(teacher, frames, options, tmp_path, progress=False)
    assert found.meets_target
    assert found.speedup is not None and found.speedup >= 3
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.target == found.chosen.plan.target
    assert plan.made_by["search"] == {"speedup": "3x"}
    model = checkpoint.load(tmp_path / "pruned.safetensors")
    shapes = Shapes(teacher)
    assert model_spec(model).architecture == shapes.pruned(plan).architecture
    written = json.loads((tmp_path / "front.json").read_text())
    assert len(written["candidates"]) == found.candidates == 6
    assert (tmp_path / "front.png").stat().st_size > 1000
    times = [row["relative_time"] for row in written["front"]]
    errors = [row["force_mae_meV_per_A"] for row in written["front"]]
    assert times == sorted(times) and errors == sorted(errors, reverse=True)
    best = min(row["force_mae_meV_per_A"] for row in written["candidates"])
    assert found.chosen.error.forces == pytest.approx(best)


def test_a_stopped_search_continues(
    teacher: nn.Module,
    frames: list[Atoms],
    tmp_path: Path,
    fake_speed: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A search that dies in its fourth candidate keeps three, and does not evaluate them again."""
    options = SearchOptions(speedup="3x", candidates=6, **SMALL)
    evaluated: list[str] = []
    real = evaluate.Evaluator.error

    def dies(self: Any, plan: Plan) -> PlanError:
        evaluated.append(plan.to_json())
        if len(evaluated) == 4:
            raise KeyboardInterrupt
        return real(self, plan)

    monkeypatch.setattr(evaluate.Evaluator, "error", dies)
    with pytest.raises(KeyboardInterrupt):
        search(teacher, frames, options, tmp_path, progress=False)
    found = search(teacher, frames, options, tmp_path, progress=False)
    assert found.candidates == 6
    assert len(evaluated) == 7, "three, the lost one, and three more"
    assert len({*evaluated}) == 6
    other = options.model_copy(update={"speedup": "2x"})
    with pytest.raises(InputError, match="another model, other structures or options"):
        search(teacher, frames, other, tmp_path, progress=False)


def test_errors_are_means_over_divisions(
    teacher: nn.Module, frames: list[Atoms], tmp_path: Path, fake_speed: None
) -> None:
    options = SearchOptions(speedup="3x", candidates=6, **(SMALL | {"splits": 3, "checked": 2}))
    found = search(teacher, frames, options, tmp_path, progress=False)
    shapes = Shapes(teacher)
    scores = {c: load_scores(scores_file(tmp_path, c), teacher)[0] for c in options.criteria}
    errors = []
    for seed in range(3):
        division = split_frames(frames, options.fit_atoms, options.held_out_atoms, seed)
        evaluator = Evaluator(teacher, division, shapes, scores, options.damping)
        errors.append(evaluator.error(found.chosen.plan).forces)
    assert len({*errors}) == 3
    assert [e.forces for e in found.chosen.divisions] == pytest.approx(errors)
    assert found.chosen.error.forces == pytest.approx(sum(errors) / 3)
    rows = json.loads((tmp_path / "front.json").read_text())["candidates"]
    best = min(r["force_mae_meV_per_A"] for r in rows if len(r["divisions"]) == 3)
    for row in rows:
        measured = [forces for _, forces in row["divisions"]]
        if len(measured) == 3:
            assert row["force_mae_meV_per_A"] == pytest.approx(sum(measured) / 3)
        else:
            assert row["force_mae_meV_per_A"] > best


def test_candidates_have_the_cutoffs_of_their_plan(teacher: nn.Module, frames: list[Atoms]) -> None:
    shapes = Shapes(teacher)
    scores = {"taylor": {name: np.ones(group.size) for name, group in shapes.graph.groups.items()}}
    evaluator = Evaluator(teacher, split_frames(frames, 24, 8, 0), shapes, scores, 1.0)
    plan = Plan.uniform("16x0+8x1", 3, cutoffs=(None, 2.4, 2.2))
    student = evaluator.student(plan)
    assert model_spec(student).architecture == shapes.pruned(plan).architecture
    assert evaluator.error(plan) == evaluator.error_of(student)
    whole = plan.model_copy(update={"cutoffs": None})
    assert evaluator.error(whole).forces != evaluator.error(plan).forces


def test_several_processes_find_the_same(
    teacher: nn.Module, frames: list[Atoms], tmp_path: Path, fake_speed: None
) -> None:
    """The first plans do not depend on what comes of others, and all are measured in the end."""
    options = SearchOptions(speedup="3x", candidates=4, **(SMALL | {"splits": 2, "checked": 4}))
    plans, chosen = [], []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        own = options.model_copy(update={"workers": workers})
        chosen.append(search(teacher, frames, own, folder, progress=False).chosen)
        rows = json.loads((folder / "front.json").read_text())["candidates"]
        plans.append({json.dumps(row["plan"]): row["divisions"][0][1] for row in rows})
        assert not list(folder.glob("workers-*"))
    assert len(plans[0]) == 4 and plans[1] == pytest.approx(plans[0], rel=1e-9)
    assert chosen[1].plan == chosen[0].plan
    assert chosen[1].error.forces == pytest.approx(chosen[0].error.forces, rel=1e-9)
    steps: list[float] = []
    started = [replace(chosen[0], divisions=chosen[0].divisions[:k]) for k in (1, 2)]
    with open_workers(teacher, frames, own, folder) as pool:
        completed = pool.completed(started, steps.append)
    assert [c.error.forces for c in completed] == pytest.approx([chosen[0].error.forces] * 2, rel=1e-9)
    assert [len(c.divisions) for c in completed] == [2, 2] and sum(steps) == 1


class _Known:
    """Evaluator of one division, with force errors that are given for each plan."""

    def __init__(self, forces: dict[str, float], calls: list[str]) -> None:
        self.forces, self.calls = forces, calls

    def error(self, plan: Plan) -> PlanError:
        self.calls.append(plan.target)
        return PlanError(1.0, self.forces[plan.target])


def test_those_far_behind_leave_the_race_with_an_estimate(frames: list[Atoms]) -> None:
    forces = {"8x0": [10.0, 30.0, 20.0], "6x0": [11.0, 28.0, 15.0], "4x0": [11.0, 40.0, 1.0], "2x0": [12.0]}
    calls: list[str] = []
    divisions = iter(range(3))

    def evaluator_of(_: Any) -> Any:
        k = next(divisions)
        return _Known({plan: errors[k] for plan, errors in forces.items() if k < len(errors)}, calls)

    race = Race(evaluator_of, frames, SearchOptions(speedup="3x", **(SMALL | {"splits": 3})))

    def start(text: str) -> Candidate:
        return Candidate(Plan.uniform(text, 1), PlanError(math.nan, math.nan), 0.3, 1e8, 77, "exchange")

    first = race.run(start("8x0"), None)
    assert first.error.forces == pytest.approx(20.0) and is_complete(first, race.options)
    assert race.run(start("6x0"), first).error.forces == pytest.approx(18.0)
    second, third = (race.run(start(plan), first) for plan in ("4x0", "2x0"))
    assert second.error.forces == pytest.approx(25.5 * 20 / 20), "51 / 2 where the leader has 40 / 2"
    assert third.error.forces == pytest.approx(12.0 * 20 / 10) and not is_complete(third, race.options)
    assert [calls.count(plan) for plan in forces] == [3, 3, 2, 1]
    assert race.completed(second).error.forces == pytest.approx(52 / 3)


@pytest.mark.parametrize("workers", [1, 2])
def test_finalists_are_trained_by_halving(
    teacher: nn.Module, frames: list[Atoms], tmp_path: Path, fake_speed: None, workers: int
) -> None:
    options = SearchOptions(
        speedup="2x", candidates=3, distil_minutes=0.05, finalists=2, workers=workers, **SMALL
    )
    search(teacher, frames, options, tmp_path, progress=False)
    rounds = json.loads((tmp_path / "halving.json").read_text())
    assert [row["round"] for row in rounds] in ([1, 1, 2], [1])
    assert checkpoint.load(tmp_path / "distilled.safetensors") is not None
    assert Plan.load(tmp_path / "plan.json").target == rounds[-1]["plan"]


def test_an_interrupted_training_of_finalists_goes_on(
    teacher: nn.Module,
    frames: list[Atoms],
    tmp_path: Path,
    fake_speed: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the same finalists, though their speeds would not be measured the same again."""
    options = SearchOptions(speedup="2x", candidates=3, distil_minutes=0.05, finalists=2, **SMALL)
    own, calls = module.successive_halving, list[Path]()

    def interrupted(students: Any, train: Any, valid: Any, minutes: float, folder: Path, **more: Any) -> Any:
        calls.append(folder)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return own(students, train, valid, minutes, folder, **more)

    monkeypatch.setattr(module, "successive_halving", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(teacher, frames, options, tmp_path, progress=False)
    before = (tmp_path / "finalists.json").read_text()

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(module.Finals, "run", never)
    found = search(teacher, frames, options, tmp_path, progress=False)
    assert (tmp_path / "finalists.json").read_text() == before and calls[0] == calls[1]
    rows = json.loads(before)["finalists"]
    assert found.chosen.row() in [{k: v for k, v in row.items() if k != "speedup"} for row in rows]
    # Another number of candidates has other finalists.
    with pytest.raises(AssertionError, match="measured again"):
        more = options.model_copy(update={"candidates": 4})
        search(teacher, frames, more, tmp_path, progress=False)


def test_error_target_prefers_the_fastest_that_is_accurate_enough(
    teacher: nn.Module, frames: list[Atoms], tmp_path: Path, fake_speed: None
) -> None:
    options = SearchOptions(candidates=6, **SMALL)
    free = search(teacher, frames, options, tmp_path / "free", progress=False)
    errors = sorted(
        row["force_mae_meV_per_A"]
        for row in json.loads((tmp_path / "free" / "front.json").read_text())["candidates"]
    )
    assert free.candidates == 6
    limited = SearchOptions(force_mae=errors[3], candidates=6, **SMALL)
    found = search(teacher, frames, limited, tmp_path / "limited", progress=False)
    rows = json.loads((tmp_path / "limited" / "front.json").read_text())["candidates"]
    good = [row["relative_time"] for row in rows if row["force_mae_meV_per_A"] <= errors[3]]
    assert found.chosen.time == pytest.approx(min(good))


def test_too_few_structures(teacher: nn.Module, frames: list[Atoms], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="more structures"):
        search(teacher, frames[:3], SearchOptions(**SMALL), tmp_path, progress=False)


def test_target_out_of_reach(
    teacher: nn.Module, frames: list[Atoms], tmp_path: Path, fake_speed: None
) -> None:
    options = SearchOptions(speedup="10000x", candidates=2, **SMALL)
    with pytest.raises(InputError, match="no plan meets the target: the smallest one is predicted to be"):
        search(teacher, frames, options, tmp_path, progress=False)


def test_the_whole_model_is_no_candidate(
    teacher: nn.Module, frames: list[Atoms], tmp_path: Path, fake_speed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which fits a generous target, but cannot be cut."""
    space = Space(Shapes(teacher), 1)
    whole = Plan.of(space.full, edge_order=space.edge_orders, odd_paths=True)
    assert not space.cuts(whole) and space.cuts(space.uniform("4x0+2x1", 1))
    own = module.seeds

    def first_the_whole(*arguments: Any) -> Any:
        yield "whole", whole
        yield from own(*arguments)

    monkeypatch.setattr(module, "seeds", first_the_whole)
    found = search(teacher, frames, SearchOptions(candidates=2, **SMALL), tmp_path, progress=False)
    assert found.candidates == 2 and space.cuts(found.chosen.plan)
    assert '"whole"' not in (tmp_path / "front.json").read_text()


def test_front() -> None:
    plan = Plan(layers=("8x0",))
    made = [
        Candidate(plan, PlanError(0.0, error), time, 0.0, 0, "optuna")
        for error, time in ((10.0, 1.0), (20.0, 0.5), (25.0, 0.6), (30.0, 0.5))
    ]
    assert [(c.error.forces, c.time) for c in front(made)] == [(20.0, 0.5), (10.0, 1.0)]


def test_journal_survives(teacher: nn.Module, tmp_path: Path) -> None:
    space = Space(Shapes(teacher), 2)
    one = Candidate(space.uniform("4x0+2x1"), PlanError(1.0, 2.0), 0.3, 1e8, 77, "uniform")
    study = Study(tmp_path, space, lambda c: c.error.forces, seed=0)
    study.add(one)
    study.study.ask(space.distributions)  # as if the process died here
    again = Study(tmp_path, space, lambda c: c.error.forces, seed=0)
    assert again.candidates == [one]
    assert again.knows(one.plan) and not again.knows(space.uniform("2x0"))
    source, plan = next(again.proposals(lambda: lambda p: 0.5))
    assert source == "exchange" and not again.knows(plan)


def test_predictions_are_right_near_the_wanted_speed() -> None:
    """Times that are not linear in the work: the median near a time is right all the same."""
    rng = np.random.default_rng(1)
    works = [Work(dense=float(x)) for x in np.linspace(1, 100, 25)]
    times = [0.01 * w.dense**1.3 * float(rng.uniform(0.98, 1.02)) for w in works]
    rows = list(zip(works, times, strict=True))
    plain, near = (SpeedModel.fit(rows, 1.0, 1.0, at) for at in (None, 0.2))
    close = [k for k, t in enumerate(times) if 0.2 / 1.5 < t < 0.3]
    off = [
        abs(np.median([np.log(m.relative_time(works[k]) / times[k]) for k in close])) for m in (plain, near)
    ]
    assert off[1] < 0.03 < 0.06 < off[0]
