"""Diffusion of motion that is known in closed form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk

from compactmlip.validate.checks import Thresholds
from compactmlip.validate.checks_dynamics import motion_checks
from compactmlip.validate.motion import (
    FEWEST_FRAMES,
    MotionComparison,
    compare_motion,
    motion,
    without_drift,
)
from compactmlip.validate.report import build_report

STEP = 0.01
"""ps between frames"""


def walkers(diffusion: float, frames: int = 400, atoms: int = 40, seed: int = 0) -> np.ndarray:
    """Brownian motion with a diffusion coefficient in 10^-5 cm^2/s = 0.1 Angstrom^2/ps."""
    steps = np.random.default_rng(seed).normal(0, np.sqrt(2 * 0.1 * diffusion * STEP), (frames, atoms, 3))
    return np.cumsum(steps, axis=0)


def vibrations(square: float, frames: int = 400, atoms: int = 40, seed: int = 0) -> np.ndarray:
    """Oscillators of random phase and of Gaussian amplitudes with <u^2> in Angstrom^2."""
    random = np.random.default_rng(seed)
    sites = random.uniform(0, 30, (atoms, 3))
    rates = random.uniform(12.0, 60.0, (atoms, 3))
    sine, cosine = random.normal(0, np.sqrt(square / 3), (2, atoms, 3))
    angles = rates * STEP * np.arange(frames)[:, None, None]
    return sites + sine * np.sin(angles) + cosine * np.cos(angles)


def test_brownian_walkers() -> None:
    """D within its error, and the error is what runs scatter by."""
    found = [motion(walkers(20.0, seed=seed), STEP, 2.0) for seed in range(20)]
    assert {f.kind for f in found} == {"diffuses"}
    values = np.array([f.diffusion for f in found])
    assert values.mean() == pytest.approx(20.0, rel=0.06)
    errors = np.array([f.diffusion_error for f in found])
    assert errors.mean() == pytest.approx(values.std(ddof=1), rel=0.4)
    assert np.mean(abs(values - 20.0) < 3 * errors) > 0.8
    assert np.mean([f.exponent for f in found]) == pytest.approx(1.0, abs=0.1)


def test_ideal_gas_is_ballistic() -> None:
    """3 kB T t^2 / m: no diffusion in that time, and nothing is said about it."""
    atoms = Atoms("Ar2000")
    speed = np.sqrt(units.kB * 300 / atoms.get_masses()[0]) * 1000 * units.fs  # Angstrom/ps
    velocities = np.random.default_rng(0).normal(0, speed, (2000, 3))
    positions = STEP * np.arange(100)[:, None, None] * velocities
    found = motion(positions, STEP, 2.0)
    assert found.exponent == pytest.approx(2.0, abs=1e-6) and found.kind == "undecided"
    compared = compare_motion(atoms, positions, positions, STEP)
    assert compared is not None
    curve = compared[1].teacher["Ar"]
    assert curve == pytest.approx(3 * speed**2 * compared[1].times_ps ** 2, rel=0.05)
    assert motion_checks(compared[0], Thresholds()) == []


def test_harmonic_crystal() -> None:
    found = motion(vibrations(0.03, atoms=600), STEP, 2.6)
    assert found.kind == "vibrates" and found.exponent == pytest.approx(0.0, abs=0.2)


def _compare(model: np.ndarray, teacher: np.ndarray) -> tuple[MotionComparison, ...]:
    compared = compare_motion(Atoms(f"Li{teacher.shape[1]}"), model, teacher, STEP)
    assert compared is not None
    return compared[0]


def _verdicts(rows: tuple[MotionComparison, ...]) -> dict[str, str]:
    return {check.name: check.verdict for check in motion_checks(rows, Thresholds())}


def test_same_motion_passes_and_another_fails() -> None:
    teacher = walkers(20.0, seed=1)
    assert _verdicts(_compare(walkers(20.0, seed=2), teacher)) == {"self-diffusion (Li)": "pass"}
    assert _verdicts(_compare(walkers(60.0, seed=2), teacher)) == {"self-diffusion (Li)": "fail"}
    still = vibrations(0.03, seed=1, atoms=200)
    assert _verdicts(_compare(vibrations(0.03, seed=2, atoms=200), still)) == {}
    melted = motion_checks(_compare(walkers(20.0, atoms=200), still), Thresholds())
    assert [c.verdict for c in melted] == ["fail"] and "diffuses in the model" in melted[0].reason


def test_false_alarms() -> None:
    pairs = [(walkers(20.0, 200, 20, 2 * k), walkers(20.0, 200, 20, 2 * k + 1)) for k in range(60)]
    verdicts = [v for pair in pairs for v in _verdicts(_compare(*pair)).values()]
    assert len(verdicts) > 40 and np.mean([v != "pass" for v in verdicts]) < 0.02


def test_species_are_apart_and_drift_does_not_count() -> None:
    """Ions that move through a lattice which as a whole flies away."""
    atoms = Atoms("Li40Cl40", masses=[7.0] * 40 + [35.0] * 40)
    positions = np.concatenate([walkers(10.0), vibrations(0.03)], axis=1)
    positions += 0.05 * np.arange(400)[:, None, None]
    compared = compare_motion(atoms, positions, positions, STEP)
    assert compared is not None
    kinds = {row.species: row.model.kind for row in compared[0]}
    assert kinds == {"Cl": "vibrates", "Li": "diffuses"}
    assert set(compared[1].model) == {"Cl", "Li"}
    still = without_drift(atoms, positions)
    assert np.allclose(np.einsum("tnk,n->tk", still, atoms.get_masses()), 0, atol=1e-9)


def test_too_short() -> None:
    atoms, few = bulk("Cu"), np.zeros((FEWEST_FRAMES - 1, 1, 3))
    assert compare_motion(atoms, few, np.zeros((FEWEST_FRAMES, 1, 3)), STEP) is None


def test_in_the_report(evidence: Any) -> None:
    certificate, data = evidence()
    atoms = Atoms("Li40")
    compared = compare_motion(atoms, walkers(20.0, seed=1), vibrations(0.03), STEP)
    assert compared is not None
    changed = certificate.model_copy(update={"motion": compared[0]})
    html = build_report(changed, replace(data, displacements=compared[1]))
    assert "Motion of the atoms" in html and "figure-motion" in html and "vibrates" in html
    assert type(certificate).model_validate_json(changed.model_dump_json()) == changed
