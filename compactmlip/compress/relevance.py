"""How much each layer matters, for the choice of depth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from compactmlip.compress.tapped import group_sizes, taylor_products
from compactmlip.data.graph import MAX_EDGES, GraphBatch, batches_by_edges, collate
from compactmlip.errors import InputError
from compactmlip.models import model_device, model_dtype, model_spec


def layer_relevance(
    model: nn.Module, graphs: Sequence[GraphBatch], *, max_edges: int = MAX_EDGES
) -> list[float]:
    """Relevance of each layer's output, adding up to one.

    GradCAM on blocks: the positive part of feature times gradient, here of the energy (a teacher's loss on
    its own labels has none), for each atom and channel with its components summed, so that rotations do not
    change it; averaged over atoms and channels.  Layers are cut from the end, so the relevance of the last
    ones says what a shallower model would lose at most.

    Raises
    ------
    InputError
        If there is no structure.
    """
    if not graphs:
        raise InputError("the relevance of layers needs at least one calibration structure.")
    num_layers = model_spec(model).num_message_passing_layers
    sizes = group_sizes(model)
    totals = np.zeros(num_layers)
    for indices in batches_by_edges(graphs, max_edges):
        batch = collate([graphs[k] for k in indices]).to(model_device(model), model_dtype(model))
        products = taylor_products(model, batch)
        for t in range(num_layers):
            outputs = [p for name, p in products.items() if name.startswith(f"layers.{t}.out/")]
            channels = sum(sizes[name] for name in products if name.startswith(f"layers.{t}.out/"))
            positive = torch.cat([p.clamp(min=0).sum(dim=1, keepdim=True) for p in outputs], dim=1)
            totals[t] += float(positive.sum()) / max(channels, 1)
    total = totals.sum()
    return [float(x) for x in (totals / total if total > 0 else totals)]
