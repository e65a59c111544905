"""All parts of the physics in a row, on calculators that are fast enough to do all of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ase import Atoms
from ase.build import bulk

from compactmlip.validate import stages
from compactmlip.validate.density import DensityComparison
from compactmlip.validate.ensemble import Ensembles
from compactmlip.validate.ladder import Ladder
from compactmlip.validate.left_out import LeftOut
from compactmlip.validate.options import ValidateOptions
from compactmlip.validate.speed import Speed
from compactmlip.validate.stages import Physics, Setting, physics
from compactmlip.validate.thermostat import KineticEnergy

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
    monkeypatch.setattr(stages, "LONGEST", 50)
    monkeypatch.setattr(stages, "SHORTEST", 50)
    monkeypatch.setattr(stages, "DENSITY_RUNS", 2)
    monkeypatch.setattr(stages, "DENSITY_ATOMS", 32)
    monkeypatch.setattr(stages, "RUNGS", (1.0, 2.0))
    monkeypatch.setattr(stages, "STEPS", 50)


def parts(found: Physics) -> set[str]:
    names = ("short_range", "ensembles", "structure", "vibration", "thermostat", "ladder", "density")
    names += ("crystal", "phonons", "defects")
    return {name for name in names if getattr(found, name)}


def reasons(found: Physics) -> dict[str, str]:
    return {part.name: part.reason for part in found.left_out}


def test_budgets_decide_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is left out where it would take too long, but for approaching atoms, which cost nothing."""
    start = bulk("Ar", cubic=True, a=5.3).repeat(2)
    slow = physics(setting(start, seconds=1.0), start)
    assert parts(slow) == {"short_range"}
    # 6 runs of 180 steps of 2 s with 64 atoms, and the teacher's word on every tenth of the last 80.
    needed = 6 * 180 * 2 + 6 * 8 * 2
    assert reasons(slow) == {
        "radial distribution and vibration": f"It needs about {needed} s on this machine, and "
        "ensemble_seconds allows 150.",
        "temperature under a thermostat": "It needs about 152 s on this machine, and nvt_seconds allows 15.",
        "highest temperature": "It needs about 400 s on this machine, and ladder_seconds allows 60.",
        "density (NPT)": "It needs about 4800 s on this machine, and npt_seconds allows 90.",
        "structure at rest, elastic constants": reasons(slow)["structure at rest, elastic constants"],
        "phonons": stages.NOT_AT_REST,
        "vacancies and surfaces": stages.NOT_AT_REST,
    }
    assert "crystal_seconds allows 30" in reasons(slow)["structure at rest, elastic constants"]
    none = {
        "nvt_seconds": 0,
        "ensemble_seconds": 0,
        "ladder_seconds": 0,
        "npt_seconds": 0,
        "crystal_seconds": 0,
        "approach_points": 0,
    }
    off = physics(setting(start, **none), start)
    assert parts(off) == set()
    assert reasons(off)["atoms stay apart"] == "Switched off (approach_points is 0)."


def test_molecules_have_dynamics_only(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    pair = Atoms("Ar2", [[0, 0, 0], [0, 0, 3.8]])
    found = physics(setting(pair, ladder_seconds=0), pair)
    assert parts(found) == {"short_range", "ensembles", "thermostat"}
    assert reasons(found)["density (NPT)"] == stages.NOT_PERIODIC


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
    assert isinstance(done["thermostat"], KineticEnergy) and done["thermostat"].steps == 41
    assert isinstance(done["density"], DensityComparison) and done["density"].model == done["density"].teacher
    runs = done["ensembles"]
    assert (
        isinstance(runs, Ensembles) and runs.sampling.method == "runs" and runs.model.shape == (6, 2, 32, 3)
    )
    structure, vibration = stages.in_dynamics(runs)
    assert structure is not None and [row.error for row in structure[0]] == [0.0]
    assert [(row.species, row.difference) for row in vibration] == [("Ar", 0.0)]
    assert (
        isinstance(done["ladder"], Ladder) and done["ladder"].highest == done["ladder"].teacher_highest == 80
    )
    assert isinstance(done["defects"], LeftOut) and "defect_seconds is 0" in done["defects"].reason
    unstable = physics(setting(start, ladder_seconds=0, crystal_seconds=0), start, stable=False)
    assert parts(unstable) == {"short_range"}
