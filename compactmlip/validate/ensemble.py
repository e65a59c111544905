"""Several short runs at constant temperature, of model and teacher from the same states.

One run does not say by how much runs differ: vibrations keep their energies, and liquids their arrangement,
for longer than it lasts.  Runs with velocities and a thermostat of their own do, and averages over each are
independent samples.  Run by run, model and teacher use the same random numbers: where motion is not chaotic,
as in a crystal, both stay close to each other and their difference holds little noise.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from pydantic import BaseModel, ConfigDict

from compactmlip.errors import CompactMLIPError
from compactmlip.progress import Track
from compactmlip.validate.nve import EXPLODED, FRICTION, advance, equilibrate, langevin
from compactmlip.validate.parity import Array

RUNS = 6
"""Of each calculator; even, as :func:`compactmlip.validate.statistics.chance_limit` needs it."""

SAMPLE_EVERY = 10
"""Steps between positions that are kept."""

WARM_UP = 100
"""Steps before, from velocities of twice the temperature."""

SHORTEST, LONGEST = 80, 600
"""Steps of a run after that; no run is made that would be shorter."""


class Sampling(BaseModel):
    """What the runs were.

    Attributes
    ----------
    runs, steps
        Of each of both, and steps of each after the warm-up.
    model_failure, teacher_failure
        What ended a run early, or empty; there is nothing to compare then.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
    atoms: int
    runs: int
    steps: int
    temperature_K: float
    timestep_fs: float
    model_failure: str = ""
    teacher_failure: str = ""


@dataclass(frozen=True)
class Ensembles:
    """Summary, cell, and positions (runs, frames, N, 3) in Angstrom of model and teacher."""

    sampling: Sampling
    cell: Atoms
    model: Array
    teacher: Array

    @property
    def complete(self) -> bool:
        """Whether all runs came to their end."""
        return len(self.model) == len(self.teacher) == self.sampling.runs


def compare_ensembles(
    model: Any,
    teacher: Any,
    atoms: Atoms,
    *,
    steps: int = LONGEST,
    warm_up: int = WARM_UP,
    runs: int = RUNS,
    temperature_K: float = 300.0,
    timestep_fs: float = 1.0,
    seed: int = 0,
    max_seconds: float = math.inf,
    progress: bool = False,
) -> Ensembles | None:
    """Run Langevin dynamics of both, in turn.

    Parameters
    ----------
    model, teacher
        ASE calculators with energy and forces.
    atoms
        Simulated as it is; not changed.
    steps, warm_up
        Of each run: those that are sampled, and those before.
    max_seconds
        Nothing is begun after this wall time.

    Returns
    -------
    The runs, without the rest where one failed; None where the time was over before all were done.
    """
    end = time.perf_counter() + max_seconds
    found: dict[str, list[Array]] = {"model": [], "teacher": []}
    failures = {"model": "", "teacher": ""}
    with Track("NVT, model and teacher", 2 * runs, "runs", enabled=progress) as track:
        for run in range(runs):
            for name, calculator in (("model", model), ("teacher", teacher)):
                if time.perf_counter() > end:
                    return None
                positions, failures[name] = _run(
                    calculator, atoms, steps, warm_up, temperature_K, timestep_fs, (seed, run)
                )
                found[name].append(positions)
                track.advance(1)
            if any(failures.values()):
                found = {name: kept[:-1] for name, kept in found.items()}
                break
    shape = (-1, _frames(steps), len(atoms), 3)
    return Ensembles(
        Sampling(
            atoms=len(atoms),
            runs=runs,
            steps=steps,
            temperature_K=temperature_K,
            timestep_fs=timestep_fs,
            model_failure=failures["model"],
            teacher_failure=failures["teacher"],
        ),
        atoms.copy(),
        np.array(found["model"]).reshape(shape),
        np.array(found["teacher"]).reshape(shape),
    )


def _run(
    calculator: Any,
    atoms: Atoms,
    steps: int,
    warm_up: int,
    temperature_K: float,
    timestep_fs: float,
    seed: tuple[int, int],
) -> tuple[Array, str]:
    """Positions (frames, N, 3) of one run, and what went wrong or an empty string."""
    kept: list[Array] = []
    state = {"temperature_K": temperature_K, "timestep_fs": timestep_fs}
    try:
        system = equilibrate(calculator, atoms, steps=warm_up, seed=seed, **state)
    except CompactMLIPError as error:
        return np.zeros((0, len(atoms), 3)), str(error)
    system.calc = calculator
    done = 0

    def record() -> None:
        nonlocal done
        if done and done % SAMPLE_EVERY == 0:
            kept.append(system.get_positions())
        done += 1

    rng = np.random.default_rng((*seed, 1))
    dynamics = langevin(system, temperature_K, timestep_fs, FRICTION, rng)
    failure = advance(dynamics, system, steps, EXPLODED * temperature_K, record)
    return np.array(kept).reshape(-1, len(atoms), 3), failure


def _frames(steps: int) -> int:
    return steps // SAMPLE_EVERY
