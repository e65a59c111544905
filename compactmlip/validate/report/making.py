"""Figures of how a model was made: importance of channels, and the front of a search."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from compactmlip.compress.scores_plot import output_groups
from compactmlip.compress.tapped import Scores
from compactmlip.validate.making import Front
from compactmlip.validate.report.figures import INK, MODEL, PALETTE, TEACHER, render_svg, styled
from compactmlip.validate.report.physics import grid

SMALLEST = 1e-6
"""Scores below this share of the largest are drawn there."""


@styled
def importance_figure(scores: Scores, kept: Mapping[str, int], criterion: str) -> str:
    """One panel for each layer: scores by rank and order, and a mark where the model was cut."""
    panels = {title: groups for title, groups in output_groups(scores).items() if title != "embedding"}
    largest = max(float(scores[name].max()) for groups in panels.values() for name in groups.values()) or 1.0
    figure, axes = grid(len(panels))
    for axis, (title, groups) in zip(axes, panels.items(), strict=False):
        for order, name in groups.items():
            values = np.maximum(np.sort(scores[name])[::-1] / largest, SMALLEST)
            colour = PALETTE[order % len(PALETTE)]
            axis.plot(
                np.arange(1, len(values) + 1), values, color=colour, linewidth=1.4, label=f"l = {order}"
            )
            if 0 < (count := kept.get(name, 0)) < len(values):
                axis.plot(count, values[count - 1], "o", color=colour, markersize=5)
        axis.set_yscale("log")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("channel, by rank")
    axes[0].set_ylabel(f"{criterion} score")
    axes[0].legend(loc="best")
    return render_svg(figure, "importance", "Importance of the teacher's channels by layer and order.")


@styled
def front_figure(found: Front, own: tuple[float, float] | None) -> str:
    """Errors of all candidates of a search against their speed, the front, the chosen one, and this model.

    Parameters
    ----------
    own
        Speed over the teacher's and force error (meV/Angstrom) of this model, if both are known.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.grid(color=INK, alpha=0.12, linewidth=0.6)
    points = np.array([(1 / c.relative_time, c.force_mae_meV_per_A) for c in found.candidates]).reshape(-1, 2)
    axes.plot(*points.T, "o", color=INK, alpha=0.35, markersize=3, linewidth=0, label="candidates")
    best = sorted((1 / c.relative_time, c.force_mae_meV_per_A) for c in found.front)
    axes.step(*zip(*best, strict=True), color=TEACHER, linewidth=1.2, where="pre", label="front")
    chosen = found.chosen
    axes.plot(
        1 / chosen.relative_time,
        chosen.force_mae_meV_per_A,
        "*",
        color=TEACHER,
        markersize=12,
        label="chosen",
    )
    if own is not None:
        axes.plot(*own, "D", color=MODEL, markersize=7, label="this file")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("speed over the teacher's")
    axes.set_ylabel("force error (meV/Å)")
    axes.legend(loc="best")
    return render_svg(figure, "front", "Force error against speed of all candidates of the search.")
