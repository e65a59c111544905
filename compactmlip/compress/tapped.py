"""Features of a model as its taps see them, and sums over what they belong to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compactmlip.data.graph import GraphBatch
from compactmlip.errors import InputError
from compactmlip.models import channel_graph, model_spec

Scores = dict[str, NDArray[np.float64]]
"""Score of each channel by channel-group name."""


def require_structures(graphs: Sequence[GraphBatch]) -> None:
    """Refuse to score anything without structures.

    Raises
    ------
    InputError
        If there is none.
    """
    if not graphs:
        raise InputError("importance needs at least one calibration structure.")


def group_sizes(model: nn.Module) -> dict[str, int]:
    """Number of channels of each group that has a feature."""
    groups = channel_graph(model_spec(model)).groups
    return {name: group.size for name, group in groups.items() if group.space is not None}


def is_on_edges(name: str) -> bool:
    """Whether a group's feature belongs to edges."""
    return ".radial." in name


def structure_of(name: str, batch: GraphBatch) -> Tensor:
    """Structure that each row of a group's feature belongs to."""
    return batch.structure[batch.centers] if is_on_edges(name) else batch.structure


def sums(product: Tensor, owner: Tensor, num_owners: int) -> Tensor:
    """Sum rows (n, channels) by owner."""
    return product.new_zeros(num_owners, product.shape[-1]).index_add(0, owner, product)


def taylor_products(model: nn.Module, batch: GraphBatch) -> dict[str, Tensor]:
    """Sum over components of h dE/dh, (n, channels) in float64, by channel-group name."""
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
    products = {}
    for name, gradient in zip(names, gradients, strict=True):
        feature = features[name].detach()
        product = (feature * (torch.zeros_like(feature) if gradient is None else gradient)).to(torch.float64)
        products[name] = product.sum(dim=1) if product.dim() == 3 else product
    return products
