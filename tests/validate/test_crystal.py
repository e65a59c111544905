"""Crystals at rest: lattice sums of Lennard-Jones, exact relations of elastic constants, comparisons."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.lj import LennardJones
from ase.constraints import FixAtoms

from compactmlip.errors import InputError
from compactmlip.validate.checks import Thresholds, crystal_checks
from compactmlip.validate.crystal import (
    Crystal,
    CrystalComparison,
    compare_crystals,
    crystal,
    deformation,
    displacement,
    elastic_constants,
    relax,
)
from compactmlip.validate.left_out import AT_REST, UNJUDGED, unjudged
from compactmlip.validate.report import build_report

SIGMA, EPSILON = 3.4, 0.0104


def argon(**changes: float) -> LennardJones:
    given = {"sigma": SIGMA, "epsilon": EPSILON, "rc": 5 * SIGMA} | changes
    return LennardJones(smooth=False, **given)


@pytest.fixture(scope="module")
def found() -> tuple[Crystal, Atoms]:
    atoms = bulk("Ar", "fcc", a=5.2, cubic=True)
    atoms.rattle(0.02, seed=1)
    atoms.set_constraint(FixAtoms([0]))
    return crystal(argon(), atoms)


def test_argon_against_lattice_sums(found: tuple[Crystal, Atoms]) -> None:
    """fcc: a = (2 A12 / A6)^(1/6) sqrt(2) sigma, bulk modulus 4 eps/sigma^3 A12 (A6/A12)^(5/2).

    The sums are 12.13188 and 14.45392 (Ashcroft and Mermin, chapter 20); the cutoff changes a by 0.1 %.
    """
    result, relaxed = found
    a12, a6 = 12.13188, 14.45392
    expected = np.sqrt(2) * (2 * a12 / a6) ** (1 / 6) * SIGMA
    assert result.relaxed and np.allclose(relaxed.cell.lengths(), expected, rtol=3e-3)
    assert result.volume == pytest.approx(expected**3 / 4, rel=1e-2)
    modulus = 4 * EPSILON / SIGMA**3 * a12 * (a6 / a12) ** 2.5 / units.GPa
    assert result.bulk_modulus == pytest.approx(modulus, rel=2e-2)
    assert not relaxed.constraints


def test_relations_of_central_forces(found: tuple[Crystal, Atoms]) -> None:
    """Cauchy: C12 = C44 at rest; and the bulk modulus is (C11 + 2 C12) / 3."""
    result, _ = found
    c = np.array(result.elastic)
    assert c[0, 1] == pytest.approx(c[3, 3], rel=5e-3)
    assert result.bulk_modulus == pytest.approx((c[0, 0] + 2 * c[0, 1]) / 3, rel=1e-2)
    assert np.allclose(c, c.T) and abs(c[:3, 3:]).max() < 0.01 * c[0, 0]
    assert result.softest == pytest.approx(min(c[0, 0] - c[0, 1], c[3, 3]), rel=1e-2)


def test_shear_strain_is_twice_the_tensor() -> None:
    matrix = deformation(np.array([0.0, 0.0, 0.0, 0.02, 0.0, 0.0]))
    assert matrix[1, 2] == matrix[2, 1] == 0.01 and np.trace(matrix) == 3


def test_displacement_forgets_shifts_and_cells() -> None:
    one = bulk("MgO", "rocksalt", a=4.2, cubic=True)
    other = one.copy()
    other.positions += 0.3
    other.wrap()
    other.set_cell(other.cell * 1.02, scale_atoms=True)
    assert displacement(one, other) == pytest.approx(0, abs=1e-12)
    other.positions[0, 0] += 0.4
    assert displacement(one, other) == pytest.approx(0.4 * np.sqrt(1 / 8 - 1 / 64), rel=1e-9)


def test_clusters_are_refused() -> None:
    with pytest.raises(InputError, match="periodic in all directions"):
        relax(argon(), Atoms("Ar2", [[0, 0, 0], [0, 0, 3.7]]))


def test_same_potential_passes_and_stiffer_one_fails(found: tuple[Crystal, Atoms]) -> None:
    atoms = bulk("Ar", "fcc", a=5.2)
    small = {"rc": 2.5 * SIGMA}
    same, _ = compare_crystals(argon(**small), argon(**small), atoms)
    checks = crystal_checks(same, Thresholds())
    assert len(checks) == 4 and {c.verdict for c in checks} == {"pass"}
    assert same.volume_error == same.elastic_error == 0
    stiff, _ = compare_crystals(argon(epsilon=1.3 * EPSILON, **small), argon(**small), atoms)
    verdicts = {c.name: c.verdict for c in crystal_checks(stiff, Thresholds())}
    assert verdicts["bulk modulus"] == verdicts["elastic constants"] == "fail"
    assert verdicts["volume at rest"] == verdicts["positions at rest"] == "pass"
    large, _ = compare_crystals(argon(sigma=1.01 * SIGMA, **small), argon(**small), atoms)
    assert large.volume_error == pytest.approx(3.0, abs=0.1)


def _crystal(**changes: Any) -> Crystal:
    given: dict[str, Any] = {
        "atoms": 8,
        "relaxed": True,
        "volume": 9.6,
        "energy": -6.0,
        "bulk_modulus": 150.0,
        "pressure_derivative": 4.2,
        "elastic": tuple(tuple(float(100 * (i == j)) for j in range(6)) for i in range(6)),
    }
    return Crystal(**(given | changes))


def _names(model: Crystal, teacher: Crystal) -> dict[str, str]:
    found = CrystalComparison(model=model, teacher=teacher, displacement=0.0)
    return {c.name: c.verdict for c in crystal_checks(found, Thresholds())}


def test_what_cannot_be_judged() -> None:
    assert crystal_checks(None, Thresholds()) == []
    assert _names(_crystal(relaxed=False), _crystal()) == {"structure at rest": "fail"}
    for model in (_crystal(), _crystal(relaxed=False)):
        found = CrystalComparison(model=model, teacher=_crystal(relaxed=False), displacement=0.0)
        assert crystal_checks(found, Thresholds()) == []
        (left_out,) = unjudged(dict.fromkeys(UNJUDGED) | {"crystal": found}, dict.fromkeys(UNJUDGED, ()))
        assert left_out.name == AT_REST and "teacher's structure did not come to rest" in left_out.reason
    assert _names(_crystal(bulk_modulus=float("nan")), _crystal())["bulk modulus"] == "fail"
    soft = tuple(tuple(float((-5 if i == 5 else 100) * (i == j)) for j in range(6)) for i in range(6))
    assert _names(_crystal(elastic=soft), _crystal())["elastic stability"] == "fail"
    assert "elastic stability" not in _names(_crystal(elastic=soft), _crystal(elastic=soft))


def test_in_the_report(evidence: Any, found: tuple[Crystal, Atoms]) -> None:
    certificate, data = evidence()
    comparison = CrystalComparison(model=found[0], teacher=_crystal(), displacement=0.01)
    html = build_report(certificate.model_copy(update={"crystal": comparison}), data)
    assert "The crystal at rest" in html and "C44" in html and "bulk modulus" in html
    assert "The crystal at rest" not in build_report(certificate, data)


def test_elastic_constants_do_not_change_the_structure(found: tuple[Crystal, Atoms]) -> None:
    relaxed = found[1].copy()
    before = relaxed.positions.copy(), relaxed.cell.array.copy()
    elastic_constants(argon(rc=2.5 * SIGMA), relaxed)
    assert np.array_equal(relaxed.positions, before[0]) and np.array_equal(relaxed.cell.array, before[1])
