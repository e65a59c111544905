"""Force constants and short molecular dynamics with a native model, for sampling."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from ase import Atoms, units
from ase.md.langevin import Langevin
from torch import nn

from compactmlip.data.perturb import SHORTEST_DISTANCE_RATIO, bare, shortest_ratio
from compactmlip.data.teacher import MAX_EDGES, TeacherCalculator, evaluate
from compactmlip.errors import CompactMLIPError

FRICTION = 0.01 / units.fs
"""Langevin friction: weak enough to keep vibrations, strong enough to hold the temperature."""

FORCE_LIMIT = 30.0
"""eV/Angstrom; structures in which a model finds a larger force are unphysical."""

HOTTEST = 5.0
"""A run whose kinetic temperature exceeds this times its target has exploded."""

FINITE_STEP = 0.01
"""Angstrom; displacement of the finite differences."""

PROBED_ATOMS = 100
"""Random probes are repeated until this many atoms were displaced (at most 16 times)."""


def stiffness(
    atoms: Atoms, model: nn.Module, rng: np.random.Generator, max_edges: int = MAX_EDGES
) -> np.ndarray:
    """Mean diagonal force constant of each atom, k_i = (1/3) sum_a d2E/dx_ia^2, in eV/Angstrom^2, shape (N,).

    Hutchinson's estimate of the diagonal: all atoms move at once by random signs v, and k = v * (H v) up to
    noise of zero mean from the off-diagonal elements; H v by central differences of the forces.  Costs two
    evaluations of the structure per probe instead of six per atom.  In a small periodic cell an atom
    moves with its images: use a supercell.
    """
    probes = min(16, math.ceil(PROBED_ATOMS / len(atoms)))
    signs = rng.choice((-1.0, 1.0), size=(probes, len(atoms), 3))
    frames = []
    for direction in (FINITE_STEP, -FINITE_STEP):
        for v in signs:
            frame = bare(atoms)
            frame.positions += direction * v
            frames.append(frame)
    forces = np.array([e.forces for _, batch in evaluate(frames, model, max_edges) for e in batch])
    curvature = -(forces[:probes] - forces[probes:]) / (2 * FINITE_STEP) * signs
    return np.asarray(curvature.mean(axis=(0, 2)))


def time_step(atoms: Atoms) -> float:
    """Time step in fs that resolves the fastest vibration: 1 fs with hydrogen, else 2 fs."""
    return 1.0 if atoms.get_masses().min() < 5 else 2.0


def trajectory(
    start: Atoms,
    model: nn.Module,
    temperature: float,
    *,
    steps: int,
    interval: int,
    rng: np.random.Generator,
    advance: Callable[[float], None] = lambda amount: None,
) -> list[Atoms]:
    """Snapshots, every ``interval`` steps, of a Langevin run at constant volume.

    The run ends early when it explodes (two atoms too close, a force above :data:`FORCE_LIMIT`, a kinetic
    temperature far above the target, numbers that are not finite); what came before is kept.

    Parameters
    ----------
    start
        Start from thermally displaced atoms: velocities are drawn at ``temperature`` (K), so that potential
        and kinetic energy are both in place.
    advance
        Called with the number of atom-steps done.
    """
    atoms = bare(start)
    atoms.calc = TeacherCalculator(model)
    thermal = np.sqrt(units.kB * temperature * atoms.get_masses())[:, None]
    atoms.set_momenta(thermal * rng.standard_normal((len(atoms), 3)))  # Maxwell-Boltzmann
    dynamics = Langevin(
        atoms,
        time_step(atoms) * units.fs,
        temperature_K=temperature,
        friction=FRICTION,
        fixcm=False,
        rng=rng,
    )
    snapshots: list[Atoms] = []
    for _ in range(steps // interval):
        try:
            dynamics.run(interval)
            force = np.linalg.norm(atoms.get_forces(), axis=1).max()
        except CompactMLIPError:
            break
        finally:
            advance(interval * len(atoms))
        hot = atoms.get_temperature() > HOTTEST * temperature
        if hot or force > FORCE_LIMIT or shortest_ratio(atoms) < SHORTEST_DISTANCE_RATIO:
            break
        snapshots.append(bare(atoms))
    return snapshots
