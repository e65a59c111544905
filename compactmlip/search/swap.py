"""Paths of the tensor products that make way for others, at the same budget.

What a path is worth depends on the others, so that a ranking of all of them is a start and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from compactmlip.channels import parse_path
from compactmlip.compress.plan_file import Plan
from compactmlip.compress.thin import kept_paths, tidied
from compactmlip.search.space import Space

Load = Callable[[Plan], float]
"""What a plan needs over what is allowed."""

FEW = 0.6
"""Probability that no further path comes back, and no further block or path changes in an exchange."""

FILLED = 8
"""Paths that are tried for what a swap leaves over."""

BIAS = 0.5
"""Power of the importance with which paths come back; those that go are drawn with its inverse."""


def swapped(space: Space, plan: Plan, load: Load, rng: np.random.Generator) -> Plan | None:
    """The plan with a few paths that were cut, without others instead, and with what fits in addition.

    Important paths come back more often, and unimportant ones go more often.  An order that the plan does not
    have can come back, with a path that makes it and one that reads it.

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
        With a load of at most one; None where no path is cut, or no others can go.
    """
    plan = opened(space, plan)
    cut, kept = list(plan.without_paths), kept_paths(space.shapes, plan)
    if not cut:
        return None
    back: list[str] = []
    for name in _drawn(space, cut, BIAS, rng)[: int(rng.geometric(FEW))]:
        back += [path for path in _with_partners(space, name, cut, kept, rng) if path not in back]
    left = [name for name in cut if name not in back]

    def made(names: Sequence[str]) -> Plan:
        return plan.model_copy(update={"without_paths": tuple(sorted(names))})

    going = _drawn(space, kept, -BIAS, rng)
    while load(made(left)) > 1:
        if not going:
            return None
        left.append(going.pop(0))
    for name in _drawn(space, left, BIAS, rng)[:FILLED]:
        fewer = [other for other in left if other != name]
        if load(made(fewer)) <= 1:
            left = fewer
    return tidied(space.shapes, made(left))


def opened(space: Space, plan: Plan) -> Plan:
    """The same plan with all orders and harmonics, of which the paths are cut that it does not have.

    Where that would leave another model, for instance because of connections of a node with itself, the plan
    is returned as it is.
    """
    layers = []
    for channels, full in zip(plan.channels, space.full, strict=True):
        share = channels[0] / full[0]
        wider = [space.rounded(share * size, size) for size in full]
        layers.append(
            tuple(channels[l] if l < len(channels) and channels[l] else c for l, c in enumerate(wider))
        )
    wider_plan = plan.model_copy(
        update={"layers": Plan.of(layers).layers, "edge_order": space.edge_orders, "without_paths": ()}
    )
    kept = set(kept_paths(space.shapes, plan))
    cut = [name for name in kept_paths(space.shapes, wider_plan) if name not in kept]
    made = wider_plan.model_copy(update={"without_paths": tuple(sorted(cut))})
    return made if _left(space, made) == _left(space, plan) else plan


def _left(space: Space, plan: Plan) -> str:
    """What a plan leaves, whatever harmonics it has that no path uses."""
    return space.effect(tidied(space.shapes, plan))


def _with_partners(
    space: Space, name: str, cut: Sequence[str], kept: Sequence[str], rng: np.random.Generator
) -> list[str]:
    """A path, and others that are cut without which it would have nothing to read, or nobody to read it."""
    found, queue = [name], [name]
    while queue:
        t, (l1, _, l3) = parse_path(queue.pop())
        there = [parse_path(other) for other in (*kept, *found)]
        if l1 and not any((u, p[2]) == (t - 1, l1) for u, p in there):
            makers = [
                other for other in cut if (parse_path(other)[0], parse_path(other)[1][2]) == (t - 1, l1)
            ]
            queue += _drawn(space, makers, BIAS, rng)[:1]
        if l3 and not any((u, p[0]) == (t + 1, l3) for u, p in there):
            readers = [
                other for other in cut if (parse_path(other)[0], parse_path(other)[1][0]) == (t + 1, l3)
            ]
            queue += _drawn(space, readers, BIAS, rng)[:1]
        found += [other for other in queue if other not in found]
    return found


def _drawn(space: Space, names: Sequence[str], power: float, rng: np.random.Generator) -> list[str]:
    """Paths in random order; those with a larger power of their importance tend to come first."""
    # An exponential race: the first one is drawn with probabilities proportional to the powers.
    times = {name: rng.exponential() / max(space.worth.get(name, 1.0), 1e-300) ** power for name in names}
    return sorted(names, key=lambda name: times[name])
