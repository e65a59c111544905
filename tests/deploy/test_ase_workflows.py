"""What people do with a calculator in ASE: relax, run dynamics, phonons, write files, parallelise."""

from __future__ import annotations

import copy
from pathlib import Path

import joblib
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from ase.filters import FrechetCellFilter
from ase.io import Trajectory, read, write
from ase.md.langevin import Langevin
from ase.md.nptberendsen import NPTBerendsen
from ase.md.verlet import VelocityVerlet
from ase.mep import NEB
from ase.optimize import BFGS, FIRE
from ase.phonons import Phonons
from ase.vibrations import Vibrations

from compactmlip.deploy.ase import CompactMLIPCalculator


@pytest.fixture
def calc(deployed_quick: Path) -> CompactMLIPCalculator:
    return CompactMLIPCalculator(deployed_quick)


@pytest.fixture
def crystal(structures: dict[str, Atoms]) -> Atoms:
    return structures["crystal"]


def relaxed(atoms: Atoms, calc: CompactMLIPCalculator, fmax: float = 2e-3, steps: int = 400) -> Atoms:
    """Relax positions; a random model has minima, too."""
    atoms = atoms.copy()
    atoms.calc = calc
    assert BFGS(atoms, logfile=None, maxstep=0.05).run(fmax=fmax, steps=steps)
    return atoms


def test_relaxation_of_positions(calc: CompactMLIPCalculator, crystal: Atoms) -> None:
    crystal.calc = calc
    before, start = crystal.get_potential_energy(), np.abs(crystal.get_forces()).max()
    after = relaxed(crystal, calc)
    assert after.get_potential_energy() < before - 1e-3
    assert start > 0.05
    assert np.linalg.norm(after.get_forces(), axis=1).max() < 2e-3


def test_relaxation_of_the_cell(calc: CompactMLIPCalculator, crystal: Atoms) -> None:
    """The optimiser, which trusts the stress, finds a minimum: any small strain costs energy there."""
    crystal.calc = calc
    before = crystal.get_potential_energy()
    assert np.abs(crystal.get_stress()).max() > 0.02
    assert BFGS(FrechetCellFilter(crystal), logfile=None, maxstep=0.05).run(fmax=4e-3, steps=120)
    assert np.abs(crystal.get_stress()).max() < 1e-3
    relaxed_energy = crystal.get_potential_energy()
    assert relaxed_energy < before - 0.1
    for strain in (0.01, -0.01):
        strained = crystal.copy()
        strained.calc = calc
        strained.set_cell(crystal.cell.array * (1 + strain), scale_atoms=True)
        assert strained.get_potential_energy() > relaxed_energy


def thermal(atoms: Atoms, temperature: float) -> Atoms:
    """Give the atoms velocities of a temperature (K), without drift."""
    velocities = np.random.default_rng(3).normal(size=(len(atoms), 3))
    velocities *= np.sqrt(units.kB * temperature / atoms.get_masses())[:, None]
    momenta = velocities * atoms.get_masses()[:, None]
    atoms.set_momenta(momenta - momenta.mean(axis=0))
    return atoms


def test_energy_is_conserved(calc: CompactMLIPCalculator, crystal: Atoms) -> None:
    """The error of velocity Verlet falls with the square of the time step only if F = -dE/dr everywhere."""
    start = thermal(relaxed(crystal, calc), 300.0)
    deviations = []
    for time_step in (1.0, 0.5):
        atoms = start.copy()
        atoms.calc = calc
        total: list[float] = []
        dynamics = VelocityVerlet(atoms, time_step * units.fs)
        dynamics.attach(lambda a=atoms, t=total: t.append(a.get_total_energy()))
        dynamics.run(int(60 / time_step))
        deviations.append(np.std(total))
    assert deviations[0] < 5e-3
    assert 3.0 < deviations[0] / deviations[1] < 5.0


def test_constant_temperature(calc: CompactMLIPCalculator, crystal: Atoms) -> None:
    atoms = thermal(relaxed(crystal, calc), 300.0)
    start = atoms.positions.copy()
    dynamics = Langevin(
        atoms,
        1.0 * units.fs,
        temperature_K=300.0,
        friction=0.02 / units.fs,
        fixcm=False,
        rng=np.random.default_rng(1),
    )
    dynamics.run(40)
    assert np.isfinite(atoms.get_total_energy())
    assert 20 < atoms.get_temperature() < 2000
    assert 0.01 < np.abs(atoms.positions - start).max() < 3


def test_constant_pressure_does_not_depend_on_the_skin(deployed_quick: Path, crystal: Atoms) -> None:
    """The cell changes at every step; with and without a kept neighbour list the path is the same."""
    paths, searches = [], []
    for skin in (0.0, 0.5):
        atoms = crystal.copy()
        atoms.calc = CompactMLIPCalculator(deployed_quick, skin=skin)
        thermal(atoms, 300.0)
        dynamics = NPTBerendsen(
            atoms,
            1.0 * units.fs,
            temperature_K=300.0,
            taut=50 * units.fs,
            pressure_au=0.0,
            taup=100 * units.fs,
            compressibility_au=1e-2 / units.GPa,
        )
        dynamics.run(30)
        paths.append(np.concatenate([atoms.positions.ravel(), atoms.cell.array.ravel()]))
        searches.append(atoms.calc._neighbors.num_searches)
    assert searches[1] < searches[0] / 3
    assert abs(np.linalg.det(paths[0][-9:].reshape(3, 3)) / crystal.get_volume() - 1) > 1e-3
    np.testing.assert_allclose(paths[0], paths[1], rtol=0, atol=1e-10)


def test_phonons(calc: CompactMLIPCalculator, tmp_path: Path) -> None:
    """Finite displacements in a supercell; force constants are symmetric and sum to zero."""
    atoms = bulk("MgO", "rocksalt", a=4.21)
    phonons = Phonons(atoms, calc, supercell=(2, 2, 2), delta=0.01, name=str(tmp_path / "phonon"))
    phonons.run()
    phonons.read(symmetrize=0, acoustic=False)
    constants = phonons.get_force_constant()  # (images, 3 n, 3 n)
    at_gamma = constants.sum(axis=0)
    assert np.abs(at_gamma).max() > 0.05
    np.testing.assert_allclose(at_gamma, at_gamma.T, atol=1e-3 * np.abs(at_gamma).max())
    np.testing.assert_allclose(at_gamma[:, :3] + at_gamma[:, 3:], 0.0, atol=1e-3 * np.abs(at_gamma).max())


def test_vibrations_of_a_molecule(calc: CompactMLIPCalculator, tmp_path: Path) -> None:
    """At a minimum translations and rotations (two, should the molecule be linear) cost nothing."""
    atoms = relaxed(molecule("H2O"), calc, fmax=1e-5)
    vibrations = Vibrations(atoms, name=str(tmp_path / "vib"), delta=0.002)
    vibrations.run()
    energies = np.sort(np.abs(vibrations.get_energies()))
    assert energies[4] < 1e-3
    assert energies[-1] > 0.01


def test_minimum_energy_path(calc: CompactMLIPCalculator, crystal: Atoms) -> None:
    """One calculator for all images, as NEB allows; ends keep their energies."""
    first = relaxed(crystal, calc, fmax=0.05)
    last = first.copy()
    last.positions[0] += 0.4
    images = [first.copy(), *(first.copy() for _ in range(2)), last]
    for image in images:
        image.calc = calc
    neb = NEB(images, allow_shared_calculator=True, method="improvedtangent")
    neb.interpolate()
    FIRE(neb, logfile=None).run(fmax=1.0, steps=3)
    alone = images[1].copy()
    alone.calc = copy.deepcopy(calc)
    assert alone.get_potential_energy() == pytest.approx(images[1].get_potential_energy(), abs=1e-10)


@pytest.mark.parametrize("name", ["crystal", "slab", "molecule"])
def test_extended_xyz(
    calc: CompactMLIPCalculator, structures: dict[str, Atoms], name: str, tmp_path: Path
) -> None:
    atoms = structures[name]
    atoms.calc = calc
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    write(tmp_path / "a.xyz", atoms)
    back = read(tmp_path / "a.xyz")
    assert back.get_potential_energy() == pytest.approx(energy, abs=1e-7)
    np.testing.assert_allclose(back.get_forces(), forces, atol=1e-7)
    if atoms.pbc.any():
        np.testing.assert_allclose(back.get_stress(), atoms.get_stress(), atol=1e-9)
    back.calc = calc
    assert back.get_potential_energy() == pytest.approx(energy, abs=1e-5)


def test_trajectory_and_database(calc: CompactMLIPCalculator, crystal: Atoms, tmp_path: Path) -> None:
    crystal.calc = calc
    energy, forces, stress = crystal.get_potential_energy(), crystal.get_forces(), crystal.get_stress()
    with Trajectory(tmp_path / "a.traj", "w", crystal) as trajectory:
        trajectory.write()
    back = read(tmp_path / "a.traj")
    assert isinstance(back.calc, SinglePointCalculator)
    assert back.get_potential_energy() == energy
    np.testing.assert_array_equal(back.get_forces(), forces)
    np.testing.assert_array_equal(back.get_stress(), stress)
    with connect(tmp_path / "a.json") as database:
        database.write(crystal)
        row = database.get(1)
    assert row.calculator == "compactmlip"
    assert row.calculator_parameters["dtype"] == "float64"
    assert row.energy == pytest.approx(energy)


def test_two_calculators_at_once(calc: CompactMLIPCalculator, deployed_quick: Path, crystal: Atoms) -> None:
    """Interleaved steps of two simulations are those of each alone."""

    def simulation(calculator: CompactMLIPCalculator, seed: int) -> VelocityVerlet:
        atoms = crystal.copy()
        atoms.rattle(0.05, seed=seed)
        atoms.calc = calculator
        return VelocityVerlet(atoms, 1.0 * units.fs)

    alone = [simulation(CompactMLIPCalculator(deployed_quick), seed) for seed in (1, 2)]
    for dynamics in alone:
        dynamics.run(5)
    together = [simulation(c, seed) for c, seed in ((calc, 1), (copy.copy(calc), 2))]
    for _ in range(5):
        for dynamics in together:
            dynamics.run(1)
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_allclose(a.atoms.positions, b.atoms.positions, rtol=0, atol=1e-12)
    assert np.abs(together[0].atoms.positions - together[1].atoms.positions).max() > 0.01


@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_joblib(calc: CompactMLIPCalculator, crystal: Atoms, backend: str) -> None:
    frames = []
    for seed in range(3):
        atoms = crystal.copy()
        atoms.rattle(0.03, seed=seed)
        atoms.calc = copy.copy(calc)
        frames.append(atoms)
    run = joblib.Parallel(n_jobs=2, backend=backend)
    found = run(joblib.delayed(Atoms.get_potential_energy)(atoms) for atoms in frames)
    expected = [atoms.get_potential_energy() for atoms in frames]
    assert len({round(e, 6) for e in expected}) == 3
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)
