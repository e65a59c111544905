"""Plans within a budget at once, without a search."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

from torch import nn

from compactmlip.channels import format_channels
from compactmlip.compress.allocate import allocate, full_channels
from compactmlip.compress.compress import some_structures
from compactmlip.compress.cost import Budget, Cost, Setting, Shapes, cost_of
from compactmlip.compress.defaults import default_cut, default_cuts
from compactmlip.compress.importance import importance
from compactmlip.compress.path_importance import path_importance
from compactmlip.compress.plan import parse_cutoffs
from compactmlip.compress.plan_file import Plan
from compactmlip.compress.tapped import Scores
from compactmlip.compress.thin import thinned
from compactmlip.data.graph import GraphBatch
from compactmlip.errors import InputError
from compactmlip.models import model_spec
from compactmlip.search.space import Space
from compactmlip.search.speed import Latency
from compactmlip.spec import ModelSpec

First = Literal["paths", "channels"]

PATHS_FIRST = frozenset({"latency", "flops"})
"""Budgets that paths of the tensor products are cut for, where the family cuts any by default.

Channels take more parameters and memory; and in MACE models losing channels costs less than losing paths
(benchmarks/results/paths.md)."""

MUCH = 0.5
"""Share of the uncut model's cost below which layers see fewer neighbours and fewer channels are begun with,
where paths are cut first.  Errors after a short training were the smallest, or nearly, for both materials
that were looked at; cutting paths of all channels is good for one of them (benchmarks/results/paths.md)."""

OVER = (1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
"""Costs over the bound that cutting paths is tried to reach, in turn; fewer channels do the rest."""


class Planner:
    """Makes plans within one budget; speeds and importances are measured once for all of them.

    Parameters
    ----------
    budget
        As :meth:`compactmlip.compress.cost.Budget.parse` takes it.
    teacher
        Model to cut.
    graphs
        Calibration structures.
    template
        Options of the plans; its layers are ignored.
    first
        "paths" cuts paths of the tensor products, those first that are worth least for what they cost, and
        thins out channels only where that is not enough; "channels" takes channels away by a ranking of all.
        By default paths for latencies and multiply-adds of SevenNet's family, channels otherwise.
    cutoffs
        Of the layers, as :func:`compactmlip.compress.plan.parse_cutoffs` takes them; by default the family's
        where paths are cut first for less than half of the cost, and the model's otherwise.
    scores
        Importance of the channels by the criterion that the template names, if it is known already.
    round_to
        Numbers of channels are multiples of this.
    seed, progress
        As elsewhere.

    Attributes
    ----------
    known
        Importance of the channels, once it was needed.

    Raises
    ------
    InputError
        If the budget cannot be read.
    """

    def __init__(
        self,
        budget: str,
        teacher: nn.Module,
        graphs: Sequence[GraphBatch],
        template: Plan,
        *,
        first: First | None = None,
        cutoffs: str | None = None,
        scores: Scores | None = None,
        round_to: int = 8,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        self.budget, self.bound = budget, Budget.parse(budget)
        self.teacher, self.graphs, self.template = teacher, graphs, template
        self.first, self.round_to, self.seed, self.progress = first, round_to, seed, progress
        self.cutoffs = cutoffs
        self.known = scores
        self.shapes, self.setting = Shapes(teacher), Setting.of(graphs)
        options = {name: getattr(template, name) for name in ("odd_paths", "radial_hidden", "readout_hidden")}
        self.space = Space(self.shapes, round_to, (template.importance,), **options)

    def plan(self, to: str | None = None) -> Plan:
        """Plan within the budget.

        Parameters
        ----------
        to
            Channels to begin with where paths are cut first; by default the last of the family's where less
            than half of the cost may stay, and all otherwise.

        Raises
        ------
        InputError
            If the budget cannot be met, or ``to`` is given where channels are ranked.
        """
        by_paths = cuts_paths(self.bound, model_spec(self.teacher), to, self.first)
        limit = self.bound.bound(self.whole)
        much = by_paths and self.space.prefers_paths and limit <= MUCH * self.whole
        narrow = default_cuts(model_spec(self.teacher))[-1].to if much and to is None else None
        template = self.template.model_copy(update={"cutoffs": self._reach(much)})

        def found() -> Plan:
            if by_paths:
                plan = _paths_first(self.space, self.worth, self.cost, limit, template, to or narrow)
                left_over = narrow is not None and not plan.without_paths
            else:
                plan = allocate(
                    self.shapes, self.scores, self.cost, limit, round_to=self.round_to, template=template
                )
                left_over = True  # the last block may have taken an order, and much of the cost
            grown = self.space.scaled(plan, lambda p: self.cost(p) / limit) if left_over else None
            return grown or plan

        plan = self.latency.settled(found) if self.latency else found()
        made_by = {
            "budget": self.budget,
            "round_to": self.round_to,
            "cost": self.cost(plan),
            "cost_uncut": self.whole,
        }
        return plan.model_copy(update={"made_by": made_by})

    def _reach(self, much: bool) -> tuple[float | None, ...] | None:
        """Cutoffs of the layers."""
        spec, text = model_spec(self.teacher), self.cutoffs
        if text is None and much:
            text = default_cut(spec).cutoffs
        return parse_cutoffs(text, spec)

    @cached_property
    def latency(self) -> Latency | None:
        """Speeds on this machine, where the budget is one."""
        if self.bound.kind != "latency":
            return None
        return Latency(
            self.teacher, self.graphs, self.shapes, self.setting, seed=self.seed, progress=self.progress
        )

    @cached_property
    def cost(self) -> Cost:
        """What the budget bounds."""
        return cost_of(self.bound.kind, self.shapes, self.setting, self.latency)

    @cached_property
    def whole(self) -> float:
        """Cost of the uncut model."""
        if self.latency:
            return self.latency.uncut
        return self.cost(Plan.of(full_channels(self.shapes), odd_paths=True))

    @cached_property
    def worth(self) -> dict[str, float]:
        """Importance of the paths."""
        return path_importance(self.teacher, self._used, progress=self.progress)

    @property
    def scores(self) -> Scores:
        """Importance of the channels; afterwards it is ``known``."""
        if self.known is None:
            self.known = importance(
                self.teacher, self._used, self.template.importance, seed=self.seed, progress=self.progress
            )
        return self.known

    @property
    def _used(self) -> list[GraphBatch]:
        return some_structures(self.graphs, self.seed)


def cuts_paths(budget: Budget, spec: ModelSpec, to: str | None, first: First | None = None) -> bool:
    """Whether paths are cut for a budget before channels.

    Parameters
    ----------
    budget, to, first
        As of :class:`Planner`.
    spec
        Of the model to cut.

    Raises
    ------
    InputError
        If channels to begin with are given where all are ranked.
    """
    if first is None:
        usual = default_cut(spec).cut_paths > 0 and budget.kind in PATHS_FIRST
        first = "paths" if usual else "channels"
    if to is not None and first == "channels":
        raise InputError(
            "give only one of --to and --budget: this budget ranks all channels. With 'prune --first paths' "
            "it cuts paths of the channels that --to names."
        )
    return first == "paths"


def _paths_first(
    space: Space, worth: dict[str, float], cost: Cost, limit: float, template: Plan, to: str | None
) -> Plan:
    text = to or ",".join(format_channels(channels) for channels in space.full)
    start = space.uniform(text, template.edge_order).model_copy(update={"cutoffs": template.cutoffs})
    for over in OVER:
        thin = thinned(space.shapes, start, worth, cost, over * limit)
        if thin is not None:
            made = thin if over == 1 else space.scaled(thin, lambda plan: cost(plan) / limit)
            if made is not None:
                return made
    raise InputError(
        f"the budget of {limit:.4g} cannot be met by cutting paths and channels of {start.target}. Allow "
        "more, begin with fewer orders (--to), or cut layers as well."
    )
