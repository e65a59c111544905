"""Import SevenNet checkpoints into the native NequIP family.

Layout differences that are absorbed here: e3nn's flat irreps into one block per order l, radial
weights into sorted path order (files from before SevenNet 0.11 are already in it), the sign of
coupling tensors into the radial weights of their path, one modality's columns into biases, and
module names of early releases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compactmlip.channels import Channels
from compactmlip.errors import CheckpointError, InputError, UnsupportedFeatureError, did_you_mean
from compactmlip.families.unpickle import load_restricted
from compactmlip.models import build
from compactmlip.models.angular import wigner_3j
from compactmlip.models.convolution import Path as TensorPath, message_channels, radial_columns
from compactmlip.models.gate import gate_input_channels
from compactmlip.models.nequip import NequIPArchitecture, NequIPLayer
from compactmlip.spec import ModelSpec, Provenance

_OLD_NAMES = {
    "EdgeEmbedding": "edge_embedding",
    "reducing_nn_input_to_hidden": "reduce_input_to_hidden",
    "reducing_nn_hidden_to_energy": "reduce_hidden_to_energy",
}


def is_checkpoint(content: Any) -> bool:
    """Whether the content of a ``.pth`` file looks like a SevenNet checkpoint."""
    return isinstance(content, Mapping) and {"model_state_dict", "config"} <= content.keys()


def load_checkpoint(path: Path, provenance: Provenance, modality: str | None = None) -> nn.Module:
    """Read a SevenNet ``.pth`` file and return the native model (float64 copies of its weights).

    Raises
    ------
    CheckpointError
        If the file is damaged or not a SevenNet checkpoint.
    UnsupportedFeatureError
        If the model uses a feature that the native family lacks.
    InputError
        If ``modality`` is not one of the checkpoint's.
    """
    content = load_restricted(path)
    if not is_checkpoint(content):
        raise CheckpointError(f"{path}: a PyTorch file, but not a SevenNet checkpoint.")
    return import_model(content["config"], content["model_state_dict"], provenance, modality)


def import_model(
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    provenance: Provenance,
    modality: str | None = None,
) -> nn.Module:
    """Build the native model from SevenNet's configuration and state dict."""
    _refuse_unsupported(config)
    modal = _choose_modality(config, modality)
    spec = _spec(config, state, provenance, modal)
    model = build(spec)
    reader = _Reader({_modern_name(name): tensor.double() for name, tensor in state.items()}, config, modal)
    model.load_state_dict(reader.native_state(NequIPArchitecture.model_validate(spec.architecture)))
    return model


def _modern_name(name: str) -> str:
    module, _, rest = name.partition(".")
    module = module.replace(" ", "_")
    return f"{_OLD_NAMES.get(module, module)}.{rest.replace('denumerator', 'denominator')}"


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    expected = {
        "is_parity": (False,),
        "interaction_type": ("nequip",),
        "readout_as_fcn": (False,),
        "use_bias_in_linear": (False,),
        "act_radial": ("silu",),
    }
    for key, allowed in expected.items():
        value = config.get(key, allowed[0])
        if value not in allowed:
            raise UnsupportedFeatureError(
                f"SevenNet option {key} = {value!r} is not supported (only {allowed[0]!r})."
            )
    for key in ("act_gate", "act_scalar"):
        if config.get(key, {"e": "silu"})["e"] != "silu":
            raise UnsupportedFeatureError(
                f"SevenNet option {key} = {config[key]!r} is not supported (only silu)."
            )
    if config["radial_basis"].get("radial_basis_name") != "bessel":
        raise UnsupportedFeatureError(
            f"radial basis {config['radial_basis']!r} is not supported (only bessel)."
        )
    kinds = config.get("self_connection_type", "nequip")
    if not isinstance(kinds, str) and len(set(kinds)) > 1:
        raise UnsupportedFeatureError("self-connections that differ between layers are not supported.")


def _choose_modality(config: Mapping[str, Any], modality: str | None) -> int | None:
    """Index of the chosen modality, or None for a model without."""
    if not config.get("use_modality", False):
        if modality is not None:
            raise InputError(
                f"modality '{modality}' was asked for, but this model has only one level of theory."
            )
        return None
    names: Mapping[str, int] = config["_modal_map"]
    if modality is None:
        raise InputError(
            f"this model has several modalities ({', '.join(names)}): choose one with --modality."
        )
    if modality not in names:
        hint = did_you_mean(modality, names)
        raise InputError(f"unknown modality '{modality}'; the model has {', '.join(names)}.{hint}")
    return names[modality]


def _spec(
    config: Mapping[str, Any], state: Mapping[str, Tensor], provenance: Provenance, modal: int | None
) -> ModelSpec:
    channels = [_parse_irreps(text) for text in _irreps(config)]
    lmax_edge = config["lmax_edge"] if config.get("lmax_edge", -1) > 0 else config["lmax"]
    lmax_edge = int(lmax_edge)
    up_bias = modal is not None and bool(config["use_modal_self_inter_intro"])
    down_bias = modal is not None and bool(config["use_modal_self_inter_outro"])
    layers = [
        NequIPLayer(
            up=up,
            paths=tuple(_paths(up, out, lmax_edge)),
            radial_hidden=tuple(config["weight_nn_hidden_neurons"]),
            out=out,
            up_bias=up_bias,
            down_bias=down_bias,
        )
        for up, out in pairwise(channels)
    ]
    cutoff_function = config["cutoff_function"]
    if cutoff_function["cutoff_function_name"] == "XPLOR":
        envelope = {"kind": "xplor", "onset": float(cutoff_function["cutoff_on"])}
    else:
        envelope = {"kind": "polynomial", "p": int(cutoff_function.get("poly_cut_p_value", 6))}
    kind = config.get("self_connection_type", "nequip")
    kind = kind if isinstance(kind, str) else kind[0]
    architecture = NequIPArchitecture.model_validate(
        {
            "embedding": channels[0][0],
            "num_basis": int(config["radial_basis"]["bessel_basis_num"]),
            "envelope": envelope,
            "lmax_edge": lmax_edge,
            # Files that do not say so were written before vectors were normalised.
            "solid_harmonics": not config.get("_normalize_sph", False),
            "self_connection": {"linear": "linear", "nequip": "species", "none": "none"}[kind],
            "layers": layers,
            "readout_hidden": channels[-1][0] // 2,
            "readout_bias": modal is not None and bool(config["use_modal_output_block"]),
        }
    )
    return ModelSpec(
        family="nequip",
        species=tuple(_species(config)),
        cutoff=float(config["cutoff"]),
        num_message_passing_layers=len(layers),
        architecture=architecture.model_dump(mode="json"),
        provenance=provenance,
    )


def _species(config: Mapping[str, Any]) -> list[str]:
    from ase.data import chemical_symbols

    by_index = {index: number for number, index in config["_type_map"].items()}
    return [chemical_symbols[by_index[k]] for k in range(len(by_index))]


def _irreps(config: Mapping[str, Any]) -> Sequence[str]:
    """Irreps that enter each layer, and those that leave the last."""
    manual = config.get("irreps_manual", False)
    if manual is not False and manual is not None:
        return list(manual)
    channel, count, lmax = int(config["channel"]), int(config["num_convolution_layer"]), int(config["lmax"])
    if config.get("lmax_node", -1) > 0:
        lmax = int(config["lmax_node"])
    lmax_edge = int(config["lmax_edge"]) if config.get("lmax_edge", -1) > 0 else int(config["lmax"])
    texts, reach = [f"{channel}x0e"], 0
    for t in range(count):
        reach = min(lmax, reach + lmax_edge) if t < count - 1 else 0
        texts.append("+".join(f"{channel}x{l}e" for l in range(reach + 1)))
    return texts


def _parse_irreps(text: str) -> Channels:
    counts: dict[int, int] = {}
    for part in str(text).replace(" ", "").split("+"):
        count, _, order = part.partition("x")
        if not order.endswith("e"):
            raise UnsupportedFeatureError(f"irreps '{text}': only even parity is supported.")
        counts[int(order[:-1])] = int(count)
    return tuple(counts.get(l, 0) for l in range(max(counts) + 1))


def _paths(up: Channels, out: Channels, lmax_edge: int) -> list[TensorPath]:
    return [
        (l1, l2, l3)
        for l1 in range(len(up))
        for l2 in range(lmax_edge + 1)
        for l3 in range(abs(l1 - l2), l1 + l2 + 1)
        if up[l1] and l3 < len(out) and out[l3]
    ]


class _Reader:
    """Translate one state dict."""

    def __init__(self, state: Mapping[str, Tensor], config: Mapping[str, Any], modal: int | None) -> None:
        self.state, self.config, self.modal = state, config, modal
        self.native: dict[str, Tensor] = {}

    def native_state(self, arch: NequIPArchitecture) -> dict[str, Tensor]:
        """State dict of the native model."""
        num_species = len(self.config["_type_map"])
        self._embedding(arch, num_species)
        self.native["basis.wave_numbers"] = self.state["edge_embedding.basis_function.coeffs"]
        for t in range(len(arch.layers)):
            self._layer(arch, t, num_species)
        scalars, hidden = arch.channels_in(len(arch.layers))[:1], (arch.readout_hidden,)
        name = "reduce_input_to_hidden.linear.weight"
        self._linear(name, "readout_hidden", scalars, hidden, modal=arch.readout_bias)
        weight = self.state["reduce_hidden_to_energy.linear.weight"]
        self.native["readout.weight"] = weight.reshape(-1, 1)
        self.native["readout.scale"] = _scalar(weight.numel() ** -0.5)
        for what in ("scale", "shift"):
            value = self.state[f"rescale_atomic_energy.{what}"]
            if self.modal is not None and value.dim() == 2:
                value = value[self.modal]
            self.native[f"energy_{what}"] = value.reshape(-1).expand(num_species).clone()
        return self.native

    def _embedding(self, arch: NequIPArchitecture, num_species: int) -> None:
        weight = self.state["onehot_to_feature_x.linear.weight"].reshape(-1, arch.embedding)
        table = weight[:num_species]
        if self.modal is not None and self.config["use_modal_node_embedding"]:
            table = table + weight[num_species + self.modal]
        self.native["embedding.weight"] = table
        self.native["embedding.scale"] = _scalar(weight.shape[0] ** -0.5)

    def _layer(self, arch: NequIPArchitecture, t: int, num_species: int) -> None:
        layer, into = arch.layers[t], arch.channels_in(t)
        gate_in = gate_input_channels(layer.out)
        messages = message_channels(layer.paths, layer.up, len(layer.out) - 1)
        self._linear(f"{t}_self_interaction_1.linear.weight", f"layers.{t}.up", into, layer.up, layer.up_bias)
        self._linear(
            f"{t}_self_interaction_2.linear.weight", f"layers.{t}.down", messages, gate_in, layer.down_bias
        )
        if arch.self_connection == "linear":
            self._linear(f"{t}_self_connection_intro.linear.weight", f"layers.{t}.skip", into, gate_in)
        elif arch.self_connection == "species":
            self._species_linear(t, into, gate_in, num_species)
        self._convolution(layer, t)

    def _linear(self, source: str, target: str, into: Channels, out: Channels, modal: bool = False) -> None:
        """Split e3nn's flat weight into one block per order; fold the modality into a bias."""
        flat, start = self.state[source], 0
        extra = int(self.config["_number_of_modalities"]) if modal else 0
        for l, (c_in, c_out) in enumerate(zip(into, out, strict=False)):
            if not (c_in and c_out):
                continue
            fan_in = c_in + (extra if l == 0 else 0)
            stop = start + c_in * c_out
            self.native[f"{target}.orders.{l}.weight"] = flat[start:stop].reshape(c_in, c_out)
            self.native[f"{target}.orders.{l}.scale"] = _scalar(fan_in**-0.5)
            start = stop
        if modal:
            rows = flat[start : start + extra * out[0]].reshape(extra, out[0])
            self.native[f"{target}.bias"] = rows[self.modal] * (into[0] + extra) ** -0.5
            start += extra * out[0]
        if start != flat.numel():
            raise CheckpointError(f"{source} has {flat.numel()} weights, expected {start}; unknown layout.")

    def _species_linear(self, t: int, into: Channels, out: Channels, num_species: int) -> None:
        flat = self.state[f"{t}_self_connection_intro.fc_tensor_product.weight"]
        start = 0
        for l, (c_in, c_out) in enumerate(zip(into, out, strict=False)):
            if not (c_in and c_out):
                continue
            stop = start + c_in * num_species * c_out
            weight = flat[start:stop].reshape(c_in, num_species, c_out).permute(1, 0, 2)
            self.native[f"layers.{t}.skip.orders.{l}.weight"] = weight.contiguous()
            self.native[f"layers.{t}.skip.orders.{l}.scale"] = _scalar((c_in * num_species) ** -0.5)
            start = stop
        if start != flat.numel():
            raise CheckpointError(f"layer {t}: self-connection has {flat.numel()} weights, expected {start}.")

    def _convolution(self, layer: NequIPLayer, t: int) -> None:
        source, target = f"{t}_convolution", f"layers.{t}.convolution"
        self.native[f"{target}.normalisation"] = 1.0 / self.state[f"{source}.denominator"].reshape(())
        last = len(layer.radial_hidden)
        for k in range(last + 1):
            weight = self.state[f"{source}.weight_nn.layer{k}.weight"]
            if k == last:
                weight = self._sorted_columns(weight, layer, t)
            self.native[f"{target}.radial.layers.{k}.weight"] = weight
            self.native[f"{target}.radial.layers.{k}.scale"] = _scalar(weight.shape[0] ** -0.5)

    def _sorted_columns(self, weight: Tensor, layer: NequIPLayer, t: int) -> Tensor:
        """Bring the radial weights of all paths into native order and phase."""
        upstream = list(layer.paths)
        if _columns_follow_output(self.config):
            upstream.sort(key=lambda path: path[2])
        pieces: dict[TensorPath, Tensor] = {}
        start = 0
        for path in upstream:
            stop = start + layer.up[path[0]]
            pieces[path] = weight[:, start:stop] * self._phase(path, t)
            start = stop
        columns = radial_columns(layer.paths, layer.up)
        return torch.cat([pieces[path] for path in sorted(columns, key=lambda p: columns[p].start)], dim=1)

    def _phase(self, path: TensorPath, t: int) -> float:
        """Sign between the coupling tensor stored in the file and ours.

        e3nn keeps no tensor for paths through l = 0, whose sign is fixed.
        """
        key = f"{t}_convolution.convolution._compiled_main_left_right._w3j_{path[0]}_{path[1]}_{path[2]}"
        if key not in self.state:
            return 1.0
        overlap = float((self.state[key] * torch.tensor(np.array(wigner_3j(*path)))).sum())
        if not math.isclose(abs(overlap), 1.0, abs_tol=1e-5):
            raise CheckpointError(
                f"{key} is not a coupling tensor of this convention (overlap {overlap:.6f})."
            )
        return math.copysign(1.0, overlap)


def _columns_follow_output(config: Mapping[str, Any]) -> bool:
    """Whether radial weights are sorted by the order of their output: since SevenNet 0.11."""
    parts = [p for p in str(config.get("version", "0")).split(".") if p.isdigit()]
    suffixed = "dev0" in str(config.get("version", ""))
    return tuple(int(p) for p in parts[:2]) >= (0, 11) and not suffixed


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)
