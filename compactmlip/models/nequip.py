"""The NequIP family as SevenNet uses it (Batzner et al. 2022; Park et al. 2024).

Each layer: self-connection on the node's own features, linear map of the neighbours' features,
convolution, linear map to the gate's input, sum, gate.  The energy is a linear readout of the last
layer's scalars, scaled and shifted per species.  Orders may have different channel counts, and
differ from layer to layer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from torch import Tensor, nn

from compactmlip.channels import Channels, format_channels
from compactmlip.models.angular import SphericalHarmonics
from compactmlip.models.convolution import Convolution, Edges, Path, message_channels
from compactmlip.models.gate import gate, gate_input_channels
from compactmlip.models.linear import (
    EquivariantLinear,
    ScaledWeight,
    Tap,
    add_features,
    apply_tap,
    tap_all,
)
from compactmlip.models.radial import BesselBasis, Envelope
from compactmlip.spec import ModelSpec

Features = list[Tensor | None]


class NequIPLayer(BaseModel):
    """Shape of one message-passing layer."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    up: Channels = Field(description="channels per order of the neighbours' features")
    paths: tuple[Path, ...]
    radial_hidden: tuple[int, ...]
    out: Channels = Field(description="channels per order after the gate")
    up_bias: bool = False
    down_bias: bool = False
    cutoff: float | None = Field(
        None, gt=0, description="Angstrom; neighbours beyond it send nothing; by default the model's"
    )

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without a cutoff of its own a layer is written as it was before there were any."""
        data: dict[str, Any] = write(self)
        return {name: value for name, value in data.items() if name != "cutoff" or value is not None}


class NequIPArchitecture(BaseModel):
    """Shape of the whole model; everything that the parameters alone do not tell."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    embedding: int = Field(ge=1)
    num_basis: int = Field(ge=1)
    envelope: Envelope
    lmax_edge: int = Field(ge=0)
    solid_harmonics: bool = False
    self_connection: Literal["linear", "species", "none"] = "linear"
    layers: tuple[NequIPLayer, ...]
    readout_hidden: int = Field(ge=1)
    readout_bias: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> NequIPArchitecture:
        for t, layer in enumerate(self.layers):
            for l1, l2, l3 in layer.paths:
                up, out = layer.up, layer.out
                alive = l1 < len(up) and up[l1] and l3 < len(out) and out[l3]
                if not alive or l2 > self.lmax_edge or not abs(l1 - l2) <= l3 <= l1 + l2:
                    raise ValueError(f"layer {t}: path {(l1, l2, l3)} couples orders that are not there")
        if self.layers and not (self.layers[-1].out and self.layers[-1].out[0]):
            raise ValueError("the last layer has no scalar channels to read the energy from")
        return self

    def channels_in(self, t: int) -> Channels:
        """Channels per order that enter layer ``t``."""
        return (self.embedding,) if t == 0 else self.layers[t - 1].out

    def summary(self) -> list[tuple[str, str]]:
        """Rows (what, channels) for people."""
        rows = [("embedding", format_channels((self.embedding,)))]
        for t, layer in enumerate(self.layers):
            shorter = "" if layer.cutoff is None else f", cutoff {layer.cutoff:g} A"
            rows.append((f"layer {t}", f"{format_channels(layer.out)}, {len(layer.paths)} paths{shorter}"))
        return rows


class NequIPBlock(nn.Module):
    """One message-passing layer."""

    def __init__(self, arch: NequIPArchitecture, t: int, num_species: int) -> None:
        super().__init__()
        layer, channels_in = arch.layers[t], arch.channels_in(t)
        self.shape, self.space = layer, f"layers.{t}"
        gate_in = gate_input_channels(layer.out)
        radial_sizes = (arch.num_basis, *layer.radial_hidden)
        self.up = EquivariantLinear(channels_in, layer.up, bias=layer.up_bias)
        self.convolution = Convolution(layer.up, layer.paths, arch.lmax_edge, radial_sizes)
        self.down = EquivariantLinear(
            message_channels(layer.paths, layer.up, len(layer.out) - 1), gate_in, bias=layer.down_bias
        )
        self.skip: EquivariantLinear | None = None
        if arch.self_connection != "none":
            per_species = num_species if arch.self_connection == "species" else None
            self.skip = EquivariantLinear(channels_in, gate_in, num_species=per_species)

    def messages(self, x: Features, edges: Edges, tap: Tap | None = None) -> Features:
        """Aggregated messages per order; the input of ``down``."""
        return self.convolve(tap_all(tap, f"{self.space}.up", self.up(x)), edges, tap)

    def convolve(self, up: Features, edges: Edges, tap: Tap | None = None) -> Features:
        """Aggregated messages from what neighbours send."""
        if self.shape.cutoff is not None:
            edges = edges.within[self.shape.cutoff]
        return self.convolution(up, edges, tap, f"{self.space}.radial")

    def gate_input(self, x: Features, messages: Features, species: Tensor) -> Features:
        """Pre-activation features: ``down(messages) + skip(x)``."""
        update = self.down(messages)
        skip: Features = [] if self.skip is None else self.skip(x, species)
        return add_features(update, skip, len(self.shape.out))

    def activate(self, gate_input: Features, tap: Tap | None = None) -> Features:
        """Apply the gate; the output enters the next layer."""
        out = gate(gate_input, self.shape.out)
        return tap_all(tap, f"{self.space}.out", out)

    def forward(self, x: Features, edges: Edges, species: Tensor, tap: Tap | None = None) -> Features:
        """Return the node features after this layer."""
        return self.activate(self.gate_input(x, self.messages(x, edges, tap), species), tap)


class NequIP(nn.Module):
    """Energy of each atom from species and edge vectors.

    Parameters
    ----------
    spec
        A spec of family "nequip".  Parameters are random until a state dict is loaded.

    Notes
    -----
    Features are lists over orders l of tensors (n_nodes, 2l+1, channels), None where there are no
    channels.  Parameters and buffers are float64 until :func:`compactmlip.models.cast`.  With
    ``wide_geometry`` all that is made from distances and directions alone is computed in float64; with
    ``static_shapes`` layers with a shorter cutoff are given all edges, of which some contribute nothing.
    """

    energy_scale: Tensor
    energy_shift: Tensor
    wide_geometry = False
    static_shapes = False

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.arch = arch = NequIPArchitecture.model_validate(spec.architecture)
        num_species = len(spec.species)
        self.embedding = ScaledWeight(num_species, arch.embedding, scale=num_species**-0.5)
        self.basis = BesselBasis(arch.num_basis, spec.cutoff, arch.envelope)
        self.harmonics = SphericalHarmonics(arch.lmax_edge, solid=arch.solid_harmonics)
        self.layers = nn.ModuleList(NequIPBlock(arch, t, num_species) for t in range(len(arch.layers)))
        scalars = arch.channels_in(len(arch.layers))[:1]
        self.readout_hidden = EquivariantLinear(scalars, (arch.readout_hidden,), bias=arch.readout_bias)
        self.readout = ScaledWeight(arch.readout_hidden, 1, scale=arch.readout_hidden**-0.5)
        self.register_buffer("energy_scale", torch.ones(num_species, dtype=torch.float64))
        self.register_buffer("energy_shift", torch.zeros(num_species, dtype=torch.float64))

    def embed(self, species: Tensor, tap: Tap | None = None) -> Features:
        """Initial node features."""
        x = self.embedding().index_select(0, species).unsqueeze(1)
        return [apply_tap(tap, "embedding", 0, x)]

    def edge_features(self, centers: Tensor, neighbors: Tensor, vectors: Tensor) -> Edges:
        """Radial basis and spherical harmonics of the edges."""
        dtype = vectors.dtype
        if self.wide_geometry:
            vectors = vectors.to(torch.float64)
        lengths = torch.linalg.vector_norm(vectors, dim=-1)
        edges = Edges(centers, neighbors, self.basis(lengths), self.harmonics(vectors, lengths))
        within = {
            layer.cutoff: edges.shorter(lengths, layer.cutoff, static_shapes=self.static_shapes)
            for layer in self.arch.layers
            if layer.cutoff is not None
        }
        edges = replace(edges, within=within)
        return edges.to(dtype) if self.wide_geometry else edges

    def read_energy(self, x: Features, species: Tensor, tap: Tap | None = None) -> Tensor:
        """Energy of each node in eV (float64), shape (n_nodes,)."""
        hidden = self.readout_hidden(x[:1])[0]
        assert hidden is not None
        hidden = apply_tap(tap, "readout.hidden", 0, hidden)
        energy = self.readout.product(hidden).flatten().to(torch.float64)
        scale, shift = self.energy_scale.index_select(0, species), self.energy_shift.index_select(0, species)
        return energy * scale + shift

    def forward(
        self,
        species: Tensor,
        centers: Tensor,
        neighbors: Tensor,
        vectors: Tensor,
        tap: Tap | None = None,
    ) -> Tensor:
        """Return the energy of each atom, (n_nodes,), float64, in eV.

        Parameters
        ----------
        species
            (n_nodes,) index into ``spec.species``.
        centers, neighbors
            (E,) node indices of each directed edge.
        vectors
            (E, 3) vector from centre to neighbour image, Angstrom.
        tap
            Called on every feature that a channel group names; used to score and to mask channels.
        """
        return self.read_energy(self.features(species, centers, neighbors, vectors, tap), species, tap)

    def features(
        self, species: Tensor, centers: Tensor, neighbors: Tensor, vectors: Tensor, tap: Tap | None = None
    ) -> Features:
        """Features after the last layer; parameters as of :meth:`forward`."""
        edges = self.edge_features(centers, neighbors, vectors)
        x = self.embed(species, tap)
        for layer in self.layers:
            x = layer(x, edges, species, tap)
        return x

    def descriptors(self, species: Tensor, centers: Tensor, neighbors: Tensor, vectors: Tensor) -> Tensor:
        """Scalars that the energy is read from, (n_nodes, channels); rotations do not change them."""
        scalars = self.features(species, centers, neighbors, vectors)[0]
        assert scalars is not None
        return scalars.squeeze(1)
