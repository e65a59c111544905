"""Calculators with known properties, and a certificate with its data."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import Calculator, all_changes

from compactmlip.validate import Certificate, Stage, Thresholds
from compactmlip.validate.certificate import Heldout, ModelFile, software_versions
from compactmlip.validate.checks import consistency_checks, nve_checks, overall, parity_checks
from compactmlip.validate.consistency import Consistency, Deviation
from compactmlip.validate.nve import NVEResult, nve
from compactmlip.validate.output import ValidationData
from compactmlip.validate.parity import Labels, parity
from compactmlip.validate.speed import Machine, Speed


class Wells(Calculator):
    """Every atom in its own isotropic harmonic well, all with the same angular frequency.

    Parameters
    ----------
    omega
        Angular frequency in 1/fs.
    scale, swirl, noise
        Errors of the forces: a factor, a curl (fraction of the harmonic force, perpendicular to it) that
        no energy has, and noise in eV/Angstrom.
    """

    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def __init__(
        self, centres: Any, omega: float, scale: float = 1.0, swirl: float = 0.0, noise: float = 0.0
    ) -> None:
        super().__init__()
        self.centres, self.omega = np.array(centres), omega / units.fs
        self.scale, self.swirl, self.noise = scale, swirl, noise
        self.rng = np.random.default_rng(0)
        self.calls = 0

    def calculate(self, atoms: Any = None, properties: Any = ("energy",), changes: Any = all_changes) -> None:
        super().calculate(atoms, properties, changes)
        self.calls += 1
        stiffness = self.atoms.get_masses()[:, None] * self.omega**2
        shift = self.atoms.positions - self.centres
        forces = -stiffness * shift
        curl = stiffness * np.cross([0.0, 0.0, 1.0], shift) * self.swirl
        self.results = {
            "energy": float(0.5 * np.sum(stiffness * shift**2)),
            "forces": self.scale * forces + curl + self.noise * self.rng.normal(size=forces.shape),
        }


class Pairs(Calculator):
    """Sum of a pair function over all pairs of nearest images, with forces and stress; fast in small cells.

    Parameters
    ----------
    energy, slope
        Functions of (pairs,) distances: eV, and the derivative in eV/Angstrom.
    """

    implemented_properties = ["energy", "forces", "stress"]  # noqa: RUF012

    def __init__(self, energy: Callable[[Any], Any], slope: Callable[[Any], Any]) -> None:
        super().__init__()
        self.energy, self.slope = energy, slope

    def calculate(self, atoms: Any = None, properties: Any = ("energy",), changes: Any = all_changes) -> None:
        super().calculate(atoms, properties, changes)
        first, second = np.triu_indices(len(self.atoms), 1)
        vectors = self.atoms.positions[second] - self.atoms.positions[first]
        if self.atoms.pbc.all():
            cell = self.atoms.cell.array
            vectors = vectors - np.round(vectors @ np.linalg.inv(cell)) @ cell
        distances = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
        pulls = (self.slope(distances) / distances)[:, None] * vectors
        forces = np.zeros((len(self.atoms), 3))
        np.add.at(forces, first, pulls)
        np.add.at(forces, second, -pulls)
        self.results = {"energy": float(np.sum(self.energy(distances))), "forces": forces}
        if self.atoms.pbc.all():
            virial = vectors.T @ pulls / self.atoms.get_volume()
            self.results["stress"] = virial[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]


def lennard_jones(epsilon: float = 0.0104, sigma: float = 3.4) -> Pairs:
    """Argon, without a cutoff but for the nearest images."""
    return Pairs(
        lambda r: 4 * epsilon * ((sigma / r) ** 12 - (sigma / r) ** 6),
        lambda r: 4 * epsilon * (6 * (sigma / r) ** 6 - 12 * (sigma / r) ** 12) / r,
    )


@pytest.fixture
def wells() -> Callable[..., tuple[Atoms, Wells]]:
    """``wells(omega=, **errors)``: 32 atoms and their calculator."""

    def make(omega: float = 0.05, **errors: float) -> tuple[Atoms, Wells]:
        atoms = bulk("Cu", cubic=True).repeat(2)
        return atoms, Wells(atoms.positions, omega, **errors)

    return make


def _file(name: str, parameters: int, size: int) -> ModelFile:
    return ModelFile(
        file=name,
        sha256="0123456789abcdef" * 4,
        bytes=size,
        family="nequip",
        species=("Mg", "O"),
        parameters=parameters,
        dtype="float32",
        cutoff=5.0,
        num_message_passing_layers=5,
        name="big <teacher>",
        source="a & b",
        licence="MIT",
        citation="A. Author et al., J. Tests 1, 1 (2024)",
    )


@pytest.fixture(scope="session")
def evidence() -> Callable[..., tuple[Certificate, ValidationData]]:
    """``evidence(stress=True, swirl=0.0)``: a certificate from synthetic errors and a real NVE run."""

    @functools.cache
    def make(stress: bool = True, swirl: float = 0.0) -> tuple[Certificate, ValidationData]:
        rng = np.random.default_rng(0)
        frames = []
        for k in range(16):
            frames.append(bulk("MgO", "rocksalt", a=4.21, cubic=True).repeat((2, 1, 1)))
            frames[-1].rattle(0.08, seed=k)
        n = [len(a) for a in frames]
        reference = Labels(
            rng.normal(-95.0, 0.6, size=16),
            tuple(rng.normal(0, 0.9, size=(k, 3)) for k in n),
            rng.normal(0, 0.03, size=(16, 6)) if stress else np.full((16, 6), np.nan),
        )
        predicted = Labels(
            reference.energies + rng.normal(0, 0.02, size=16),
            tuple(f + rng.normal(0, 0.03, size=f.shape) for f in reference.forces),
            reference.stresses + rng.normal(0, 4e-4, size=(16, 6)),
        )
        run = _run(swirl, 1500)
        teacher_run = _run(0.0, 30)
        found = parity(frames, reference, predicted)
        consistency = Consistency(
            atoms=16,
            largest_force=2100.0,
            largest_stress=80.0 if stress else None,
            symmetry=(
                Deviation(operation="rotation", energy=1e-5, forces=2e-3),
                Deviation(operation="inversion", energy=1e-5, forces=1e-3),
                Deviation(operation="permutation", energy=1e-5, forces=1e-3),
                Deviation(operation="translation", energy=1e-5, forces=1e-3),
            ),
            teacher_inversion=None,
            derivative_forces=0.31,
            derivative_stress=0.002 if stress else None,
        )
        limits = Thresholds()
        checks = (
            *parity_checks(found, limits),
            *consistency_checks(consistency, "float32"),
            *nve_checks(run.summary, limits),
        )
        certificate = Certificate(
            created_utc=datetime(2024, 2, 29, 12, 30, tzinfo=timezone.utc),
            verdict=overall(checks),
            checks=checks,
            model=_file("MgO.pt", 98_304, 812_345),
            teacher=_file("teacher.safetensors", 1_170_000, 4_812_345),
            heldout=Heldout(origin="sampled", reference="teacher", seed=1234),
            parity=found,
            consistency=consistency,
            nve=run.summary,
            teacher_nve=teacher_run.summary,
            speed=(
                Speed(
                    atoms=64,
                    repeats=5,
                    seconds={"teacher": 64 / 51.3, "model": 64 / 1820},
                    atoms_per_second={"teacher": 51.3, "model": 1820.0},
                ),
                Speed(
                    atoms=216,
                    repeats=5,
                    seconds={"model": 216 / 1935},
                    atoms_per_second={"model": 1935.0},
                ),
            ),
            stages=(
                Stage(name="pruned", parameters=98_304, energy_mae=72.1, forces_mae=192.0, note="l ≤ 2"),
                Stage(name="compensated", parameters=98_304, energy_mae=7.7, forces_mae=78.0),
                Stage(name="distilled", parameters=98_304, energy_mae=1.3, forces_mae=24.0, stress_mae=0.4),
            ),
            machine=Machine(processor="Test CPU", cores=2, threads=2, system="Linux", load_average=0.1),
            software=software_versions(),
            options={"n_heldout": 16, "seed": 0},
        )
        return certificate, ValidationData(tuple(frames), reference, predicted, run.trace, teacher_run.trace)

    return make


def _run(swirl: float, steps: int) -> NVEResult:
    atoms = bulk("Cu", cubic=True).repeat(2)
    return nve(Wells(atoms.positions, 0.05, swirl=swirl), atoms, steps=steps, equilibration_steps=20)
