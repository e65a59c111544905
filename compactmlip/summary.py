"""The table that ends ``quickstart`` and ``specialize``."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from compactmlip.validate.certificate import Certificate


def print_summary(certificate: Certificate, folder: Path) -> None:
    """Print the steps with their errors, then drift, speed and where the results are."""
    console = Console()
    console.print(_stages(certificate))
    for line in _lines(certificate, folder):
        console.print(line, highlight=False, soft_wrap=True)


def _number(value: float | None, form: str = ".1f") -> str:
    return "-" if value is None else format(value, form)


def _stages(certificate: Certificate) -> Table:
    title = "Held-out errors against the teacher (mean absolute)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    table.add_column("model", no_wrap=True)
    for column in ("parameters", "MB", "E meV/atom", "F meV/A", "S meV/A^3"):
        table.add_column(column, justify="right", min_width=min(10, len(column)))
    for row in certificate.stages:
        table.add_row(
            row.name,
            _number(row.parameters, ",d"),
            "-" if row.file_bytes is None else f"{row.file_bytes / 1e6:.2f}",
            _number(row.energy_mae, ".2f"),
            _number(row.forces_mae),
            _number(row.stress_mae, ".2f"),
        )
    file = certificate.model
    parity = certificate.parity
    table.add_row(
        f"deployed, {file.dtype}",
        f"{file.parameters:,d}",
        f"{file.bytes / 1e6:.2f}",
        _number(parity.energy.mae, ".2f"),
        _number(parity.forces.mae),
        "-" if parity.stress is None else _number(parity.stress.mae, ".2f"),
        style="bold",
    )
    return table


def _lines(certificate: Certificate, folder: Path) -> list[str]:
    run, drift = certificate.nve, certificate.nve.drift
    if drift is None:
        lines = [f"NVE drift   not known: {run.reason}"]
    else:
        lines = [
            f"NVE drift   {drift.slope:+.3f} +- {drift.slope_error:.3f} meV/atom/ps over "
            f"{run.steps * run.timestep_fs / 1000:.1f} ps (rms fluctuation {drift.fluctuation:.3f} meV/atom)"
        ]
    for speed in certificate.speed:
        ratio = speed.ratio()
        text = "" if ratio is None else f" ({ratio:.1f} times the teacher)"
        lines.append(
            f"speed       {speed.atoms_per_second['model']:,.0f} atoms/s at {speed.atoms} atoms{text}"
        )
    names = certificate.not_checked
    return [
        *lines,
        f"verdict     {certificate.verdict}" + (f" (not checked: {names})" if names else ""),
        f"licence     {certificate.teacher.licence} (the teacher's; it applies to the model as well)",
        f"model       {folder / 'model.pt'}",
        f"report      {folder / 'report.html'}",
    ]
