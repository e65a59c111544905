"""A plan within a budget at once, without a search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from compactmlip.channels import format_channels
from compactmlip.compress.allocate import allocate, full_channels
from compactmlip.compress.compress import default_target, some_structures
from compactmlip.compress.cost import Budget, Cost, Setting, Shapes, cost_of
from compactmlip.compress.importance import importance
from compactmlip.compress.path_importance import path_importance
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

OVER = (1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
"""Costs over the bound that cutting paths is tried to reach, in turn; fewer channels do the rest."""


def plan_within(
    budget: str,
    teacher: nn.Module,
    graphs: Sequence[GraphBatch],
    template: Plan,
    *,
    to: str | None = None,
    first: First | None = None,
    scores: Scores | None = None,
    round_to: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> tuple[Plan, Scores | None]:
    """Plan within a budget, and the scores that it was made from, if it was.

    Parameters
    ----------
    budget
        As :meth:`compactmlip.compress.cost.Budget.parse` takes it.
    teacher
        Model to cut.
    graphs
        Calibration structures.
    template
        Options of the plan; its layers are ignored.
    to
        Channels to begin with where paths are cut first; all by default.
    first
        "paths" cuts paths of the tensor products, those first that are worth least for what they cost, and
        thins out channels only where that is not enough; "channels" takes channels away by a ranking of all.
        By default paths for latencies and multiply-adds of SevenNet's family, channels otherwise.
    scores
        Importance of the channels by the criterion that the template names, if it is known already.
    round_to
        Numbers of channels are multiples of this.
    seed, progress
        As elsewhere.

    Raises
    ------
    InputError
        If the budget cannot be read or met, or ``to`` is given where channels are ranked.
    """
    bound = Budget.parse(budget)
    by_paths = cuts_paths(bound, model_spec(teacher), to, first)
    shapes, setting = Shapes(teacher), Setting.of(graphs)
    latency = None
    if bound.kind == "latency":
        latency = Latency(teacher, graphs, shapes, setting, seed=seed, progress=progress)
    cost = cost_of(bound.kind, shapes, setting, latency)
    whole = latency.uncut if latency else cost(Plan.of(full_channels(shapes), odd_paths=True))
    limit = bound.bound(whole)
    used = some_structures(graphs, seed)
    options = {name: getattr(template, name) for name in ("odd_paths", "radial_hidden", "readout_hidden")}
    space = Space(shapes, round_to, (template.importance,), **options)
    worth = path_importance(teacher, used, progress=progress) if by_paths else {}
    if scores is None and not by_paths:
        scores = importance(teacher, used, template.importance, seed=seed, progress=progress)

    def made() -> Plan:
        if by_paths:
            return _paths_first(space, worth, cost, limit, template.edge_order, to)
        assert scores is not None
        ranked = allocate(shapes, scores, cost, limit, round_to=round_to, template=template)
        # The last block may have taken an order, and much of the cost: the others get what is left over.
        return space.scaled(ranked, lambda plan: cost(plan) / limit) or ranked

    plan = latency.settled(made) if latency else made()
    made_by = {"budget": budget, "round_to": round_to, "cost": cost(plan), "cost_uncut": whole}
    return plan.model_copy(update={"made_by": made_by}), scores


def cuts_paths(budget: Budget, spec: ModelSpec, to: str | None, first: First | None = None) -> bool:
    """Whether paths are cut for a budget before channels.

    Parameters
    ----------
    budget, to, first
        As of :func:`plan_within`.
    spec
        Of the model to cut.

    Raises
    ------
    InputError
        If channels to begin with are given where all are ranked.
    """
    if first is None:
        usual = default_target(spec)[1] > 0 and budget.kind in PATHS_FIRST
        first = "paths" if usual else "channels"
    if to is not None and first == "channels":
        raise InputError(
            "give only one of --to and --budget: this budget ranks all channels. With 'prune --first paths' "
            "it cuts paths of the channels that --to names."
        )
    return first == "paths"


def _paths_first(
    space: Space, worth: dict[str, float], cost: Cost, limit: float, edge_order: int | None, to: str | None
) -> Plan:
    text = to or ",".join(format_channels(channels) for channels in space.full)
    start = space.uniform(text, edge_order)
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
