"""Errors against hand computation; consistency checks on calculators that are right or wrong."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import all_changes
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.constraints import FixAtoms

from compactmlip.data.graph import build_graph, energy_and_derivatives
from compactmlip.errors import InputError
from compactmlip.validate import Thresholds
from compactmlip.validate.checks import consistency_checks, overall, parity_checks
from compactmlip.validate.consistency import check_consistency
from compactmlip.validate.parity import (
    Labels,
    error_stats,
    evaluate_frames,
    has_labels,
    labels_of,
    parity,
)


def test_error_statistics_by_hand():
    stats = error_stats(np.array([1.0, 2.0, 4.0]), np.array([1.001, 1.998, 4.0]), "meV/A")
    assert stats.count == 3
    assert stats.mae == pytest.approx(1.0)
    assert stats.rmse == pytest.approx(math.sqrt(5 / 3))
    assert stats.maximum == pytest.approx(2.0)
    assert stats.bias == pytest.approx(-1 / 3)
    assert stats.reference_mean_abs == pytest.approx(7000 / 3)
    assert stats.r2 == pytest.approx(1 - 5e-6 / 3 / (14 / 9))


def test_size_of_energies_is_measured_from_their_mean():
    stats = error_stats(np.array([-5.0, -5.2]), np.array([-5.0, -5.2]), "meV/atom", centered=True)
    assert stats.reference_mean_abs == pytest.approx(100.0)
    assert stats.mae == 0.0 and stats.r2 == 1.0


def test_no_r2_without_variation_and_no_statistics_of_nothing():
    assert error_stats(np.ones(3), np.zeros(3), "x").r2 is None
    with pytest.raises(InputError, match="shapes"):
        error_stats(np.ones(3), np.ones(2), "x")
    with pytest.raises(InputError):
        error_stats(np.ones(0), np.ones(0), "x")


def _labels() -> tuple[list[Atoms], Labels, Labels]:
    frames = [Atoms("MgO"), Atoms("O3Mg")]
    reference = Labels(
        np.array([-10.0, -20.0]), (np.zeros((2, 3)), np.zeros((4, 3))), np.array([[0.01] * 6, [np.nan] * 6])
    )
    forces = (np.full((2, 3), 0.01), np.full((4, 3), 0.02))
    forces[1][3] = -0.05  # the magnesium of the second structure
    predicted = Labels(np.array([-9.99, -20.04]), forces, np.array([[0.012] * 6, [0.0] * 6]))
    return frames, reference, predicted


def test_parity_is_per_atom_and_per_species_and_skips_unknown_stress():
    report = parity(*_labels())
    assert (report.frames, report.atoms) == (2, 6)
    assert report.energy.mae == pytest.approx((5.0 + 10.0) / 2)
    assert report.energy.bias == pytest.approx((5.0 - 10.0) / 2)
    assert report.forces.mae == pytest.approx((2 * 10 + 3 * 20 + 50) / 6)
    assert report.forces_by_species["Mg"].mae == pytest.approx((10 + 50) / 2)
    assert report.forces_by_species["O"].mae == pytest.approx((10 + 3 * 20) / 4)
    assert report.forces_by_species["O"].count == 12
    assert report.stress is not None and report.stress.count == 6
    assert report.stress.mae == pytest.approx(2.0)
    assert report.mean_force == 0.0


def test_errors_by_kind_of_structure():
    frames, reference, predicted = _labels()
    assert parity(frames, reference, predicted).by_kind == {}
    frames[1].info["config_type"] = "vacancy"
    found = parity(frames, reference, predicted).by_kind
    assert list(found) == ["other", "vacancy"] and found["vacancy"].frames == 1
    assert found["other"].energy == pytest.approx(5) and found["other"].forces == pytest.approx(10)
    assert found["vacancy"].energy == pytest.approx(10)
    assert found["vacancy"].forces == pytest.approx((3 * 20 + 50) / 4)


def test_labels_must_belong_to_the_structures():
    frames, reference, predicted = _labels()
    with pytest.raises(InputError, match="does not belong"):
        parity(frames[::-1], reference, predicted)
    with pytest.raises(InputError, match="does not belong"):
        parity([], reference, predicted)


def test_labels_are_all_there_or_not_used():
    atoms = bulk("Cu")
    labelled = atoms.copy()
    labelled.info["REF_energy"], labelled.arrays["REF_forces"] = -1.0, np.zeros((1, 3))
    tensor = np.array([[1.0, 6, 5], [6, 2, 4], [5, 4, 3]])
    stressed = labelled.copy()
    stressed.info["REF_stress"] = tensor
    assert not has_labels([atoms]) and has_labels([labelled])
    found = labels_of([labelled, stressed])
    assert np.isnan(found.stresses[0]).all()
    np.testing.assert_array_equal(found.stresses[1], [1, 2, 3, 4, 5, 6])
    with pytest.raises(InputError, match="structure 1 has no REF_energy"):
        has_labels([labelled, atoms])
    with pytest.raises(InputError, match="no REF_energy"):
        labels_of([atoms])
    labelled.arrays["REF_forces"][0, 0] = np.nan
    with pytest.raises(InputError, match=r"structure 0.*not finite"):
        labels_of([labelled])


def test_evaluating_a_calculator_ignores_constraints_and_leaves_structures_alone():
    crystal = bulk("Cu", cubic=True)
    crystal.rattle(0.1, seed=0)
    cluster = Atoms("Cu3", [[0, 0, 0], [2.4, 0, 0], [0, 2.5, 0.3]])
    free = crystal.copy()
    crystal.set_constraint(FixAtoms([0, 1, 2, 3]))
    found = evaluate_frames(EMT(), [crystal, cluster])
    free.calc = EMT()
    np.testing.assert_allclose(found.forces[0], free.get_forces())
    np.testing.assert_allclose(found.stresses[0], free.get_stress())
    assert found.energies[0] == pytest.approx(free.get_potential_energy())
    assert np.isnan(found.stresses[1]).all()
    assert crystal.constraints and crystal.calc is None


def test_evaluating_a_native_model(small_model, structures):
    frames = [structures["crystal"], structures["molecule"], structures["slab"]]
    found = evaluate_frames(small_model, frames)
    expected = energy_and_derivatives(small_model, build_graph(frames[0], small_model.spec))
    assert found.energies[0] == pytest.approx(float(expected.energies[0]), abs=1e-12)
    np.testing.assert_allclose(found.forces[0], expected.forces.numpy(), atol=1e-12)
    assert found.stresses[0, 3] == pytest.approx(float(expected.stresses[0, 1, 2]), abs=1e-12)
    assert np.isnan(found.stresses[1:]).all()


@pytest.mark.parametrize(
    ("error", "verdict"), [(0.0, "pass"), (0.05, "pass"), (0.15, "warn"), (0.3, "fail"), (np.nan, "fail")]
)
def test_verdict_on_forces_is_relative_to_their_size(error, verdict):
    frames = [bulk("Cu", cubic=True)]
    forces = np.full((4, 3), 2.0)
    reference = Labels(np.zeros(1), (forces,), np.zeros((1, 6)))
    predicted = Labels(np.zeros(1), (forces * (1 + error),), np.zeros((1, 6)))
    checks = {c.name.split()[0]: c for c in parity_checks(parity(frames, reference, predicted), Thresholds())}
    assert checks["force"].verdict == verdict
    assert checks["energy"].verdict == checks["stress"].verdict == "pass"
    assert overall(checks.values()) == verdict
    if np.isfinite(error):
        assert checks["force"].value == pytest.approx(100 * error)
    else:
        assert checks["force"].value is None


class Swapped(EMT):  # type: ignore[misc]
    """EMT that takes copper for gold and gold for copper."""

    def calculate(self, atoms: Any = None, properties: Any = ("energy",), changes: Any = all_changes) -> None:
        exchanged = atoms.copy()
        exchanged.numbers = np.where(atoms.numbers == 29, 79, 29)
        super().calculate(exchanged, properties, changes)


def test_swapped_species_are_caught():
    frames = [bulk("Cu", cubic=True, a=3.8) for _ in range(3)]
    for k, atoms in enumerate(frames):
        atoms.symbols[k] = "Au"
        atoms.rattle(0.1, seed=k)
    true, swapped = (evaluate_frames(calculator, frames) for calculator in (EMT(), Swapped()))
    verdicts = {
        c.name.split()[0]: c.verdict for c in parity_checks(parity(frames, true, swapped), Thresholds())
    }
    assert verdicts == {"energy": "fail", "force": "fail", "stress": "fail"}
    same = parity_checks(parity(frames, true, true), Thresholds())
    assert {c.verdict for c in same} == {"pass"}


class Wrong(EMT):  # type: ignore[misc]
    """EMT with one thing broken."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def calculate(self, atoms: Any = None, properties: Any = ("energy",), changes: Any = all_changes) -> None:
        super().calculate(atoms, properties, changes)
        results = self.results
        if self.what == "scaled forces":
            results["forces"] = 1.02 * results["forces"]
        if self.what == "scaled stress":
            results["stress"] = 1.1 * results["stress"]
        if self.what == "depends on the frame":
            height = self.atoms.positions[:, 2]
            results["energy"] = results["energy"] + 0.02 * np.sum(np.sin(height))
            results["forces"] = results["forces"] - 0.02 * np.cos(height)[:, None] * [0, 0, 1]
        if self.what == "depends on the order":
            results["forces"] = results["forces"] * np.linspace(1, 1.02, len(self.atoms))[:, None]


def _crystal() -> Atoms:
    atoms = bulk("Cu", cubic=True).repeat((2, 1, 1))
    strain = np.array([[0.04, 0.01, 0.01], [0.01, 0.02, 0], [0.01, 0, 0.03]])
    atoms.set_cell(atoms.cell.array @ (np.eye(3) - strain), scale_atoms=True)
    atoms.rattle(0.08, seed=5)
    return atoms


FORCES, STRESS = "forces are the gradient of the energy", "stress is the strain derivative of the energy"
SYMMETRY = "symmetry: rotation, permutation, translation"


@pytest.mark.parametrize(
    ("what", "caught"),
    [
        ("nothing", set()),
        ("scaled forces", {FORCES}),
        ("scaled stress", {STRESS}),
        ("depends on the frame", {SYMMETRY, "symmetry: inversion"}),
        ("depends on the order", {SYMMETRY, FORCES}),
    ],
)
def test_what_is_broken_is_caught(what, caught):
    found = check_consistency(Wrong(what), _crystal(), dtype="float64", seed=1)
    assert found.largest_stress > 10
    checks = consistency_checks(found, "float32")  # the tolerances of an ordinary deployed file
    assert len(checks) == 4
    failed = {c.name for c in checks if c.verdict == "fail"}
    if what == "depends on the frame":
        failed.discard(STRESS)  # follows: the field has a strain derivative that EMT's stress lacks
    assert failed == caught


def test_consistency_of_a_model_in_both_precisions(make_spec, make_model, structures):
    import torch

    spec = make_spec(species=("C", "H", "O"), lmax_edge=1, channels=(6, 4))
    for dtype, name in ((torch.float64, "float64"), (torch.float32, "float32")):
        model = make_model(spec, dtype=dtype)
        found = check_consistency(model, structures["molecule"], dtype=name, seed=2, teacher=model)
        checks = consistency_checks(found, name)
        assert found.derivative_stress is None and len(checks) == 3
        assert overall(checks) == "pass", checks


def test_inversion_is_held_against_the_teacher(make_spec, make_model, structures):
    # Paths with odd l1 + l2 + l3 make the random model chiral: that is not a fault of the student.
    model = make_model(make_spec(channels=(4, 3, 2), lmax_edge=2, cutoff=3.5))
    atoms = structures["smaller than the cutoff"]
    alone = consistency_checks(check_consistency(model, atoms, dtype="float64"), "float64")
    beside = consistency_checks(check_consistency(model, atoms, dtype="float64", teacher=model), "float64")
    assert {c.name: c.verdict for c in alone}["symmetry: inversion"] == "fail"
    assert overall(beside) == "pass"


def test_consistency_of_a_molecule_without_a_cell():
    atoms = molecule("CH4")
    atoms.rattle(0.05, seed=1)
    found = check_consistency(LennardJones(sigma=1.0, epsilon=0.5, rc=6.0), atoms, dtype="float64")
    assert found.derivative_stress is None
    assert overall(consistency_checks(found, "float64")) == "pass"
