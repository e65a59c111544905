"""Channel groups of the MACE family and what is left of the shape when channels are cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache

import numpy as np
import torch

from compactmlip.channels import ChannelGraph, ChannelGroup, Channels, Mask, Slot, path_group
from compactmlip.errors import InputError
from compactmlip.models.contraction import weight_key
from compactmlip.models.convolution import message_rows, radial_columns
from compactmlip.models.mace import MACE
from compactmlip.models.mace_architecture import MACEArchitecture, MACELayer, MACEReadout, Positions
from compactmlip.models.products import products
from compactmlip.spec import ModelSpec


def channel_graph(spec: ModelSpec) -> ChannelGraph:
    """Declare the groups.

    species; edge_harmonics/l; embedding/0; and per layer up/l, radial.k/0, path/..., source/0, target/0,
    inner/l (before a species map or after a gate), atomic/l (what enters the contraction), term/... (its
    products by multiset of orders), product/L (what leaves it), out/l, readout.k/0.
    """
    return _graph(spec.model_copy(update={"provenance": type(spec.provenance)()}).to_json())


@lru_cache(maxsize=8)
def _graph(text: str) -> ChannelGraph:
    spec = ModelSpec.from_json(text)
    arch = MACEArchitecture.model_validate(spec.architecture)
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in MACE(spec).state_dict().items()}
    groups = [_species_group(spec, shapes)]
    groups += [ChannelGroup(f"edge_harmonics/{l}", 1, ()) for l in range(arch.lmax_edge + 1)]
    groups.append(_stream_group(arch, 0, 0))
    for t in range(len(arch.layers)):
        groups += _LayerGroups(arch, t, shapes).all()
    return ChannelGraph.build(groups, shapes)


_SPECIES_PARTS = (
    "contraction.weights.",
    "species_map.orders.",
    "skip.orders.",
    ".source.weight",
    ".target.weight",
)


def _species_group(spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]]) -> ChannelGroup:
    """Everything that has one entry per species on its first axis."""
    count = len(spec.species)
    arch = MACEArchitecture.model_validate(spec.architecture)
    named = ["embedding.weight", "energy_scale", "energy_shift", "radial.radii"]
    named += ["repulsion.charges", "repulsion.radii"]
    slots = [Slot(name, 0) for name in named if name in shapes]
    for name in shapes:
        if not any(part in name for part in _SPECIES_PARTS) or name.endswith(".scale"):
            continue
        t = int(name.split(".")[1])
        if "contraction" in name and not arch.contraction_per_species:
            continue
        if ".skip." in name and arch.layers[t].skip != "species":
            continue
        slots.append(Slot(name, 0))
    return ChannelGroup("species", count, tuple(slots))


def _stream_name(t: int, l: int) -> str:
    """Name of the group of order-l channels that enter layer ``t``."""
    return f"embedding/{l}" if t == 0 else f"layers.{t - 1}.out/{l}"


def _stream_group(arch: MACEArchitecture, t: int, l: int) -> ChannelGroup:
    """Order-l channels that enter layer ``t`` (leave layer t - 1, or the embedding)."""
    slots, sources = [], []
    if t == 0:
        slots.append(Slot("embedding.weight", 1))
    else:
        before = arch.layers[t - 1]
        if l < len(before.product) and before.product[l]:
            slots.append(Slot(f"layers.{t - 1}.linear.orders.{l}.weight", 1))
            sources.append(f"layers.{t - 1}.product/{l}")
        if l in arch.skip_orders(t - 1):
            slots.append(Slot(f"layers.{t - 1}.skip.orders.{l}.weight", _skip_axis(before, output=True)))
            sources.append(_stream_name(t - 1, l))
        if l == 0 and before.readout is not None:
            slots.append(Slot(f"layers.{t - 1}.readout.maps.0.weight", 0))
    if t < len(arch.layers):
        layer = arch.layers[t]
        if l < len(layer.up) and layer.up[l]:
            slots.append(Slot(f"layers.{t}.interaction.up.orders.{l}.weight", 0))
        if l in arch.skip_orders(t):
            slots.append(Slot(f"layers.{t}.skip.orders.{l}.weight", _skip_axis(layer, output=False)))
    name = _stream_name(t, l)
    size = arch.channels_in(t)[l]
    return ChannelGroup(name, size, tuple(slots), name.partition("/")[0], l, requires_any=tuple(sources))


def _skip_axis(layer: MACELayer, *, output: bool) -> int:
    return int(output) + int(layer.skip == "species")


class _LayerGroups:
    """Groups of one layer."""

    def __init__(self, arch: MACEArchitecture, t: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.arch, self.t, self.layer, self.shapes = arch, t, arch.layers[t], shapes
        self.prefix = f"layers.{t}"
        self.inner = f"{self.prefix}.interaction"

    def all(self) -> Iterator[ChannelGroup]:
        yield from self._neighbors()
        yield from self._radial()
        yield from self._paths()
        yield from self._pair_embedding()
        if self.layer.has_inner:
            yield from self._inner()
        yield from self._atomic()
        yield from self._terms()
        yield from self._product()
        for l, size in enumerate(self.layer.out):
            if size:
                yield _stream_group(self.arch, self.t + 1, l)
        yield from self._readout()

    def _slots(self, *candidates: Slot) -> tuple[Slot, ...]:
        """Those whose parameter exists: orders without channels on one side have no weights."""
        return tuple(s for s in candidates if s.parameter in self.shapes)

    @property
    def _radial_out(self) -> str:
        return f"{self.inner}.convolution.radial.layers.{len(self.layer.radial_hidden)}"

    def _radial_slots(self, offset: int, block: int = 1) -> tuple[Slot, ...]:
        """Columns of the radial network's last layer, whose weights are transposed in biased networks."""
        biased = self.layer.interaction == "nonlinear"
        weight = Slot(f"{self._radial_out}.weight", 0 if biased else 1, offset, block)
        return self._slots(weight, Slot(f"{self._radial_out}.bias", 0, offset, block))

    def _neighbors(self) -> Iterator[ChannelGroup]:
        layer = self.layer
        columns, rows = radial_columns(layer.paths, layer.up), message_rows(layer.paths, layer.up)
        for l, size in enumerate(layer.up):
            if not size:
                continue
            residual = f"{self.inner}.residual.orders.{l}.weight"
            slots = self._slots(Slot(f"{self.inner}.up.orders.{l}.weight", 1), Slot(residual, 0))
            readers = [path_group(self.t, p) for p in layer.paths if p[0] == l]
            if residual in self.shapes:
                readers += self._made_from(l)
            for path in layer.paths:
                if path[0] == l:
                    slots += self._radial_slots(columns[path].start)
                    slots += (Slot(f"{self.inner}.down.orders.{path[2]}.weight", 0, rows[path].start),)
            yield ChannelGroup(
                f"{self.prefix}.up/{l}",
                size,
                slots,
                f"{self.prefix}.up",
                l,
                requires=(_stream_name(self.t, l),),
                requires_any=tuple(readers),
            )

    def _radial(self) -> Iterator[ChannelGroup]:
        if self.layer.interaction == "nonlinear":
            return
        weights = f"{self.inner}.convolution.radial.layers"
        for k, size in enumerate(self.layer.radial_hidden):
            slots = (Slot(f"{weights}.{k}.weight", 1), Slot(f"{weights}.{k + 1}.weight", 0))
            yield ChannelGroup(f"{self.prefix}.radial.{k}/0", size, slots, f"{self.prefix}.radial.{k}")

    def _made_from(self, l: int) -> tuple[str, ...]:
        """Groups that live on order l after the convolution; scalars also make the gates of all orders."""
        name = f"{self.prefix}.{'inner' if self.layer.has_inner else 'atomic'}"
        gates = l == 0 and self.layer.interaction == "nonlinear"
        return tuple(f"{name}/{k}" for k in (_present(self.layer.down) if gates else (l,)))

    def _paths(self) -> Iterator[ChannelGroup]:
        layer = self.layer
        columns, rows = radial_columns(layer.paths, layer.up), message_rows(layer.paths, layer.up)
        for path in layer.paths:
            width = layer.up[path[0]]
            slots = self._radial_slots(columns[path].start, width)
            slots += (Slot(f"{self.inner}.down.orders.{path[2]}.weight", 0, rows[path].start, width),)
            requires = (f"{self.prefix}.up/{path[0]}", f"edge_harmonics/{path[1]}")
            made = self._made_from(path[2])
            yield ChannelGroup(path_group(self.t, path), 1, slots, requires=requires, requires_any=made)

    def _pair_embedding(self) -> Iterator[ChannelGroup]:
        if self.layer.pair_embedding is None:
            return
        offset = self.arch.num_basis
        for name, size in zip(("source", "target"), self.layer.pair_embedding, strict=True):
            slots = (
                Slot(f"{self.inner}.{name}.weight", 1),
                Slot(f"{self.inner}.convolution.radial.layers.0.weight", 1, offset),
                Slot(f"{self.inner}.density_network.layers.0.weight", 1, offset),
            )
            yield ChannelGroup(f"{self.prefix}.{name}/0", size, slots, f"{self.prefix}.{name}")
            offset += size

    def _produced(self, l: int, channels: Channels) -> tuple[Slot, ...]:
        """Columns of the maps after the convolution that make order l, with its gates if there are any."""
        maps = [f"{self.inner}.down.orders.{{}}.weight", f"{self.inner}.residual.orders.{{}}.weight"]
        slots = [Slot(m.format(l), 1) for m in maps]
        if self.layer.interaction == "nonlinear" and l > 0:
            slots += [Slot(m.format(0), 1, sum(channels[:l])) for m in maps]
        return self._slots(*slots)

    def _inner(self) -> Iterator[ChannelGroup]:
        for l, size in enumerate(self.layer.inner):
            if not size:
                continue
            slots = self._produced(l, self.layer.inner) + self._slots(
                Slot(f"{self.inner}.mix.orders.{l}.weight", 0),
                Slot(f"{self.inner}.species_map.orders.{l}.weight", 1),
            )
            fed: tuple[str, ...] = tuple(path_group(self.t, p) for p in self.layer.paths if p[2] == l)
            if self.layer.interaction == "nonlinear" and l < len(self.layer.up) and self.layer.up[l]:
                fed += (f"{self.prefix}.up/{l}",)
            needed = (f"{self.prefix}.atomic/{l}",)
            name = f"{self.prefix}.inner"
            yield ChannelGroup(f"{name}/{l}", size, slots, name, l, requires=needed, requires_any=fed)

    def _atomic(self) -> Iterator[ChannelGroup]:
        for l, size in enumerate(self.layer.atomic):
            if not size:
                continue
            fed: tuple[str, ...]
            if self.layer.has_inner:
                fed = (f"{self.prefix}.inner/{l}",)
                slots = self._slots(
                    Slot(f"{self.inner}.mix.orders.{l}.weight", 1),
                    Slot(f"{self.inner}.species_map.orders.{l}.weight", 2),
                )
            else:
                fed = tuple(path_group(self.t, p) for p in self.layer.paths if p[2] == l)
                slots = self._produced(l, self.layer.atomic)
            name = f"{self.prefix}.atomic"
            yield ChannelGroup(f"{name}/{l}", size, slots, name, l, requires_any=fed)

    def _term_name(self, output: int, degree: int, multiset: tuple[int, ...]) -> str:
        return f"{self.prefix}.term/{output}-{degree}-{'.'.join(map(str, multiset))}"

    def _multisets(self) -> Iterator[tuple[int, int, list[tuple[int, ...]]]]:
        """For each output order and degree: the multiset of each weight along axis 1."""
        orders = _present(self.layer.atomic)
        for output in _present(self.layer.product):
            for degree in range(1, self.layer.correlation + 1):
                table = products(orders, output, degree)
                by_path = self.arch.contraction == "paths"
                yield output, degree, list(table.path_multisets if by_path else table.multisets)

    def _terms(self) -> Iterator[ChannelGroup]:
        """One group per multiset of orders: its weights die when one of these orders is cut."""
        for output, degree, multisets in self._multisets():
            parameter = f"{self.prefix}.contraction.weights.{weight_key(output, degree)}"
            for multiset in sorted(set(multisets)):
                slots = tuple(Slot(parameter, 1, k) for k, m in enumerate(multisets) if m == multiset)
                requires = [f"{self.prefix}.atomic/{l}" for l in sorted(set(multiset))]
                yield ChannelGroup(
                    self._term_name(output, degree, multiset),
                    1,
                    slots,
                    requires=(*requires, f"{self.prefix}.product/{output}"),
                )

    def _product(self) -> Iterator[ChannelGroup]:
        slots: dict[int, tuple[Slot, ...]] = {}
        sources: dict[int, list[str]] = {}
        for output, degree, multisets in self._multisets():
            parameter = f"{self.prefix}.contraction.weights.{weight_key(output, degree)}"
            slots[output] = slots.get(output, ()) + self._slots(Slot(parameter, 2))
            names = [self._term_name(output, degree, m) for m in sorted(set(multisets))]
            sources.setdefault(output, []).extend(names)
        for l in _present(self.layer.product):
            own = slots[l] + self._slots(Slot(f"{self.prefix}.linear.orders.{l}.weight", 0))
            name = f"{self.prefix}.product"
            yield ChannelGroup(
                f"{name}/{l}",
                self.layer.product[l],
                own,
                name,
                l,
                requires=(f"{self.prefix}.out/{l}",),
                requires_any=tuple(sources[l]),
            )

    def _readout(self) -> Iterator[ChannelGroup]:
        if self.layer.readout is None:
            return
        for k, size in enumerate(self.layer.readout.hidden):
            name = f"{self.prefix}.readout.{k}"
            maps = f"{self.prefix}.readout.maps"
            slots = [Slot(f"{maps}.{k}.weight", 1), Slot(f"{maps}.{k + 1}.weight", 0)]
            if k:
                slots.append(Slot(f"{self.prefix}.readout.biases.{k - 1}", 0))
            yield ChannelGroup(f"{name}/0", size, tuple(slots), name)


def _present(channels: Channels) -> tuple[int, ...]:
    return tuple(l for l, size in enumerate(channels) if size)


def pruned_spec(spec: ModelSpec, masks: Mapping[str, Mask]) -> ModelSpec:
    """Spec of the model that keeps the masked-in channels (masks as from ``ChannelGraph.complete``).

    Raises
    ------
    InputError
        If no species, no embedding channel, or no scalar, contraction channel or radial unit of a layer
        is left.
    """
    arch = MACEArchitecture.model_validate(spec.architecture)
    left = {name: int(np.count_nonzero(mask)) for name, mask in masks.items()}
    for name in ("species", "embedding/0"):
        if not left[name]:
            raise InputError(f"pruning would leave nothing of '{name}'; keep at least one.")
    layers = tuple(_pruned_layer(layer, f"layers.{t}", masks, left) for t, layer in enumerate(arch.layers))
    update = {
        "embedding": left["embedding/0"],
        "layers": layers,
        "lmax_edge": max(path[1] for layer in layers for path in layer.paths),
    }
    smaller = arch.model_copy(update=update)
    species = tuple(s for s, keep in zip(spec.species, masks["species"], strict=True) if keep)
    changed = {"architecture": smaller.model_dump(mode="json"), "species": species}
    return ModelSpec.model_validate({**spec.model_dump(), **changed})


def _pruned_layer(
    layer: MACELayer, prefix: str, masks: Mapping[str, Mask], left: Mapping[str, int]
) -> MACELayer:
    def sizes(space: str, channels: Channels) -> Channels:
        return _trim([left.get(f"{prefix}.{space}/{l}", 0) for l in range(len(channels))])

    paths = tuple(p for p in layer.paths if left[f"{prefix}.path/{p[0]}-{p[1]}-{p[2]}"])
    out, up = sizes("out", layer.out), sizes("up", layer.up)
    hidden = layer.radial_hidden
    if layer.interaction != "nonlinear":
        hidden = tuple(left[f"{prefix}.radial.{k}/0"] for k in range(len(hidden)))
    update: dict[str, object] = {"up": up, "paths": paths, "radial_hidden": hidden, "out": out}
    update["inner"] = sizes("inner", layer.inner)
    if layer.pair_embedding is not None:
        update["pair_embedding"] = (left[f"{prefix}.source/0"], left[f"{prefix}.target/0"])
    update |= _pruned_contraction(layer, prefix, masks)
    if layer.readout is not None:
        units = tuple(left[f"{prefix}.readout.{k}/0"] for k in range(len(layer.readout.hidden)))
        if not all(units):
            raise InputError(
                f"pruning would leave nothing of the readout of {prefix}; keep at least one unit."
            )
        update["readout"] = MACEReadout(kind=layer.readout.kind, hidden=units)
    if layer.interaction == "nonlinear" and not (up and up[0]) and not any(p[2] == 0 for p in paths):
        raise InputError(f"pruning would leave the gates of {prefix} without scalars to be made from.")
    embedded = update.get("pair_embedding") or (1, 1)
    if not (out and out[0]) or not paths or not all(hidden) or not all(embedded):  # type: ignore[arg-type]
        raise InputError(f"pruning would leave {prefix} without scalars, paths, embeddings or radial units.")
    return MACELayer.model_validate({**layer.model_dump(), **update})


def _pruned_contraction(layer: MACELayer, prefix: str, masks: Mapping[str, Mask]) -> dict[str, object]:
    """Channels of the contraction that are still used on either side, and who uses which."""
    kept: dict[str, dict[int, list[int]]] = {"atomic": {}, "product": {}}
    for space, channels, positions in (
        ("atomic", layer.atomic, layer.atomic_positions),
        ("product", layer.product, layer.product_positions),
    ):
        for l in _present(channels):
            places = positions.get(l, tuple(range(layer.width)))
            mask = masks[f"{prefix}.{space}/{l}"]
            chosen = [place for place, keep in zip(places, mask, strict=True) if keep]
            if chosen:
                kept[space][l] = chosen
    used = sorted({place for side in kept.values() for places in side.values() for place in places})
    if not kept["atomic"] or not kept["product"]:
        raise InputError(f"pruning would leave nothing of the contraction of {prefix}.")
    new = {place: k for k, place in enumerate(used)}
    result: dict[str, object] = {"width": len(used)}
    for space, side in kept.items():
        result[space] = _trim([len(side.get(l, [])) for l in range(max(side) + 1)])
        positions_left: Positions = {
            l: tuple(new[p] for p in places) for l, places in side.items() if len(places) < len(used)
        }
        result[f"{space}_positions"] = positions_left
    return result


def _trim(channels: list[int]) -> Channels:
    """Drop trailing orders without channels."""
    counts = list(channels)
    while counts and not counts[-1]:
        counts.pop()
    return tuple(counts)
