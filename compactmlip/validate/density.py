"""Density at constant temperature and pressure, of model and teacher from the same start.

The barostat is Berendsen's (J. Chem. Phys. 81, 3684 (1984)) with isotropic scaling.  In its steady state the
mean pressure is the one asked for, so that the mean volume is right up to a share of 1/N; the fluctuations of
the volume are not those of the ensemble, and nothing is derived from them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.md.nptberendsen import NPTBerendsen
from pydantic import BaseModel, ConfigDict

from compactmlip.errors import CompactMLIPError, InputError
from compactmlip.progress import Track
from compactmlip.validate.nve import EXPLODED, advance, equilibrate
from compactmlip.validate.parity import Array
from compactmlip.validate.statistics import Estimate, effective_samples, mean, relative_difference

THERMOSTAT_FS, BAROSTAT_FS = 50.0, 100.0
"""Times of the couplings: short, so that a picosecond holds several independent volumes."""

BULK_MODULUS = 5.0
"""GPa, where it is not known; between a liquid's 2 and a molecular crystal's 10."""

WARM_UP = 0.3
"""Part of a run that is left out: the volume needs several times of the barostat to settle."""

SHORTEST, LONGEST = 400, 2000
"""Steps; no run is made that would be shorter."""

FEWEST_EFFECTIVE = 4.0
"""Independent volumes; with fewer there is no error."""

LARGEST_CHANGE = 1.5
"""Of the volume; a cell that changes more is a gas, has empty space, or fell apart."""


class Density(BaseModel):
    """One run at constant pressure.

    Attributes
    ----------
    volume, volume_error
        Angstrom^3 per atom, and standard error.
    density, density_error
        g/cm^3.
    pressure_GPa, temperature_K
        Means over the run.
    effective
        Independent samples of the volume.
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
    effective: float
    failure: str = ""


class DensityComparison(BaseModel):
    """Model and teacher at the same temperature and pressure.

    Attributes
    ----------
    target_K, target_GPa
        What was asked for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
    atoms: int
    target_K: float
    target_GPa: float
    model: Density
    teacher: Density

    @property
    def enough(self) -> bool:
        """Whether both runs can be judged."""
        return all(not d.failure and d.effective >= FEWEST_EFFECTIVE for d in (self.model, self.teacher))

    @property
    def difference(self) -> Estimate:
        """Relative difference of the densities, percent."""
        own, other = (
            Estimate(one.density, one.density_error, one.effective - 1) for one in (self.model, self.teacher)
        )
        found = relative_difference(own, other)
        return Estimate(100 * found.value, 100 * found.error, found.degrees)


def compare_densities(
    model: Any,
    teacher: Any,
    atoms: Atoms,
    *,
    temperature_K: float = 300.0,
    pressure_GPa: float = 0.0,
    progress: bool = False,
    **how: Any,
) -> DensityComparison:
    """Run both from the same positions and velocities.

    Parameters
    ----------
    how
        As for :func:`npt`.
    """
    how = {"temperature_K": temperature_K, "pressure_GPa": pressure_GPa, **how}
    found = []
    with Track("NPT", 2, "runs", enabled=progress) as track:
        for calculator in (model, teacher):
            found.append(npt(calculator, atoms, **how))
            track.advance(1)
    return DensityComparison(
        atoms=len(atoms), target_K=temperature_K, target_GPa=pressure_GPa, model=found[0], teacher=found[1]
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
    seed: int = 0,
    max_seconds: float = math.inf,
) -> Density:
    """Run at constant temperature and pressure; the cell keeps its shape.

    Parameters
    ----------
    calculator
        ASE calculator with energy, forces and stress.
    atoms
        Periodic in all directions; not changed.
    bulk_modulus
        GPa; sets how strongly the cell answers, not the mean volume.
    max_seconds
        The run ends early after this wall time.

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
        system = equilibrate(
            calculator, atoms, temperature_K=temperature_K, timestep_fs=timestep_fs, steps=50, seed=seed
        )
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
            max_seconds,
        )
    except CompactMLIPError as error:
        failure = f"the run stopped: {error}"
    return _density(atoms, np.array(rows).reshape(-1, 3), failure)


def _observe(system: Atoms, rows: list[tuple[float, float, float]], start: float) -> str | None:
    """Collect volume, pressure and temperature; say if the cell has left all bounds."""
    volume = system.get_volume()
    if not 1 / LARGEST_CHANGE < volume / start < LARGEST_CHANGE:
        return f"the volume changed by a factor of {volume / start:.2f} (a gas, or empty space)"
    pressure = -np.trace(system.get_stress(voigt=False, include_ideal_gas=True)) / 3
    rows.append((volume, float(pressure) / units.GPa, system.get_temperature()))
    return None


def _density(atoms: Atoms, rows: Array, failure: str) -> Density:
    settled = rows[round(WARM_UP * len(rows)) :]
    if not failure and len(settled) < 2:
        failure = "the run had no time."
    if failure:
        nothing: dict[str, Any] = dict.fromkeys(
            ("volume", "volume_error", "density", "density_error", "pressure_GPa", "temperature_K"), math.nan
        )
        return Density(steps=len(rows), effective=0.0, failure=failure, **nothing)
    volume = mean(settled[:, 0])
    # g/cm^3 from atomic mass units per Angstrom^3; the mean of 1/V, whose error is relative that of V.
    mass = float(atoms.get_masses().sum()) / units.kg * 1e3 * (units.m * 1e-2) ** 3
    density = float(np.mean(mass / settled[:, 0]))
    return Density(
        steps=len(rows) - 1,
        volume=volume.value / len(atoms),
        volume_error=volume.error / len(atoms),
        density=density,
        density_error=density * volume.error / volume.value,
        pressure_GPa=float(settled[:, 1].mean()),
        temperature_K=float(settled[:, 2].mean()),
        effective=effective_samples(settled[:, 0]),
    )
