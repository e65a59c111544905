"""Share a budget among layers and orders: cut what costs most for what it is worth, until it fits."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compactmlip.channels import Channels
from compactmlip.compress.cost import Cost, Shapes
from compactmlip.compress.plan_file import Plan
from compactmlip.compress.tapped import Scores
from compactmlip.errors import InputError

COMPARABLE = frozenset({"taylor", "taylor-atom", "fisher", "hessian"})
"""Criteria whose scores mean the same in all groups: changes of energies or forces.  Others are divided by
their norm in each group, as in Molchanov et al. (2017)."""

Place = tuple[int, int]
"""(layer, order)."""


@dataclass(frozen=True)
class Ladder:
    """Scores of the channels of one layer and order, highest first."""

    scores: NDArray[np.float64]

    def between(self, low: int, high: int) -> float:
        """Sum of the scores of channels ``low ... high - 1`` by rank."""
        return float(self.scores[low:high].sum())


def ladders(scores: Scores, layers: Sequence[Channels], criterion: str) -> dict[Place, Ladder]:
    """What the channels of each layer's output are worth."""
    made = {}
    for t, channels in enumerate(layers):
        for l, size in enumerate(channels):
            if size:
                own = np.sort(scores[f"layers.{t}.out/{l}"])[::-1]
                norm = 1.0 if criterion in COMPARABLE else float(np.linalg.norm(own)) or 1.0
                made[t, l] = Ladder(own / norm)
    return made


def full_channels(shapes: Shapes) -> tuple[Channels, ...]:
    """Channels per order of each layer's output, uncut."""
    groups = shapes.graph.groups
    layers = []
    for t in range(shapes.spec.num_message_passing_layers):
        orders = [int(name.rpartition("/")[2]) for name in groups if name.startswith(f"layers.{t}.out/")]
        sizes = {l: groups[f"layers.{t}.out/{l}"].size for l in orders}
        layers.append(tuple(sizes.get(l, 0) for l in range(max(orders) + 1)))
    return tuple(layers)


def allocate(
    shapes: Shapes,
    scores: Scores,
    cost: Cost,
    bound: float,
    *,
    round_to: int = 8,
    template: Plan | None = None,
    weights: Mapping[Place, float] | None = None,
    start: Sequence[Channels] | None = None,
) -> Plan:
    """Plan within a budget from a ranking of all channels of all layers and orders together.

    From the uncut model, blocks of ``round_to`` channels are taken away one by one: always those with the
    smallest loss of score for the cost that they save.

    Parameters
    ----------
    shapes
        Of the model.
    scores
        Importance of its channels, by the criterion that the template names.
    cost, bound
        What is bounded, and by how much.
    round_to
        Numbers of channels are multiples of this (or what the model has): 8 is the width of the vector
        units that convolutions use, so that other numbers cost as much as the next multiple.
    template
        Options of the plan; its layers are ignored.
    weights
        Factors on the scores of single layers and orders (1 where not given).
    start
        Channels to begin with, by default all.

    Raises
    ------
    InputError
        If the smallest plan is still too expensive, or ``round_to`` is not positive.
    """
    if round_to < 1:
        raise InputError("channels cannot be rounded to multiples of less than one.")
    full = full_channels(shapes)
    template = template or Plan.of(full)
    worth = ladders(scores, full, template.importance)
    factors = weights or {}
    current = tuple(start or full)
    plan = template.model_copy(update={"layers": Plan.of(current).layers})
    now = cost(plan)
    queue: list[tuple[float, Place]] = []

    def rate(place: Place) -> tuple[float, float, Plan]:
        """Loss of score over saved cost of the next block of a place, and what is left without it."""
        t, l = place
        smaller = _without_block(current, place, round_to)
        candidate = plan.model_copy(update={"layers": Plan.of(smaller).layers})
        price = cost(candidate)
        loss = worth[place].between(smaller[t][l] if l < len(smaller[t]) else 0, current[t][l])
        return loss * factors.get(place, 1.0) / max(now - price, 1e-12 * now), price, candidate

    if now > bound:
        queue = [(rate(place)[0], place) for place in _places(current, round_to)]
        heapq.heapify(queue)
    while now > bound:
        if not queue:
            raise InputError(
                f"the budget of {bound:.4g} cannot be met: with {plan.target} the cost is still {now:.4g}. "
                "Allow more, or cut layers as well."
            )
        _, place = heapq.heappop(queue)
        # Rates change as other blocks go; one that is still the lowest after an update is taken.
        found, price, candidate = rate(place)
        if queue and found > queue[0][0] * (1 + 1e-9):
            heapq.heappush(queue, (found, place))
            continue
        now, plan, current = price, candidate, candidate.channels
        if place in _places(current, round_to):
            heapq.heappush(queue, (rate(place)[0], place))
    return plan


def _places(current: Sequence[Channels], round_to: int) -> list[Place]:
    """Layers and orders that can spare a block; scalars keep at least one."""
    return [
        (t, l)
        for t, channels in enumerate(current)
        for l, size in enumerate(channels)
        if size > (round_to if l == 0 else 0)
    ]


def _without_block(current: Sequence[Channels], place: Place, round_to: int) -> tuple[Channels, ...]:
    """One block less in one layer and order, down to a multiple of ``round_to``."""
    t, l = place
    changed = list(current[t])
    changed[l] = (changed[l] - 1) // round_to * round_to
    while changed and not changed[-1]:
        changed.pop()
    return (*current[:t], tuple(changed), *current[t + 1 :])
