"""How an upstream MACE model is built: read from a ``.model`` file or from constructor arguments.

Only what the tensors do not tell is read; sizes of networks are taken from the state dict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from compactmlip.channels import Channels
from compactmlip.errors import CheckpointError, UnsupportedFeatureError
from compactmlip.families.inert import InertGlobal, InertObject, irreps, modules

MODELS = ("MACE", "ScaleShiftMACE")
INTERACTIONS: dict[str, dict[str, Any]] = {
    "RealAgnosticInteractionBlock": {"interaction": "plain", "species_map": True, "skip": "none"},
    "RealAgnosticResidualInteractionBlock": {"interaction": "plain", "skip": "species"},
    "RealAgnosticDensityInteractionBlock": {"interaction": "density", "species_map": True, "skip": "none"},
    "RealAgnosticDensityResidualInteractionBlock": {"interaction": "density", "skip": "species"},
    "RealAgnosticResidualNonLinearInteractionBlock": {"interaction": "nonlinear", "skip": "linear"},
}
"""Upstream class -> what it is in :class:`compactmlip.models.mace_architecture.MACELayer`."""
READOUTS = {
    "LinearReadoutBlock": "linear",
    "NonLinearReadoutBlock": "nonlinear",
    "NonLinearBiasReadoutBlock": "biased",
}
_BASES = {"BesselBasis": "bessel", "GaussianBasis": "gaussian", "ChebychevBasis": "chebyshev"}
_TRANSFORMS = {"AgnesiTransform": "agnesi", "SoftTransform": "soft"}
_EXTRAS = {
    "joint_embedding": "an embedding of the total charge, spin or other global quantities",
    "embedding_readout": "a readout of global quantities",
    "les": "latent Ewald summation (long-range electrostatics)",
}


@dataclass(frozen=True)
class LayerConfig:
    """One interaction with its product.

    Attributes
    ----------
    interaction
        Upstream class.
    channels_in, up, out
        Channels per order that enter, that neighbours send and that leave.
    width
        Channels of the contraction.
    avg_num_neighbors
        Divisor of plain messages.
    correlation
        Degree of the contraction, where it is stated.
    """

    interaction: str
    channels_in: Channels
    up: Channels
    out: Channels
    width: int
    avg_num_neighbors: float
    correlation: int | None = None


@dataclass(frozen=True)
class MACEConfig:
    """Everything about an upstream model that its tensors do not tell.

    Attributes
    ----------
    readouts
        Upstream class of the readout of each layer, None where there is none.
    heads
        Names of the heads.
    basis, transform
        Names as in :mod:`compactmlip.models.radial`.
    envelope_on_basis
        False if the cutoff multiplies path weights instead.
    reduced_couplings
        Whether the contraction's weights are said to belong to cuequivariance's reduced basis of couplings,
        where the file may lack the tensors that tell.
    """

    layers: tuple[LayerConfig, ...]
    readouts: tuple[str | None, ...]
    heads: tuple[str, ...]
    lmax_edge: int
    basis: str
    transform: str | None
    envelope_on_basis: bool
    contraction_per_species: bool
    reduced_couplings: bool = False


def channels(obj: Any, what: str) -> Channels:
    """Channels per order of irreps with natural parity.

    Raises
    ------
    UnsupportedFeatureError
        If an order has the other parity or appears twice.
    """
    counts: dict[int, int] = {}
    for mul, l, parity in irreps(obj):
        if parity != (-1) ** l or l in counts:
            raise UnsupportedFeatureError(
                f"{what}: features of order {l} with parity {'e' if parity == 1 else 'o'} are not supported "
                "(only 0e, 1o, 2e, 3o, ..., each once)."
            )
        counts[l] = mul
    return tuple(counts.get(l, 0) for l in range(max(counts) + 1))


def from_model(root: InertObject, where: str) -> MACEConfig:
    """Read the configuration of a whole-module file.

    Raises
    ------
    UnsupportedFeatureError
        If the model has a part that the native family lacks; the message names it.
    CheckpointError
        If the object is no model, or misses what every MACE model has.
    """
    if not root.module.startswith("mace.modules"):
        raise CheckpointError(f"{where}: holds a {root.module}.{root.name}, not a MACE model.")
    if root.name not in MODELS:
        raise UnsupportedFeatureError(
            f"{where}: models of class {root.name} are not supported; only {' and '.join(MODELS)} give "
            "an energy from positions and species alone."
        )
    parts = dict(modules(root))
    _refuse_extras(root, parts, where)
    try:
        return _read_model(root, parts, where)
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{where}: not the layout of a MACE model ({error!r}).") from error


def _refuse_extras(root: InertObject, parts: Mapping[str, InertObject], where: str) -> None:
    for name, what in _EXTRAS.items():
        if name in parts:
            raise UnsupportedFeatureError(
                f"{where}: the model has {what} ('{name}'), which compactmlip does not support: its energy "
                "depends on more than positions and species."
            )
    lora = next((name for name, part in parts.items() if "lora" in part.module.lower()), None)
    if lora is not None:
        raise UnsupportedFeatureError(
            f"{where}: {lora} is a low-rank adapter (LoRA). Merge the adapters into the model with "
            "mace-torch first."
        )
    if root.attribute("use_so3", False):
        raise UnsupportedFeatureError(f"{where}: use_so3 (features without parity) is not supported.")


def _read_model(root: InertObject, parts: Mapping[str, InertObject], where: str) -> MACEConfig:
    count = sum(1 for name in parts if name.startswith("interactions.") and name.count(".") == 1)
    layers = tuple(_layer(parts, t, f"{where}: interaction {t}") for t in range(count))
    names = [parts[f"readouts.{t}"].name for t in range(count) if f"readouts.{t}" in parts]
    radial = parts["radial_embedding"]
    transform = parts.get("radial_embedding.distance_transform")
    for name, part in parts.items():
        if name.endswith("non_linearity"):
            _check_activation(part, f"{where}: {name}")
    return MACEConfig(
        layers=layers,
        readouts=_readouts(names, count, where),
        heads=tuple(root.attribute("heads", None) or ("Default",)),
        lmax_edge=len(channels(parts["interactions.0"].attribute("edge_attrs_irreps"), where)) - 1,
        basis=_known(_BASES, parts["radial_embedding.bessel_fn"].name, "radial basis", where),
        transform=None
        if transform is None
        else _known(_TRANSFORMS, transform.name, "distance transform", where),
        envelope_on_basis=bool(radial.attribute("apply_cutoff", True)),
        contraction_per_species=not parts["products.0"].attribute("use_agnostic_product", False),
        # Modules of e3nn, which state no degree, hold their couplings.
        reduced_couplings=layers[0].correlation is not None and bool(root.attribute("use_reduced_cg", False)),
    )


def _layer(parts: Mapping[str, InertObject], t: int, where: str) -> LayerConfig:
    block, product = parts[f"interactions.{t}"], parts[f"products.{t}.symmetric_contractions"]
    _known(INTERACTIONS, block.name, "interaction block", where)
    into = channels(block.attribute("node_feats_irreps"), where)
    sent = block.attribute("edge_irreps", None)
    neighbors = block.attribute("avg_num_neighbors")
    return LayerConfig(
        interaction=block.name,
        channels_in=into,
        up=into if sent is None else channels(sent, where),
        out=channels(block.attribute("hidden_irreps"), where),
        width=channels(block.attribute("target_irreps"), where)[0],
        avg_num_neighbors=float(neighbors.mean() if isinstance(neighbors, Tensor) else neighbors),
        correlation=product.attribute("contraction_degree", None),
    )


def _known(table: Mapping[str, Any], name: str, what: str, where: str) -> Any:
    if name not in table:
        raise UnsupportedFeatureError(
            f"{where}: {what} {name} is not supported; supported are {', '.join(table)}."
        )
    return table[name]


def _readouts(names: Sequence[str], count: int, where: str) -> tuple[str | None, ...]:
    for name in names:
        _known(READOUTS, name, "readout", where)
    if len(names) == 1:
        return (*[None] * (count - 1), names[0])
    if len(names) != count:
        raise CheckpointError(f"{where}: {len(names)} readouts for {count} interactions.")
    return tuple(names)


def _check_activation(part: InertObject, where: str) -> None:
    """Only SiLU is supported in readouts; a file names it as a global or inside a normalising wrapper."""
    for activation in part.table("_modules")["acts"].table("_modules").values():
        function = activation.attribute("f", None) if isinstance(activation, InertObject) else activation
        name = getattr(function, "name", None)
        if isinstance(function, InertGlobal | InertObject) and name in ("silu", "SiLU"):
            continue
        raise UnsupportedFeatureError(
            f"{where}: activation {name or activation} is not supported (only silu)."
        )


def from_arguments(arguments: Mapping[str, Any], where: str) -> MACEConfig:
    """Read the configuration from constructor arguments of upstream's model, as plain values.

    Class and function arguments are given by name; irreps as text.  ``model`` ("MACE" or
    "ScaleShiftMACE") may be among them.

    Raises
    ------
    CheckpointError
        If an argument that is needed is missing.
    UnsupportedFeatureError
        If the model has a part that the native family lacks.
    """
    needed = ("r_max", "hidden_irreps", "max_ell", "interaction_cls", "num_interactions", "avg_num_neighbors")
    missing = [name for name in needed if name not in arguments]
    if missing:
        raise CheckpointError(f"{where}: the config lacks {', '.join(missing)}.")
    get = arguments.get
    if (model := _name(get("model", MODELS[0]))) not in MODELS:
        raise UnsupportedFeatureError(
            f"{where}: models of class {model} are not supported; only {' and '.join(MODELS)}."
        )
    if get("embedding_specs"):
        raise UnsupportedFeatureError(
            f"{where}: the model has {_EXTRAS['joint_embedding']} (embedding_specs)."
        )
    if get("use_so3"):
        raise UnsupportedFeatureError(f"{where}: use_so3 (features without parity) is not supported.")
    if (gate := _name(get("gate", "silu"))) not in ("silu", "None"):
        raise UnsupportedFeatureError(f"{where}: activation {gate} is not supported (only silu).")
    count = int(arguments["num_interactions"])
    layers = tuple(_layer_from_arguments(arguments, t, count, where) for t in range(count))
    last = _name(get("readout_cls") or "NonLinearReadoutBlock") if count > 1 else "LinearReadoutBlock"
    _known(READOUTS, last, "readout", where)
    inner = None if get("use_last_readout_only") else "LinearReadoutBlock"
    transform = {"Agnesi": "agnesi", "Soft": "soft", "None": None}
    return MACEConfig(
        layers=layers,
        readouts=(*[inner] * (count - 1), last),
        heads=tuple(get("heads") or ("Default",)),
        lmax_edge=int(arguments["max_ell"]),
        basis=_known(
            {name: name for name in _BASES.values()}, get("radial_type") or "bessel", "radial basis", where
        ),
        transform=_known(transform, str(get("distance_transform")), "distance transform", where),
        envelope_on_basis=bool(get("apply_cutoff", True)),
        contraction_per_species=not get("use_agnostic_product", False),
        reduced_couplings=bool(get("use_reduced_cg", False)),
    )


def _layer_from_arguments(arguments: Mapping[str, Any], t: int, count: int, where: str) -> LayerConfig:
    hidden = channels(arguments["hidden_irreps"], where)
    kind = (
        arguments["interaction_cls"]
        if t
        else arguments.get("interaction_cls_first") or arguments["interaction_cls"]
    )
    into = hidden[:1] if t == 0 else hidden
    scalar = t == count - 1 and not (t and arguments.get("keep_last_layer_irreps", False))
    edge = arguments.get("edge_irreps")
    sent = into
    if edge is not None and (t or arguments.get("use_edge_irreps_first", False)):
        sent = channels(edge, where) if t else channels(edge, where)[:1]
    name = _name(kind)
    _known(INTERACTIONS, name, "interaction block", where)
    return LayerConfig(
        interaction=name,
        channels_in=into,
        up=sent,
        out=hidden[:1] if scalar else hidden,
        width=hidden[0],
        avg_num_neighbors=float(arguments["avg_num_neighbors"]),
        correlation=_of_layer(arguments.get("correlation"), t),
    )


def _of_layer(value: Any, t: int) -> int | None:
    """An argument that may be given once or per layer."""
    if isinstance(value, list | tuple):
        return int(value[t])
    return None if value is None else int(value)


def _name(value: Any) -> str:
    """Last part of a class's or function's name, whether it is given as text or as the thing itself."""
    text = value if isinstance(value, str) else getattr(value, "__name__", str(value))
    return text.rpartition(".")[2]
