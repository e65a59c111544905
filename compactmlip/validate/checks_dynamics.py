"""Verdicts on dynamics beyond energy conservation, and on defects."""

from __future__ import annotations

import math
from collections.abc import Sequence

from compactmlip.validate.checks import Check, Thresholds, limited
from compactmlip.validate.defects import Defect
from compactmlip.validate.density import DensityComparison
from compactmlip.validate.ensemble import LARGEST_SPREAD, Sampling
from compactmlip.validate.ladder import Ladder
from compactmlip.validate.motion import MotionComparison
from compactmlip.validate.thermostat import KineticEnergy
from compactmlip.validate.vibration import Vibration


def thermostat_checks(found: KineticEnergy | None, limits: Thresholds) -> list[Check]:
    """Judge whether dynamics with a thermostat is canonical; nothing where the run was too short."""
    if found is None:
        return []
    name = "temperature under a thermostat"
    if found.failure:
        return [Check(name=name, verdict="fail", value=None, unit="%", reason=found.failure)]
    if not found.enough:
        return []
    return [
        limited(name, found.mean_excess, "%", limits.thermostat_mean),
        limited("fluctuation of the kinetic energy", found.variance_excess, "%", limits.thermostat_variance),
    ]


def motion_checks(found: Sequence[MotionComparison], limits: Thresholds) -> list[Check]:
    """Judge diffusion, by the species that differs most."""
    checks = []
    for row in found:
        if row.compared == "kind":
            reason = f"{row.species} {row.model.kind} in the model and {row.teacher.kind} in the teacher."
            checks.append(
                Check(name=f"motion of {row.species}", verdict="fail", value=None, unit="", reason=reason)
            )
    rows = [row for row in found if row.compared == "diffusion"]
    if rows:
        worst = max(rows, key=lambda row: row.difference.excess(0.0))
        name = f"self-diffusion ({worst.species})"
        checks.append(limited(name, worst.difference.excess(0.0), "%", limits.diffusion))
    return checks


def sampling_checks(found: Sampling | None) -> list[Check]:
    """Judge the model's runs: whether they came to their end, in states of which the teacher thinks as well.

    Nothing where the teacher's own runs failed.
    """
    if found is None or found.teacher_failure:
        return []
    if found.model_failure:
        name, reason = "stability with a thermostat", found.model_failure
        if found.method == "runs":
            reason += " The teacher's run from the same state did not."
        return [Check(name=name, verdict="fail", value=None, unit="", reason=reason)]
    if found.comparable:
        return []
    reason = (
        f"Energies of model and teacher differ by {found.spread:.1f} kB T from state to state of the model's "
        f"runs ({found.atoms} atoms), too much to say what the teacher's would be like."
    )
    name = "states of the model in the teacher's eyes"
    value = found.spread if found.spread is not None and math.isfinite(found.spread) else None
    return [
        Check(name=name, verdict="warn", value=value, unit="kB T", good=LARGEST_SPREAD, reason=reason),
    ]


def vibration_checks(found: Sequence[Vibration], limits: Thresholds) -> list[Check]:
    """Judge how far atoms move from their sites, by the species that differs most; nothing without any."""
    if not found:
        return []
    worst = max(found, key=lambda row: row.excess)
    return [limited(f"vibration amplitude ({worst.species})", worst.excess, "%", limits.amplitude)]


def ladder_checks(found: Ladder | None, temperature_K: float, limits: Thresholds) -> list[Check]:
    """Judge the highest temperature that the model held; nothing where time was too short for a rung."""
    if found is None or not found.model:
        return []
    last = found.model[-1]
    if not last.failure and found.highest * limits.ladder.good < temperature_K:
        return []  # time ended, not the model
    text = (
        f"Broke at {last.temperature_K:.0f} K: {last.failure}"
        if last.failure
        else f"Held {last.temperature_K:.0f} K."
    )
    if found.teacher:
        text += f" The teacher held {found.teacher_highest:.0f} K."
    limit = limits.ladder.model_copy(update={"reason": f"{text} {limits.ladder.reason}"})
    value = temperature_K / found.highest if found.highest > 0 else math.inf
    return [limited("temperature / highest one held", value, "", limit)]


def density_checks(found: DensityComparison | None, limits: Thresholds) -> list[Check]:
    """Judge the density at constant pressure; nothing where it was not compared or the teacher's failed."""
    if found is None or found.teacher.failure:
        return []
    if found.model.failure:
        reason = f"{found.model.failure} The teacher's run did not."
        return [Check(name="density (NPT)", verdict="fail", value=None, unit="%", reason=reason)]
    return [limited("density (NPT)", found.difference.excess(0.0), "%", limits.density)]


def defect_checks(found: Sequence[Defect], limits: Thresholds) -> list[Check]:
    """Judge vacancies and surfaces, by the energy that differs most; nothing where there are none."""
    known = [defect for defect in found if defect.teacher > 0]
    if not known:
        return []
    worst = max(known, key=lambda defect: defect.error)
    return [limited(f"energy of a defect ({worst.name})", worst.error, "%", limits.defects)]
