"""Importance as what a refit cannot repair: how badly a layer's output can be rebuilt without a channel.

Uses the normal equations of compensation: with G = X^T X of a linear map's inputs and weights W, the least
squared error of its output without the inputs S is  tr(W_S^T [(G^-1)_SS]^-1 W_S)  (Optimal Brain Surgeon,
Hassibi & Stork 1993).  A channel that others can stand in for is cheap however large it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compactmlip.channels import ChannelGroup
from compactmlip.compress.tapped import Scores, group_sizes, require_structures
from compactmlip.data.graph import MAX_EDGES, GraphBatch, batches_by_edges, collate
from compactmlip.models import (
    channel_graph,
    linear_stages,
    model_device,
    model_dtype,
    model_spec,
    start_state,
)
from compactmlip.models.stages import Fit
from compactmlip.progress import Track

RIDGE = 1e-4
"""Penalty of the refit, relative to the mean eigenvalue of the scaled normal equations: what only noise can
tell apart does not count as rebuilt."""


@torch.no_grad()
def reconstruction_importance(
    model: nn.Module, graphs: Sequence[GraphBatch], *, max_edges: int = MAX_EDGES, progress: bool = False
) -> Scores:
    """Squared error of the layers that read a channel after their best refit without it.

    Relative to the squared output of each such layer (all its orders) and summed over them.  Groups that no
    refitted layer reads (hidden units of radial networks) are rebuilt from the other channels of their own
    group instead, weighted by the weights that read them.

    Raises
    ------
    InputError
        If there is no structure.
    """
    require_structures(graphs)
    batches = [
        collate([graphs[k] for k in indices]).to(model_device(model), model_dtype(model))
        for indices in batches_by_edges(graphs, max_edges)
    ]
    groups = channel_graph(model_spec(model)).groups
    sizes = group_sizes(model)
    scores = {name: np.zeros(size) for name, size in sizes.items()}
    read: set[str] = set()
    states = [start_state(model, batch) for batch in batches]
    stages = list(linear_stages(model))
    with Track("reconstruction", len(stages), "stages", enabled=progress) as track:
        for stage in stages:
            problems = [_Problem(fit, model, states, batches) for fit in stage.fits if fit.inputs]
            total = sum(problem.output for problem in problems)
            for problem in problems:
                for name in sizes:
                    rows = problem.rows_of(groups[name])
                    if rows is not None and total > 0:
                        read.add(name)
                        scores[name] += problem.errors_without(rows) / total
            states = [stage.advance(state, stage.evaluate(state)) for state in states]
            track.advance(1)
    return scores | _from_own_group(model, batches, {n: groups[n] for n in sizes if n not in read})


class _Problem:
    """Normal equations and weights of one fit; one block, or one per species."""

    def __init__(
        self, fit: Fit[Any], model: nn.Module, states: Sequence[Any], batches: Sequence[GraphBatch]
    ) -> None:
        weights = [effective_weight(model, name) for name in fit.inputs]
        self.starts = dict(zip(fit.inputs, np.cumsum([0, *(w.shape[-2] for w in weights)]), strict=False))
        weight = torch.cat(weights, dim=-2)
        self.axis = weight.dim() - 2
        self.weights = weight if weight.dim() == 3 else weight.unsqueeze(0)
        gram = self.weights.new_zeros(len(self.weights), weight.shape[-2], weight.shape[-2])
        for state, batch in zip(states, batches, strict=True):
            design = fit.design(state).double()
            for block in range(len(gram)):
                part = design if fit.kind == "shared" else design[batch.species == block]
                flat = part.flatten(0, 1)
                gram[block] += flat.mT @ flat
        self.solved = [Damped.of(g) for g in gram]
        self.output = float((self.weights * (gram @ self.weights)).sum())

    def rows_of(self, group: ChannelGroup) -> Tensor | None:
        """Inputs that each channel of a group owns, (channels, k); None if it owns none."""
        parts = []
        for slot in group.slots:
            if slot.parameter in self.starts and slot.axis == self.axis:
                first = int(self.starts[slot.parameter]) + slot.offset
                parts.append(torch.arange(first, first + group.size * slot.block).reshape(group.size, -1))
        return torch.cat(parts, dim=1) if parts else None

    def errors_without(self, rows: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Least squared error of the output without the inputs of each channel."""
        total = torch.zeros(len(rows), dtype=torch.float64)
        for solved, weight in zip(self.solved, self.weights, strict=True):
            total += solved.errors_without(rows, weight).cpu()
        return total.numpy()


@dataclass(frozen=True)
class Damped:
    """Inverse of a damped Gram matrix."""

    inverse: Tensor = field(repr=False)

    @staticmethod
    def of(gram: Tensor) -> Damped:
        """Inputs are scaled as in :class:`compactmlip.compress.ridge.RidgePath`, then damped."""
        scale = gram.diagonal().clamp(min=0).pow(0.25)
        inverse_scale = torch.where(scale > 0, 1 / scale, 0.0)
        scaled = gram * inverse_scale.unsqueeze(1) * inverse_scale
        damping = RIDGE * scaled.diagonal().mean().clamp(min=1e-300)
        inverse = torch.linalg.inv(scaled + damping * torch.eye(len(gram)).to(gram))
        return Damped(inverse * inverse_scale.unsqueeze(1) * inverse_scale)

    def errors_without(self, rows: Tensor, weight: Tensor) -> Tensor:
        """tr(W_S^T [(G^-1)_SS]^-1 W_S) for the inputs S in each of ``rows`` (channels, k)."""
        rows = rows.to(weight.device)
        blocks = self.inverse[rows.unsqueeze(2), rows.unsqueeze(1)]
        # An input that is always zero has a zero row: nothing is lost with it.
        dead = blocks.diagonal(dim1=1, dim2=2) <= 0
        blocks = blocks + torch.diag_embed(dead.to(blocks))
        parts = weight[rows] * (~dead).unsqueeze(2)
        errors: Tensor = (parts * torch.linalg.solve(blocks, parts)).sum(dim=(1, 2))
        return errors.clamp(min=0)


def effective_weight(model: nn.Module, parameter: str) -> Tensor:
    """Weight times its frozen factor, in float64."""
    weight = model.get_parameter(parameter).detach().double()
    return weight * model.get_buffer(f"{parameter.rpartition('.')[0]}.scale").double()


def _from_own_group(
    model: nn.Module, batches: Sequence[GraphBatch], groups: dict[str, ChannelGroup]
) -> Scores:
    """For groups that no refitted layer reads: channels rebuilt from the others of the group."""
    grams = {name: torch.zeros(g.size, g.size, dtype=torch.float64) for name, g in groups.items()}

    def watch(space: str, order: int, x: Tensor) -> Tensor:
        name = f"{space}/{order}"
        if name in grams:
            flat = x.double().flatten(0, -2)
            grams[name] = grams[name].to(flat) + flat.mT @ flat
        return x

    for batch in batches:
        model(batch.species, batch.centers, batch.neighbors, batch.vectors, tap=watch)
    scores = {}
    for name, gram in grams.items():
        weight = _readers(model, groups[name]).sqrt().unsqueeze(1).to(gram)
        rows = torch.arange(len(gram)).unsqueeze(1)
        total = float((gram.diagonal() * weight.squeeze(1).square()).sum())
        errors = Damped.of(gram).errors_without(rows, weight) / max(total, 1e-300)
        scores[name] = errors.cpu().numpy()
    return scores


def _readers(model: nn.Module, group: ChannelGroup) -> Tensor:
    """Sum of squares of the weights that read each channel; ones if nobody multiplies it by weights."""
    state = model.state_dict()
    total = torch.zeros(group.size, dtype=torch.float64)
    for slot in group.slots:
        weight = state[slot.parameter]
        if f"{slot.parameter.rpartition('.')[0]}.scale" not in state or slot.axis != weight.dim() - 2:
            continue
        owned = effective_weight(model, slot.parameter).movedim(slot.axis, 0)
        owned = owned[slot.offset : slot.offset + group.size * slot.block].reshape(group.size, -1)
        total += owned.square().sum(dim=1).cpu()
    return total if total.any() else torch.ones_like(total)
