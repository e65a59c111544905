"""Neighbours of a plan at the same budget: blocks of channels or single paths make way for others."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from compactmlip.compress.plan_file import Plan
from compactmlip.compress.thin import kept_paths
from compactmlip.search.reach import other_cutoffs
from compactmlip.search.space import CRITERION, Space
from compactmlip.search.swap import FEW, Load, swapped

OTHER_CRITERION = 0.15
"""Probability that other channels are kept instead, and not other numbers of them."""

CUTOFFS = 0.3
"""Probability that cutoffs of layers change as well, in families whose layers can have their own."""

SWAP = 0.5
"""Probability that paths of the tensor products make way for other paths, in families where that pays or for
plans that cut some."""

PATHS = 0.5
"""Otherwise, the probability that paths change, and channels to restore the load."""

FEWER_PATHS = 0.75
"""Probability that a path goes, where there are some to bring back."""

STEPS = 12
"""Exchanges that lead to a plan of the same kind as those of a search, but like none of them."""


def exchanged(space: Space, plan: Plan, load: Load, rng: np.random.Generator) -> Plan | None:
    """The plan with a few changes that cost, others that pay for them, and what is left over spent.

    Paths of the tensor products come back and others go; or more channels go to one random place, and fewer
    to others; or paths go, which frees time for channels, or come back.  Proposals of this kind change two or
    three numbers of a good plan, which a model of all variables cannot do before it has seen several times as
    many plans as there are variables.  Cutoffs of layers may change with each of them.

    Parameters and result are those of :func:`compactmlip.search.swap.swapped`.
    """
    if len(space.criteria) > 1 and rng.random() < OTHER_CRITERION:
        others = [c for c in space.criteria if c != plan.importance]
        return plan.model_copy(update={"importance": str(rng.choice(others))})
    if space.layer_cutoffs and rng.random() < CUTOFFS:
        plan = other_cutoffs(space, plan, rng)
    if (space.prefers_paths or plan.without_paths) and rng.random() < SWAP:
        other = swapped(space, plan, load, rng)
        if other is not None:
            return other
    blocks = space.blocks(plan)
    fixed = {CRITERION: blocks.pop(CRITERION)} if CRITERION in blocks else {}
    place = None
    if rng.random() < PATHS:
        plan = plan.model_copy(update={"without_paths": _other_paths(space, plan, rng)})
    else:
        growing = [name for name, count in blocks.items() if count < space.bounds[name][1]]
        if not growing:
            return None
        place = str(rng.choice(growing))
        blocks[place] = min(blocks[place] + int(rng.geometric(FEW)), space.bounds[place][1])

    def made(blocks: dict[str, int]) -> Plan:
        return space.plan(blocks | fixed, plan)

    return _balanced(space, blocks, place, made, load, rng)


def wandered(space: Space, plan: Plan, load: Load, seed: int, steps: int = STEPS) -> Plan:
    """What many random exchanges in a row make of a plan: one of the kind that a search is going to see."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        plan = exchanged(space, plan, load, rng) or plan
    return plan


def _other_paths(space: Space, plan: Plan, rng: np.random.Generator) -> tuple[str, ...]:
    """Paths to cut: those of the plan and a few more, or a few less."""
    number = int(rng.geometric(FEW))
    kept = kept_paths(space.shapes, plan)
    if plan.without_paths and rng.random() >= FEWER_PATHS:
        back = set(rng.permutation(plan.without_paths)[:number].tolist())
        return tuple(name for name in plan.without_paths if name not in back)
    return (*plan.without_paths, *rng.permutation(kept)[:number].tolist())


def _balanced(
    space: Space,
    blocks: dict[str, int],
    place: str | None,
    made: Callable[[dict[str, int]], Plan],
    load: Load,
    rng: np.random.Generator,
) -> Plan | None:
    """Plan with blocks taken away elsewhere until it is small enough, then added where they still fit."""
    bounds = space.bounds
    while load(made(blocks)) > 1:
        shrinking = [name for name, count in blocks.items() if name != place and count > bounds[name][0]]
        if not shrinking:
            return None
        blocks[str(rng.choice(shrinking))] -= 1
    for name in map(str, rng.permutation(list(blocks))):
        larger = blocks | {name: blocks[name] + 1}
        if larger[name] <= bounds[name][1] and load(made(larger)) <= 1:
            blocks = larger
    return made(blocks)
