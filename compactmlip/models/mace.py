"""The MACE family (Batatia et al. 2022, arXiv:2206.07697; MACE-MP: arXiv:2401.00096).

Each layer: linear map of the neighbours' features, convolution, linear map to the atomic basis A,
symmetric contraction to the product basis B, linear map to the layer's output, skip connection.  The
energy is the sum of the layers' readouts, scaled and shifted per species.  Orders may have different
channel counts, and differ from layer to layer.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from compactmlip.channels import Channels
from compactmlip.models.angular import SphericalHarmonics
from compactmlip.models.contraction import SymmetricContraction
from compactmlip.models.convolution import Convolution, Edges, message_channels
from compactmlip.models.gate import gate, gate_input_channels, normalised_sigmoid
from compactmlip.models.linear import (
    EquivariantLinear,
    NormedMLP,
    RadialMLP,
    ScaledWeight,
    Tap,
    Weight,
    add_features,
    apply_tap,
    normalised_silu,
    tap_all,
)
from compactmlip.models.mace_architecture import MACEArchitecture, MACELayer, MACEReadout, Positions
from compactmlip.models.radial import RadialEmbedding
from compactmlip.models.repulsion import ZBLRepulsion
from compactmlip.spec import ModelSpec

Features = list[Tensor | None]


class Interaction(nn.Module):
    """Two-body messages: from the features that enter a layer to the atomic basis A.

    Plain interactions divide the summed messages by the average number of neighbours, the others by a
    learned density of the neighbours.  In the nonlinear kind (the blocks of MACE-MH), radial networks also
    read species embeddings of both atoms, and a gate follows the convolution.
    """

    def __init__(self, arch: MACEArchitecture, t: int, num_species: int) -> None:
        super().__init__()
        layer, channels_in = arch.layers[t], arch.channels_in(t)
        self.shape, self.space = layer, f"layers.{t}"
        self.up = EquivariantLinear(channels_in, layer.up)
        pair = layer.pair_embedding or (0, 0)
        sizes = (arch.num_basis + sum(pair), *layer.radial_hidden)
        nonlinear = layer.interaction == "nonlinear"
        network = NormedMLP if nonlinear else RadialMLP
        self.convolution = Convolution(layer.up, layer.paths, arch.lmax_edge, sizes, network)
        messages = message_channels(layer.paths, layer.up, len(layer.down) - 1)
        down = gate_input_channels(layer.down) if nonlinear else layer.down
        self.down = EquivariantLinear(messages, down)
        if layer.species_map:
            self.species_map = EquivariantLinear(layer.inner, layer.atomic, num_species=num_species)
        if layer.interaction == "density":
            self.density = RadialMLP([sizes[0], 1])
        if nonlinear:
            self._add_nonlinear(layer, sizes[0], num_species)

    def _add_nonlinear(self, layer: MACELayer, num_inputs: int, num_species: int) -> None:
        assert layer.pair_embedding is not None
        source, target = layer.pair_embedding
        self.source = ScaledWeight(num_species, source, scale=num_species**-0.5)
        self.target = ScaledWeight(num_species, target, scale=num_species**-0.5)
        self.density_network = NormedMLP([num_inputs, *layer.density_hidden, 1])
        self.alpha = nn.Parameter(torch.tensor(20.0, dtype=torch.float64))
        self.beta = nn.Parameter(torch.tensor(0.0, dtype=torch.float64))
        self.residual = EquivariantLinear(layer.up, gate_input_channels(layer.inner))
        self.mix = EquivariantLinear(layer.inner, layer.atomic)

    def neighbor_features(self, x: Features, tap: Tap | None = None) -> Features:
        """Features that neighbours send; the input of the convolution."""
        return tap_all(tap, f"{self.space}.up", self.up(x))

    def edges_with_species(self, edges: Edges, species: Tensor, tap: Tap | None = None) -> Edges:
        """Edges whose radial inputs contain the species embeddings of both ends, where the layer has them."""
        if self.shape.pair_embedding is None:
            return edges
        source = self.source().index_select(0, species)
        target = self.target().index_select(0, species)
        source = apply_tap(tap, f"{self.space}.source", 0, source).index_select(0, edges.neighbors)
        target = apply_tap(tap, f"{self.space}.target", 0, target).index_select(0, edges.centers)
        return replace(edges, basis=torch.cat([edges.basis, source, target], dim=-1))

    def divisor(self, edges: Edges, num_nodes: int) -> Tensor | None:
        """What summed messages are divided by, (n_nodes, 1, 1); None if it is one."""
        if self.shape.interaction == "plain":
            return None
        network = self.density if self.shape.interaction == "density" else self.density_network
        density = torch.tanh(network(edges.basis) ** 2)
        if edges.envelope is not None:
            density = density * edges.envelope
        total = density.new_zeros(num_nodes, 1).index_add(0, edges.centers, density).unsqueeze(-1)
        return 1 + total if self.shape.interaction == "density" else self.alpha + self.beta * total

    def normalised(self, messages: Features, divisor: Tensor | None) -> Features:
        """Messages divided by the density."""
        return messages if divisor is None else [None if f is None else f / divisor for f in messages]

    def after_convolution(self, messages: Features, up: Features) -> Features:
        """``down(messages)``; with the neighbours' residual in nonlinear layers, as input of the gate."""
        down: Features = self.down(messages)
        if self.shape.interaction != "nonlinear":
            return down
        return add_features(down, self.residual(up), len(down))

    def activate(self, total: Features) -> Features:
        """Gate of nonlinear layers; others leave what follows the convolution as it is."""
        if self.shape.interaction != "nonlinear":
            return total
        return gate(total, self.shape.inner, normalised_sigmoid)

    def map_inner(self, inner: Features, species: Tensor) -> Features:
        """From the inner features to the atomic basis: linear after a gate, else per species."""
        mapped: Features
        mapped = (
            self.mix(inner) if self.shape.interaction == "nonlinear" else self.species_map(inner, species)
        )
        return mapped

    def forward(self, x: Features, edges: Edges, species: Tensor, tap: Tap | None = None) -> Features:
        """Atomic basis per order, (n_nodes, 2l+1, channels)."""
        up = self.neighbor_features(x, tap)
        edges = self.edges_with_species(edges, species, tap)
        messages = self.convolution(up, edges, tap, f"{self.space}.radial")
        messages = self.normalised(messages, self.divisor(edges, species.shape[0]))
        x = self.activate(self.after_convolution(messages, up))
        if self.shape.has_inner:
            x = self.map_inner(tap_all(tap, f"{self.space}.inner", x), species)
        return tap_all(tap, f"{self.space}.atomic", x)


class Readout(nn.Module):
    """Energy of each atom from a layer's scalars."""

    def __init__(self, shape: MACEReadout, channels: int, space: str) -> None:
        super().__init__()
        self.shape, self.space = shape, space
        sizes = (channels, *shape.hidden, 1)
        self.maps = nn.ModuleList(
            ScaledWeight(n_in, n_out, scale=n_in**-0.5) for n_in, n_out in pairwise(sizes)
        )
        biased = sizes[2:] if shape.kind == "biased" else ()
        self.biases = nn.ParameterList(torch.zeros(n, dtype=torch.float64) for n in biased)

    def forward(self, scalars: Tensor, tap: Tap | None = None) -> Tensor:
        """Return (n_nodes,) from (n_nodes, 1, channels)."""
        x = scalars
        for k, layer in enumerate(self.maps):
            if k:
                x = apply_tap(tap, f"{self.space}.{k - 1}", 0, normalised_silu(x))
            assert isinstance(layer, Weight)
            x = layer.product(x)
            if k and len(self.biases):
                x = x + self.biases[k - 1]
        return x.flatten()


class MACEBlock(nn.Module):
    """One layer: interaction, contraction, linear map, skip connection, readout."""

    def __init__(self, arch: MACEArchitecture, t: int, num_species: int) -> None:
        super().__init__()
        layer, channels_in = arch.layers[t], arch.channels_in(t)
        self.shape, self.space = layer, f"layers.{t}"
        self.interaction = Interaction(arch, t, num_species)
        self.contraction = SymmetricContraction(
            layer.width,
            _places(layer.atomic, layer.atomic_positions),
            _places(layer.product, layer.product_positions),
            layer.correlation,
            num_species if arch.contraction_per_species else None,
            arch.contraction,
        )
        self.linear = EquivariantLinear(layer.product, layer.out)
        self.skip: EquivariantLinear | None = None
        if layer.skip != "none":
            per_species = num_species if layer.skip == "species" else None
            self.skip = EquivariantLinear(channels_in, layer.out, num_species=per_species)
        self.readout: Readout | None = None
        if layer.readout is not None:
            self.readout = Readout(layer.readout, layer.out[0], f"{self.space}.readout")

    def contract(self, atomic: Features, species: Tensor, tap: Tap | None = None) -> Features:
        """Product basis B from the atomic basis A."""
        return tap_all(tap, f"{self.space}.product", self.contraction(atomic, species))

    def update(self, x: Features, product: Features, species: Tensor) -> Features:
        """Output before taps: ``linear(product) + skip(x)``."""
        new = self.linear(product)
        skip: Features = [] if self.skip is None else self.skip(x, species)
        return add_features(new, skip, len(self.shape.out))

    def forward(self, x: Features, edges: Edges, species: Tensor, tap: Tap | None = None) -> Features:
        """Node features after this layer."""
        atomic = self.interaction(x, edges, species, tap)
        product = self.contract(atomic, species, tap)
        return tap_all(tap, f"{self.space}.out", self.update(x, product, species))

    def read(self, x: Features, tap: Tap | None = None) -> Tensor | None:
        """Energy contribution of this layer's output, (n_nodes,), or None without readout."""
        if self.readout is None:
            return None
        assert x[0] is not None
        energy: Tensor = self.readout(x[0], tap)
        return energy


def _places(channels: Channels, positions: Positions) -> dict[int, tuple[int, ...] | None]:
    return {l: positions.get(l) for l, size in enumerate(channels) if size}


class MACE(nn.Module):
    """Energy of each atom from species and edge vectors.

    Parameters
    ----------
    spec
        A spec of family "mace".  Parameters are random until a state dict is loaded.

    Notes
    -----
    Features are lists over orders l of tensors (n_nodes, 2l+1, channels), None where there are no
    channels.  Parameters and buffers are float64 until :func:`compactmlip.models.cast`.  With
    ``wide_geometry`` all that is made from distances and directions alone is computed in float64.
    """

    energy_scale: Tensor
    energy_shift: Tensor
    wide_geometry = False

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.arch = arch = MACEArchitecture.model_validate(spec.architecture)
        num_species = len(spec.species)
        self.embedding = ScaledWeight(num_species, arch.embedding, scale=num_species**-0.5)
        self.radial = RadialEmbedding(
            arch.basis,
            arch.num_basis,
            spec.cutoff,
            arch.envelope,
            arch.transform,
            num_species,
            envelope_on_basis=arch.envelope_on_basis,
        )
        self.harmonics = SphericalHarmonics(arch.lmax_edge)
        self.repulsion = None if arch.repulsion is None else ZBLRepulsion(arch.repulsion, num_species)
        self.layers = nn.ModuleList(MACEBlock(arch, t, num_species) for t in range(len(arch.layers)))
        self.register_buffer("energy_scale", torch.ones(num_species, dtype=torch.float64))
        self.register_buffer("energy_shift", torch.zeros(num_species, dtype=torch.float64))

    def embed(self, species: Tensor, tap: Tap | None = None) -> Features:
        """Initial node features."""
        x = self.embedding().index_select(0, species).unsqueeze(1)
        return [apply_tap(tap, "embedding", 0, x)]

    def edge_features(self, species: Tensor, centers: Tensor, neighbors: Tensor, vectors: Tensor) -> Edges:
        """Radial basis and spherical harmonics of the edges."""
        dtype, vectors = vectors.dtype, self._wide(vectors)
        lengths = torch.linalg.vector_norm(vectors, dim=-1)
        ends = species.index_select(0, centers), species.index_select(0, neighbors)
        basis, envelope = self.radial(lengths, *ends)
        edges = Edges(centers, neighbors, basis, self.harmonics(vectors, lengths), envelope)
        return edges.to(dtype) if self.wide_geometry else edges

    def pair_energy(self, species: Tensor, centers: Tensor, neighbors: Tensor, vectors: Tensor) -> Tensor:
        """Repulsion of each atom, (n_nodes,) in units of the energy scale; zero if there is none."""
        if self.repulsion is None:
            return vectors.new_zeros(species.shape[0])
        lengths = torch.linalg.vector_norm(self._wide(vectors), dim=-1)
        energy: Tensor = self.repulsion(lengths, species, centers, neighbors)
        return energy

    def _wide(self, vectors: Tensor) -> Tensor:
        return vectors.to(torch.float64) if self.wide_geometry else vectors

    def scaled(self, energy: Tensor, species: Tensor) -> Tensor:
        """Apply scale and shift per species; float64, eV."""
        scale, shift = self.energy_scale.index_select(0, species), self.energy_shift.index_select(0, species)
        return energy.to(torch.float64) * scale + shift

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
        edges = self.edge_features(species, centers, neighbors, vectors)
        energy = self.pair_energy(species, centers, neighbors, vectors).to(torch.float64)
        x = self.embed(species, tap)
        for layer in self.layers:
            assert isinstance(layer, MACEBlock)
            x = layer(x, edges, species, tap)
            part = layer.read(x, tap)
            if part is not None:
                energy = energy + part.to(torch.float64)
        return self.scaled(energy, species)

    def descriptors(self, species: Tensor, centers: Tensor, neighbors: Tensor, vectors: Tensor) -> Tensor:
        """Scalars of the product basis in the last layer that is read, (n_nodes, channels).

        Rotations do not change them.  Parameters are those of :meth:`forward`.
        """
        last = max(t for t, layer in enumerate(self.layers) if layer.readout is not None)
        edges, x = self.edge_features(species, centers, neighbors, vectors), self.embed(species)
        for layer in self.layers[:last]:
            x = layer(x, edges, species)
        block = self.layers[last]
        assert isinstance(block, MACEBlock)
        scalars = block.contract(block.interaction(x, edges, species), species)[0]
        assert scalars is not None
        return scalars.squeeze(1)
