"""Energy conservation in molecular dynamics without thermostat.

A potential whose forces are the exact gradient of a smooth energy conserves the total energy in
velocity Verlet up to a bounded fluctuation that scales as the square of the time step.  A drift means
forces that are not the gradient, an energy surface that is not smooth, or a time step too long.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.md.langevin import Langevin
from ase.md.verlet import VelocityVerlet
from pydantic import BaseModel, ConfigDict

from compactmlip.errors import CompactMLIPError, InputError
from compactmlip.progress import Track
from compactmlip.validate.parity import MILLI, Array

FRICTION = 0.02
"""1/fs; Langevin friction of the equilibration: strong, so that 100 fs suffice to forget the start."""

EXPLODED = 20.0
"""A run is unstable when its temperature exceeds this many times the target."""

TRANSIENT_FRACTION = 0.1
"""Part of a run that is left out of the drift.  The Verlet energy error follows the potential energy, so
relaxation right after the start looks like a drift that does not last."""

BLOCKS = 10
"""Blocks for the standard error of the drift; samples inside a block are correlated."""

SAMPLE_EVERY = 10
"""Steps between positions that are kept."""

MIN_STEPS_FOR_DRIFT = 200
"""Runs with fewer steps are shown, but no drift is derived from them."""


@dataclass(frozen=True)
class Trace:
    """Recorded run; all arrays are (steps + 1,).

    Attributes
    ----------
    time_ps, temperature_K
        Time since the start of the run, and the kinetic temperature.
    total, potential
        Energies in eV (whole cell).
    """

    time_ps: Array
    total: Array
    potential: Array
    temperature_K: Array


class Drift(BaseModel):
    """Trend of the total energy and the fluctuation around it.

    ``slope`` and ``slope_error`` (one standard error) are in meV/atom/ps, ``fluctuation`` (RMS) in
    meV/atom.  ``fluctuation_ratio`` is the RMS of the total over the RMS of the kinetic energy, which does
    not depend on the number of atoms.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    slope: float
    slope_error: float
    fluctuation: float
    fluctuation_ratio: float


class NVESummary(BaseModel):
    """What a run was and what came out of it; ``drift`` is None where the run is too short to tell."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    atoms: int
    steps: int
    timestep_fs: float
    mean_temperature_K: float
    seconds_per_step: float
    stable: bool
    reason: str
    drift: Drift | None


@dataclass(frozen=True)
class NVEResult:
    """A run: its summary, its trace, and positions (frames, N, 3) in Angstrom every SAMPLE_EVERY steps."""

    summary: NVESummary
    trace: Trace
    positions: Array = field(default_factory=lambda: np.zeros((0, 0, 3)))


def maxwell_boltzmann(atoms: Atoms, temperature_K: float, rng: np.random.Generator) -> None:
    """Draw momenta for a temperature and remove the total momentum."""
    masses = atoms.get_masses()[:, None]
    momenta = np.sqrt(masses * units.kB * temperature_K) * rng.standard_normal((len(atoms), 3))
    atoms.set_momenta(momenta)
    stop_drift(atoms)


def stop_drift(atoms: Atoms) -> None:
    """Give the centre of mass zero velocity."""
    velocities = atoms.get_velocities()
    masses = atoms.get_masses()
    atoms.set_velocities(velocities - masses @ velocities / masses.sum())


def langevin(
    atoms: Atoms, temperature_K: float, timestep_fs: float, friction: float, rng: np.random.Generator
) -> Langevin:
    """Langevin dynamics of all 3N degrees of freedom; ``friction`` in 1/fs."""
    return Langevin(
        atoms,
        timestep_fs * units.fs,
        temperature_K=temperature_K,
        friction=friction / units.fs,
        fixcm=False,
        rng=rng,
    )


def equilibrate(
    calculator: Any,
    atoms: Atoms,
    *,
    temperature_K: float = 300.0,
    timestep_fs: float = 1.0,
    steps: int = 150,
    seed: int | tuple[int, ...] = 0,
) -> Atoms:
    """Return a copy at a temperature: momenta for twice the temperature, then Langevin dynamics.

    A structure near its minimum turns half of its kinetic energy into potential energy, hence twice.

    Raises
    ------
    CompactMLIPError
        If the dynamics explodes.
    """
    rng = np.random.default_rng(seed)
    system = atoms.copy()
    system.set_constraint()
    system.calc = calculator
    maxwell_boltzmann(system, 2 * temperature_K, rng)
    if steps:
        dynamics = langevin(system, temperature_K, timestep_fs, FRICTION, rng)
        failure = advance(dynamics, system, steps, EXPLODED * temperature_K, lambda: None)
        if failure:
            raise CompactMLIPError(f"the equilibration at {temperature_K:g} K failed: {failure}")
    stop_drift(system)
    system.calc = None
    return system


def nve(
    calculator: Any,
    atoms: Atoms,
    *,
    temperature_K: float = 300.0,
    timestep_fs: float = 1.0,
    steps: int = 2000,
    seed: int = 0,
    equilibration_steps: int = 150,
    max_seconds: float = float("inf"),
    progress: bool = False,
    description: str = "NVE",
) -> NVEResult:
    """Run velocity Verlet and measure how well the total energy is conserved.

    Parameters
    ----------
    calculator
        ASE calculator with energy and forces.
    atoms
        Simulated as it is, see :func:`compactmlip.validate.supercells.supercell`.  Momenta that it has
        are kept; without any, it is first brought to ``temperature_K`` by :func:`equilibrate` with
        ``equilibration_steps``.
    steps, timestep_fs, seed
        Length of the run, time step in fs, seed of the equilibration.
    max_seconds
        The run ends early after this wall time.

    Raises
    ------
    InputError
        If there are fewer than two atoms or no step.
    """
    if len(atoms) < 2 or steps < 1:
        raise InputError(f"NVE needs at least two atoms and one step, got {len(atoms)} and {steps}.")
    if np.any(atoms.get_momenta()):
        system = atoms.copy()
        system.set_constraint()
    else:
        system = equilibrate(
            calculator,
            atoms,
            temperature_K=temperature_K,
            timestep_fs=timestep_fs,
            steps=equilibration_steps,
            seed=seed,
        )
    system.calc = calculator
    rows: list[tuple[float, float]] = []
    positions: list[Array] = []
    started = time.perf_counter()
    with Track(description, steps, "steps", enabled=progress) as track:

        def record() -> None:
            rows.append((system.get_potential_energy(), system.get_kinetic_energy()))
            if len(rows) % SAMPLE_EVERY == 1:
                positions.append(system.get_positions())
            if len(rows) > 1:
                track.advance(1)

        dynamics = VelocityVerlet(system, timestep_fs * units.fs)
        failure = advance(dynamics, system, steps, EXPLODED * temperature_K, record, max_seconds)
    seconds = (time.perf_counter() - started) / max(len(rows) - 1, 1)
    result = _result(np.array(rows).reshape(-1, 2), len(system), timestep_fs, seconds, failure)
    return replace(result, positions=np.array(positions).reshape(-1, len(system), 3))


def advance(
    dynamics: Any,
    atoms: Atoms,
    steps: int,
    hottest: float,
    record: Callable[[], str | None],
    max_seconds: float = float("inf"),
) -> str:
    """Advance until the steps are done or the time is over; return what went wrong, or an empty string.

    ``record`` is called at every step, the start included; what it returns ends the run.
    """
    end = time.perf_counter() + max_seconds
    try:
        for step, _ in enumerate(dynamics.irun(steps)):
            temperature = atoms.get_temperature()
            if not (np.isfinite(temperature) and np.isfinite(atoms.get_potential_energy())):
                return f"energy or forces are not finite at step {step}."
            if failure := record():
                return f"{failure} at step {step}."
            if temperature > hottest:
                return f"the temperature reached {temperature:.0f} K at step {step}."
            if time.perf_counter() > end:
                break
    except CompactMLIPError as error:
        return f"the calculator stopped: {error}"
    return ""


def _result(rows: Array, atoms: int, timestep_fs: float, seconds: float, failure: str) -> NVEResult:
    potential, kinetic = rows.T
    trace = Trace(
        time_ps=np.arange(len(rows), dtype=np.float64) * (timestep_fs / 1000.0),
        total=potential + kinetic,
        potential=potential,
        temperature_K=2.0 * kinetic / (3.0 * atoms * units.kB),
    )
    steps = max(len(rows) - 1, 0)
    enough = not failure and steps >= MIN_STEPS_FOR_DRIFT
    reason = failure or ("" if enough else f"{steps} steps are too few for a drift; give it more time.")
    summary = NVESummary(
        atoms=atoms,
        steps=steps,
        timestep_fs=timestep_fs,
        mean_temperature_K=float(trace.temperature_K.mean()) if len(rows) else float("nan"),
        seconds_per_step=seconds,
        stable=not failure,
        reason=reason,
        drift=fit_drift(trace.time_ps, trace.total / atoms, kinetic / atoms) if enough else None,
    )
    return NVEResult(summary, trace)


def fit_drift(time_ps: Sequence[float] | Array, total: Array, kinetic: Array) -> Drift:
    """Least-squares slope of the total energy per atom, with a block-averaged standard error.

    Parameters
    ----------
    time_ps, total, kinetic
        (T,) times in ps and energies per atom in eV, T >= 2 * BLOCKS after the transient is left out.

    Notes
    -----
    The residuals of the fit are averaged over BLOCKS blocks, each longer than a vibration, and the
    standard error is that of a line through the block averages (BLOCKS - 2 degrees of freedom).
    """
    start = round(TRANSIENT_FRACTION * len(total))
    times, energy = np.asarray(time_ps, dtype=float)[start:], np.asarray(total, dtype=float)[start:] * MILLI
    if len(energy) < 2 * BLOCKS:
        raise InputError(f"{len(energy)} samples are too few for a drift; {2 * BLOCKS} are needed.")
    slope, intercept = np.polyfit(times - times.mean(), energy, 1)
    residual = energy - intercept - slope * (times - times.mean())
    blocks = [np.mean(part) for part in np.array_split(residual, BLOCKS)]
    centres = np.array([np.mean(part) for part in np.array_split(times, BLOCKS)])
    variance = np.sum(np.square(blocks)) / (BLOCKS - 2)
    kinetic_rms = float(np.std(np.asarray(kinetic)[start:])) * MILLI
    fluctuation = float(np.sqrt(np.mean(residual**2)))
    return Drift(
        slope=float(slope),
        slope_error=float(np.sqrt(variance / np.sum((centres - centres.mean()) ** 2))),
        fluctuation=fluctuation,
        fluctuation_ratio=fluctuation / kinetic_rms if kinetic_rms > 0 else float("inf"),
    )


def affordable_steps(seconds_per_step: float, max_seconds: float, longest: int, shortest: int = 0) -> int:
    """Steps that fit into a time budget, at least ``shortest`` and at most ``longest``."""
    return int(np.clip(max_seconds / max(seconds_per_step, 1e-9), min(shortest, longest), longest))
