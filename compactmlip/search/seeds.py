"""The plans that a search begins with."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping

from compactmlip.compress.allocate import allocate
from compactmlip.compress.plan_file import Plan
from compactmlip.compress.tapped import Scores
from compactmlip.compress.thin import thinned
from compactmlip.errors import InputError
from compactmlip.search.reach import first_cutoffs
from compactmlip.search.space import Space

SHAPES = ("64x0", "64x0+32x1", "64x0+32x1+16x2", "64x0+32x1+16x2+16x3", "32x0+32x1+32x2+32x3")
"""Proportions of the uniform plans that a search begins with."""

TAPERED = ("128x0+64x1", "128x0+64x1+32x2")
"""Proportions in the layer that has most channels, of plans that thin out towards the first or last layer."""

TAPERS = (0.3, 3.0)

PATHS_FIRST = (1.0, 1.5, 2.0)
"""Loads that plans with all channels are brought to by cutting paths; cutting channels does the rest."""


def seeds(
    space: Space,
    scores: Mapping[str, Scores],
    paths: Mapping[str, float],
    load: Callable[[Plan], float],
) -> Iterator[tuple[str, Plan]]:
    """Sources and plans with a load of at most one.

    First what a ranking of all channels leaves, by each criterion and with each order of the harmonics of
    edges; then plans with many channels that lose paths of the tensor products, with the model's cutoff and
    with shorter ones behind the first layer; plans with the same channels in all layers; and some that thin
    out towards one end.

    Parameters
    ----------
    space
        Variables.
    scores
        Of all channels, by criterion.
    paths
        Of all paths.
    load
        What a plan needs over what is allowed.
    """
    yield from _ranked(space, scores, load)
    yield from _without_paths(space, paths, load)
    for text in SHAPES:
        for extra in (0, 1):
            plan = space.uniform(text)
            highest = max(len(channels) - 1 for channels in plan.channels)
            made = space.scaled(space.uniform(text, highest + extra), load)
            if made is not None:
                yield f"uniform {text}" + ", edges one order higher" * extra, made
    for text, ratio in itertools.product(TAPERED, TAPERS):
        made = space.scaled(space.tapered(space.uniform(text), ratio), load)
        if made is not None:
            yield f"tapered {text}", made


def _ranked(
    space: Space, scores: Mapping[str, Scores], load: Callable[[Plan], float]
) -> Iterator[tuple[str, Plan]]:
    edges = [None] if space.edge_orders is None else range(space.edge_orders, 0, -1)
    for edge, criterion in itertools.product(edges, space.criteria):
        options = {"edge_order": edge, "importance": criterion, **space.options}
        template = Plan(layers=("1x0",), **options)
        try:
            ranked = allocate(
                space.shapes, scores[criterion], load, 1.0, round_to=space.round_to, template=template
            )
        except InputError:
            continue
        made = space.scaled(ranked, load)
        if made is not None:
            yield "ranking", made


def _without_paths(
    space: Space, paths: Mapping[str, float], load: Callable[[Plan], float]
) -> Iterator[tuple[str, Plan]]:
    """Plans with all channels up to some order that lose paths, and then channels."""
    orders = range(max(map(len, space.full)))
    terms = [f"{max(c[l] for c in space.full if l < len(c))}x{l}" for l in orders]
    for cutoffs, highest, bound in itertools.product(first_cutoffs(space), range(1, len(terms)), PATHS_FIRST):
        text = "+".join(terms[: highest + 1])
        whole = space.uniform(text, highest).model_copy(update={"cutoffs": cutoffs})
        thin = thinned(space.shapes, whole, paths, load, bound)
        made = thin and space.scaled(thin, load)
        if made:
            short = "" if cutoffs is None else f", cutoffs {cutoffs[-1]:g}"
            yield f"{text} without {len(made.without_paths)} paths{short}", made
