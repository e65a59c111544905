"""Up to which temperature a model holds: short runs, each twice as hot as the one before, until it breaks.

A potential that is sound at 300 K may have a hole that atoms find at 900 K.  The ladder looks for the nearest
one: a rung is passed when atoms stay apart, energies stay finite, the thermostat keeps the temperature, and
the teacher gives the last frames about the energy that the model gives them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.data import covalent_radii
from pydantic import BaseModel, ConfigDict

from compactmlip.data.neighbors import VerletList
from compactmlip.errors import CompactMLIPError
from compactmlip.progress import Track
from compactmlip.validate.nve import langevin, maxwell_boltzmann
from compactmlip.validate.parity import MILLI, Array

RUNGS = (1.0, 2.0, 4.0, 8.0)
"""In units of the temperature asked for.  At eight times room temperature most matter is liquid or gas."""

STEPS = 200
"""Of each rung."""

FRICTION = 0.03
"""Per step: the first half of a rung forgets the rung before, and atoms still move between collisions."""

TOO_CLOSE = 0.5
"""In units of the sum of the covalent radii.  N2, the shortest bond in these units, has 0.77, and the true
energy at 0.5 is above 10 eV, out of reach up to some 10,000 K."""

RUNAWAY = 3.0
"""Times the temperature asked for, in one moment; chance alone never takes 30 atoms there."""

FRAMES = 4
"""Last frames of a rung on which the teacher is asked, :data:`APART` steps apart."""

APART = 10

DISAGREE = 0.5
"""Difference to the teacher's energy per atom, since the start, in units of kB T: a third of the harmonic
potential energy.  Beyond, the model samples another surface."""


class Rung(BaseModel):
    """One temperature.

    Attributes
    ----------
    temperature_K, mean_temperature_K
        Of the thermostat, and of the second half of the run.
    closest
        Shortest distance over the sum of the covalent radii; infinite for one atom.
    disagreement
        Mean difference to the other potential's energy on the last frames, counted from the start, in
        meV/atom; None where there was no other.
    failure
        Why it broke, or empty.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
    temperature_K: float
    steps: int
    mean_temperature_K: float
    closest: float
    disagreement: float | None = None
    failure: str = ""


class Ladder(BaseModel):
    """Rungs of the model, and of the teacher where it was simulated as well.

    Attributes
    ----------
    atoms
        Number of atoms.
    model, teacher
        Rungs from cold to hot; the last one may have failed, none follows it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
    atoms: int
    model: tuple[Rung, ...]
    teacher: tuple[Rung, ...] = ()

    @property
    def highest(self) -> float:
        """Highest temperature in K that the model held; 0 if none."""
        return _highest(self.model)

    @property
    def teacher_highest(self) -> float:
        """The same for the teacher; 0 if none or not simulated."""
        return _highest(self.teacher)


def climb(
    calculator: Any,
    atoms: Atoms,
    *,
    temperature_K: float = 300.0,
    timestep_fs: float = 1.0,
    rungs: tuple[float, ...] = RUNGS,
    steps: int = STEPS,
    judge: Any = None,
    seed: int = 0,
    max_seconds: float = math.inf,
    advance: Callable[[float], None] = lambda _: None,
) -> tuple[Rung, ...]:
    """Run Langevin dynamics at rising temperatures until something breaks.

    Parameters
    ----------
    calculator
        ASE calculator with energy and forces.
    atoms
        The start; it is not changed.  Each rung begins where the one before ended.
    rungs
        Temperatures in units of ``temperature_K``.
    judge
        Calculator that is asked for the energy of the last frames (the teacher), or None.
    max_seconds
        No rung begins after this wall time, and one that is not done by then does not count.
    advance
        Called with 1 after each rung.
    """
    rng = np.random.default_rng(seed)
    system = atoms.copy()
    system.set_constraint()
    system.calc = calculator
    maxwell_boltzmann(system, rungs[0] * temperature_K, rng)
    end = time.perf_counter() + max_seconds
    found: list[Rung] = []
    for factor in rungs:
        if time.perf_counter() > end:
            break
        # Hot atoms are fast: the time step shrinks as their mean velocity grows.
        timestep = timestep_fs / math.sqrt(max(factor, 1.0))
        done = _rung(system, factor * temperature_K, timestep, steps, rng, end)
        if done is None:
            break
        rung, frames = done
        if judge is not None and not rung.failure:
            rung = _judged(rung, [_with(atoms, p) for p in (atoms.positions, *frames)], calculator, judge)
        found.append(rung)
        advance(1)
        if rung.failure:
            break
    return tuple(found)


def compare_ladders(
    model: Any, teacher: Any, atoms: Atoms, *, with_teacher: bool = True, progress: bool = False, **how: Any
) -> Ladder:
    """Climb with the model, judged by the teacher, and with the teacher itself.

    Parameters
    ----------
    with_teacher
        Whether the teacher climbs as well; it is slower.
    how
        As for :func:`climb`.
    """
    count = len(how.get("rungs", RUNGS)) * (2 if with_teacher else 1)
    with Track("Temperature ladder", count, "rungs", enabled=progress) as track:
        own = climb(model, atoms, judge=teacher, advance=track.advance, **how)
        other = climb(teacher, atoms, advance=track.advance, **how) if with_teacher else ()
    return Ladder(atoms=len(atoms), model=own, teacher=other)


def closest(atoms: Atoms, search: VerletList | None = None) -> float:
    """Shortest distance between atoms over the sum of their covalent radii; infinite beyond 1.

    ``search`` is that of :func:`bond_search`, for many structures of one run.
    """
    radii = covalent_radii[atoms.numbers]
    search = search or bond_search(atoms)
    centers, neighbors, vectors = search.edges(atoms)
    if not len(centers):
        return math.inf
    return float((np.linalg.norm(vectors, axis=1) / (radii[centers] + radii[neighbors])).min())


def bond_search(atoms: Atoms) -> VerletList:
    """Neighbour list that reaches as far as atoms of these species touch."""
    return VerletList(float(2 * covalent_radii[atoms.numbers].max()), skin=0.5)


def _rung(
    system: Atoms, temperature_K: float, timestep_fs: float, steps: int, rng: np.random.Generator, end: float
) -> tuple[Rung, list[Array]] | None:
    """Run at one temperature, and keep the last frames; None where the time ends before."""
    dynamics = langevin(system, temperature_K, timestep_fs, FRICTION / timestep_fs, rng)
    temperatures: list[float] = []
    frames: list[Array] = []
    nearest, failure, search = math.inf, "", bond_search(system)
    try:
        for step, _ in enumerate(dynamics.irun(steps)):
            failure, near, now = _look(system, temperature_K, search)
            nearest = min(nearest, near)
            if failure:
                failure = f"{failure} at step {step}."
                break
            temperatures.append(now)
            if step > steps - FRAMES * APART and (steps - step) % APART == 0:
                frames.append(system.get_positions())
            if time.perf_counter() > end:
                return None
    except CompactMLIPError as error:
        failure = f"the calculator stopped: {error}"
    half = temperatures[len(temperatures) // 2 :]
    rung = Rung(
        temperature_K=temperature_K,
        steps=max(len(temperatures) - 1, 0),
        mean_temperature_K=float(np.mean(half)) if half else math.nan,
        closest=nearest,
        failure=failure,
    )
    return rung, frames


def _look(system: Atoms, temperature_K: float, search: VerletList) -> tuple[str, float, float]:
    """What is wrong, or empty; how close atoms are; and the temperature."""
    now = float(system.get_temperature())
    finite = np.isfinite(system.positions).all() and np.isfinite(system.get_forces()).all()
    if not (finite and math.isfinite(now) and math.isfinite(system.get_potential_energy())):
        return "energy or forces were not finite", math.inf, now
    near = closest(system, search)
    if near < TOO_CLOSE:
        return f"two atoms came within {near:.2f} times the sum of their radii", near, now
    if now > RUNAWAY * temperature_K:
        return f"the temperature reached {now:.0f} K", near, now
    return "", near, now


def _judged(rung: Rung, structures: list[Atoms], calculator: Any, judge: Any) -> Rung:
    """The rung with what another potential says of its last frames, relative to the first structure."""
    try:
        own, other = (_energies(c, structures) for c in (calculator, judge))
    except CompactMLIPError as error:
        return rung.model_copy(update={"failure": f"the teacher refused the last frames: {error}"})
    changes = (own - own[0]) - (other - other[0])
    disagreement = float(np.abs(changes[1:]).mean()) / len(structures[0])
    thermal = units.kB * rung.temperature_K
    failure = ""
    if not disagreement <= DISAGREE * thermal:
        failure = (
            f"the teacher's energy of the last frames is {disagreement / thermal:.2g} kB T per atom off."
        )
    return rung.model_copy(update={"disagreement": MILLI * disagreement, "failure": failure})


def _energies(calculator: Any, structures: list[Atoms]) -> Array:
    found = []
    for atoms in structures:
        system = atoms.copy()
        system.calc = calculator
        found.append(float(system.get_potential_energy()))
    return np.array(found)


def _with(atoms: Atoms, positions: Array) -> Atoms:
    system = atoms.copy()
    system.set_positions(positions, apply_constraint=False)
    return system


def _highest(rungs: tuple[Rung, ...]) -> float:
    return max((rung.temperature_K for rung in rungs if not rung.failure), default=0.0)
