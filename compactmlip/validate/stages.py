"""Physics of model and teacher beyond energy conservation, each part within its budget of time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ase import Atoms

from compactmlip.errors import CompactMLIPError
from compactmlip.validate.crystal import EVALUATIONS, CrystalComparison, compare_crystals
from compactmlip.validate.defects import VACANCY_ATOMS, Defect, compare_defects, evaluations
from compactmlip.validate.density import LONGEST, SHORTEST, DensityComparison, compare_densities
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
    """What was found; None or empty where time or structure do not allow a part."""

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
    apart, curves = keep("short-range", lambda: short_range(setting))
    crystal, relaxed = keep("crystal", lambda: at_rest(setting))
    phonons, spectra = keep("phonons", lambda: vibrations(setting, relaxed))
    modulus = crystal.teacher.bulk_modulus if crystal and relaxed else None
    runs = keep("ensembles", lambda: ensembles(setting)) if stable else None
    structure, vibration = in_dynamics(runs)
    return Physics(
        ensembles=runs,
        structure=structure[0] if structure else (),
        functions=structure[1] if structure else None,
        vibration=vibration,
        short_range=tuple(apart),
        curves=tuple(curves),
        thermostat=keep("thermostat", lambda: thermostat(setting, cell)) if stable else None,
        ladder=keep("ladder", lambda: ladder(setting)),
        density=keep("density", lambda: density(setting, modulus)) if stable else None,
        crystal=crystal,
        phonons=phonons,
        spectra=spectra,
        defects=keep("defects", lambda: defects(setting, relaxed)),
    )


def short_range(setting: Setting) -> tuple[list[Approach], list[Curve]]:
    """Energies while two atoms come together."""
    points = setting.options.approach_points
    if not points:
        return [], []
    cell, cutoff = near_size(setting.start, SMALL_CELL), setting.calculators["model"].spec.cutoff
    return approach(setting.calculators, cell, cutoff, points, progress=setting.progress)


def ensembles(setting: Setting) -> Ensembles | None:
    """Several runs of both with a thermostat, or of the model where the teacher is too slow."""
    options = setting.options
    cell = near_size(setting.start, ENSEMBLE_ATOMS)
    own, other = (RUNS * setting.seconds(cell, name) for name in ("model", "teacher"))
    for energies_only in (False, True):
        per_step = own + (other / RUN_SAMPLES if energies_only else other)
        warm_up = RUN_WARM_UP * (own if energies_only else own + other)
        steps = affordable_steps(per_step, options.ensemble_seconds - warm_up, LONGEST_RUN)
        if steps >= SHORTEST_RUN:
            break
    else:
        return None
    if len(cell) < 2:
        return None
    return compare_ensembles(
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


def in_dynamics(
    runs: Ensembles | None,
) -> tuple[tuple[tuple[Distribution, ...], Functions] | None, tuple[Vibration, ...]]:
    """Radial distribution functions, and how far atoms move from their sites."""
    if runs is None or not runs.sampling.comparable:
        return None, ()
    return compare_structure(runs), compare_vibrations(runs)


def thermostat(setting: Setting, cell: Atoms) -> KineticEnergy | None:
    """Kinetic energies of the model's run at constant temperature."""
    options = setting.options
    per_step = setting.seconds(cell, "model")
    steps = affordable_steps(per_step, options.nvt_seconds, LONGEST_NVT + WARM_UP) - WARM_UP
    if steps < 2:
        return None
    return nvt(
        setting.calculators["model"],
        cell,
        temperature_K=options.temperature_K,
        timestep_fs=options.timestep_fs,
        steps=steps,
        seed=options.seed,
        max_seconds=1.5 * options.nvt_seconds,
        progress=setting.progress,
    )


def ladder(setting: Setting) -> Ladder | None:
    """Temperatures that model and teacher hold; without the teacher where it is too slow."""
    options = setting.options
    cell = near_size(setting.start, SMALL_CELL)
    needed = len(RUNGS) * STEPS * setting.seconds(cell, "model")
    both = needed + len(RUNGS) * STEPS * setting.seconds(cell, "teacher")
    # Half of the rungs are enough for a verdict; each run ends with its time.
    if needed / 2 > options.ladder_seconds or len(cell) < 2:
        return None
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


def density(setting: Setting, bulk_modulus: float | None) -> DensityComparison | None:
    """Density at constant pressure, of periodic structures for which the time is enough."""
    options, model, teacher = setting.options, *setting.pair
    stresses = all("stress" in c.implemented_properties for c in (model, teacher))
    if not (setting.start.pbc.all() and stresses):
        return None
    cell = near_size(setting.start, DENSITY_ATOMS)
    steps = affordable_steps(setting.seconds(cell), options.npt_seconds, LONGEST)
    if steps < SHORTEST:
        return None
    return compare_densities(
        model,
        teacher,
        cell,
        temperature_K=options.temperature_K,
        pressure_GPa=options.pressure_GPa,
        timestep_fs=options.timestep_fs,
        steps=steps,
        bulk_modulus=bulk_modulus,
        seed=options.seed,
        max_seconds=options.npt_seconds,
        progress=setting.progress,
    )


def at_rest(setting: Setting) -> tuple[CrystalComparison | None, tuple[Atoms, Atoms] | None]:
    """Elastic constants, and the minima of model and teacher, of periodic structures."""
    start = setting.start
    if not start.pbc.all() or EVALUATIONS * setting.seconds(start) > setting.options.crystal_seconds:
        return None, None
    found, relaxed = compare_crystals(*setting.pair, start)
    if not (found.model.relaxed and found.teacher.relaxed):
        return found, None
    own, other = relaxed
    return found, (own.copy(), other.copy())  # without calculators


def vibrations(
    setting: Setting, relaxed: tuple[Atoms, Atoms] | None
) -> tuple[Phonons | None, Spectra | None]:
    """Phonons at the minima of both."""
    if relaxed is None or not phonons_available():
        return None, None
    count, atoms = displacements(relaxed[1])
    if count * setting.seconds(near_size(setting.start, atoms)) > setting.options.crystal_seconds:
        return None, None
    return compare_phonons(*setting.pair, relaxed, setting.options.temperature_K)


def defects(setting: Setting, relaxed: tuple[Atoms, Atoms] | None) -> tuple[Defect, ...]:
    """Vacancies and surfaces of what is at rest in both."""
    if relaxed is None:
        return ()
    cost = evaluations(relaxed[1]) * setting.seconds(near_size(relaxed[1], VACANCY_ATOMS))
    if cost > setting.options.defect_seconds:
        return ()
    try:
        return compare_defects(*setting.pair, relaxed)
    except CompactMLIPError:  # a defective cell that a calculator refuses
        return ()
