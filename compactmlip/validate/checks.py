"""Limits, and the verdicts that follow from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from compactmlip.validate.consistency import Consistency
from compactmlip.validate.crystal import CrystalComparison
from compactmlip.validate.cutoff import CutoffStep
from compactmlip.validate.engines import EngineParity
from compactmlip.validate.nve import NVESummary
from compactmlip.validate.parity import ParityReport
from compactmlip.validate.phonons import IMAGINARY, Phonons
from compactmlip.validate.short_range import Approach, safe_temperature
from compactmlip.validate.structure import Distribution

Verdict = Literal["pass", "warn", "fail"]

ROUNDING = {"float32": 1e-4, "float64": 1e-9}
"""Tolerated symmetry error of the forces, relative to the larger of the largest force and 1 eV/Angstrom:
about a thousand times the precision of the type in float32; more means a bug and not rounding."""

DERIVATIVE = {"float32": 2e-3, "float64": 1e-4}
"""Tolerated error of the forces as derivatives, relative as ROUNDING; the finite difference itself is
limited by the rounding of the energy in float32 and by its step in float64."""

STRESS_DERIVATIVE = {"float32": 1e-2, "float64": 1e-4}
"""The same for the stress, relative to the larger of the largest component and 10 meV/Angstrom^3."""

ENGINE = {"float32": 0.1, "float64": 1e-5}
"""Tolerated difference of a force between engines in meV/Angstrom: what the order of sums changes."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Limit(_Frozen):
    """Up to ``good`` a check passes, up to ``bad`` it warns, above it fails."""

    good: float
    bad: float
    reason: str = ""

    def judge(self, value: float) -> Verdict:
        """Return the verdict on a value; NaN fails."""
        return "pass" if value <= self.good else "warn" if value <= self.bad else "fail"

    def judge_size(self, value: float, error: float) -> Verdict:
        """Return the verdict on the size of a value with its standard error; two of them count."""
        size, margin = abs(value), 2 * error
        return "pass" if size + margin <= self.good else "warn" if size - margin <= self.bad else "fail"


class Thresholds(_Frozen):
    """Limits of the checks."""

    energy_mae: Limit = Limit(
        good=5.0,
        bad=15.0,
        reason="A fifth of the thermal energy at 300 K (26 meV/atom). Energy differences below the error "
        "cannot be resolved.",
    )
    force_mae_relative: Limit = Limit(
        good=10.0,
        bad=20.0,
        reason="Held against the size of the forces on the same structures. A tenth is a rule of thumb for "
        "thermal vibrations near them; subtle questions need less.",
    )
    stress_mae: Limit = Limit(
        good=1.0,
        bad=3.0,
        reason="1 meV/A^3 is 0.16 GPa: 0.03 % in the lattice constant at a bulk modulus of 160 GPa.",
    )
    nve_drift: Limit = Limit(
        good=0.1,
        bad=0.1,
        reason="0.1 meV/atom/ps heats a harmonic solid by 0.4 K per ps, which a thermostat takes away. "
        "Passes when the drift plus two standard errors is below, fails when the drift minus two is above.",
    )
    nve_fluctuation: Limit = Limit(
        good=0.025,
        bad=0.1,
        reason="RMS of the total over the kinetic energy. In velocity Verlet it is (ω dt)^2/4 for a "
        "vibration of frequency ω: 0.025 is 20 steps per period, 0.1 is 10. Noise adds to it.",
    )
    short_range: Limit = Limit(
        good=0.5,
        bad=1.0,
        reason="The temperature over that at which a collapse becomes likely: where the lowest barrier is "
        "25 kB T, ten thousand pairs collapse once in some hundred nanoseconds.",
    )
    volume: Limit = Limit(
        good=1.0,
        bad=3.0,
        reason="Against the teacher. 1 % of the volume is 0.3 % of a lattice constant, less than density "
        "functionals differ among each other.",
    )
    minimum: Limit = Limit(
        good=0.05,
        bad=0.2,
        reason="Root mean square distance of the atoms at rest from where they rest in the teacher. "
        "Zero-point motion is 0.05 to 0.1 A.",
    )
    bulk_modulus: Limit = Limit(
        good=10.0,
        bad=20.0,
        reason="Against the teacher; a tenth is about how far density functionals are apart.",
    )
    elastic: Limit = Limit(
        good=10.0,
        bad=20.0,
        reason="Largest deviation of an elastic constant from the teacher's, relative to its largest one.",
    )
    phonons: Limit = Limit(
        good=3.0,
        bad=8.0,
        reason="Mean difference to the teacher's frequencies, relative to its highest one.",
    )
    structure: Limit = Limit(
        good=5.0,
        bad=10.0,
        reason="Integrated difference of radial distribution functions to the teacher's, beyond what chance "
        "does in one of a hundred comparisons, of the pair of species that differs most.",
    )
    thermostat_mean: Limit = Limit(
        good=2.0,
        bad=5.0,
        reason="Mean kinetic energy of all atoms, and of each species, against the thermostat's temperature, "
        "beyond what chance does once in 370 runs. 2 % is what a time step of a twelfth of a period does.",
    )
    thermostat_variance: Limit = Limit(
        good=10.0,
        bad=25.0,
        reason="Variance of the kinetic energy against the canonical one, beyond what chance does once in "
        "370 runs. Thermostats that only rescale velocities have too little.",
    )
    diffusion: Limit = Limit(
        good=20.0,
        bad=50.0,
        reason="Diffusion coefficient against the teacher's, beyond what chance does once in 370 "
        "comparisons. 20 % is a change of temperature by some 10 K in water.",
    )
    amplitude: Limit = Limit(
        good=10.0,
        bad=25.0,
        reason="Mean square displacement from the sites against the teacher's, beyond what chance does once "
        "in 370 comparisons. It is inversely proportional to the stiffness.",
    )
    ladder: Limit = Limit(
        good=0.5,
        bad=0.5,
        reason="The temperature over the highest one that was held in a short run. Twice the temperature "
        "should be: a long run at one temperature meets what a short one meets at the next.",
    )
    density: Limit = Limit(
        good=1.0,
        bad=3.0,
        reason="Against the teacher at the same temperature and pressure, beyond what chance does once in "
        "370 comparisons.",
    )
    defects: Limit = Limit(
        good=15.0,
        bad=math.inf,
        reason="Largest deviation from the teacher of vacancy and surface energies. Never fails: such "
        "structures are rarely what a model was trained on. Those who simulate them should heed the warning.",
    )
    cutoff_energy: Limit = Limit(
        good=0.1,
        bad=1.0,
        reason="Change of the energy when two atoms come into reach of each other, or of a layer, that no "
        "force accounts for. Each such event adds it or takes it.",
    )
    cutoff_force: Limit = Limit(
        good=1.0,
        bad=10.0,
        reason="Change of the force from 0.001 A within the cutoff to 0.001 A beyond it, where that of a "
        "smooth one is hardly to be seen (one whose curvature jumps, as XPLOR's, shows up to about 1).",
    )


class Check(_Frozen):
    """One verdict with the number and the limits that led to it."""

    name: str
    verdict: Verdict
    value: float | None
    error: float | None = None
    unit: str
    good: float | None = None
    bad: float | None = None
    reason: str


def overall(checks: Iterable[Check]) -> Verdict:
    """Return the worst verdict."""
    verdicts = {check.verdict for check in checks}
    return "fail" if "fail" in verdicts or not verdicts else "warn" if "warn" in verdicts else "pass"


def parity_checks(parity: ParityReport, limits: Thresholds) -> list[Check]:
    """Judge energies, forces and stresses."""
    mean = parity.forces.reference_mean_abs
    relative = 100 * parity.forces.mae / mean if mean > 0 else math.nan
    checks = [
        limited("energy error (MAE)", parity.energy.mae, "meV/atom", limits.energy_mae),
        limited("force error (MAE / mean |component|)", relative, "%", limits.force_mae_relative),
    ]
    if parity.stress is not None:
        checks.append(limited("stress error (MAE)", parity.stress.mae, "meV/A^3", limits.stress_mae))
    return checks


def consistency_checks(found: Consistency, dtype: str) -> list[Check]:
    """Judge symmetry and derivatives with tolerances for the precision of the deployed file."""
    scale = max(found.largest_force, 1000.0)
    rounding, derivative = ROUNDING[dtype] * scale, DERIVATIVE[dtype] * scale
    reason = f"{dtype}; relative to the largest force of the tested structure ({scale:.0f} meV/A or more)."
    checks = [
        limited(
            "symmetry: rotation, permutation, translation",
            found.proper_symmetry,
            "meV/A",
            Limit(good=rounding, bad=10 * rounding, reason=f"Largest deviation of a force. {reason}"),
        ),
        limited("symmetry: inversion", found.inversion, "meV/A", _inversion_limit(found, rounding)),
        limited(
            "forces are the gradient of the energy",
            found.derivative_forces,
            "meV/A",
            Limit(good=derivative, bad=5 * derivative, reason=f"Finite differences. {reason}"),
        ),
    ]
    if found.derivative_stress is not None:
        tolerance = STRESS_DERIVATIVE[dtype] * max(found.largest_stress or 0.0, 10.0)
        limit = Limit(good=tolerance, bad=5 * tolerance, reason="Finite differences of the strain.")
        name = "stress is the strain derivative of the energy"
        checks.append(limited(name, found.derivative_stress, "meV/A^3", limit))
    return checks


def _inversion_limit(found: Consistency, rounding: float) -> Limit:
    """Rounding, or what the teacher itself does if that is more."""
    own = found.teacher_inversion.forces if found.teacher_inversion else 0.0
    if own <= rounding:
        return Limit(good=rounding, bad=10 * rounding, reason="Largest deviation of a force.")
    return Limit(
        good=2 * own,
        bad=5 * own,
        reason=f"The teacher is not symmetric under inversion (it deviates by {own:.2g} meV/A), like all "
        "models that are equivariant under rotations only; this one should not be much worse.",
    )


def nve_checks(run: NVESummary, limits: Thresholds) -> list[Check]:
    """Judge energy conservation."""
    name = "energy drift (NVE)"
    if not run.stable:
        return [Check(name=name, verdict="fail", value=None, unit="meV/atom/ps", reason=run.reason)]
    if run.drift is None:
        return [Check(name=name, verdict="warn", value=None, unit="meV/atom/ps", reason=run.reason)]
    limit, drift = limits.nve_drift, run.drift
    return [
        Check(
            name=name,
            verdict=limit.judge_size(drift.slope, drift.slope_error),
            value=drift.slope,
            error=drift.slope_error,
            unit="meV/atom/ps",
            good=limit.good,
            bad=limit.bad,
            reason=limit.reason,
        ),
        limited("energy fluctuation (NVE)", drift.fluctuation_ratio, "of kinetic", limits.nve_fluctuation),
    ]


def short_range_checks(found: Sequence[Approach], temperature_K: float, limits: Thresholds) -> list[Check]:
    """Judge what keeps atoms apart, by the pair with the lowest barrier; nothing without pairs."""
    if not found:
        return []
    worst = min(found, key=lambda a: a.barrier)
    safe = safe_temperature(worst.barrier)
    text = (
        f"{worst.pair}: {worst.barrier:.2g} eV, enough up to about {safe:.0f} K. {limits.short_range.reason}"
    )
    if worst.hole is not None:
        text = f"The energy of {worst.pair} falls below {worst.hole:.2f} A. {text}"
        if worst.teacher_hole is not None:
            text += f" The teacher has such a hole too, behind {worst.teacher_barrier:.2g} eV."
    limit = limits.short_range.model_copy(update={"reason": text})
    value = temperature_K / safe if safe > 0 else math.inf
    return [limited("atoms stay apart (temperature / highest safe one)", value, "", limit)]


def crystal_checks(found: CrystalComparison | None, limits: Thresholds) -> list[Check]:
    """Judge what the crystal is like at rest; nothing where there is no teacher's to compare with."""
    if found is None or not found.teacher.relaxed:
        return []
    model, teacher = found.model, found.teacher
    if not model.relaxed:
        reason = "The model's structure did not come to rest within the steps allowed; the teacher's did."
        return [Check(name="structure at rest", verdict="fail", value=None, unit="", reason=reason)]
    checks = [
        limited("volume at rest", found.volume_error, "%", limits.volume),
        limited("positions at rest", found.displacement, "A", limits.minimum),
        limited("bulk modulus", found.bulk_modulus_error, "%", limits.bulk_modulus),
        limited("elastic constants", found.elastic_error, "%", limits.elastic),
    ]
    if teacher.softest > 0 >= model.softest:
        reason = "An eigenvalue of the elastic constants is negative, and the teacher has none."
        name = "elastic stability"
        checks.append(
            Check(name=name, verdict="fail", value=model.softest, unit="GPa", good=0.0, reason=reason)
        )
    return checks


def phonon_checks(found: Phonons | None, limits: Thresholds) -> list[Check]:
    """Judge frequencies; nothing where they were not compared."""
    if found is None:
        return []
    relative = 100 * found.mean_error / found.teacher_highest
    allowed = min(IMAGINARY, 1.5 * found.teacher_lowest)
    reason = "The lowest frequency; imaginary ones are negative."
    if found.teacher_lowest < IMAGINARY:
        reason += f" The teacher has such modes as well, down to {found.teacher_lowest:.2f} THz."
    return [
        limited("phonon frequencies (mean error)", relative, "% of the highest", limits.phonons),
        Check(
            name="imaginary phonon modes",
            verdict="pass" if found.lowest >= allowed else "fail",
            value=found.lowest,
            unit="THz",
            reason=reason,
        ),
    ]


def structure_checks(found: Sequence[Distribution], limits: Thresholds) -> list[Check]:
    """Judge radial distribution functions; nothing where they were not compared."""
    if not found:
        return []
    worst = max(found, key=lambda d: d.excess)
    return [limited(f"radial distribution ({worst.pair})", worst.excess, "%", limits.structure)]


def cutoff_checks(found: CutoffStep | None, limits: Thresholds) -> list[Check]:
    """Judge whether energy and force are smooth where atoms come into reach of each other."""
    if found is None:
        return []
    where = f"at the cutoff ({found.pair}, {found.cutoff:g} A)"
    return [
        limited(f"step of the energy {where}", found.energy, "meV", limits.cutoff_energy),
        limited(f"step of the force {where}", found.force, "meV/A", limits.cutoff_force),
    ]


def engine_checks(found: Sequence[EngineParity], dtype: str) -> list[Check]:
    """Judge whether engines agree, by the one that differs most; nothing where only one was used."""
    if not found:
        return []
    worst = max(found, key=lambda e: e.unexplained)
    reason = worst.failure or (
        f"Largest difference of a force to ASE in {worst.engine}, {dtype}, beyond that of tables."
    )
    limit = Limit(good=ENGINE[dtype], bad=10 * ENGINE[dtype], reason=reason)
    return [limited("engines agree", worst.unexplained, "meV/A", limit)]


def limited(name: str, value: float, unit: str, limit: Limit) -> Check:
    """Return the check of a value for which small is good."""
    return Check(
        name=name,
        verdict=limit.judge(value),
        value=value if math.isfinite(value) else None,
        unit=unit,
        good=limit.good,
        bad=limit.bad,
        reason=limit.reason,
    )
