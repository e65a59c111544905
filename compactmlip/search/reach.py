"""Cutoffs of single layers: how far each of them sees."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from compactmlip.compress.plan_file import Plan
from compactmlip.search.space import Space

STEP = 0.1
"""Cutoffs change by this share of the model's."""

SHORTEST = 0.6
"""Shortest cutoff that is tried, in the model's."""

FIRST = (0.9, 0.8)
"""Cutoffs of all layers but the first, in the model's, of the plans that a search begins with."""

SHORTER = 0.6
"""Probability that a cutoff that could become longer becomes shorter."""

ONE = 0.5
"""Probability that only one layer's cutoff changes; otherwise those of all behind it change, too."""


def first_cutoffs(space: Space) -> Iterator[tuple[float | None, ...] | None]:
    """Cutoffs of the layers of plans that a search begins with, those of the model first."""
    yield None
    if space.layer_cutoffs:
        for share in FIRST:
            yield (None, *[_rounded(space, share)] * (len(space.full) - 1))


def other_cutoffs(space: Space, plan: Plan, rng: np.random.Generator) -> Plan:
    """The plan with a shorter or a longer cutoff of one layer, or of all from one layer on."""
    count, whole = len(space.full), space.shapes.spec.cutoff
    steps = [round((1.0 - (c or whole) / whole) / STEP) for c in plan.cutoffs or (None,) * count]
    layer = int(rng.integers(count))
    change = 1 if rng.random() < SHORTER or not steps[layer] else -1
    most = round((1.0 - SHORTEST) / STEP)
    for t in range(layer, layer + 1 if rng.random() < ONE else count):
        steps[t] = min(max(steps[t] + change, 0), most)
    cutoffs = tuple(_rounded(space, 1.0 - STEP * k) if k else None for k in steps)
    return plan.model_copy(update={"cutoffs": cutoffs if any(steps) else None})


def _rounded(space: Space, share: float) -> float:
    """A share of the model's cutoff, in hundredths of an Angstrom."""
    return round(share * space.shapes.spec.cutoff, 2)
