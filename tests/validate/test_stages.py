"""All parts of the physics in a row, on calculators that are fast enough to do all of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ase import Atoms
from ase.build import bulk

from compactmlip.validate import stages
from compactmlip.validate.options import ValidateOptions
from compactmlip.validate.speed import Speed
from compactmlip.validate.stages import Physics, Setting, physics

from .conftest import Pairs, lennard_jones

OPTIONS = ValidateOptions(temperature_K=40, timestep_fs=5, approach_points=4)


def argon() -> Pairs:
    calculator = lennard_jones()
    calculator.spec = SimpleNamespace(cutoff=6.0)
    return calculator


def setting(start: Atoms, seconds: float = 1e-5, **options: Any) -> Setting:
    row = Speed(
        atoms=32,
        repeats=1,
        seconds={"model": seconds, "teacher": seconds},
        atoms_per_second={"model": 32 / seconds, "teacher": 32 / seconds},
    )
    calculators = {"model": argon(), "teacher": argon()}
    return Setting(calculators, start, [row], OPTIONS.model_copy(update=options))


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes of the parts that a test can wait for."""
    monkeypatch.setattr(stages, "LONGEST_NVT", 40)
    monkeypatch.setattr(stages, "LONGEST_RUN", 20)
    monkeypatch.setattr(stages, "SHORTEST_RUN", 20)
    monkeypatch.setattr(stages, "RUN_WARM_UP", 5)
    monkeypatch.setattr(stages, "ENSEMBLE_ATOMS", 32)
    monkeypatch.setattr(stages, "LONGEST", stages.SHORTEST // 4)
    monkeypatch.setattr(stages, "SHORTEST", 50)
    monkeypatch.setattr(stages, "DENSITY_ATOMS", 32)
    monkeypatch.setattr(stages, "RUNGS", (1.0, 2.0))
    monkeypatch.setattr(stages, "STEPS", 50)


def parts(found: Physics) -> set[str]:
    names = ("short_range", "ensembles", "structure", "vibration", "thermostat", "ladder", "density")
    names += ("crystal", "phonons", "defects")
    return {name for name in names if getattr(found, name)}


def test_budgets_decide_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is left out where it would take too long, but for approaching atoms, which cost nothing."""
    start = bulk("Ar", cubic=True, a=5.3).repeat(2)
    slow = physics(setting(start, seconds=1.0), start)
    assert parts(slow) == {"short_range"}
    none = {
        "nvt_seconds": 0,
        "ensemble_seconds": 0,
        "ladder_seconds": 0,
        "npt_seconds": 0,
        "crystal_seconds": 0,
        "approach_points": 0,
    }
    assert parts(physics(setting(start, **none), start)) == set()


def test_molecules_have_dynamics_only(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    pair = Atoms("Ar2", [[0, 0, 0], [0, 0, 3.8]])
    found = physics(setting(pair, ladder_seconds=0), pair)
    assert parts(found) == {"short_range", "ensembles", "thermostat"}


def test_all_parts_of_a_crystal(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    start = bulk("Ar", cubic=True, a=5.3).repeat(2)
    what = setting(start)
    done = {
        "thermostat": stages.thermostat(what, start),
        "density": stages.density(what, 2.0),
        "ensembles": stages.ensembles(what),
        "ladder": stages.ladder(what),
        "defects": stages.defects(setting(start, defect_seconds=0), (start, start)),
    }
    assert done["thermostat"] is not None and done["thermostat"].steps == 41
    assert done["density"] is not None and done["density"].model == done["density"].teacher
    runs = done["ensembles"]
    assert runs is not None and runs.sampling.method == "runs" and runs.model.shape == (6, 2, 32, 3)
    structure, vibration = stages.in_dynamics(runs)
    assert structure is not None and [row.error for row in structure[0]] == [0.0]
    assert [(row.species, row.difference) for row in vibration] == [("Ar", 0.0)]
    assert done["ladder"] is not None and done["ladder"].highest == done["ladder"].teacher_highest == 80
    assert done["defects"] == ()
    unstable = physics(setting(start, ladder_seconds=0, crystal_seconds=0), start, stable=False)
    assert parts(unstable) == {"short_range"}
