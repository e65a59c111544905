"""Whether a native MACE model has the shape that mace-torch can build, and with which arguments.

Upstream has one channel count for every order and layer, the same networks in every layer and all orders
of the spherical harmonics everywhere; only what neighbours send may be narrower.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from compactmlip.channels import Channels, format_channels
from compactmlip.errors import UnsupportedFeatureError
from compactmlip.families.mace_config import INTERACTIONS, READOUTS
from compactmlip.models.mace_architecture import MACEArchitecture, MACELayer, MACEReadout, upstream_layer
from compactmlip.models.radial import PolynomialEnvelope
from compactmlip.spec import ModelSpec

_FIELDS = {
    "up": "channels that neighbours send",
    "paths": "paths of the convolution",
    "radial_hidden": "hidden units of the radial network",
    "density_hidden": "hidden units of the density network",
    "pair_embedding": "species embeddings of the edges",
    "inner": "channels after the convolution",
    "width": "width of the contraction",
    "atomic": "channels that enter the contraction",
    "product": "channels that leave the contraction",
    "out": "channels of the output",
    "readout": "readout",
}
"""What a layer must share with the others, in the order in which differences are reported."""

_DENSITY_HIDDEN = (64,)
_DEFAULT_READOUT_UNITS = 16
_TRANSFORMS = {"agnesi": "Agnesi", "soft": "Soft"}


def nearest_uniform_target(spec: ModelSpec) -> str:
    """Largest target for ``compactmlip prune --to`` that is uniform and asks for no more than there is.

    The smallest channel count of any order and layer, for all orders that every layer has (the last one
    may have scalars only).

    Parameters
    ----------
    spec
        Of a MACE model.

    Returns
    -------
    str
        For instance ``"16x0+16x1"``.
    """
    arch = MACEArchitecture.model_validate(spec.architecture)
    orders = _hidden_orders(arch)
    smallest = min(_counts(arch, orders))
    return format_channels(smallest if l in orders else 0 for l in range(max(orders) + 1))


def _hidden_orders(arch: MACEArchitecture) -> list[int]:
    """Orders of the hidden features that all layers share."""
    chosen = [layer for layer in arch.layers[:-1] if layer.out]
    if not chosen or _present(arch.layers[-1].out) != [0]:
        chosen.append(arch.layers[-1])
    return sorted(set.intersection(*(set(_present(layer.out)) for layer in chosen)))


def _counts(arch: MACEArchitecture, orders: list[int]) -> Iterator[int]:
    """All channel counts that upstream has only one number for."""
    yield arch.embedding
    for layer in arch.layers:
        yield from (size for size in (*layer.inner, *layer.atomic) if size)
        for channels in (layer.out, layer.product):
            yield from (size for l, size in enumerate(channels) if size and l in orders)


def _present(channels: Channels) -> list[int]:
    return [l for l, size in enumerate(channels) if size]


def constructor_arguments(spec: ModelSpec, avg_num_neighbors: float) -> dict[str, Any]:
    """Arguments of upstream's ``ScaleShiftMACE`` as plain values: classes by name, irreps as text.

    Energies, scale and shift are left out.

    Raises
    ------
    UnsupportedFeatureError
        If upstream cannot build a model of this shape; the message lists every reason and, where cutting
        helps, the nearest uniform target.
    """
    arch = MACEArchitecture.model_validate(spec.architecture)
    hidden = _hidden(arch)
    uniform, other = list(_differences(arch, hidden)), list(_other_reasons(arch))
    if uniform or other:
        raise UnsupportedFeatureError(_refusal(spec, arch, uniform, other))
    return _arguments(spec, arch, hidden, avg_num_neighbors)


def _arguments(
    spec: ModelSpec, arch: MACEArchitecture, hidden: Channels, avg_num_neighbors: float
) -> dict[str, Any]:
    from ase.data import atomic_numbers

    first, last = arch.layers[0], arch.layers[-1]
    assert last.readout is not None
    readouts = {kind: name for name, kind in READOUTS.items()}
    edge = _edge_channels(arch)
    return {
        "model": "ScaleShiftMACE",
        "r_max": spec.cutoff,
        "num_bessel": arch.num_basis,
        "num_polynomial_cutoff": arch.envelope.p,  # type: ignore[union-attr]
        "max_ell": arch.lmax_edge,
        "interaction_cls": _interaction(arch.layers[min(1, len(arch.layers) - 1)]),
        "interaction_cls_first": _interaction(first),
        "num_interactions": len(arch.layers),
        "num_elements": len(spec.species),
        "hidden_irreps": irreps_text(hidden),
        "MLP_irreps": irreps_text(last.readout.hidden[:1] or (_DEFAULT_READOUT_UNITS,)),
        "avg_num_neighbors": avg_num_neighbors,
        "atomic_numbers": [int(atomic_numbers[symbol]) for symbol in spec.species],
        "correlation": _one_or_list([layer.correlation for layer in arch.layers]),
        "gate": "silu",
        "pair_repulsion": arch.repulsion is not None,
        "apply_cutoff": arch.envelope_on_basis,
        "use_reduced_cg": False,
        "use_agnostic_product": not arch.contraction_per_species,
        "use_last_readout_only": len(arch.layers) > 1 and first.readout is None,
        "distance_transform": "None" if arch.transform is None else _TRANSFORMS[arch.transform.kind],
        "edge_irreps": None if edge is None else irreps_text(edge),
        "use_edge_irreps_first": edge is not None and first.up[0] == edge[0],
        "radial_MLP": list(first.radial_hidden),
        "radial_type": arch.basis,
        "heads": ["Default"],
        "readout_cls": readouts[last.readout.kind] if len(arch.layers) > 1 else "NonLinearReadoutBlock",
        "keep_last_layer_irreps": len(arch.layers) > 1 and len(last.out) > 1,
    }


def irreps_text(channels: Channels) -> str:
    """Channels per order in e3nn's notation, with natural parity."""
    return "+".join(f"{size}x{l}{'eo'[l % 2]}" for l, size in enumerate(channels) if size)


def _one_or_list(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values


def _interaction(layer: MACELayer) -> str | None:
    """Upstream class of a layer's interaction, if there is one."""
    own = (layer.interaction, layer.species_map, layer.skip)
    for name, kind in INTERACTIONS.items():
        if own == (kind["interaction"], kind.get("species_map", False), kind["skip"]):
            return name
    return None


def _hidden(arch: MACEArchitecture) -> Channels:
    """What upstream's hidden irreps would be: the orders of the first layer, the most frequent count."""
    orders = _present(arch.layers[0].out) if len(arch.layers) > 1 else [0]
    count = Counter(_counts(arch, orders)).most_common(1)[0][0]
    return tuple(count if l in orders else 0 for l in range(max(orders) + 1))


def _edge_channels(arch: MACEArchitecture) -> Channels | None:
    """Upstream's edge irreps; None where neighbours send as many channels as enter a layer."""
    if all(layer.up == arch.channels_in(t) for t, layer in enumerate(arch.layers)):
        return None
    return arch.layers[min(1, len(arch.layers) - 1)].up


def _differences(arch: MACEArchitecture, hidden: Channels) -> Iterator[str]:
    """What cutting channels can make uniform."""
    if arch.embedding != hidden[0]:
        yield f"embedding: {arch.embedding} channels instead of {hidden[0]}"
    for t, layer in enumerate(arch.layers):
        expected = _uniform_layer(arch, t, hidden)
        for name, what in _FIELDS.items():
            found, wanted = getattr(layer, name), getattr(expected, name)
            if found != wanted:
                yield f"layer {t}, {what}: {_shown(name, found, wanted)}"


def _uniform_layer(arch: MACEArchitecture, t: int, hidden: Channels) -> MACELayer:
    """The layer that upstream would build in this place."""
    layer, last = arch.layers[t], t == len(arch.layers) - 1
    into = hidden[:1] if t == 0 else hidden
    made = upstream_layer(
        into,
        width=hidden[0],
        out=hidden[:1] if last and (t == 0 or len(layer.out) == 1) else hidden,
        up=_uniform_up(arch, t, into),
        lmax_edge=arch.lmax_edge,
        correlation=layer.correlation,
        radial_hidden=arch.layers[0].radial_hidden,
        interaction=layer.interaction,
        species_map=layer.species_map,
        skip=layer.skip,
        readout=_uniform_readout(layer.readout),
    )
    return made.model_copy(update={"density_hidden": _DENSITY_HIDDEN if made.density_hidden else ()})


def _uniform_up(arch: MACEArchitecture, t: int, into: Channels) -> Channels:
    """Neighbours send what enters, or the same in all layers from the second on (and its scalars before)."""
    edge = _edge_channels(arch)
    if edge is None:
        return into
    own = arch.layers[t].up
    if t == 0:
        return own if own in (into, edge[:1]) else into
    return edge


def _uniform_readout(readout: MACEReadout | None) -> MACEReadout | None:
    """Both hidden layers of a readout with two have the same size."""
    if readout is None or len(readout.hidden) < 2:
        return readout
    return MACEReadout(kind=readout.kind, hidden=(min(readout.hidden),) * len(readout.hidden))


def _shown(name: str, found: Any, wanted: Any) -> str:
    if name == "paths":
        lacking = sorted(set(wanted) - set(found))
        odd = sorted(set(found) - set(wanted))
        parts = [f"{what} {paths}" for what, paths in (("lacks", lacking), ("has besides", odd)) if paths]
        return " and ".join(parts)
    if name in ("up", "inner", "atomic", "product", "out"):
        return f"{format_channels(found)} instead of {format_channels(wanted)}"
    if name == "readout":
        return f"hidden units {found.hidden} instead of {wanted.hidden}"
    return f"{found} instead of {wanted}"


def _other_reasons(arch: MACEArchitecture) -> Iterator[str]:
    """What no cutting can change."""
    layers = arch.layers
    if not isinstance(arch.envelope, PolynomialEnvelope):
        yield f"the cutoff function is {arch.envelope.kind} instead of polynomial"
    if arch.basis == "chebyshev":
        why = "torch has no derivative of them, so that upstream's forces are wrong"
        yield f"the radial basis is made of Chebyshev polynomials: {why}"
    kinds = [_interaction(layer) for layer in layers]
    for t, kind in enumerate(kinds):
        if kind is None:
            yield f"layer {t}: upstream has no interaction block of this kind"
        elif t > 1 and kind != kinds[1]:
            yield f"layer {t}: another interaction block ({kind}) than layer 1 ({kinds[1]})"
    if max(len(layer.out) for layer in layers) > arch.lmax_edge + 1:
        yield f"features have orders above those of the spherical harmonics ({arch.lmax_edge})"
    yield from _readout_reasons([layer.readout for layer in layers])


def _readout_reasons(readouts: list[MACEReadout | None]) -> Iterator[str]:
    *inner, last = [None if readout is None else readout.kind for readout in readouts]
    wanted = ("nonlinear", "biased") if inner else ("linear",)
    if last not in wanted:
        instead = f"instead of a {' or '.join(wanted)} one"
        yield f"the last of {len(readouts)} layers has a {last} readout {instead}"
    if len(set(inner)) > 1 or (inner and inner[0] not in (None, "linear")):
        yield f"layers before the last have readouts {inner}, not all linear or all none"


def _refusal(spec: ModelSpec, arch: MACEArchitecture, uniform: list[str], other: list[str]) -> str:
    reasons = "".join(f"\n  - {reason}" for reason in (*uniform, *other))
    text = f"mace-torch cannot hold this model, as all its layers and orders have one shape:{reasons}"
    if not uniform or other:
        return text
    target, options = nearest_uniform_target(spec), ""
    sizes = [layer.radial_hidden for layer in arch.layers]
    if len(set(sizes)) > 1:
        options += f" --radial-hidden {min(min(hidden) for hidden in sizes)}"
    readout = arch.layers[-1].readout
    if readout is not None and len(set(readout.hidden)) > 1:
        options += f" --readout-hidden {min(readout.hidden)}"
    command = f"compactmlip prune MODEL --to {target}{options} --calibration STRUCTURES"
    return f"{text}\nThe nearest uniform plan is {target}. Cut the model that this one came from: {command}"
