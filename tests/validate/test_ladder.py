"""Rising temperatures: a hole that hot atoms fall into, and potentials that hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.data import covalent_radii

from compactmlip.errors import CompactMLIPError
from compactmlip.validate.checks import Thresholds
from compactmlip.validate.checks_dynamics import ladder_checks
from compactmlip.validate.ladder import Ladder, climb, closest, compare_ladders
from compactmlip.validate.report import build_report

from .conftest import Pairs, Wells, lennard_jones

HOW: dict[str, Any] = {"temperature_K": 100.0, "timestep_fs": 4.0, "steps": 80}


@pytest.fixture(scope="module")
def argon() -> Atoms:
    """With light atoms, which get around in a short run."""
    atoms = bulk("Ar", cubic=True, a=5.3).repeat(2)
    atoms.set_masses([4.0] * len(atoms))
    return atoms


def buckingham() -> Pairs:
    """The well of argon, and behind a wall of some 100 meV, at 2.3 Angstrom, a fall without end."""
    a, rho, c = 168.6, 0.4222, 93.94
    return Pairs(
        lambda r: a * np.exp(-r / rho) - c / r**6, lambda r: -a / rho * np.exp(-r / rho) + 6 * c / r**7
    )


def _check(found: Ladder, temperature: float = 100.0) -> Any:
    (check,) = ladder_checks(found, temperature, Thresholds())
    return check


def test_lennard_jones_holds(argon: Atoms) -> None:
    before = argon.positions.copy()
    found = compare_ladders(lennard_jones(), lennard_jones(), argon, rungs=(1.0, 2.0, 4.0), **HOW)
    assert found.highest == found.teacher_highest == 400 and len(found.model) == len(found.teacher) == 3
    assert all(r.mean_temperature_K == pytest.approx(r.temperature_K, rel=0.45) for r in found.model)
    assert all(r.closest > 0.6 and r.disagreement == pytest.approx(0, abs=1e-9) for r in found.model)
    assert all(r.disagreement is None for r in found.teacher)
    assert _check(found).verdict == "pass" and _check(found).value == 0.25
    assert np.array_equal(argon.positions, before) and argon.calc is None


def test_hole_is_found(argon: Atoms) -> None:
    """Atoms go over the wall of Buckingham's potential where those of Lennard-Jones turn back."""
    rungs = (1.0, 2.0, 4.0, 8.0, 16.0)
    found = compare_ladders(buckingham(), lennard_jones(), argon, with_teacher=False, rungs=rungs, **HOW)
    assert found.model[-1].failure and found.highest < 1600 and found.teacher == ()
    check = _check(found, temperature=max(found.highest, 100.0))
    assert check.verdict == "fail" and f"Broke at {found.model[-1].temperature_K:.0f} K" in check.reason


def test_atoms_that_do_not_repel_each_other_meet(argon: Atoms) -> None:
    """Free atoms: nothing else is wrong with them."""
    rungs = climb(Pairs(lambda r: 0 * r, lambda r: 0 * r), argon, rungs=(1.0, 2.0, 4.0, 8.0), **HOW)
    assert "two atoms came within" in rungs[-1].failure and rungs[-1].closest < 0.5


def test_another_surface_is_found_by_the_teacher(argon: Atoms) -> None:
    """A model that holds, but on a surface that the teacher does not know."""
    model = Wells(argon.positions, 0.015)
    found = compare_ladders(model, lennard_jones(), argon, with_teacher=False, **HOW)
    assert "kB T per atom off" in found.model[-1].failure
    disagreement = found.model[-1].disagreement
    assert disagreement is not None and disagreement > 4


def test_runaway_and_errors_end_the_climb(argon: Atoms) -> None:
    hot = climb(Wells(argon.positions, 0.02, noise=3.0), argon, **HOW)
    assert len(hot) == 1 and "the temperature reached" in hot[0].failure

    class Refuses(Wells):
        def calculate(self, *args: Any, **kwargs: Any) -> None:
            super().calculate(*args, **kwargs)
            if self.calls > 30:
                raise CompactMLIPError("outside")

    stopped = climb(Refuses(argon.positions, 0.02), argon, **HOW)
    assert stopped[-1].failure == "the calculator stopped: outside"
    broken = climb(Pairs(lambda r: np.nan * r, lambda r: np.nan * r), argon, **HOW)
    assert "not finite" in broken[0].failure and _check(Ladder(atoms=32, model=broken)).verdict == "fail"


def test_time_that_ends_is_not_a_failure(argon: Atoms) -> None:
    rungs = climb(lennard_jones(), argon, max_seconds=0.0, **HOW)
    assert rungs == () and ladder_checks(Ladder(atoms=32, model=rungs), 100.0, Thresholds()) == []
    one = climb(lennard_jones(), argon, rungs=(1.0,), **HOW)
    assert not one[0].failure and ladder_checks(Ladder(atoms=32, model=one), 100.0, Thresholds()) == []
    assert ladder_checks(None, 100.0, Thresholds()) == []


def test_closest() -> None:
    pair = Atoms("NaCl", [[0, 0, 0], [0, 0, 1.9]], cell=[20, 20, 20], pbc=True)
    radii = covalent_radii[11] + covalent_radii[17]
    assert closest(pair) == pytest.approx(1.9 / radii)
    pair.positions[1, 2] = 19.0  # around the corner
    assert closest(pair) == pytest.approx(1.0 / radii)
    pair.positions[1, 2] = 10.0
    assert closest(pair) == np.inf


def test_in_the_report(evidence: Any, argon: Atoms) -> None:
    certificate, data = evidence()
    found = compare_ladders(lennard_jones(), lennard_jones(), argon, rungs=(1.0,), **HOW)
    changed = certificate.model_copy(update={"ladder": found})
    html = build_report(changed, data)
    assert "Rising temperature" in html and "Rising temperature" not in build_report(certificate, data)
    assert type(certificate).model_validate_json(changed.model_dump_json()) == changed
