"""How much each channel matters for the energy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compactmlip.channels import Slot
from compactmlip.compress.reconstruction import reconstruction_importance
from compactmlip.compress.second_order import energy_curvature, force_curvature
from compactmlip.compress.tapped import (
    Scores,
    group_sizes,
    is_on_edges,
    require_structures,
    structure_of,
    sums,
    taylor_products,
)
from compactmlip.data.graph import MAX_EDGES, GraphBatch, batches_by_edges, collate
from compactmlip.errors import InputError, did_you_mean
from compactmlip.models import channel_graph, model_device, model_dtype, model_spec
from compactmlip.progress import Track

CRITERIA = (
    *("taylor", "taylor-atom", "fisher", "hessian", "reconstruction"),
    *("activation", "magnitude", "random"),
)
"""Ways to score channels; see :func:`importance`."""


def importance(
    model: nn.Module,
    graphs: Iterable[GraphBatch],
    criterion: str = "taylor",
    *,
    seed: int = 0,
    max_edges: int = MAX_EDGES,
    progress: bool = False,
) -> Scores:
    """Score every channel that has a feature h, by one of these criteria.

    ``taylor``
        Mean over structures of the absolute sum over atoms i and components m of h_icm dE/dh_icm: the
        first-order change of a structure's energy when the channel is cut (Structural Pruning, importance
        score).
    ``taylor-atom``
        The same with the absolute value for each atom: changes of opposite sign do not cancel.
    ``fisher``
        Mean over structures of the squared sum over atoms and components: twice the second-order change of
        the squared error of the energy, the diagonal of its Fisher information for channels that are scaled.
    ``hessian``
        The same for force components, from products with the Hessian of the energy
        (:func:`compactmlip.compress.second_order.force_curvature`); 2 to 3 times as much work.
    ``reconstruction``
        Relative squared error that is left in the layers that read the channel when they are refitted to
        the others (:func:`compactmlip.compress.reconstruction.reconstruction_importance`).
    ``activation``
        Root of the mean over structures of the sum over atoms and components of h_icm^2.
    ``magnitude``
        Norm of the weights that the channel owns, with their frozen factors; needs no structures.
    ``random``
        Uniform random numbers; needs no structures.

    No score changes when structures are rotated.  Channels of edges (spaces with ``.radial.`` in their
    name) are summed over edges, in ``taylor-atom`` over the edges of each centre.

    Parameters
    ----------
    model
        A native model.
    graphs
        Calibration structures as graphs of this model.
    criterion
        One of :data:`CRITERIA`.
    seed
        Of ``random`` and of the random vectors of ``hessian``.
    max_edges
        Largest batch, in edges.

    Raises
    ------
    InputError
        If the criterion is unknown, or there is no calibration structure and it needs some.
    """
    if criterion == "taylor":
        return taylor_importance(model, graphs, max_edges=max_edges, progress=progress)
    if criterion == "taylor-atom":
        return _mean_over_structures(model, graphs, _taylor_by_atom, max_edges, progress)
    if criterion == "fisher":
        return _mean_over_structures(model, graphs, energy_curvature, max_edges, progress)
    if criterion == "hessian":
        signs = torch.Generator().manual_seed(seed)
        return _mean_over_structures(model, graphs, partial(force_curvature, signs), max_edges, progress)
    if criterion == "reconstruction":
        return reconstruction_importance(model, list(graphs), max_edges=max_edges, progress=progress)
    if criterion == "activation":
        means = _mean_over_structures(model, graphs, _squares, max_edges, progress)
        return {name: np.sqrt(mean) for name, mean in means.items()}
    if criterion == "magnitude":
        return _magnitudes(model)
    if criterion == "random":
        generator = np.random.default_rng(seed)
        return {name: generator.random(size) for name, size in group_sizes(model).items()}
    raise InputError(
        f"unknown importance '{criterion}'; choose one of {', '.join(CRITERIA)}."
        f"{did_you_mean(criterion, CRITERIA)}"
    )


def taylor_importance(
    model: nn.Module, graphs: Iterable[GraphBatch], *, max_edges: int = MAX_EDGES, progress: bool = False
) -> Scores:
    """First-order Taylor importance, the criterion ``taylor`` of :func:`importance`."""
    return _mean_over_structures(model, graphs, _taylor_by_structure, max_edges, progress)


BatchScores = Callable[[nn.Module, GraphBatch], Scores]
"""Sums over the structures of a batch."""


def _mean_over_structures(
    model: nn.Module,
    graphs: Iterable[GraphBatch],
    batch_scores: BatchScores,
    max_edges: int,
    progress: bool,
) -> Scores:
    graphs = list(graphs)
    require_structures(graphs)
    totals = {name: np.zeros(size) for name, size in group_sizes(model).items()}
    num_atoms = sum(len(g.species) for g in graphs)
    with Track("importance", num_atoms, enabled=progress) as track:
        for indices in batches_by_edges(graphs, max_edges):
            batch = collate([graphs[k] for k in indices]).to(model_device(model), model_dtype(model))
            for name, score in batch_scores(model, batch).items():
                totals[name] += score
            track.advance(len(batch.species))
    return {name: total / len(graphs) for name, total in totals.items()}


def _taylor_by_structure(model: nn.Module, batch: GraphBatch) -> Scores:
    """Sum over structures of |sum h dE/dh|."""
    scores = {}
    for name, product in taylor_products(model, batch).items():
        scores[name] = _absolute_sums(product, structure_of(name, batch), len(batch.num_atoms))
    return scores


def _taylor_by_atom(model: nn.Module, batch: GraphBatch) -> Scores:
    """Sum over atoms of |sum over components (and the atom's edges) of h dE/dh|."""
    num_atoms = len(batch.species)
    everyone = torch.arange(num_atoms, device=batch.species.device)
    scores = {}
    for name, product in taylor_products(model, batch).items():
        owner = batch.centers if is_on_edges(name) else everyone
        scores[name] = _absolute_sums(product, owner, num_atoms)
    return scores


def _squares(model: nn.Module, batch: GraphBatch) -> Scores:
    """Sum of h^2."""
    scores: Scores = {}

    def watch(space: str, order: int, x: Tensor) -> Tensor:
        scores[f"{space}/{order}"] = x.to(torch.float64).square().flatten(0, -2).sum(dim=0).cpu().numpy()
        return x

    with torch.no_grad():
        model(batch.species, batch.centers, batch.neighbors, batch.vectors, tap=watch)
    return scores


def _absolute_sums(product: Tensor, owner: Tensor, num_owners: int) -> NDArray[np.float64]:
    """Sum rows by owner, then the owners' absolute values."""
    summed: NDArray[np.float64] = sums(product, owner, num_owners).abs().sum(dim=0).cpu().numpy()
    return summed


@torch.no_grad()
def _magnitudes(model: nn.Module) -> Scores:
    """Norm of all effective weights of the slots of each group."""
    graph, state = channel_graph(model_spec(model)), model.state_dict()
    scores = {}
    for name, size in group_sizes(model).items():
        squares = torch.zeros(size, dtype=torch.float64)
        for slot in graph.groups[name].slots:
            squares += _owned_squares(state, slot, size)
        scores[name] = squares.sqrt().numpy()
    return scores


def _owned_squares(state: dict[str, Tensor], slot: Slot, size: int) -> Tensor:
    """Sum of squares of the effective weights of each channel in one slot."""
    weight = state[slot.parameter].double().cpu()
    scale = state.get(f"{slot.parameter.rpartition('.')[0]}.scale")
    if scale is not None:
        weight = weight * scale.double().cpu()
    owned = weight.movedim(slot.axis, 0)[slot.offset : slot.offset + size * slot.block]
    return owned.reshape(size, -1).square().sum(dim=1)
