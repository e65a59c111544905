"""How much each path of the tensor products matters: one number per path, where channels have one each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from compactmlip.channels import is_path
from compactmlip.compress.tapped import require_structures
from compactmlip.data.graph import GraphBatch
from compactmlip.models import channel_graph, model_device, model_dtype, model_spec
from compactmlip.progress import Track

SHARES = 2.0
"""A path's message is the product of weights of two maps (radial network, map after the convolution): the sum
of weight times gradient over both is twice the derivative by a factor on the message."""


def path_importance(
    model: nn.Module, graphs: Sequence[GraphBatch], *, progress: bool = False
) -> dict[str, float]:
    """Mean over structures of the squared derivative of the energy by a factor on a path's message, eV^2.

    The criterion ``fisher`` of :func:`compactmlip.compress.importance.importance` for paths, which have no
    feature of their own that could be watched: the derivative is taken through their weights.

    Parameters
    ----------
    model
        A native model.
    graphs
        Structures.

    Returns
    -------
    dict
        By name of the path's channel group, for instance ``layers.1.path/0-1-1``.

    Raises
    ------
    InputError
        If there is no structure.
    """
    require_structures(graphs)
    groups = channel_graph(model_spec(model)).groups
    slots = {name: group.slots for name, group in groups.items() if is_path(name)}
    own = dict(model.named_parameters())
    used = {slot.parameter: own[slot.parameter] for parts in slots.values() for slot in parts}
    totals = dict.fromkeys(slots, 0.0)
    with Track("paths", len(graphs), "structures", enabled=progress) as track:
        for graph in graphs:
            batch = graph.to(model_device(model), model_dtype(model))
            energy = model(batch.species, batch.centers, batch.neighbors, batch.vectors).sum()
            gradients = torch.autograd.grad(energy, list(used.values()), allow_unused=True)
            with torch.no_grad():
                products = {
                    name: weight * gradient
                    for (name, weight), gradient in zip(used.items(), gradients, strict=True)
                    if gradient is not None
                }
                for name, parts in slots.items():
                    found = sum(
                        float(products[s.parameter].narrow(s.axis, s.offset, s.block).sum())
                        for s in parts
                        if s.parameter in products
                    )
                    totals[name] += (found / SHARES) ** 2
            track.advance(1)
    return {name: total / len(graphs) for name, total in totals.items()}
