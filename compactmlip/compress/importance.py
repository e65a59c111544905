"""How much each channel matters for the energy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compactmlip.data.graph import MAX_EDGES, GraphBatch, batches_by_edges, collate
from compactmlip.errors import InputError
from compactmlip.models import channel_graph, model_device, model_dtype, model_spec
from compactmlip.progress import Track

Scores = dict[str, NDArray[np.float64]]
"""Score of each channel by channel-group name."""


def taylor_importance(
    model: nn.Module, graphs: Iterable[GraphBatch], *, max_edges: int = MAX_EDGES, progress: bool = False
) -> Scores:
    """First-order Taylor importance of every channel that has a feature.

    For channel c of order l (Structural Pruning, importance score)::

        I[c, l] = mean over structures of | sum over atoms i and components m of h_iclm dE/dh_iclm |

    which estimates how much the energy of a structure changes when the channel is cut.  It does not
    change when a structure is rotated.  Channels that live on edges (radial units) are summed over
    edges.

    Parameters
    ----------
    model
        A native model.
    graphs
        Calibration structures as graphs of this model.
    max_edges
        Largest batch, in edges.

    Raises
    ------
    InputError
        If there is no calibration structure.
    """
    graphs = list(graphs)
    if not graphs:
        raise InputError("importance needs at least one calibration structure.")
    groups = channel_graph(model_spec(model)).groups
    totals = {name: np.zeros(group.size) for name, group in groups.items() if group.space is not None}
    num_atoms = sum(len(g.species) for g in graphs)
    with Track("importance", num_atoms, enabled=progress) as track:
        for indices in batches_by_edges(graphs, max_edges):
            batch = collate([graphs[k] for k in indices]).to(model_device(model), model_dtype(model))
            for name, score in _batch_scores(model, batch).items():
                totals[name] += score
            track.advance(len(batch.species))
    return {name: total / len(graphs) for name, total in totals.items()}


def _batch_scores(model: nn.Module, batch: GraphBatch) -> Scores:
    """Sum over the batch's structures of |sum h dE/dh| per channel."""
    features: dict[str, Tensor] = {}

    def watch(space: str, order: int, x: Tensor) -> Tensor:
        if not x.requires_grad:
            x = x.detach().requires_grad_()
        features[f"{space}/{order}"] = x
        return x

    with torch.enable_grad():
        energies = model(batch.species, batch.centers, batch.neighbors, batch.vectors, tap=watch)
        names = list(features)
        gradients: Sequence[Tensor | None] = torch.autograd.grad(
            energies.sum(), [features[n] for n in names], allow_unused=True
        )
    structure_of_edge = batch.structure[batch.centers]
    scores = {}
    for name, gradient in zip(names, gradients, strict=True):
        feature = features[name].detach()
        if gradient is None:
            scores[name] = np.zeros(feature.shape[-1])
            continue
        product = (feature * gradient).to(torch.float64)
        if product.dim() == 3:
            product = product.sum(dim=1)
        owner = structure_of_edge if ".radial." in name else batch.structure
        total = product.new_zeros(len(batch.num_atoms), product.shape[-1]).index_add(0, owner, product)
        scores[name] = total.abs().sum(dim=0).cpu().numpy()
    return scores
