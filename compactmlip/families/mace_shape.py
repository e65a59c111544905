"""Shape of the native model that an upstream MACE model becomes: from its configuration and its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from compactmlip.families import mace_contraction
from compactmlip.families.mace_config import INTERACTIONS, READOUTS, MACEConfig
from compactmlip.models.mace_architecture import MACEArchitecture, MACELayer, MACEReadout, upstream_layer


def linear_names(state: Mapping[str, Tensor], prefix: str) -> list[str]:
    """Weights of the linear layers of a biased network: every third module of the sequence."""
    found = [k for k in range(0, 100, 3) if f"{prefix}.net.{k}.weight" in state]
    return [f"{prefix}.net.{k}.weight" for k in found]


def readout_name(config: MACEConfig, t: int) -> str:
    """Prefix of the readout of layer ``t``; a single readout belongs to the last layer."""
    return f"readouts.{0 if config.readouts[0] is None and len(config.layers) > 1 else t}"


def read_shape(
    config: MACEConfig, state: Mapping[str, Tensor], where: str
) -> tuple[MACEArchitecture, list[mace_contraction.Weights]]:
    """Shape of the native model, and the weights of each layer's contraction, whose layout is part of it."""
    layers = [_layer_shape(config, state, t) for t in range(len(config.layers))]
    contraction, products = mace_contraction.read(state, layers, where, config.reduced_couplings)
    architecture = MACEArchitecture.model_validate(
        {
            "embedding": config.layers[0].channels_in[0],
            "basis": config.basis,
            "num_basis": _num_basis(config, state),
            "envelope": {"kind": "polynomial", "p": int(state["radial_embedding.cutoff_fn.p"])},
            "envelope_on_basis": config.envelope_on_basis,
            "transform": _transform(config, state),
            "repulsion": _repulsion(state),
            "lmax_edge": config.lmax_edge,
            "contraction": contraction,
            "contraction_per_species": config.contraction_per_species,
            "layers": layers,
        }
    )
    return architecture, products


def _num_basis(config: MACEConfig, state: Mapping[str, Tensor]) -> int:
    name = {"bessel": "bessel_weights", "gaussian": "gaussian_weights", "chebyshev": "n"}[config.basis]
    return state[f"radial_embedding.bessel_fn.{name}"].numel()


def _transform(config: MACEConfig, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    kind = config.transform
    if kind is None:
        return None
    names = ("q", "p", "a") if kind == "agnesi" else ("alpha",)
    values = {n: float(state[f"radial_embedding.distance_transform.{n}"]) for n in names}
    return {"kind": kind, **values}


def _repulsion(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    if "pair_repulsion_fn.c" not in state:
        return None
    return {
        "coefficients": state["pair_repulsion_fn.c"].tolist(),
        "a_exponent": float(state["pair_repulsion_fn.a_exp"]),
        "a_prefactor": float(state["pair_repulsion_fn.a_prefactor"]),
        "p": int(state["pair_repulsion_fn.p"]),
    }


def _layer_shape(config: MACEConfig, state: Mapping[str, Tensor], t: int) -> MACELayer:
    layer = config.layers[t]
    return upstream_layer(
        layer.channels_in,
        width=layer.width,
        out=layer.out,
        up=layer.up,
        lmax_edge=config.lmax_edge,
        correlation=mace_contraction.correlation(state, t, layer.correlation),
        radial_hidden=tuple(_radial_sizes(state, t)),
        readout=_readout_shape(config, state, t),
        **INTERACTIONS[layer.interaction],
    )


def _radial_sizes(state: Mapping[str, Tensor], t: int) -> list[int]:
    prefix = f"interactions.{t}.conv_tp_weights"
    if f"{prefix}.net.0.weight" in state:
        return [state[name].shape[0] for name in linear_names(state, prefix)][:-1]
    count = sum(1 for name in state if name.startswith(f"{prefix}.layer") and name.endswith(".weight"))
    return [state[f"{prefix}.layer{k}.weight"].shape[1] for k in range(count - 1)]


def _readout_shape(config: MACEConfig, state: Mapping[str, Tensor], t: int) -> MACEReadout | None:
    name = config.readouts[t]
    if name is None:
        return None
    kind = READOUTS[name]
    if kind == "linear":
        return MACEReadout(kind="linear")
    total = state[f"{readout_name(config, t)}.linear_1.weight"].numel() // config.layers[t].out[0]
    units = total // len(config.heads)
    return MACEReadout.model_validate({"kind": kind, "hidden": (units,) * (1 if kind == "nonlinear" else 2)})
