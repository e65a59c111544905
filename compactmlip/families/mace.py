"""Import MACE models into the native family, without mace-torch.

Layout differences that are absorbed here: e3nn's flat irreps into one block per order l; radial weights
into sorted path order; the direction of edge vectors (upstream's point to the centre) as a sign of paths
with odd spherical harmonics; phases of coupling tensors into the weights of the contraction; one head's
readouts, energies, scale and shift.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compactmlip.channels import Channels
from compactmlip.errors import CheckpointError, InputError, did_you_mean
from compactmlip.families import inert
from compactmlip.families.mace_config import MACEConfig, from_arguments, from_model
from compactmlip.families.mace_shape import linear_names, read_shape, readout_name
from compactmlip.models import build
from compactmlip.models.convolution import message_channels, radial_columns
from compactmlip.models.gate import gate_input_channels
from compactmlip.models.mace_architecture import MACEArchitecture, MACELayer, MACEReadout
from compactmlip.spec import ModelSpec, Provenance

STATE_KEYS = ("state_dict", "model_state_dict", "model")


def load_checkpoint(path: Path, provenance: Provenance, head: str | None = None) -> nn.Module:
    """Read a whole-module ``.model`` file, or a state dict with its config; return the native model.

    Nothing from the file is executed.  A file that :func:`torch.load` reads with ``weights_only`` may hold a
    dictionary ``{"config": {...}, "state_dict": {...}}`` with the constructor's arguments as plain values.

    Parameters
    ----------
    head
        Which head of a model with several; "default" is chosen if there is one of this name.

    Raises
    ------
    CheckpointError
        If the file is damaged, hostile or not a MACE model.
    UnsupportedFeatureError
        If the model has a part that the native family lacks, or needs a newer mace.
    InputError
        If ``head`` is not one of the model's, or has to be chosen.
    """
    content = _plain_content(path)
    if content is None:
        root = inert.load_inert(path)
        return import_model(from_model(root, str(path)), inert.state_dict(root), provenance, head, str(path))
    state = next((content[key] for key in STATE_KEYS if isinstance(content.get(key), Mapping)), None)
    config = content.get("config")
    if state is None or not isinstance(config, Mapping):
        raise CheckpointError(
            f"{path}: a dictionary without the constructor's arguments: tensors alone do not say how a model "
            'is built. Save {"config": {...}, "state_dict": model.state_dict()}, or give the .model file.'
        )
    return import_model(from_arguments(config, str(path)), state, provenance, head, str(path))


def _plain_content(path: Path) -> Mapping[str, Any] | None:
    """Content of a file of tensors and plain containers; None if it is a pickled module."""
    from compactmlip.families.unpickle import load_restricted

    if path.suffix == ".model":
        return None
    try:
        content = load_restricted(path)
    except CheckpointError as error:
        if "refused" in str(error):
            return None
        raise
    return content if isinstance(content, Mapping) else None


def import_model(
    config: MACEConfig,
    state: Mapping[str, Tensor],
    provenance: Provenance,
    head: str | None = None,
    where: str = "MACE model",
) -> nn.Module:
    """Build the native model from a configuration and upstream's state dict (float64 copies)."""
    from ase.data import chemical_symbols

    index = _choose_head(config.heads, head, where)
    try:
        reader = _Reader(config, {name: t.detach() for name, t in state.items()}, index, where)
        spec = ModelSpec(
            family="mace",
            species=tuple(chemical_symbols[int(z)] for z in state["atomic_numbers"]),
            cutoff=float(state["r_max"]),
            num_message_passing_layers=len(config.layers),
            architecture=reader.architecture.model_dump(mode="json"),
            provenance=provenance,
        )
        model = build(spec)
        native = reader.native_state(len(spec.species))
    except KeyError as error:
        raise CheckpointError(f"{where}: the state dict lacks {error}.") from error
    missing = sorted(model.state_dict().keys() - native.keys())
    if missing:
        raise CheckpointError(f"{where}: nothing found for {', '.join(missing[:3])}; unknown layout.")
    model.load_state_dict(native)
    return model


def _choose_head(heads: tuple[str, ...], head: str | None, where: str) -> int:
    if head is None:
        default = [k for k, name in enumerate(heads) if name.lower() == "default"]
        if len(heads) > 1 and not default:
            raise InputError(
                f"{where}: the model has several heads ({', '.join(heads)}): choose one with --modality."
            )
        return default[0] if default else 0
    if head not in heads:
        raise InputError(
            f"{where}: unknown head '{head}'; the model has {', '.join(heads)}.{did_you_mean(head, heads)}"
        )
    return heads.index(head)


class _Reader:
    """Translate one state dict."""

    def __init__(self, config: MACEConfig, state: Mapping[str, Tensor], head: int, where: str) -> None:
        self.config, self.head, self.where = config, head, where
        self.state = {k: v.double() if v.is_floating_point() else v for k, v in state.items()}
        self.native: dict[str, Tensor] = {}
        self.architecture, self.products = read_shape(config, self.state, where)

    def native_state(self, num_species: int) -> dict[str, Tensor]:
        """State dict of the native model."""
        arch = self.architecture
        weight = self.state["node_embedding.linear.weight"]
        self._table("embedding", weight, num_species)
        self._radial(arch, num_species)
        for t, layer in enumerate(arch.layers):
            self._interaction(arch, t, num_species)
            prefix = f"layers.{t}"
            for key, value in self.products[t].items():
                self.native[f"{prefix}.contraction.weights.{key}"] = value
            self._linear(f"products.{t}.linear.weight", f"{prefix}.linear", layer.product, layer.out)
            self._skip(arch, t, num_species)
            if layer.readout is not None:
                self._readout(layer.readout, t)
        self._energies(num_species)
        return self.native

    def _radial(self, arch: MACEArchitecture, num_species: int) -> None:
        name = {"bessel": "bessel_weights", "gaussian": "gaussian_weights"}.get(self.config.basis)
        if name is not None:
            self.native["radial.functions.points"] = self.state[f"radial_embedding.bessel_fn.{name}"].reshape(
                -1
            )
        numbers = self.state["atomic_numbers"].long()
        if arch.transform is not None:
            radii = self.state["radial_embedding.distance_transform.covalent_radii"]
            self.native["radial.radii"] = radii[numbers]
        if arch.repulsion is not None:
            self.native["repulsion.charges"] = numbers.double()
            self.native["repulsion.radii"] = self.state["pair_repulsion_fn.covalent_radii"][numbers]

    def _table(self, target: str, weight: Tensor, num_species: int) -> None:
        """Linear map of the one-hot species."""
        self.native[f"{target}.weight"] = weight.reshape(num_species, -1)
        self.native[f"{target}.scale"] = _scalar(num_species**-0.5)

    def _interaction(self, arch: MACEArchitecture, t: int, num_species: int) -> None:
        layer, into = arch.layers[t], arch.channels_in(t)
        source, target = f"interactions.{t}", f"layers.{t}.interaction"
        messages = message_channels(layer.paths, layer.up, len(layer.down) - 1)
        self._linear(f"{source}.linear_up.weight", f"{target}.up", into, layer.up)
        divisor = 1.0 if layer.interaction != "plain" else self.config.layers[t].avg_num_neighbors
        self.native[f"{target}.convolution.normalisation"] = _scalar(1.0 / divisor)
        if layer.interaction == "nonlinear":
            gated = gate_input_channels(layer.inner)
            self._linear(f"{source}.linear_1.weight", f"{target}.down", messages, gated)
            self._linear(f"{source}.linear_res.weight", f"{target}.residual", layer.up, gated)
            self._linear(f"{source}.linear_2.weight", f"{target}.mix", layer.inner, layer.atomic)
            for name in ("source", "target"):
                self._table(f"{target}.{name}", self.state[f"{source}.{name}_embedding.weight"], num_species)
            for name in ("alpha", "beta"):
                self.native[f"{target}.{name}"] = self.state[f"{source}.{name}"].reshape(())
            self._normed_network(f"{source}.density_fn", f"{target}.density_network")
            self._normed_network(f"{source}.conv_tp_weights", f"{target}.convolution.radial", layer)
            return
        self._linear(f"{source}.linear.weight", f"{target}.down", messages, layer.down)
        if layer.species_map:
            name = f"{target}.species_map"
            self._species_linear(f"{source}.skip_tp.weight", name, layer.inner, layer.atomic, num_species)
        self._network(f"{source}.conv_tp_weights", f"{target}.convolution.radial", layer)
        if layer.interaction == "density":
            self._network(f"{source}.density_fn", f"{target}.density")

    def _network(self, source: str, target: str, layer: MACELayer | None = None) -> None:
        count = len(layer.radial_hidden) + 1 if layer else 1
        for k in range(count):
            weight = self.state[f"{source}.layer{k}.weight"]
            self.native[f"{target}.layers.{k}.scale"] = _scalar(weight.shape[0] ** -0.5)
            if layer and k == count - 1:
                weight = sorted_columns(weight, layer)
            self.native[f"{target}.layers.{k}.weight"] = weight

    def _normed_network(self, source: str, target: str, layer: MACELayer | None = None) -> None:
        names = linear_names(self.state, source)
        for k, name in enumerate(names):
            number = 3 * k
            weight, bias = self.state[name], self.state[f"{source}.net.{number}.bias"]
            if layer and k == len(names) - 1:
                weight = sorted_columns(weight.T, layer).T.contiguous()
                bias = sorted_columns(bias.unsqueeze(0), layer).squeeze(0)
            self.native[f"{target}.layers.{k}.weight"] = weight
            self.native[f"{target}.layers.{k}.bias"] = bias
            if k < len(names) - 1:
                for part in ("weight", "bias"):
                    self.native[f"{target}.norms.{k}.{part}"] = self.state[
                        f"{source}.net.{number + 1}.{part}"
                    ]

    def _linear(self, source: str, target: str, into: Channels, out: Channels) -> None:
        """Split e3nn's flat weight into one block per order."""
        flat, start = self.state[source].reshape(-1), 0
        for l, (c_in, c_out) in enumerate(zip(into, out, strict=False)):
            if c_in and c_out:
                stop = start + c_in * c_out
                self.native[f"{target}.orders.{l}.weight"] = flat[start:stop].reshape(c_in, c_out)
                self.native[f"{target}.orders.{l}.scale"] = _scalar(c_in**-0.5)
                start = stop
        self._check_used(source, flat, start)

    def _species_linear(
        self, source: str, target: str, into: Channels, out: Channels, num_species: int
    ) -> None:
        flat, start = self.state[source].reshape(-1), 0
        for l, (c_in, c_out) in enumerate(zip(into, out, strict=False)):
            if c_in and c_out:
                stop = start + c_in * num_species * c_out
                weight = flat[start:stop].reshape(c_in, num_species, c_out).permute(1, 0, 2)
                self.native[f"{target}.orders.{l}.weight"] = weight.contiguous()
                self.native[f"{target}.orders.{l}.scale"] = _scalar((c_in * num_species) ** -0.5)
                start = stop
        self._check_used(source, flat, start)

    def _check_used(self, source: str, flat: Tensor, used: int) -> None:
        if used != flat.numel():
            raise CheckpointError(
                f"{self.where}: {source} has {flat.numel()} weights, expected {used}; unknown layout."
            )

    def _skip(self, arch: MACEArchitecture, t: int, num_species: int) -> None:
        layer, into = arch.layers[t], arch.channels_in(t)
        source, target = f"interactions.{t}.skip_tp.weight", f"layers.{t}.skip"
        if layer.skip == "species":
            self._species_linear(source, target, into, layer.out, num_species)
        elif layer.skip == "linear":
            self._linear(source, target, into, layer.out)

    def _readout(self, shape: MACEReadout, t: int) -> None:
        """One head of a readout; upstream puts the units of all heads side by side."""
        source, target = readout_name(self.config, t), f"layers.{t}.readout"
        heads, channels_in = len(self.config.heads), self.config.layers[t].out[0]
        names = {"linear": ("linear",), "nonlinear": ("linear_1", "linear_2")}.get(
            shape.kind, ("linear_1", "linear_mid", "linear_2")
        )
        sizes = (channels_in, *shape.hidden, 1)
        for k, name in enumerate(names):
            n_in, n_out = sizes[k] * (heads if k else 1), sizes[k + 1] * heads
            weight = self.state[f"{source}.{name}.weight"].reshape(n_in, n_out)
            rows = slice(self.head * sizes[k], (self.head + 1) * sizes[k]) if k else slice(None)
            columns = slice(self.head * sizes[k + 1], (self.head + 1) * sizes[k + 1])
            self.native[f"{target}.maps.{k}.weight"] = weight[rows, columns].contiguous()
            self.native[f"{target}.maps.{k}.scale"] = _scalar(n_in**-0.5)
            if k and shape.kind == "biased":
                self.native[f"{target}.biases.{k - 1}"] = self.state[f"{source}.{name}.bias"][columns].clone()

    def _energies(self, num_species: int) -> None:
        isolated = torch.atleast_2d(self.state["atomic_energies_fn.atomic_energies"])[
            self._head_row("isolated atoms")
        ]
        scale = shift = _scalar(0.0)
        if "scale_shift.scale" in self.state:
            scale, shift = (torch.atleast_1d(self.state[f"scale_shift.{n}"]) for n in ("scale", "shift"))
            scale, shift = (v[self.head if v.numel() > 1 else 0] for v in (scale, shift))
        else:
            scale = _scalar(1.0)
        self.native["energy_scale"] = scale.expand(num_species).clone()
        self.native["energy_shift"] = isolated + shift

    def _head_row(self, what: str) -> int:
        rows = torch.atleast_2d(self.state["atomic_energies_fn.atomic_energies"]).shape[0]
        if rows != len(self.config.heads):
            raise CheckpointError(
                f"{self.where}: {rows} rows of energies of {what}, {len(self.config.heads)} heads."
            )
        return self.head


def sorted_columns(weight: Tensor, layer: MACELayer) -> Tensor:
    """Bring upstream's path weights (columns ordered by l3, l1, l2) into native order and direction.

    Upstream's edge vectors point to the centre, ours away from it: Y_l changes by (-1)^l.  The map is its
    own inverse up to the order of columns (:func:`upstream_columns`).
    """
    pieces, start = {}, 0
    for path in sorted(layer.paths, key=lambda p: (p[2], p[0], p[1])):
        stop = start + layer.up[path[0]]
        pieces[path] = weight[:, start:stop] * (-1.0) ** path[1]
        start = stop
    columns = radial_columns(layer.paths, layer.up)
    return torch.cat([pieces[path] for path in sorted(columns)], dim=1)


def upstream_columns(weight: Tensor, layer: MACELayer) -> Tensor:
    """Inverse of :func:`sorted_columns`."""
    columns = radial_columns(layer.paths, layer.up)
    ordered = sorted(layer.paths, key=lambda p: (p[2], p[0], p[1]))
    return torch.cat([weight[:, columns[path]] * (-1.0) ** path[1] for path in ordered], dim=1)


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)
