"""Figures of environments, short distances, phonons, radial distribution functions and motion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from compactmlip.validate.environment import EnvironmentErrors
from compactmlip.validate.motion import Displacements
from compactmlip.validate.phonons import Bands, Spectra
from compactmlip.validate.report.figures import INK, MARKERS, MODEL, PALETTE, TEACHER, render_svg, styled
from compactmlip.validate.short_range import Approach, Curve
from compactmlip.validate.structure import Functions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3
"""Panels beside each other."""

BROADENING = 0.015
"""Width of the Gaussians of the density of states, relative to the highest frequency."""


@styled
def approach_figure(curves: Sequence[Curve], summaries: Sequence[Approach]) -> str:
    """One panel for each pair of species: energies of model and teacher, on a scale linear up to 1 eV."""
    figure, panels = grid(len(curves))
    for axes, curve, summary in zip(panels, curves, summaries, strict=False):
        for name, colour in (("teacher", TEACHER), ("model", MODEL)):
            if name in curve.energies:
                axes.plot(curve.distances, curve.energies[name], color=colour, linewidth=1.3, label=name)
        if summary.hole is not None:
            top = np.interp(summary.hole, curve.distances[::-1], curve.energies["model"][::-1])
            axes.plot(summary.hole, top, "o", color=MODEL, markersize=7, markerfacecolor="none")
        axes.set_yscale("symlog", linthresh=1.0)
        axes.set_title(curve.pair, fontsize=10)
        axes.set_xlabel("distance (Å)")
    panels[0].set_ylabel("energy (eV)")
    panels[0].legend(loc="best")
    return render_svg(
        figure, "approach", "Energy against the distance of two atoms for each pair of species."
    )


@styled
def phonons_figure(spectra: Spectra) -> str:
    """Densities of states of model and teacher."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.6, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.grid(color=INK, alpha=0.12, linewidth=0.6)
    low = min(0.0, float(spectra.model.min()), float(spectra.teacher.min()))
    high = max(float(spectra.model.max()), float(spectra.teacher.max()))
    x = np.linspace(1.05 * low, 1.05 * high, 400)
    for found, colour, label in ((spectra.teacher, TEACHER, "teacher"), (spectra.model, MODEL, "model")):
        y = np.exp(-0.5 * ((x[:, None] - found.ravel()) / (BROADENING * high)) ** 2).sum(axis=1)
        axes.plot(x, y / y.max(), color=colour, linewidth=1.3, label=label)
    axes.set_xlabel("frequency (THz)")
    axes.set_yticks([])
    axes.legend(loc="upper left")
    return render_svg(figure, "phonons", "Phonon density of states of model and teacher.")


@styled
def bands_figure(bands: Bands) -> str:
    """Frequencies along lines of high symmetry, of both on the same wave vectors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.6, 3.2), layout="constrained")
    axes = figure.subplots()
    for table, colour, width, label in (
        (bands.teacher, TEACHER, 2.0, "teacher"),
        (bands.model, MODEL, 1.0, "model"),
    ):
        lines = axes.plot(bands.distances, table, color=colour, linewidth=width)
        lines[0].set_label(label)
    for tick, _ in bands.ticks:
        axes.axvline(tick, color=INK, alpha=0.25, linewidth=0.6)
    axes.axhline(0, color=INK, alpha=0.4, linewidth=0.6)
    names = [name.replace("G", "Γ") for _, name in bands.ticks]
    axes.set_xticks([tick for tick, _ in bands.ticks], names)
    axes.set_xlim(float(bands.distances[0]), float(bands.distances[-1]))
    axes.set_ylabel("frequency (THz)")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, borderaxespad=0.2)
    return render_svg(figure, "bands", "Phonon bands of model and teacher along lines of high symmetry.")


@styled
def environment_figure(rows: Sequence[EnvironmentErrors]) -> str:
    """Force errors against the number of neighbours, by species; large dots stand for many atoms."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.2, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.grid(color=INK, alpha=0.12, linewidth=0.6)
    kinds = sorted({row.species for row in rows})
    most = max(row.atoms for row in rows)
    for k, kind in enumerate(kinds):
        own = [row for row in rows if row.species == kind]
        # Beside each other where numbers of neighbours are equal.
        x = np.array([row.neighbors for row in own]) + 0.24 * ((k + 0.5) / len(kinds) - 0.5)
        y = np.array([row.forces for row in own])
        errors = [row.forces_error or 0.0 for row in own]
        colour, marker = PALETTE[k % len(PALETTE)], MARKERS[k // len(PALETTE) % len(MARKERS)]
        axes.errorbar(x, y, errors, fmt="none", ecolor=colour, elinewidth=0.9)
        sizes = 12 + 60 * np.sqrt(np.array([row.atoms for row in own]) / most)
        axes.scatter(x, y, s=sizes, color=colour, marker=marker, linewidths=0, label=kind)
    axes.set_xlabel("neighbours (effective coordination number)")
    axes.set_ylabel("force error (meV/Å)")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="best", ncols=1 + len(kinds) // 6)
    return render_svg(figure, "environment", "Force error by species and number of neighbours.")


@styled
def rdf_figure(functions: Functions) -> str:
    """One panel for each pair of species."""
    figure, panels = grid(len(functions.teacher))
    for axes, pair in zip(panels, functions.teacher, strict=False):
        axes.plot(functions.distances, functions.teacher[pair], color=TEACHER, linewidth=1.6, label="teacher")
        axes.plot(functions.distances, functions.model[pair], color=MODEL, linewidth=1.0, label="model")
        axes.set_title(pair, fontsize=10)
        axes.set_xlabel("distance (Å)")
    panels[0].set_ylabel("g(r)")
    panels[0].legend(loc="best")
    return render_svg(figure, "rdf", "Radial distribution functions of model and teacher.")


@styled
def motion_figure(displacements: Displacements) -> str:
    """One panel for each species: mean square displacement, both axes logarithmic."""
    figure, panels = grid(len(displacements.teacher))
    for axes, symbol in zip(panels, displacements.teacher, strict=False):
        for found, colour, label in (
            (displacements.teacher, TEACHER, "teacher"),
            (displacements.model, MODEL, "model"),
        ):
            axes.plot(displacements.times_ps, found[symbol], color=colour, linewidth=1.4, label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(symbol, fontsize=10)
        axes.set_xlabel("time (ps)")
    panels[0].set_ylabel("mean square displacement (Å²)")
    panels[0].legend(loc="best")
    return render_svg(figure, "motion", "Mean square displacement of each species in model and teacher.")


def grid(count: int) -> tuple[Figure, list[Axes]]:
    """Panels, ``count`` of them with axes."""
    from matplotlib.figure import Figure

    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(2.6 * columns + 0.6, 2.4 * rows + 0.3), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axes in panels[:count]:
        axes.grid(color=INK, alpha=0.12, linewidth=0.6)
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, panels
