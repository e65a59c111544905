"""The report: one HTML file that needs nothing but itself."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

from compactmlip.validate.certificate import Certificate, Stage
from compactmlip.validate.checks import Check
from compactmlip.validate.nve import Drift
from compactmlip.validate.report import figures
from compactmlip.validate.report.formats import (
    NONE,
    file_size,
    integer,
    limit,
    number,
    plus_minus,
    pretty_unit,
    r_squared,
    signed,
    times,
)
from compactmlip.validate.report.making import front_figure, importance_figure
from compactmlip.validate.report.physics import (
    approach_figure,
    bands_figure,
    environment_figure,
    motion_figure,
    phonons_figure,
    rdf_figure,
)

if TYPE_CHECKING:
    from compactmlip.validate.output import ValidationData


ELASTIC_SHOWN = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2), (3, 3), (4, 4), (5, 5))
"""Elastic constants in the table; the certificate has all."""

OWN_LABELS = 1.0
"""meV/Angstrom and meV/atom; labels that the teacher reproduces better than this were made by it."""


def build_report(certificate: Certificate, data: ValidationData) -> str:
    """Return the report as HTML text with styles and figures inside and no external reference."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    package = resources.files(__package__)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters.update(
        num=number,
        limit=limit,
        signed=signed,
        int_=integer,
        size=file_size,
        r2=r_squared,
        times=times,
        unit=pretty_unit,
        plus_minus=plus_minus,
    )
    template = environment.from_string(package.joinpath("report.html.j2").read_text(encoding="utf-8"))
    drawn = {name: Markup(svg) if svg else "" for name, svg in _figures(certificate, data).items()}
    further = environment.from_string(package.joinpath("dynamics.html.j2").read_text(encoding="utf-8"))
    made = environment.from_string(package.joinpath("making.html.j2").read_text(encoding="utf-8"))
    criterion = data.making.criterion if data.making else ""
    return template.render(
        c=certificate,
        dynamics=Markup(further.render(c=certificate, figures=drawn)),
        making=Markup(made.render(figures=drawn, criterion=criterion)) if data.making else "",
        css=Markup(package.joinpath("report.css").read_text(encoding="utf-8")),
        figures=drawn,
        summary=_summary(certificate),
        checks=_worst_first(certificate),
        headline=_headline(certificate),
        rows=_stage_rows(certificate),
        crystal_rows=_crystal_rows(certificate),
        heldout_text=_heldout_text(certificate),
        nve_text=_nve_text(certificate),
        limits=_limits(certificate),
        compare_teacher=certificate.teacher_parity is not None and not _is_teachers(certificate),
    )


def _figures(c: Certificate, data: ValidationData) -> dict[str, str]:
    has_stress, making = c.parity.stress is not None, data.making
    return {
        "energy": figures.energy_figure(data.frames, data.reference, data.predicted),
        "forces": figures.forces_figure(data.frames, data.reference, data.predicted),
        "stress": figures.stress_figure(data.reference, data.predicted) if has_stress else "",
        "nve": figures.nve_figure(data.trace, c.nve, data.teacher_trace, c.teacher_nve)
        if c.nve.steps
        else "",
        "rdf": rdf_figure(data.functions) if data.functions else "",
        "motion": motion_figure(data.displacements) if data.displacements else "",
        "phonons": phonons_figure(data.spectra) if data.spectra else "",
        "bands": bands_figure(data.spectra.bands) if data.spectra and data.spectra.bands else "",
        "environment": environment_figure(c.environments) if c.environments else "",
        "importance": importance_figure(making.scores, making.kept, making.criterion)
        if making and making.scores
        else "",
        "front": front_figure(making.front, _own_point(c)) if making and making.front else "",
        "short_range": approach_figure(data.curves, c.short_range) if data.curves else "",
        "speed": figures.speed_figure(c.speed) if c.speed else "",
    }


def _own_point(c: Certificate) -> tuple[float, float] | None:
    """Speed over the teacher's on the largest structure that both did, and force error."""
    ratios = [(row.atoms, ratio) for row in c.speed if (ratio := row.ratio()) is not None]
    return (max(ratios)[1], c.parity.forces.mae) if ratios else None


ADVICE = {
    "pass": "As far as it was checked, this file can stand in for its teacher.",
    "warn": "This file can stand in for its teacher, but be careful with what the warnings are about:",
    "fail": "Do not use this file for what failed, nor for anything before you know why it failed:",
}
"""What a person should do, before any number."""

SEVERITY = ("pass", "warn", "fail")


def _summary(c: Certificate) -> str:
    counts = {v: sum(check.verdict == v for check in c.checks) for v in ("pass", "warn", "fail")}
    parts = [f"{counts['pass']} of {len(c.checks)} checks passed"]
    parts += [f"{counts['warn']} with a warning"] if counts["warn"] else []
    parts += [f"{counts['fail']} failed"] if counts["fail"] else []
    names = c.not_checked
    open_ = f"Not checked, for reasons listed below the verdicts: {names}. " if names else ""
    return ", ".join(parts) + ". " + open_ + ADVICE[c.verdict]


def _worst_first(c: Certificate) -> list[Check]:
    return sorted(c.checks, key=lambda check: -SEVERITY.index(check.verdict))


def _headline(c: Certificate) -> list[tuple[str, str, str]]:
    """The five numbers that people look for first."""
    ratios = [(row.ratio(), row.atoms) for row in c.speed]
    known = [(ratio, atoms) for ratio, atoms in ratios if ratio is not None]
    ratio, atoms = max(known, key=lambda r: r[1]) if known else (None, 0)
    drift = c.nve.drift
    slope, _, error = plus_minus(drift.slope, drift.slope_error).partition(" ± ") if drift else ("", "", "")
    return [
        ("speed-up", times(ratio), f"at {atoms} atoms" if known else "not measured"),
        ("parameters", times(c.teacher.parameters / max(c.model.parameters, 1)), "fewer"),
        ("energy MAE", number(c.parity.energy.mae), "meV/atom"),
        ("force MAE", number(c.parity.forces.mae), "meV/Å"),
        (
            "NVE drift",
            slope or NONE,
            f"± {error} meV/atom/ps" if drift else c.nve.reason,
        ),
    ]


def _stage_rows(c: Certificate) -> list[Stage]:
    teacher, model, parity = c.teacher, c.model, c.parity
    own = c.teacher_parity
    first = Stage(
        name="teacher",
        parameters=teacher.parameters,
        file_bytes=teacher.bytes,
        energy_mae=own.energy.mae if own else None,
        forces_mae=own.forces.mae if own else None,
        stress_mae=own.stress.mae if own and own.stress else None,
        note=f"against the labels, on {own.frames} of the structures" if own else "the reference",
    )
    last = Stage(
        name=f"this file ({model.file})",
        parameters=model.parameters,
        file_bytes=model.bytes,
        energy_mae=parity.energy.mae,
        forces_mae=parity.forces.mae,
        stress_mae=parity.stress.mae if parity.stress else None,
    )
    return [*(c.stages or [first]), last]


def _crystal_rows(c: Certificate) -> list[tuple[str, str, float, float]]:
    """Quantity, unit, model, teacher."""
    if c.crystal is None:
        return []
    model, teacher = c.crystal.model, c.crystal.teacher
    rows = [
        ("energy", "eV/atom", model.energy, teacher.energy),
        ("volume", "A^3/atom", model.volume, teacher.volume),
        ("bulk modulus", "GPa", model.bulk_modulus, teacher.bulk_modulus),
        ("its pressure derivative", "", model.pressure_derivative, teacher.pressure_derivative),
    ]
    for i, j in ELASTIC_SHOWN:
        rows.append((f"C{i + 1}{j + 1}", "GPa", model.elastic[i][j], teacher.elastic[i][j]))
    return [*rows, ("softest elastic mode", "GPa", model.softest, teacher.softest)]


def _heldout_text(c: Certificate) -> str:
    if c.heldout.origin == "sampled":
        return (
            f"{c.parity.frames} structures were sampled from the given ones with their own seed "
            f"({c.heldout.seed}), independent of the sampling of training data, and labelled by the teacher."
        )
    text = (
        f"{c.parity.frames} labelled structures were given; their labels are the reference. "
        "Whether the model was trained on them is not known here."
    )
    if _is_teachers(c) and c.teacher_parity is not None:
        error = number(c.teacher_parity.forces.mae, 2)
        text += f" The labels are the teacher's own: it reproduces their forces to {error} meV/Å."
    return text


def _is_teachers(c: Certificate) -> bool:
    """Whether the reference is the teacher, also if it came in as labels."""
    own = c.teacher_parity
    if own is None:
        return c.heldout.reference == "teacher"
    return own.forces.maximum < OWN_LABELS and own.energy.maximum < OWN_LABELS


def _nve_text(c: Certificate) -> str:
    run = c.nve
    if not run.stable:
        return f"The run was not stable: {run.reason}"
    text = (
        f"{run.atoms} atoms, {run.steps:,} steps of {number(run.timestep_fs)} fs, mean temperature "
        f"{run.mean_temperature_K:.0f} K. "
    )
    if run.drift:
        text += (
            f"The total energy drifts by {_drift(run.drift)} "
            f"and fluctuates by {number(run.drift.fluctuation)} meV/atom (RMS) around the trend. "
        )
    else:
        text += f"No drift is given: {run.reason} "
    own = c.teacher_nve
    if own is None:
        return text + "The teacher was not simulated: too slow for its time budget, or switched off."
    text += (
        "The teacher starts from the same positions and velocities and did "
        f"{own.steps:,} steps in its time budget"
    )
    if own.drift:
        return f"{text}; it drifts by {_drift(own.drift)}."
    return text + (": too few for a drift." if own.stable else f" and was not stable: {own.reason}")


def _drift(drift: Drift) -> str:
    return f"{plus_minus(drift.slope, drift.slope_error)} meV/atom/ps"


def _limits(c: Certificate) -> list[str]:
    """What a reader must not conclude."""
    lines = []
    if c.heldout.species_not_seen:
        missing = ", ".join(c.heldout.species_not_seen)
        lines.append(f"The model covers {missing}, which the held-out structures do not contain.")
    if _is_teachers(c):
        lines.append(
            "Errors are relative to the teacher, whose own error against DFT or experiment comes on top."
        )
    lines.append(
        "Nothing is known about what the held-out structures do not contain: other phases, surfaces, defects "
        "or compositions need their own validation."
    )
    lines.append(
        f"{c.nve.steps * c.nve.timestep_fs / 1000:.2g} ps at {c.nve.mean_temperature_K:.0f} K test energy "
        "conservation, not stability over nanoseconds."
        if c.nve.stable
        else "Nothing can be said about dynamics: the run was not stable."
    )
    if c.machine.load_average is not None and c.machine.load_average > 0.5 * c.machine.cores:
        lines.append(
            "Other processes were using the machine: absolute speeds may be too low. The ratio suffers less."
        )
    return lines
