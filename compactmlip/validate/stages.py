"""Physics of model and teacher beyond energy conservation, each part within its budget of time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ase import Atoms

from compactmlip.errors import CompactMLIPError
from compactmlip.validate.crystal import EVALUATIONS, CrystalComparison, compare_crystals
from compactmlip.validate.defects import VACANCY_ATOMS, Defect, compare_defects, evaluations
from compactmlip.validate.density import (
    EQUILIBRATION,
    LONGEST,
    RUNS as DENSITY_RUNS,
    SHORTEST,
    DensityComparison,
    compare_densities,
)
from compactmlip.validate.ensemble import (
    LONGEST as LONGEST_RUN,
    RUNS,
    SAMPLE_EVERY as RUN_SAMPLES,
    SHORTEST as SHORTEST_RUN,
    WARM_UP as RUN_WARM_UP,
    Ensembles,
    compare_ensembles,
)
from compactmlip.validate.ladder import RUNGS, STEPS, Ladder, compare_ladders
from compactmlip.validate.left_out import (
    APART,
    AT_REST,
    DEFECTS,
    DENSITY,
    IN_DYNAMICS,
    LADDER,
    PHONONS,
    THERMOSTAT,
    LeftOut,
    no_time,
    unstable,
)
from compactmlip.validate.nve import affordable_steps
from compactmlip.validate.options import ValidateOptions
from compactmlip.validate.paired import seconds_per_step
from compactmlip.validate.phonons import (
    Phonons,
    Spectra,
    available as phonons_available,
    compare_phonons,
    displacements,
)
from compactmlip.validate.resume import Parts
from compactmlip.validate.short_range import Approach, Curve, approach
from compactmlip.validate.speed import Speed
from compactmlip.validate.structure import Distribution, Functions, compare_structure
from compactmlip.validate.supercells import near_size
from compactmlip.validate.thermostat import LONGEST as LONGEST_NVT, WARM_UP, KineticEnergy, nvt
from compactmlip.validate.vibration import Vibration, compare_vibrations

T = TypeVar("T")

NOT_PERIODIC = "The structure is not periodic in all directions."
NOT_AT_REST = "There is no periodic structure at rest in both, or no time to find it."
TOO_COMPLEX = "The formula unit is large, and so are slabs of all low-index planes."

SMALL_CELL = 32
"""About how many atoms are around two that come together, and climb the temperature ladder."""

DENSITY_ATOMS = 64
"""About how many atoms the cell at constant pressure has."""

ENSEMBLE_ATOMS = 64
"""About how many atoms the cell has of which several runs are made."""

OVERTIME = 2.0
"""Runs of which all are needed are given up when they take this many times their budget."""


@dataclass(frozen=True)
class Physics:
    """What was found; None or empty where time or structure do not allow a part, as ``left_out`` says."""

    short_range: tuple[Approach, ...] = ()
    curves: tuple[Curve, ...] = ()
    ensembles: Ensembles | None = None
    structure: tuple[Distribution, ...] = ()
    functions: Functions | None = None
    vibration: tuple[Vibration, ...] = ()
    thermostat: KineticEnergy | None = None
    ladder: Ladder | None = None
    density: DensityComparison | None = None
    crystal: CrystalComparison | None = None
    phonons: Phonons | None = None
    spectra: Spectra | None = None
    defects: tuple[Defect, ...] = ()
    left_out: tuple[LeftOut, ...] = ()


@dataclass(frozen=True)
class Setting:
    """Both calculators, the structure, and how fast they are on it."""

    calculators: dict[str, Any]
    start: Atoms
    speed: Sequence[Speed]
    options: ValidateOptions
    progress: bool = False
    parts: Parts | None = None

    def keep(self, name: str, compute: Callable[[], T]) -> T:
        """Return a part of an interrupted run, or compute it and keep it for the next one."""
        return self.parts.of(name, compute) if self.parts else compute()

    def seconds(self, atoms: Atoms, *names: str) -> float:
        """Of one energy with forces by each calculator named, or by both."""
        return sum(
            seconds_per_step(name, self.calculators, atoms, self.speed)
            for name in names or ("model", "teacher")
        )

    @property
    def pair(self) -> tuple[Any, Any]:
        """Model and teacher."""
        return self.calculators["model"], self.calculators["teacher"]


def physics(setting: Setting, cell: Atoms, *, stable: bool = True) -> Physics:
    """Run all parts.

    Parameters
    ----------
    cell
        Of the dynamics.
    stable
        Whether dynamics at constant energy was; if not, none with a thermostat follows.
    """
    keep = setting.keep
    close = keep("short-range", lambda: short_range(setting))
    rest = keep("crystal", lambda: at_rest(setting))
    crystal, relaxed = _there(rest) or (None, None)
    bands = keep("phonons", lambda: vibrations(setting, relaxed))
    modulus = crystal.teacher.bulk_modulus if crystal and relaxed else None
    runs = keep("ensembles", lambda: ensembles(setting)) if stable else unstable(IN_DYNAMICS)
    structure, vibration = in_dynamics(_there(runs))
    kinetic = keep("thermostat", lambda: thermostat(setting, cell)) if stable else unstable(THERMOSTAT)
    rungs = keep("ladder", lambda: ladder(setting))
    dense = keep("density", lambda: density(setting, modulus)) if stable else unstable(DENSITY)
    broken = keep("defects", lambda: defects(setting, relaxed))
    approaches, curves = _there(close) or ((), ())
    phonons, spectra = _there(bands) or (None, None)
    parts = (close, runs, kinetic, rungs, dense, rest, bands, broken)
    return Physics(
        ensembles=_there(runs),
        structure=structure[0] if structure else (),
        functions=structure[1] if structure else None,
        vibration=vibration,
        short_range=tuple(approaches),
        curves=tuple(curves),
        thermostat=_there(kinetic),
        ladder=_there(rungs),
        density=_there(dense),
        crystal=crystal,
        phonons=phonons,
        spectra=spectra,
        defects=_there(broken) or (),
        left_out=tuple(part for part in parts if isinstance(part, LeftOut)),
    )


def _there(found: T | LeftOut) -> T | None:
    return None if isinstance(found, LeftOut) else found


def _late(name: str, option: str, allowed: float) -> LeftOut:
    reason = f"Not all runs were done after {OVERTIME * allowed:.0f} s, {OVERTIME:g} times {option}."
    return LeftOut(name=name, reason=reason)


def short_range(setting: Setting) -> tuple[list[Approach], list[Curve]] | LeftOut:
    """Energies while two atoms come together."""
    points = setting.options.approach_points
    if not points:
        return LeftOut(name=APART, reason="Switched off (approach_points is 0).")
    cell, cutoff = near_size(setting.start, SMALL_CELL), setting.calculators["model"].spec.cutoff
    return approach(setting.calculators, cell, cutoff, points, progress=setting.progress)


def ensembles(setting: Setting) -> Ensembles | LeftOut:
    """Several runs of both with a thermostat, or of the model where the teacher is too slow."""
    options = setting.options
    cell = near_size(setting.start, ENSEMBLE_ATOMS)
    if len(cell) < 2:
        return LeftOut(name=IN_DYNAMICS, reason="The structure is one atom.")
    own, other = (RUNS * setting.seconds(cell, name) for name in ("model", "teacher"))
    for energies_only in (False, True):
        per_step = own + (other / RUN_SAMPLES if energies_only else other)
        warm_up = RUN_WARM_UP * (own if energies_only else own + other)
        steps = affordable_steps(per_step, options.ensemble_seconds - warm_up, LONGEST_RUN)
        if steps >= SHORTEST_RUN:
            break
    else:
        needed = warm_up + SHORTEST_RUN * per_step
        return no_time(IN_DYNAMICS, "ensemble_seconds", options.ensemble_seconds, needed)
    found = compare_ensembles(
        *setting.pair,
        cell,
        steps=steps,
        warm_up=RUN_WARM_UP,
        runs=RUNS,
        energies_only=energies_only,
        temperature_K=options.temperature_K,
        timestep_fs=options.timestep_fs,
        seed=options.seed,
        max_seconds=OVERTIME * options.ensemble_seconds,
        progress=setting.progress,
    )
    return found or _late(IN_DYNAMICS, "ensemble_seconds", options.ensemble_seconds)


def in_dynamics(
    runs: Ensembles | None,
) -> tuple[tuple[tuple[Distribution, ...], Functions] | None, tuple[Vibration, ...]]:
    """Radial distribution functions, and how far atoms move from their sites."""
    if runs is None or not runs.sampling.comparable:
        return None, ()
    return compare_structure(runs), compare_vibrations(runs)


def thermostat(setting: Setting, cell: Atoms) -> KineticEnergy | LeftOut:
    """Kinetic energies of the model's run at constant temperature."""
    options = setting.options
    per_step = setting.seconds(cell, "model")
    steps = affordable_steps(per_step, options.nvt_seconds, LONGEST_NVT + WARM_UP) - WARM_UP
    if steps < 2:
        return no_time(THERMOSTAT, "nvt_seconds", options.nvt_seconds, (WARM_UP + 2) * per_step)
    found = nvt(
        setting.calculators["model"],
        cell,
        temperature_K=options.temperature_K,
        timestep_fs=options.timestep_fs,
        steps=steps,
        seed=options.seed,
        max_seconds=1.5 * options.nvt_seconds,
        progress=setting.progress,
    )
    return found or LeftOut(name=THERMOSTAT, reason="The run ended before there was anything to judge.")


def ladder(setting: Setting) -> Ladder | LeftOut:
    """Temperatures that model and teacher hold; without the teacher where it is too slow."""
    options = setting.options
    cell = near_size(setting.start, SMALL_CELL)
    needed = len(RUNGS) * STEPS * setting.seconds(cell, "model")
    both = needed + len(RUNGS) * STEPS * setting.seconds(cell, "teacher")
    # Half of the rungs are enough for a verdict; each run ends with its time.
    if len(cell) < 2:
        return LeftOut(name=LADDER, reason="The structure is one atom.")
    if needed / 2 > options.ladder_seconds:
        return no_time(LADDER, "ladder_seconds", options.ladder_seconds, needed / 2)
    with_teacher = both <= options.ladder_seconds
    return compare_ladders(
        *setting.pair,
        cell,
        with_teacher=with_teacher,
        rungs=RUNGS,
        steps=STEPS,
        progress=setting.progress,
        temperature_K=options.temperature_K,
        timestep_fs=options.timestep_fs,
        seed=options.seed,
        max_seconds=options.ladder_seconds,
    )


def density(setting: Setting, bulk_modulus: float | None) -> DensityComparison | LeftOut:
    """Density at constant pressure, of periodic structures for which the time is enough."""
    options, model, teacher = setting.options, *setting.pair
    stresses = all("stress" in c.implemented_properties for c in (model, teacher))
    if not setting.start.pbc.all():
        return LeftOut(name=DENSITY, reason=NOT_PERIODIC)
    if not stresses:
        return LeftOut(name=DENSITY, reason="Model or teacher have no stress.")
    cell = near_size(setting.start, DENSITY_ATOMS)
    per_step, allowed = DENSITY_RUNS * setting.seconds(cell), options.npt_seconds
    steps = affordable_steps(per_step, allowed, LONGEST + EQUILIBRATION) - EQUILIBRATION
    if steps < SHORTEST:
        return no_time(DENSITY, "npt_seconds", allowed, (SHORTEST + EQUILIBRATION) * per_step)
    found = compare_densities(
        model,
        teacher,
        cell,
        temperature_K=options.temperature_K,
        pressure_GPa=options.pressure_GPa,
        timestep_fs=options.timestep_fs,
        steps=steps,
        runs=DENSITY_RUNS,
        bulk_modulus=bulk_modulus,
        seed=options.seed,
        max_seconds=OVERTIME * allowed,
        progress=setting.progress,
    )
    return found or _late(DENSITY, "npt_seconds", allowed)


def at_rest(setting: Setting) -> tuple[CrystalComparison, tuple[Atoms, Atoms] | None] | LeftOut:
    """Elastic constants, and the minima of model and teacher, of periodic structures."""
    start, allowed = setting.start, setting.options.crystal_seconds
    if not start.pbc.all():
        return LeftOut(name=AT_REST, reason=NOT_PERIODIC)
    needed = EVALUATIONS * setting.seconds(start)
    if needed > allowed:
        return no_time(AT_REST, "crystal_seconds", allowed, needed)
    found, relaxed = compare_crystals(*setting.pair, start)
    if not (found.model.relaxed and found.teacher.relaxed):
        return found, None
    own, other = relaxed
    return found, (own.copy(), other.copy())  # without calculators


def vibrations(setting: Setting, relaxed: tuple[Atoms, Atoms] | None) -> tuple[Phonons, Spectra] | LeftOut:
    """Phonons at the minima of both."""
    if relaxed is None:
        return LeftOut(name=PHONONS, reason=NOT_AT_REST)
    if not phonons_available():
        return LeftOut(name=PHONONS, reason="phonopy is not installed.")
    count, atoms = displacements(relaxed[1])
    needed, allowed = (
        count * setting.seconds(near_size(setting.start, atoms)),
        setting.options.crystal_seconds,
    )
    if needed > allowed:
        return no_time(PHONONS, "crystal_seconds", allowed, needed)
    return compare_phonons(*setting.pair, relaxed, setting.options.temperature_K)


def defects(setting: Setting, relaxed: tuple[Atoms, Atoms] | None) -> tuple[Defect, ...] | LeftOut:
    """Vacancies and surfaces of what is at rest in both."""
    if relaxed is None:
        return LeftOut(name=DEFECTS, reason=NOT_AT_REST)
    needed = evaluations(relaxed[1]) * setting.seconds(near_size(relaxed[1], VACANCY_ATOMS))
    if needed > setting.options.defect_seconds:
        return no_time(DEFECTS, "defect_seconds", setting.options.defect_seconds, needed)
    try:
        found = compare_defects(*setting.pair, relaxed)
    except CompactMLIPError as error:  # a defective cell that a calculator refuses
        return LeftOut(name=DEFECTS, reason=str(error))
    return found or LeftOut(name=DEFECTS, reason=TOO_COMPLEX)
