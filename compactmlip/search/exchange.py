"""Neighbours of a plan at the same budget: a few blocks of channels move from one place to another."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from compactmlip.compress.plan_file import Plan
from compactmlip.search.space import CRITERION, Space

OTHER_CRITERION = 0.2
"""Probability that other channels are kept instead, and not other numbers of them."""

FEW = 0.6
"""Probability that no further block goes to the place that grows."""


def exchanged(
    space: Space, plan: Plan, load: Callable[[Plan], float], rng: np.random.Generator
) -> Plan | None:
    """The plan with more blocks in one random place and fewer in others, as large as the budget allows.

    Proposals of this kind change two or three numbers of a good plan, which a model of all variables
    cannot do before it has seen several times as many plans as there are variables.

    Parameters
    ----------
    space
        Variables.
    plan
        Where to start.
    load
        What a plan needs over what is allowed.
    rng
        Random numbers.

    Returns
    -------
    Plan or None
        With a load of at most one; None where nothing else can shrink enough.
    """
    blocks = space.blocks(plan)
    bounds = space.bounds
    if CRITERION in blocks:
        others = [k for k in range(len(space.criteria)) if k != blocks[CRITERION]]
        if rng.random() < OTHER_CRITERION:
            return space.plan(blocks | {CRITERION: int(rng.choice(others))})
    fixed = {CRITERION: blocks.pop(CRITERION)} if CRITERION in blocks else {}
    growing = [name for name, count in blocks.items() if count < bounds[name][1]]
    if not growing:
        return None
    place = str(rng.choice(growing))
    blocks[place] = min(blocks[place] + int(rng.geometric(FEW)), bounds[place][1])
    while load(space.plan(blocks | fixed)) > 1:
        shrinking = [name for name, count in blocks.items() if name != place and count > bounds[name][0]]
        if not shrinking:
            return None
        blocks[str(rng.choice(shrinking))] -= 1
    for name in map(str, rng.permutation(list(blocks))):
        larger = blocks | {name: blocks[name] + 1}
        if larger[name] <= bounds[name][1] and load(space.plan(larger | fixed)) <= 1:
            blocks = larger
    return space.plan(blocks | fixed)
