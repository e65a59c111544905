"""Figures of the report as inline SVG.

Axes and text are drawn in a marker colour that becomes ``currentColor``, so that they follow the page into
dark mode and print; data colours are mid-tones with contrast on white and on black.  Clouds of points are
embedded as one image each, which keeps the file small.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np
from ase import Atoms

from compactmlip.validate.nve import TRANSIENT_FRACTION, NVESummary, Trace
from compactmlip.validate.parity import MILLI, Array, Labels
from compactmlip.validate.report.formats import plus_minus
from compactmlip.validate.speed import Speed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")

INK = "#123457"
"""Stands for the text colour of the page; replaced in the SVG."""

MODEL, TEACHER = "#3b82d6", "#d97a1e"
PALETTE = ("#3b82d6", "#d97a1e", "#22a06b", "#c2528b", "#8b6fd8", "#b58a0a", "#1c9aa8", "#d2553f")
"""Colours of the species in order; beyond eight the marker changes."""

MARKERS = "os^Dv"
GPA = 160.21766208
"""GPa per eV/Angstrom^3."""

MAX_POINTS = 2000
"""Points of an energy trace that are drawn; longer ones are thinned."""

STYLE = {
    "font.family": "sans-serif",
    "font.size": 10.0,
    "svg.fonttype": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "savefig.dpi": 200,
}


def styled(draw: Callable[P, str]) -> Callable[P, str]:
    """Draw with the report's style, which does not leak into the caller's matplotlib."""

    @functools.wraps(draw)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> str:
        from matplotlib import rc_context

        style: Any = STYLE  # newer matplotlib types the keys
        with rc_context(style):
            return draw(*args, **kwargs)

    return wrapped


@styled
def energy_figure(frames: Sequence[Atoms], reference: Labels, predicted: Labels) -> str:
    """Energy per atom, model against reference, and the error below."""
    sizes = np.array([len(a) for a in frames])
    true, found = reference.energies / sizes * MILLI, predicted.energies / sizes * MILLI
    zero = true.mean()
    return _parity_figure(
        "energy",
        [("", true - zero, found - zero)],
        ("reference energy − mean (meV/atom)", "model (meV/atom)", "error (meV/atom)"),
        1.0,
        f"Energy per atom of {len(frames)} held-out structures, model against reference.",
    )


@styled
def forces_figure(frames: Sequence[Atoms], reference: Labels, predicted: Labels) -> str:
    """Force components by species, model against reference, and the error below."""
    symbols = np.array([s for a in frames for s in a.get_chemical_symbols()])
    true, found = np.concatenate(reference.forces), np.concatenate(predicted.forces)
    groups = [(str(s), true[symbols == s].ravel(), found[symbols == s].ravel()) for s in sorted(set(symbols))]
    return _parity_figure(
        "forces",
        groups,
        ("reference force (eV/Å)", "model (eV/Å)", "error (meV/Å)"),
        MILLI,
        f"Force components of {len(symbols)} atoms by species, model against reference.",
    )


@styled
def stress_figure(reference: Labels, predicted: Labels) -> str:
    """Stress components in GPa, model against reference, and the error below."""
    known = np.isfinite(reference.stresses).all(axis=1)
    true, found = reference.stresses[known] * GPA, predicted.stresses[known] * GPA
    groups = [
        ("xx, yy, zz", true[:, :3].ravel(), found[:, :3].ravel()),
        ("yz, xz, xy", true[:, 3:].ravel(), found[:, 3:].ravel()),
    ]
    return _parity_figure(
        "stress",
        groups,
        ("reference stress (GPa)", "model (GPa)", "error (GPa)"),
        1.0,
        f"Stress components of {int(known.sum())} held-out structures, model against reference.",
    )


@styled
def nve_figure(
    trace: Trace, summary: NVESummary, teacher: Trace | None, teacher_summary: NVESummary | None
) -> str:
    """Change of the total energy, fitted trend, and temperature, of model and teacher."""
    figure, (top, bottom) = make_panels((6.6, 4.1), (2, 1.25))
    start = round(TRANSIENT_FRACTION * len(trace.time_ps))
    if len(trace.time_ps):
        per_atom = (trace.total - trace.total[start:].mean()) / summary.atoms * MILLI
        draw_line(top, trace.time_ps, per_atom, MODEL, "model", 0.9)
        draw_line(bottom, trace.time_ps, trace.temperature_K, MODEL, "model", 0.9)
    if teacher is not None and teacher_summary is not None:
        shift = teacher.total - teacher.total.mean()
        draw_line(top, teacher.time_ps, shift / teacher_summary.atoms * MILLI, TEACHER, "teacher", 1.2)
        draw_line(bottom, teacher.time_ps, teacher.temperature_K, TEACHER, "teacher", 1.2)
    if summary.drift is not None:
        times = trace.time_ps[start:]
        trend = summary.drift.slope * (times - times.mean())
        label = f"trend {plus_minus(summary.drift.slope, summary.drift.slope_error)} meV/atom/ps"
        top.plot(times[[0, -1]], trend[[0, -1]], color=INK, linewidth=1.2, linestyle=(0, (5, 2)), label=label)
        top.axvspan(0, times[0], color=INK, alpha=0.08, linewidth=0)
    top.set_ylabel("total energy − mean\n(meV/atom)")
    bottom.set_ylabel("temperature (K)")
    bottom.set_xlabel("time (ps)")
    if top.get_legend_handles_labels()[0]:
        top.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, borderaxespad=0.2)
    title = f"Total energy per atom and temperature over {summary.steps} steps without thermostat."
    return render_svg(figure, "nve", title)


@styled
def speed_figure(rows: Sequence[Speed]) -> str:
    """Atoms per second of model and teacher for each size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 0.7 + 0.66 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    fastest = max(speed for row in rows for speed in row.atoms_per_second.values())
    for k, row in enumerate(rows):
        for name, offset, colour in (("model", -0.19, MODEL), ("teacher", 0.19, TEACHER)):
            if name not in row.atoms_per_second:
                axes.text(0, k + offset, f" {name}: not measured (too slow)", va="center", fontsize=9)
                continue
            speed = row.atoms_per_second[name]
            axes.barh(k + offset, speed, height=0.34, color=colour)
            axes.text(speed + 0.01 * fastest, k + offset, f"{name} {speed:,.0f}", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [f"{row.atoms} atoms" for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.42 * fastest)
    axes.set_xlabel("energies and forces (atoms/s)")
    return render_svg(figure, "speed", "Atoms per second of model and teacher by system size.")


def _parity_figure(
    name: str,
    groups: Sequence[tuple[str, Array, Array]],
    labels: tuple[str, str, str],
    error_factor: float,
    title: str,
) -> str:
    """Parity above, error below on the same x axis; groups are (label, reference, predicted)."""
    figure, (top, bottom) = make_panels((4.2, 4.6), (3, 1.2))
    both = np.concatenate([np.concatenate((x, y[np.isfinite(y)])) for _, x, y in groups])
    low, high = float(both.min()), float(both.max())
    margin = 0.05 * (high - low) or 1.0
    ends = (low - margin, high + margin)
    top.plot(ends, ends, color=INK, linewidth=0.8, alpha=0.6)
    bottom.axhline(0, color=INK, linewidth=0.8, alpha=0.6)
    dots = 14.0 if sum(len(x) for _, x, _ in groups) < 200 else 5.0
    for k, (label, x, y) in enumerate(groups):
        style: dict[str, Any] = {
            "s": dots,
            "color": PALETTE[k % len(PALETTE)],
            "marker": MARKERS[k // len(PALETTE) % len(MARKERS)],
            "alpha": 0.65,
            "linewidths": 0,
            "rasterized": True,
        }
        top.scatter(x, y, label=label, **style)
        bottom.scatter(x, (y - x) * error_factor, **style)
    top.set_xlim(ends)
    top.set_ylim(ends)
    largest = max(float(np.nanmax(np.abs(y - x), initial=0.0)) for _, x, y in groups) * error_factor
    bottom.set_ylim(-1.1 * largest or -1.0, 1.1 * largest or 1.0)
    bottom.set_xlabel(labels[0])
    top.set_ylabel(labels[1])
    bottom.set_ylabel(labels[2])
    if any(label for label, _, _ in groups):
        top.legend(loc="upper left", markerscale=1.8, handletextpad=0.2, ncols=1 + len(groups) // 6)
    return render_svg(figure, name, title)


def make_panels(size: tuple[float, float], heights: tuple[float, float]) -> tuple[Figure, tuple[Axes, Axes]]:
    """Two axes above each other that share x."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": heights})
    for axes in (top, bottom):
        axes.grid(color=INK, alpha=0.12, linewidth=0.6)
    figure.align_ylabels([top, bottom])
    return figure, (top, bottom)


def draw_line(axes: Axes, x: Array, y: Array, colour: str, label: str, width: float) -> None:
    """Draw a line, thinned where it has more points than can be seen."""
    stride = max(1, -(-len(x) // MAX_POINTS))
    axes.plot(x[::stride], y[::stride], color=colour, linewidth=width, label=label)


def render_svg(figure: Figure, name: str, title: str) -> str:
    """Render, with unique ids, the page's ink, and a description for screen readers."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": f"compactmlip-{name}"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'(<g) id="[^"]*"', r"\1", text)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family:[^;\"]*;?", "", text)
    text = text.replace(INK, "currentColor")
    head = f'<svg role="img" aria-label="{escape(title, quote=True)}" class="figure-{name}"'
    text = re.sub(r'<svg\b([^>]*?) width="[^"]*"', head + r"\1", text, count=1)
    text = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text
