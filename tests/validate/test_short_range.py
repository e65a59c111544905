"""What keeps atoms apart: barriers and holes of potentials that are known in closed form."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import Calculator, all_changes
from ase.data import covalent_radii
from scipy.optimize import brentq

from compactmlip.errors import InputError
from compactmlip.validate.checks import Thresholds, overall, short_range_checks
from compactmlip.validate.report import build_report
from compactmlip.validate.short_range import (
    CLOSEST,
    NO_BOND,
    SAFE_BARRIER,
    Approach,
    approach,
    barrier,
    nearest_pairs,
    safe_temperature,
)

# Buckingham's potential of O-O in oxides: it falls without bound at short distances.
A, RHO, C = 22764.0, 0.149, 27.88


def buckingham(r: Any) -> Any:
    return A * np.exp(-r / RHO) - C / r**6


class Pairs(Calculator):
    """Sum of a function of all distances below 8 Angstrom."""

    implemented_properties = ["energy"]  # noqa: RUF012

    def __init__(self, function: Any, closest: float = 0.0) -> None:
        super().__init__()
        self.function, self.closest = function, closest

    def calculate(self, atoms: Any = None, properties: Any = ("energy",), changes: Any = all_changes) -> None:
        super().calculate(atoms, properties, changes)
        distances = self.atoms.get_all_distances()[np.triu_indices(len(self.atoms), 1)]
        if distances.min() < self.closest:
            raise InputError("not finite")
        self.results = {"energy": float(self.function(distances).sum())}


@pytest.fixture
def pair() -> Atoms:
    return Atoms("O2", [[0, 0, 0], [0, 0, 2.6]])


def test_hole_of_a_buckingham_potential(pair: Atoms) -> None:
    """Its barrier and where it falls follow from dE/dr = 0."""
    slope = lambda r: -A / RHO * np.exp(-r / RHO) + 6 * C / r**7  # noqa: E731
    top = brentq(slope, 0.5, 1.2)  # inner extremum: a maximum
    assert buckingham(top) > buckingham(top - 0.1) and buckingham(top) > buckingham(top + 0.1)
    found, curves = approach({"model": Pairs(buckingham)}, pair, 6.0, 400)
    assert [a.pair for a in found] == ["O-O"] and found[0].start == pytest.approx(2.6)
    lowest = buckingham(curves[0].distances[curves[0].distances > top]).min()
    assert found[0].hole is not None and found[0].hole == pytest.approx(top, abs=0.01)
    assert found[0].barrier == pytest.approx(buckingham(top) - lowest, rel=1e-3)
    assert found[0].teacher_barrier is None
    # The path ends where it should.
    assert curves[0].distances[-1] == pytest.approx(CLOSEST * 2 * covalent_radii[8])


def test_wall_has_no_hole(pair: Atoms) -> None:
    wall = lambda r: 4 * ((2.4 / r) ** 12 - (2.4 / r) ** 6)  # noqa: E731
    found, curves = approach({"model": Pairs(buckingham), "teacher": Pairs(wall)}, pair, 6.0)
    end = curves[0].distances[-1]
    assert found[0].teacher_hole is None and found[0].hole is not None
    energies = curves[0].energies["teacher"]
    assert found[0].teacher_barrier == pytest.approx(wall(end) - energies.min() - wall(2.6), rel=1e-9)


def test_bonds_are_no_holes() -> None:
    """Two atoms may form a bond on the way; a well below any bond length is a hole even behind a wall."""
    distances = np.linspace(2.0, 0.3, 200)
    wall = 0.5 / distances**6
    bond = -8 * np.exp(-(((distances - 0.74) / 0.1) ** 2))
    height, hole = barrier(distances, wall + bond - wall[0], NO_BOND * 0.62)
    assert hole is None and height > 500
    height, hole = barrier(distances, wall + 30 * bond, NO_BOND * 1.3)
    assert hole is not None and 0.74 < hole < 1.1 and 0 < height < 2


def test_well_that_the_teacher_lacks_is_a_hole() -> None:
    """Where the teacher only rises, the model may not fall, however long the bond would be."""
    distances = np.linspace(2.5, 0.5, 200)
    wall = 2.0 / distances**6 - 2.0 / 2.5**6
    well = wall - 6 * np.exp(-(((distances - 1.2) / 0.1) ** 2))
    assert barrier(distances, well, NO_BOND * 1.32)[1] is None
    height, hole = barrier(distances, well, NO_BOND * 1.32, reference=wall)
    assert hole is not None and 1.25 < hole < 1.5 and 0 < height < 1
    assert barrier(distances, well, NO_BOND * 1.32, reference=well)[1] is None
    pair = Atoms("O2", [[0, 0, 0], [0, 0, 2.5]])
    curve = lambda r: 2.0 / r**6 - 6 * np.exp(-(((r - 1.2) / 0.1) ** 2))  # noqa: E731
    calculators = {"model": Pairs(curve), "teacher": Pairs(lambda r: 2.0 / r**6)}
    assert approach({"model": calculators["model"]}, pair, 6.0)[0][0].hole is None
    (found,), _ = approach(calculators, pair, 6.0)
    assert found.hole is not None and found.teacher_hole is None
    blind = np.where(distances < 1.6, np.nan, wall)  # a teacher that refused
    assert barrier(distances, well, NO_BOND * 1.32, reference=blind)[1] is None


def test_path_that_ends_in_an_error(pair: Atoms) -> None:
    """A simulation would stop there and say so; what came before counts."""
    found, curves = approach({"model": Pairs(buckingham, closest=1.2)}, pair, 6.0)
    assert np.isnan(curves[0].energies["model"][-1])
    known = buckingham(curves[0].distances[curves[0].distances >= 1.2])
    assert found[0].hole is None and found[0].barrier == pytest.approx(np.ptp(known)) and np.ptp(known) > 1
    assert barrier(np.array([1.0, 0.5]), np.array([np.nan, np.nan]), 0.7) == (0.0, 1.0)


def test_nearest_pairs() -> None:
    crystal = bulk("MgO", "rocksalt", a=4.2, cubic=True).repeat(2)
    crystal.rattle(0.05, seed=1)
    pairs = nearest_pairs(crystal, 4.0)
    assert list(pairs) == [("Mg", "Mg"), ("Mg", "O"), ("O", "O")]
    distances = crystal.get_all_distances(mic=True)
    symbols = np.array(crystal.get_chemical_symbols())
    for (one, other), (i, j, vector) in pairs.items():
        block = distances[np.ix_(symbols == one, symbols == other)]
        assert np.linalg.norm(vector) == pytest.approx(block[block > 0].min())
        assert (symbols[i], symbols[j]) == (one, other)
        assert np.allclose(vector, crystal.get_distance(i, j, mic=True, vector=True))
    assert nearest_pairs(bulk("Cu"), 4.0) == {}  # images of one atom


def test_structure_is_not_changed(pair: Atoms) -> None:
    before = pair.positions.copy()
    approach({"model": Pairs(buckingham)}, pair, 6.0, 5)
    assert np.array_equal(pair.positions, before) and pair.calc is None


def _approach(**changes: Any) -> Approach:
    given = {"pair": "Mg-O", "start": 2.1, "barrier": 30.0, "hole": None}
    return Approach(**(given | changes))


@pytest.mark.parametrize(("temperature", "verdict"), [(300, "pass"), (800, "warn"), (1200, "fail")])
def test_verdict_follows_the_temperature(temperature: float, verdict: str) -> None:
    """The hole behind 2.2 eV is safe up to about 1,000 K."""
    height = SAFE_BARRIER * units.kB * 1000
    rows = [
        _approach(),
        _approach(pair="O-O", barrier=height, hole=1.1, teacher_barrier=9.0, teacher_hole=0.8),
    ]
    (check,) = short_range_checks(rows, temperature, Thresholds())
    assert check.verdict == verdict and check.value == pytest.approx(temperature / 1000)
    assert "O-O falls below 1.10 A" in check.reason and "The teacher has such a hole too" in check.reason
    assert "up to about 1000 K" in check.reason


def test_no_barrier_at_all_fails() -> None:
    (check,) = short_range_checks([_approach(barrier=0.0, hole=2.1)], 300, Thresholds())
    assert check.verdict == "fail" and overall([check]) == "fail" and safe_temperature(-1.0) == 0.0
    assert short_range_checks([], 300, Thresholds()) == []


def test_in_the_report(evidence: Any) -> None:
    certificate, data = evidence()
    oxygen = Atoms("O2", [[0, 0, 0], [0, 0, 2.6]])
    found, curves = approach({"model": Pairs(buckingham)}, oxygen, 6.0)
    certificate = certificate.model_copy(update={"short_range": tuple(found)})
    html = build_report(certificate, replace(data, curves=tuple(curves)))
    assert "Short distances" in html and "figure-approach" in html
    row = re.search(r'<tr><th scope="row">O-O</th>(.*?)</tr>', html, re.DOTALL)
    assert row is not None and f"{found[0].hole:.3g}"[:3] in row[1]
    assert "Short distances" not in build_report(*evidence())
    assert type(certificate).model_validate_json(certificate.model_dump_json()) == certificate
