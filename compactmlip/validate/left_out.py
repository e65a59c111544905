"""What a validation did not check, and why: an absent verdict must not be taken for a good one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

ENGINES, LAMMPS, PLAIN = "engines agree", "engines agree: LAMMPS", "engines agree: plain PyTorch"
APART, IN_DYNAMICS, MOTION = "atoms stay apart", "radial distribution and vibration", "self-diffusion"
THERMOSTAT, LADDER, DENSITY = "temperature under a thermostat", "highest temperature", "density (NPT)"
AT_REST, PHONONS, DEFECTS = "structure at rest, elastic constants", "phonons", "vacancies and surfaces"
"""What is checked, where it is left out."""


class LeftOut(BaseModel):
    """One check without a verdict.

    Attributes
    ----------
    name
        What would have been checked.
    reason
        What hindered it, and the option that would help where there is one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    reason: str


def no_time(name: str, option: str, allowed: float, needed: float) -> LeftOut:
    """For a part that its budget does not allow.

    Parameters
    ----------
    option
        The name of the budget.
    allowed, needed
        Seconds.
    """
    if not allowed:
        return LeftOut(name=name, reason=f"Switched off ({option} is 0).")
    reason = f"It needs about {needed:.0f} s on this machine, and {option} allows {allowed:.3g}."
    return LeftOut(name=name, reason=reason)


def unstable(name: str) -> LeftOut:
    """For a part that needs dynamics, of a model whose dynamics broke."""
    return LeftOut(name=name, reason="Dynamics at constant energy was not stable.")


def _short_thermostat(found: Any) -> str:
    return f"{found.steps} steps hold {found.effective:.1f} independent energies, too few (nvt_seconds)."


def _density(found: Any) -> str:
    return f"The teacher's run ended: {found.teacher.failure}"


def _short_ladder(found: Any) -> str:
    held = f"{found.highest:.0f} K was held" if found.highest else "nothing was held"
    return f"{held} when the time was over (ladder_seconds)."


def _at_rest(found: Any) -> str:
    if found.teacher.relaxed:
        return ""
    return "The teacher's structure did not come to rest within the steps allowed (a liquid's hardly does)."


def _sampling(found: Any) -> str:
    return f"The teacher's own run ended: {found.teacher_failure}" if found.teacher_failure else ""


UNJUDGED: dict[str, tuple[str, Callable[[Any], str]]] = {
    "crystal": (AT_REST, _at_rest),
    "sampling": (IN_DYNAMICS, _sampling),
    "thermostat": (THERMOSTAT, _short_thermostat),
    "density": (DENSITY, _density),
    "ladder": (LADDER, _short_ladder),
    "defects": (DEFECTS, lambda _: "The teacher's own energies are not positive."),
}
"""Results that may be there without allowing a verdict: their names, and why (empty: another check says)."""


def unjudged(measured: Mapping[str, Any], judged: Mapping[str, Sequence[object]]) -> tuple[LeftOut, ...]:
    """Say why there is no verdict on what was measured.

    Parameters
    ----------
    measured
        Results by name; None or empty where there are none.
    judged
        By name, the verdicts that follow from them.
    """
    found = []
    for key, (name, why) in UNJUDGED.items():
        if measured[key] and not judged[key] and (reason := why(measured[key])):
            found.append(LeftOut(name=name, reason=reason))
    return tuple(found)
