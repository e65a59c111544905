"""Which channels to keep: a target per layer and order, filled with the most important channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from compactmlip.channels import Channels, Mask, parse_channels
from compactmlip.compress.importance import Scores
from compactmlip.errors import InputError
from compactmlip.models import channel_graph
from compactmlip.models.nequip import NequIPArchitecture
from compactmlip.models.nequip_channels import path_group
from compactmlip.spec import ModelSpec


def parse_target(text: str, num_layers: int) -> list[Channels]:
    """Parse ``"64x0+32x1"`` (all layers) or one such text per layer, separated by commas.

    Raises
    ------
    InputError
        If the text is malformed or lists another number of layers.
    """
    parts = [parse_channels(part) for part in text.split(",")]
    if len(parts) == 1:
        parts *= num_layers
    if len(parts) != num_layers:
        raise InputError(f"'{text}' lists {len(parts)} layers, but the model has {num_layers}.")
    return parts


def target_sizes(
    spec: ModelSpec,
    target: Sequence[Channels],
    *,
    radial_hidden: int | None = None,
    readout_hidden: int | None = None,
    odd_paths: bool = True,
) -> dict[str, int]:
    """Number of channels to keep in each group.

    The channels of layer t's output are ``target[t]``, never more than there are; the last layer keeps
    only the orders that it has.  The embedding gets the scalars of the first layer, and the
    neighbours' features as many channels as enter the layer.  Spherical harmonics above the largest
    order of the target are dropped.  Without ``odd_paths``, so are the tensor-product paths with odd
    l1 + l2 + l3: they change sign under inversion, and without them the energy is exactly invariant.

    Raises
    ------
    InputError
        If the target has no scalars, or asks for nothing smaller than the model.
    """
    arch = NequIPArchitecture.model_validate(spec.architecture)
    if any(not channels or not channels[0] for channels in target):
        raise InputError("a target needs scalar channels in every layer, for instance 64x0+32x1.")
    sizes = {"embedding/0": min(arch.embedding, target[0][0])}
    highest = max(len(channels) - 1 for channels in target)
    for l in range(arch.lmax_edge + 1):
        sizes[f"edge_harmonics/{l}"] = int(l <= highest)
    into: Channels = (sizes["embedding/0"],)
    for t, (layer, wanted) in enumerate(zip(arch.layers, target, strict=True)):
        for l, available in enumerate(layer.up):
            if available:
                sizes[f"layers.{t}.up/{l}"] = min(available, into[l] if l < len(into) else 0)
        out = tuple(min(c, wanted[l]) if l < len(wanted) else 0 for l, c in enumerate(layer.out))
        for l, available in enumerate(layer.out):
            if available:
                sizes[f"layers.{t}.out/{l}"] = out[l]
        for k, available in enumerate(layer.radial_hidden):
            sizes[f"layers.{t}.radial.{k}/0"] = min(available, radial_hidden or available)
        if not odd_paths:
            sizes |= {path_group(t, path): int(sum(path) % 2 == 0) for path in layer.paths}
        into = out
    sizes["readout.hidden/0"] = min(arch.readout_hidden, readout_hidden or arch.readout_hidden)
    return sizes


def top_channels(spec: ModelSpec, sizes: Mapping[str, int], scores: Scores) -> dict[str, Mask]:
    """Masks that keep the ``sizes[group]`` highest-scoring channels of each group.

    Ties are broken by channel index, so that the result does not depend on the machine.
    """
    masks: dict[str, Mask] = {}
    for name, group in channel_graph(spec).groups.items():
        if name not in sizes:
            continue
        if group.space is None:
            masks[name] = np.full(group.size, bool(sizes[name]))
            continue
        order = np.argsort(-scores[name], kind="stable")
        mask = np.zeros(group.size, dtype=bool)
        mask[order[: sizes[name]]] = True
        masks[name] = mask
    return masks
