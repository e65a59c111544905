"""Density at constant temperature and pressure, of model and teacher from the same start.

The barostat is Berendsen's (J. Chem. Phys. 81, 3684 (1984)) with isotropic scaling.  In its steady state the
mean pressure is the one asked for, so that the mean volume is right up to a share of 1/N; the fluctuations of
the volume are not those of the ensemble, and nothing is derived from them.

Volumes of one run follow each other slowly and do not tell by how much runs differ.  So there are several,
with velocities of their own and the same ones in model and teacher: the error is that of the difference from
run to run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.md.nptberendsen import NPTBerendsen
from pydantic import BaseModel, ConfigDict

from compactmlip.errors import CompactMLIPError, InputError
from compactmlip.progress import Track
from compactmlip.validate.nve import EXPLODED, advance, equilibrate
from compactmlip.validate.parity import Array
from compactmlip.validate.statistics import Estimate, independent

THERMOSTAT_FS, BAROSTAT_FS = 50.0, 100.0
"""Times of the couplings: short, so that the volume settles within a run."""

BULK_MODULUS = 5.0
"""GPa, where it is not known; between a liquid's 2 and a molecular crystal's 10."""

RUNS = 4
"""Of each potential."""

EQUILIBRATION = 50
"""Steps at constant volume before each run."""

WARM_UP = 0.5
"""Part of a run that is left out: the volume needs several times of the barostat to settle."""

SHORTEST, LONGEST = 250, 1000
"""Steps of a run; none is made that would be shorter."""

LARGEST_CHANGE = 1.5
"""Of the volume; a cell that changes more is a gas, has empty space, or fell apart."""


@dataclass(frozen=True)
class Run:
    """One run at constant pressure.

    Attributes
    ----------
    volume
        (steps,) Angstrom^3 of the cell, without the warm-up; empty where the run failed.
    pressure_GPa, temperature_K
        Means over the run.
    steps
        All that were done.
    failure
        Why there is nothing, or empty.
    """

    volume: Array
    pressure_GPa: float
    temperature_K: float
    steps: int
    failure: str = ""


class Density(BaseModel):
    """Means over several runs at constant pressure.

    Attributes
    ----------
    steps
        Of each run.
    volume, volume_error
        Angstrom^3 per atom, and standard error from run to run.
    density, density_error
        g/cm^3.
    pressure_GPa, temperature_K
        Means over all runs.
    failure
        Why there is nothing, or empty.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
    steps: int
    volume: float
    volume_error: float
    density: float
    density_error: float
    pressure_GPa: float
    temperature_K: float
    failure: str = ""


class DensityComparison(BaseModel):
    """Model and teacher at the same temperature and pressure.

    Attributes
    ----------
    target_K, target_GPa
        What was asked for.
    differences
        Percent, of the densities in each pair of runs; empty where one failed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
    atoms: int
    target_K: float
    target_GPa: float
    model: Density
    teacher: Density
    differences: tuple[float, ...]

    @property
    def difference(self) -> Estimate:
        """Relative difference of the densities, percent, with its error from run to run."""
        return independent(np.array(self.differences))


def compare_densities(
    model: Any,
    teacher: Any,
    atoms: Atoms,
    *,
    temperature_K: float = 300.0,
    pressure_GPa: float = 0.0,
    runs: int = RUNS,
    seed: int = 0,
    max_seconds: float = math.inf,
    progress: bool = False,
    **how: Any,
) -> DensityComparison | None:
    """Run both several times, from the same positions and velocities.

    Parameters
    ----------
    runs
        Of each, two at least.
    max_seconds
        None is begun after this wall time.
    how
        As for :func:`npt`.

    Returns
    -------
    None where the time was over before all runs were done.
    """
    how = {"temperature_K": temperature_K, "pressure_GPa": pressure_GPa, **how}
    found: tuple[list[Run], list[Run]] = ([], [])
    end = time.perf_counter() + max_seconds
    with Track("NPT", 2 * runs, "runs", enabled=progress) as track:
        for run in range(runs):
            for calculator, into in zip((model, teacher), found, strict=True):
                if time.perf_counter() > end:
                    return None
                into.append(npt(calculator, atoms, seed=(seed, run), **how))
                track.advance(1)
            if any(into[-1].failure for into in found):
                break
    return compare_runs(atoms, *found, temperature_K=temperature_K, pressure_GPa=pressure_GPa)


def compare_runs(
    atoms: Atoms, model: Sequence[Run], teacher: Sequence[Run], *, temperature_K: float, pressure_GPa: float
) -> DensityComparison:
    """Compare runs in pairs.

    Parameters
    ----------
    model, teacher
        As many of each, two at least or one of them failed.
    """
    own, other = _density(atoms, model), _density(atoms, teacher)
    differences = [
        100 * float(np.mean(1 / a.volume) / np.mean(1 / b.volume) - 1)
        for a, b in zip(model, teacher, strict=True)
        if not (own.failure or other.failure)
    ]
    return DensityComparison(
        atoms=len(atoms),
        target_K=temperature_K,
        target_GPa=pressure_GPa,
        model=own,
        teacher=other,
        differences=tuple(differences),
    )


def npt(
    calculator: Any,
    atoms: Atoms,
    *,
    temperature_K: float = 300.0,
    pressure_GPa: float = 0.0,
    timestep_fs: float = 1.0,
    steps: int = LONGEST,
    bulk_modulus: float | None = None,
    seed: int | tuple[int, ...] = 0,
) -> Run:
    """Run at constant temperature and pressure; the cell keeps its shape.

    Parameters
    ----------
    calculator
        ASE calculator with energy, forces and stress.
    atoms
        Periodic in all directions; not changed.
    bulk_modulus
        GPa; sets how strongly the cell answers, not the mean volume.
    seed
        Of the velocities.

    Raises
    ------
    InputError
        If the structure is not periodic in all directions, or the calculator has no stress.
    """
    if not atoms.pbc.all():
        raise InputError("only structures that are periodic in all directions have a density.")
    if "stress" not in calculator.implemented_properties:
        raise InputError(f"{type(calculator).__name__} has no stress, which constant pressure needs.")
    rows: list[tuple[float, float, float]] = []
    failure = ""
    try:
        state = {"temperature_K": temperature_K, "timestep_fs": timestep_fs}
        system = equilibrate(calculator, atoms, steps=EQUILIBRATION, seed=seed, **state)
        system.calc = calculator
        dynamics = NPTBerendsen(
            system,
            timestep_fs * units.fs,
            temperature_K=temperature_K,
            pressure_au=pressure_GPa * units.GPa,
            taut=THERMOSTAT_FS * units.fs,
            taup=BAROSTAT_FS * units.fs,
            compressibility_au=1 / ((bulk_modulus or BULK_MODULUS) * units.GPa),
        )
        start = system.get_volume()
        failure = advance(
            dynamics,
            system,
            steps,
            EXPLODED * temperature_K,
            lambda: _observe(system, rows, start),
        )
    except CompactMLIPError as error:
        failure = f"the run stopped: {error}"
    settled = np.array(rows).reshape(-1, 3)[round(WARM_UP * len(rows)) :]
    if failure or not len(settled):
        return Run(np.zeros(0), math.nan, math.nan, len(rows), failure or "the run had no step.")
    return Run(settled[:, 0], float(settled[:, 1].mean()), float(settled[:, 2].mean()), len(rows) - 1)


def _observe(system: Atoms, rows: list[tuple[float, float, float]], start: float) -> str | None:
    """Collect volume, pressure and temperature; say if the cell has left all bounds."""
    volume = system.get_volume()
    if not 1 / LARGEST_CHANGE < volume / start < LARGEST_CHANGE:
        return f"the volume changed by a factor of {volume / start:.2f} (a gas, or empty space)"
    pressure = -np.trace(system.get_stress(voigt=False, include_ideal_gas=True)) / 3
    rows.append((volume, float(pressure) / units.GPa, system.get_temperature()))
    return None


def _density(atoms: Atoms, runs: Sequence[Run]) -> Density:
    """Means over runs, or why there are none."""
    failure = next((run.failure for run in runs if run.failure), "")
    if failure:
        nothing: dict[str, Any] = dict.fromkeys(
            ("volume", "volume_error", "density", "density_error", "pressure_GPa", "temperature_K"), math.nan
        )
        return Density(steps=runs[-1].steps, failure=failure, **nothing)
    # g/cm^3 from atomic mass units per Angstrom^3.
    mass = float(atoms.get_masses().sum()) / units.kg * 1e3 * (units.m * 1e-2) ** 3
    volume = independent(np.array([run.volume.mean() / len(atoms) for run in runs]))
    density = independent(np.array([mass * np.mean(1 / run.volume) for run in runs]))
    return Density(
        steps=runs[0].steps,
        volume=volume.value,
        volume_error=volume.error,
        density=density.value,
        density_error=density.error,
        pressure_GPa=float(np.mean([run.pressure_GPa for run in runs])),
        temperature_K=float(np.mean([run.temperature_K for run in runs])),
    )
