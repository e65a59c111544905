"""Picture of scores: one panel per layer, one line per order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from compactmlip.checkpoint import atomic_write
from compactmlip.compress.tapped import Scores


def plot_scores(path: str | Path, scores: Scores, title: str, relevance: list[float] | None = None) -> Path:
    """Write sorted scores of the layers' outputs, and the relevance of layers if it is given.

    The kind of file follows from the name (``.png``, ``.svg``, ``.pdf``).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    panels = output_groups(scores)
    count = len(panels) + (relevance is not None)
    figure = Figure(figsize=(2.6 * max(count, 2), 2.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis, (layer, groups) in zip(axes, panels.items(), strict=False):
        for order, name in groups.items():
            _curve(axis, np.sort(scores[name])[::-1], f"l = {order}")
        axis.set_title(layer, fontsize=9)
        axis.set_xlabel("channel, by rank", fontsize=8)
    axes[0].set_ylabel(title, fontsize=8)
    axes[0].legend(fontsize=7)
    if relevance is not None:
        axes[-1].bar(range(len(relevance)), relevance)
        axes[-1].set_title("relevance of layers", fontsize=9)
        axes[-1].set_xlabel("layer", fontsize=8)
    kind = path.suffix[1:] or "png"
    atomic_write(path, lambda p: figure.savefig(p, format=kind, dpi=120))
    return path


def output_groups(scores: Scores) -> dict[str, dict[int, str]]:
    """Groups of the layers' outputs (and of the embedding), by panel and order."""
    panels: dict[str, dict[int, str]] = {}
    for name in scores:
        space, _, order = name.rpartition("/")
        if space == "embedding" or (space.startswith("layers.") and space.endswith(".out")):
            title = space.removesuffix(".out").replace("layers.", "layer ")
            panels.setdefault(title, {})[int(order)] = name
    return panels


def _curve(axis: Any, values: Any, label: str) -> None:
    axis.plot(np.arange(1, len(values) + 1), np.maximum(values, 1e-12), label=label)
    axis.set_yscale("log")
    axis.tick_params(labelsize=7)
