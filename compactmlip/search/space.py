"""The variables of a search: blocks of channels in each layer and order, the order of the edges, paths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from optuna.distributions import BaseDistribution, IntDistribution

from compactmlip.channels import Channels
from compactmlip.compress.allocate import full_channels
from compactmlip.compress.cost import Shapes
from compactmlip.compress.defaults import default_cuts
from compactmlip.compress.plan_file import Plan
from compactmlip.compress.tapped import Scores
from compactmlip.compress.thin import HARMONICS, cuttable_paths
from compactmlip.models import LAYER_CUTOFFS
from compactmlip.search.speed import capped

EDGE = "edge order above the features'"
"""Name of the variable for the largest order of the harmonics of edges, where it is free: how far it is above
the largest order of the features."""

CRITERION = "criterion that ranks channels"
"""Name of the variable for it, where there are several."""

KEPT = ("without_paths", "cutoffs")
"""What a plan has besides the variables."""

MOST_EXTRA = 2
"""Its largest value."""

STEPS = 24
"""Halvings of the interval when a plan is scaled to its budget."""


class Space:
    """Translates between plans and the optimiser's variables.

    Parameters
    ----------
    shapes
        Of the model.
    round_to
        Channels per block.
    criteria
        Names of the criteria that may rank channels.
    scores
        What they say of the model's channels; without it no two criteria are taken to keep the same ones.
    worth
        Importance of the paths of the tensor products; without it all are taken to matter as much.
    options
        Options that all plans share.
    """

    def __init__(
        self,
        shapes: Shapes,
        round_to: int,
        criteria: Sequence[str] = ("taylor",),
        scores: Mapping[str, Scores] | None = None,
        worth: Mapping[str, float] | None = None,
        **options: object,
    ) -> None:
        self.shapes, self.round_to, self.criteria, self.options = shapes, round_to, tuple(criteria), options
        self.scores, self.worth = scores or {}, worth or {}
        self.full = full_channels(shapes)
        self._effects: dict[str, str] = {}
        edges = [name for name in shapes.graph.groups if name.startswith(HARMONICS)]
        self.edge_orders = len(edges) - 1 if edges else None
        self.paths = cuttable_paths(shapes)
        self.layer_cutoffs = shapes.spec.family in LAYER_CUTOFFS

    @property
    def prefers_paths(self) -> bool:
        """Whether cutting paths pays in models of this family."""
        return any(cut.cut_paths > 0 for cut in default_cuts(self.shapes.spec))

    @property
    def bounds(self) -> dict[str, tuple[int, int]]:
        """Smallest and largest value of each variable."""
        found: dict[str, tuple[int, int]] = {}
        for (t, l), size in self._places():
            found[name_of(t, l)] = 1 if l == 0 else 0, max(1, -(-size // self.round_to))
        if self.edge_orders is not None:
            found[EDGE] = 0, min(MOST_EXTRA, self.edge_orders)
        if len(self.criteria) > 1:
            found[CRITERION] = 0, len(self.criteria) - 1
        return found

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """The same for the optimiser."""
        return {name: IntDistribution(low, high) for name, (low, high) in self.bounds.items()}

    def _places(self) -> Iterator[tuple[tuple[int, int], int]]:
        for t, channels in enumerate(self.full):
            for l, size in enumerate(channels):
                if size:
                    yield (t, l), size

    def plan(self, blocks: Mapping[str, float], like: Plan | None = None) -> Plan:
        """Plan with (rounded) numbers of blocks; paths that are cut, and cutoffs of layers, are another's."""
        layers = []
        for t, channels in enumerate(self.full):
            sizes = []
            for l, size in enumerate(channels):
                sizes.append(self._size(blocks.get(name_of(t, l), 0), size, 1 if l == 0 else 0))
            layers.append(_trimmed(sizes))
        edge = None
        if self.edge_orders is not None:
            edge = min(_highest(layers) + int(blocks[EDGE]), self.edge_orders)
        criterion = self.criteria[int(blocks.get(CRITERION, 0))]
        made = Plan.of(layers, edge_order=edge, importance=criterion, **self.options)
        return made if like is None else made.model_copy(update={n: getattr(like, n) for n in KEPT})

    def _size(self, blocks: float, most: int, fewest_blocks: int) -> int:
        """Channels of a (rounded) number of blocks."""
        return min(most, self.round_to * max(fewest_blocks, int(blocks + 0.5)))

    def rounded(self, channels: float, most: int) -> int:
        """Whole blocks of about so many channels, at least one."""
        return self._size(channels / self.round_to, most, 1) if most else 0

    def blocks(self, plan: Plan) -> dict[str, int]:
        """Variables of a plan, but for its paths and cutoffs."""
        found = {}
        for (t, l), _ in self._places():
            channels = plan.channels[t]
            found[name_of(t, l)] = -(-channels[l] // self.round_to) if l < len(channels) else 0
        if self.edge_orders is not None:
            highest = _highest(plan.channels)
            edge = highest if plan.edge_order is None else plan.edge_order
            found[EDGE] = min(max(edge - highest, 0), MOST_EXTRA, self.edge_orders)
        if len(self.criteria) > 1:
            found[CRITERION] = self.criteria.index(plan.importance)
        return found

    def cuts(self, plan: Plan) -> bool:
        """Whether the plan leaves less than the whole model."""
        return plan.cutoffs is not None or not all(mask.all() for mask in self.shapes.masks(plan).values())

    def effect(self, plan: Plan) -> str:
        """What the plan leaves, as a text: plans that cut the same model have the same.

        They may differ in what has no effect, and in the criterion where two of them keep the same channels.
        """
        name = plan.model_copy(update={"made_by": {}}).to_json()
        if name not in self._effects:
            scores = self.scores.get(plan.importance)
            masks = self.shapes.graph.complete(self.shapes.masks(plan, scores))
            kept = np.packbits(np.concatenate(list(masks.values()))).tobytes().hex()
            short = f" {plan.cutoffs}" if plan.cutoffs else ""
            self._effects[name] = (kept if scores else f"{kept} {plan.importance}") + short
        return self._effects[name]

    def scaled(self, plan: Plan, load: Callable[[Plan], float]) -> Plan | None:
        """The largest plan of the same proportions with a load of at most one; None if there is none.

        Orders that the plan does not have stay away.
        """
        blocks = self.blocks(plan)
        fixed = {name: blocks.pop(name) for name in (EDGE, CRITERION) if name in blocks}
        loads: dict[str, float] = {}

        def at(factor: float) -> tuple[Plan, float]:
            scaled = {name: factor * count for name, count in blocks.items()}
            made = self.plan(scaled | fixed, plan)
            if made.target not in loads:
                loads[made.target] = load(made)
            return made, loads[made.target]

        low, high = 0.0, 1.0
        while at(high)[1] <= 1 and high < 64:
            low, high = high, 2 * high
        if at(low)[1] > 1:
            return None
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if at(middle)[1] <= 1 else (low, middle)
        return at(low)[0]

    def uniform(self, text: str, edge_order: int | None = None) -> Plan:
        """Plan with the same channels in all layers, as far as the model has them."""
        if self.edge_orders is None:
            edge_order = None
        elif edge_order is not None:
            edge_order = min(edge_order, self.edge_orders)
        options = {"importance": self.criteria[0], **self.options}
        plan = Plan.uniform(text, len(self.full), edge_order=edge_order, **options)
        return capped(plan, self.full)

    def tapered(self, plan: Plan, ratio: float) -> Plan:
        """The plan with channels above order 0 that change towards the last layer, by ``ratio`` in all."""
        last = max(len(self.full) - 1, 1)
        blocks: dict[str, float] = dict(self.blocks(plan))
        for (t, l), _ in self._places():
            if l:
                blocks[name_of(t, l)] *= ratio ** (t / last)
        return self.plan(blocks, plan)


def name_of(t: int, l: int) -> str:
    """Name of the variable for one layer and order."""
    return f"layer {t}, l = {l}"


def _highest(layers: Sequence[Channels]) -> int:
    """Largest order that any layer has."""
    return max(len(channels) - 1 for channels in layers)


def _trimmed(sizes: Sequence[int]) -> Channels:
    left = list(sizes)
    while left and not left[-1]:
        left.pop()
    return tuple(left)
