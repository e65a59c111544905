"""Channel groups of the NequIP family and what is left of the shape when channels are cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from compactmlip.channels import ChannelGraph, ChannelGroup, Channels, Mask, Slot, path_group
from compactmlip.errors import InputError
from compactmlip.models.convolution import message_rows, radial_columns
from compactmlip.models.nequip import NequIP, NequIPArchitecture, NequIPLayer
from compactmlip.spec import ModelSpec


def channel_graph(spec: ModelSpec) -> ChannelGraph:
    """Declare the groups: species, edge orders, and per layer up, radial, paths, out; readout."""
    arch = NequIPArchitecture.model_validate(spec.architecture)
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in NequIP(spec).state_dict().items()}
    groups = [_species_group(spec, arch)]
    groups += [ChannelGroup(f"edge_harmonics/{l}", 1, ()) for l in range(arch.lmax_edge + 1)]
    groups.append(_stream_group(arch, 0, 0))
    for t in range(len(arch.layers)):
        groups += _layer_groups(arch, t)
    hidden: tuple[Slot, ...] = (Slot("readout_hidden.orders.0.weight", 1), Slot("readout.weight", 0))
    if arch.readout_bias:
        hidden += (Slot("readout_hidden.bias", 0),)
    groups.append(ChannelGroup("readout.hidden/0", arch.readout_hidden, hidden, "readout.hidden"))
    return ChannelGraph.build(groups, shapes)


def _species_group(spec: ModelSpec, arch: NequIPArchitecture) -> ChannelGroup:
    slots = [Slot("embedding.weight", 0), Slot("energy_scale", 0), Slot("energy_shift", 0)]
    if arch.self_connection == "species":
        for t in range(len(arch.layers)):
            slots += [Slot(f"layers.{t}.skip.orders.{l}.weight", 0) for l in _skip_orders(arch, t)]
    return ChannelGroup("species", len(spec.species), tuple(slots))


def _skip_orders(arch: NequIPArchitecture, t: int) -> list[int]:
    """Orders that the self-connection of layer ``t`` carries over."""
    if arch.self_connection == "none":
        return []
    out, into = arch.layers[t].out, arch.channels_in(t)
    return [l for l in range(min(len(out), len(into))) if into[l] and (out[l] or (l == 0 and sum(out)))]


def _stream_group(arch: NequIPArchitecture, t: int, l: int) -> ChannelGroup:
    """Order-l channels that enter layer ``t`` (leave layer t - 1, or the embedding)."""
    size = arch.channels_in(t)[l]
    slots: list[Slot] = []
    slots += [Slot("embedding.weight", 1)] if t == 0 else _produced_by(arch, t - 1, l)
    if t == len(arch.layers):
        if l == 0:
            slots.append(Slot("readout_hidden.orders.0.weight", 0))
    else:
        if l < len(arch.layers[t].up) and arch.layers[t].up[l]:
            slots.append(Slot(f"layers.{t}.up.orders.{l}.weight", 0))
        if l in _skip_orders(arch, t):
            axis = 1 if arch.self_connection == "species" else 0
            slots.append(Slot(f"layers.{t}.skip.orders.{l}.weight", axis))
    name = _stream_name(t, l)
    space = name.partition("/")[0]
    return ChannelGroup(name, size, tuple(slots), space, l, requires_any=_sources(arch, t, l))


def _sources(arch: NequIPArchitecture, t: int, l: int) -> tuple[str, ...]:
    """Groups of which at least one must live for order l to enter layer ``t``."""
    if t == 0:
        return ()
    sources = [path_group(t - 1, p) for p in arch.layers[t - 1].paths if p[2] == l]
    if l in _skip_orders(arch, t - 1):
        sources.append(_stream_name(t - 1, l))
    return tuple(sources)


def _stream_name(t: int, l: int) -> str:
    """Name of the group of order-l channels that enter layer ``t``."""
    return f"embedding/{l}" if t == 0 else f"layers.{t - 1}.out/{l}"


def _produced_by(arch: NequIPArchitecture, t: int, l: int) -> Iterator[Slot]:
    """Output columns of ``down`` and ``skip`` of layer ``t`` for order l, and its gates."""
    layer = arch.layers[t]
    fed = {p[2] for p in layer.paths}
    columns = [(l, 0), (0, sum(layer.out[:l]))] if l else [(0, 0)]
    for order, offset in columns:
        if order in fed:
            yield Slot(f"layers.{t}.down.orders.{order}.weight", 1, offset)
        if order in _skip_orders(arch, t):
            axis = 2 if arch.self_connection == "species" else 1
            yield Slot(f"layers.{t}.skip.orders.{order}.weight", axis, offset)
        if order == 0 and layer.down_bias:
            yield Slot(f"layers.{t}.down.bias", 0, offset)


def _layer_groups(arch: NequIPArchitecture, t: int) -> Iterator[ChannelGroup]:
    layer, into = arch.layers[t], arch.channels_in(t)
    prefix = f"layers.{t}"
    columns, rows = radial_columns(layer.paths, layer.up), message_rows(layer.paths, layer.up)
    radial_out = f"{prefix}.convolution.radial.layers.{len(layer.radial_hidden)}.weight"
    for l, size in enumerate(layer.up):
        if not size:
            continue
        slots = [Slot(f"{prefix}.up.orders.{l}.weight", 1)] if l < len(into) and into[l] else []
        if l == 0 and layer.up_bias:
            slots.append(Slot(f"{prefix}.up.bias", 0))
        for path in layer.paths:
            if path[0] == l:
                slots.append(Slot(radial_out, 1, columns[path].start))
                slots.append(Slot(f"{prefix}.down.orders.{path[2]}.weight", 0, rows[path].start))
        yield ChannelGroup(
            f"{prefix}.up/{l}",
            size,
            tuple(slots),
            f"{prefix}.up",
            l,
            requires=(_stream_name(t, l),),
            requires_any=tuple(path_group(t, p) for p in layer.paths if p[0] == l),
        )
    for k, size in enumerate(layer.radial_hidden):
        weights = f"{prefix}.convolution.radial.layers"
        slots = [Slot(f"{weights}.{k}.weight", 1), Slot(f"{weights}.{k + 1}.weight", 0)]
        yield ChannelGroup(f"{prefix}.radial.{k}/0", size, tuple(slots), f"{prefix}.radial.{k}")
    for path in layer.paths:
        width = layer.up[path[0]]
        yield ChannelGroup(
            path_group(t, path),
            1,
            (
                Slot(radial_out, 1, columns[path].start, width),
                Slot(f"{prefix}.down.orders.{path[2]}.weight", 0, rows[path].start, width),
            ),
            requires=(f"{prefix}.up/{path[0]}", f"edge_harmonics/{path[1]}", f"{prefix}.out/{path[2]}"),
        )
    for l, size in enumerate(layer.out):
        if size:
            yield _stream_group(arch, t + 1, l)


def pruned_spec(spec: ModelSpec, masks: Mapping[str, Mask]) -> ModelSpec:
    """Spec of the model that keeps the masked-in channels (masks as from ``ChannelGraph.complete``).

    Raises
    ------
    InputError
        If no species, no embedding channel or no scalar of the last layer is left, or a layer is empty.
    """
    arch = NequIPArchitecture.model_validate(spec.architecture)
    left = {name: int(np.count_nonzero(mask)) for name, mask in masks.items()}
    for name in ("species", "embedding/0", "readout.hidden/0", f"layers.{len(arch.layers) - 1}.out/0"):
        if not left[name]:
            raise InputError(f"pruning would leave nothing of '{name}'; keep at least one.")
    layers = []
    for t, layer in enumerate(arch.layers):
        paths = tuple(p for p in layer.paths if left[path_group(t, p)])
        out = _trim(left.get(f"layers.{t}.out/{l}", 0) for l in range(len(layer.out)))
        hidden = tuple(left[f"layers.{t}.radial.{k}/0"] for k in range(len(layer.radial_hidden)))
        used = {p[0] for p in paths}
        up = _trim(left.get(f"layers.{t}.up/{l}", 0) if l in used else 0 for l in range(len(layer.up)))
        if not (out and out[0]) or not paths or not all(hidden):
            raise InputError(f"pruning would leave layer {t} without scalars, paths or radial units.")
        layers.append(
            NequIPLayer.model_validate(
                {**layer.model_dump(), "up": up, "paths": paths, "radial_hidden": hidden, "out": out}
            )
        )
    lmax_edge = max(p[1] for layer in layers for p in layer.paths)
    smaller = arch.model_copy(
        update={
            "embedding": left["embedding/0"],
            "layers": tuple(layers),
            "lmax_edge": lmax_edge,
            "readout_hidden": left["readout.hidden/0"],
        }
    )
    species = tuple(s for s, keep in zip(spec.species, masks["species"], strict=True) if keep)
    update = {"architecture": smaller.model_dump(mode="json"), "species": species}
    return ModelSpec.model_validate({**spec.model_dump(), **update})


def _trim(channels: Iterator[int]) -> Channels:
    """Drop trailing orders without channels."""
    counts = list(channels)
    while counts and not counts[-1]:
        counts.pop()
    return tuple(counts)
