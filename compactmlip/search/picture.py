"""Picture of a search: errors against speed, the front, and what was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compactmlip.checkpoint import atomic_write
from compactmlip.search.study import PROPOSED, Candidate, front


def plot_front(
    path: str | Path, candidates: Sequence[Candidate], chosen: Candidate | None, limit: float | None = None
) -> Path:
    """Write the picture; the kind of file follows from the name.

    Parameters
    ----------
    candidates
        All that were evaluated.
    chosen
        What the search chose; None if nothing meets the target.
    limit
        Speed-up that was asked for.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    figure = Figure(figsize=(5.2, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for (name, members), mark in zip(by_source(candidates).items(), "o^s", strict=True):
        axis.plot([1 / c.time for c in members], [c.error.forces for c in members], mark, ms=4, label=name)
    best = front(candidates)
    axis.step(
        [1 / c.time for c in best], [c.error.forces for c in best], "k-", lw=0.8, where="post", label="front"
    )
    if chosen is not None:
        axis.plot([1 / chosen.time], [chosen.error.forces], "*", color="k", ms=12, label="chosen")
    if limit is not None:
        axis.axvline(limit, color="0.6", lw=0.8, ls="--")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("predicted speed over the uncut model's, both deployed")
    axis.set_ylabel("held-out force error (meV/Å)")
    axis.legend(fontsize=8)
    kind = path.suffix[1:] or "png"
    atomic_write(path, lambda p: figure.savefig(p, format=kind, dpi=130))
    return path


def by_source(candidates: Sequence[Candidate]) -> dict[str, list[Candidate]]:
    """Candidates by where they come from, as the picture names it; each is in one of these groups."""
    groups: dict[str, list[Candidate]] = {"search": [], "ranking, tapered, paths": [], "uniform": []}
    for candidate in candidates:
        uniform = candidate.source.startswith("uniform")
        first = "uniform" if uniform else "ranking, tapered, paths"
        groups["search" if candidate.source in PROPOSED else first].append(candidate)
    return groups
