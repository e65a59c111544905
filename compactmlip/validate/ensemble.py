"""Averages at constant temperature in model and teacher, from several short runs.

One run does not say by how much runs differ: vibrations keep their energies, and liquids their arrangement,
for longer than it lasts.  Runs with velocities and a thermostat of their own do, and averages over each are
independent samples.  Run by run, model and teacher use the same random numbers: where motion is not chaotic,
as in a crystal, both stay close to each other and their difference holds little noise.

Where the teacher is too slow to run, it only tells the energies of states of the model's runs.  Averages in
its own ensemble then follow to first order in the difference U of the energies (Zwanzig, J. Chem. Phys. 22,
1420 (1954)): <A>_teacher = <A> - (<A U> - <A> <U>) / kB T.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from ase import Atoms, units
from pydantic import BaseModel, ConfigDict

from compactmlip.errors import CompactMLIPError
from compactmlip.progress import Track
from compactmlip.validate.nve import EXPLODED, FRICTION, advance, equilibrate, langevin
from compactmlip.validate.parity import Array

RUNS = 6
"""Of each calculator; even, as :func:`compactmlip.validate.statistics.chance_limit` needs it."""

SAMPLE_EVERY = 10
"""Steps between states that are kept."""

WARM_UP = 100
"""Steps before, from velocities of twice the temperature."""

SHORTEST, LONGEST = 80, 600
"""Steps of a run after that; no run is made that would be shorter."""

LARGEST_SPREAD = 1.5
"""Standard deviation of U over kB T beyond which the first order says nothing: its noise in short runs hides
what it should show.  Springs 12 % too soft have that with 64 atoms: sqrt(3 N / 2) times the change."""


class Sampling(BaseModel):
    """What the runs were.

    Attributes
    ----------
    method
        "runs" of both, or "energies" of the teacher on states of the model's runs.
    runs, steps
        Runs, of each of both where both have some, and steps of each after the warm-up.
    spread
        Standard deviation of the energy difference over kB T, where the teacher only told energies.
    model_failure, teacher_failure
        What ended a run early, or empty; there is nothing to compare then.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
    method: Literal["runs", "energies"]
    atoms: int
    runs: int
    steps: int
    temperature_K: float
    timestep_fs: float
    spread: float | None = None
    model_failure: str = ""
    teacher_failure: str = ""

    @property
    def comparable(self) -> bool:
        """Whether averages of model and teacher can be compared."""
        return not (self.model_failure or self.teacher_failure) and (self.spread or 0.0) <= LARGEST_SPREAD


@dataclass(frozen=True)
class Ensembles:
    """States of the runs.

    Attributes
    ----------
    sampling, cell
        Summary, and the structure at the start.
    model
        (runs, frames, N, 3) positions in Angstrom.
    teacher
        The same of the teacher's runs, or None.
    differences
        Where it has none: (runs, frames) eV, energy of the teacher minus that of the model in its states.
    """

    sampling: Sampling
    cell: Atoms
    model: Array
    teacher: Array | None
    differences: Array | None

    def averages(self, observe: Callable[[Array], Array]) -> tuple[Array, Array]:
        """Average something over each run, in model and teacher.

        Parameters
        ----------
        observe
            Takes (runs, frames, N, 3) positions of all runs of one and returns (runs, frames, ...).

        Returns
        -------
        (runs, ...) of the model and of the teacher.
        """
        own = observe(self.model)
        if self.teacher is not None:
            return own.mean(axis=1), observe(self.teacher).mean(axis=1)
        assert self.differences is not None
        shift = self.differences - self.differences.mean()
        weights = -shift / (units.kB * self.sampling.temperature_K) / own.shape[1]
        response = np.einsum("rf,rf...->r...", weights, own - own.mean(axis=(0, 1)))
        return own.mean(axis=1), own.mean(axis=1) + response


def compare_ensembles(
    model: Any,
    teacher: Any,
    atoms: Atoms,
    *,
    steps: int = LONGEST,
    warm_up: int = WARM_UP,
    runs: int = RUNS,
    energies_only: bool = False,
    temperature_K: float = 300.0,
    timestep_fs: float = 1.0,
    seed: int = 0,
    max_seconds: float = math.inf,
    progress: bool = False,
) -> Ensembles | None:
    """Run Langevin dynamics of both, in turn, or of the model with the teacher's word on its states.

    Parameters
    ----------
    model, teacher
        ASE calculators with energy and forces.
    atoms
        Simulated as it is; not changed.
    steps, warm_up
        Of each run: those that are sampled, and those before.
    energies_only
        The teacher does not run.
    max_seconds
        Nothing is begun after this wall time.

    Returns
    -------
    The runs, without the rest where one failed; None where the time was over before all were done.
    """
    end = time.perf_counter() + max_seconds
    dynamics = _Dynamics(atoms, steps, warm_up, temperature_K, timestep_fs)
    own: list[Array] = []
    other: list[Array] = []
    differences: list[Array] = []
    failures = {"model_failure": "", "teacher_failure": ""}
    with Track("NVT, model and teacher", runs, "runs", enabled=progress) as track:
        for run in range(runs):
            if time.perf_counter() > end:
                return None
            positions, energies, failures["model_failure"] = dynamics.run(model, (seed, run))
            if energies_only and not failures["model_failure"]:
                differences.append(_energies(teacher, atoms, positions) - energies)
            elif not energies_only:
                theirs, _, failures["teacher_failure"] = dynamics.run(teacher, (seed, run))
                other.append(theirs)
            own.append(positions)
            if any(failures.values()):
                break
            track.advance(1)
    complete = not any(failures.values())
    method: Literal["runs", "energies"] = "energies" if energies_only else "runs"
    sampling = Sampling(
        method=method,
        atoms=len(atoms),
        runs=runs,
        steps=steps,
        temperature_K=temperature_K,
        timestep_fs=timestep_fs,
        spread=float(np.std(differences)) / (units.kB * temperature_K) if complete and differences else None,
        **failures,
    )
    empty = np.zeros((0, 0, len(atoms), 3))
    return Ensembles(
        sampling,
        atoms.copy(),
        np.array(own) if complete else empty,
        None if energies_only else np.array(other) if complete else empty,
        np.array(differences) if energies_only and complete else None,
    )


@dataclass(frozen=True)
class _Dynamics:
    """Runs that differ in calculator and seed only."""

    atoms: Atoms
    steps: int
    warm_up: int
    temperature_K: float
    timestep_fs: float

    def run(self, calculator: Any, seed: tuple[int, int]) -> tuple[Array, Array, str]:
        """Positions (frames, N, 3), energies (frames,) in eV, and what went wrong or an empty string."""
        positions: list[Array] = []
        energies: list[float] = []
        state = {"temperature_K": self.temperature_K, "timestep_fs": self.timestep_fs}
        try:
            system = equilibrate(calculator, self.atoms, steps=self.warm_up, seed=seed, **state)
        except CompactMLIPError as error:
            return np.zeros((0, len(self.atoms), 3)), np.zeros(0), str(error)
        system.calc = calculator
        done = 0

        def record() -> None:
            nonlocal done
            if done and done % SAMPLE_EVERY == 0:
                positions.append(system.get_positions())
                energies.append(float(system.get_potential_energy()))
            done += 1

        rng = np.random.default_rng((*seed, 1))
        dynamics = langevin(system, self.temperature_K, self.timestep_fs, FRICTION, rng)
        failure = advance(dynamics, system, self.steps, EXPLODED * self.temperature_K, record)
        return np.array(positions).reshape(-1, len(self.atoms), 3), np.array(energies), failure


def _energies(calculator: Any, atoms: Atoms, positions: Array) -> Array:
    """Energies (frames,) in eV of a calculator."""
    system = atoms.copy()
    system.calc = calculator
    found = []
    for frame in positions:
        system.positions = frame
        found.append(float(system.get_potential_energy()))
    return np.array(found)
