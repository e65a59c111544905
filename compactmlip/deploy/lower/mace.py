"""Lowering of the MACE family.

What is folded: the first layer's features, which depend on the species only, into its radial tables,
together with the linear map behind its convolution; radial networks into tables; coupling paths into
independent products; the first matrix of the last readout into the maps before it.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from compactmlip.deploy.lower.base import LoweredModel
from compactmlip.deploy.lower.contraction import FoldedContraction
from compactmlip.deploy.lower.convolution import (
    PairTypes,
    SplineConvolution,
    first_scalar,
    folded,
    pad_columns,
    padded_rows,
    sum_of_neighbors,
)
from compactmlip.deploy.lower.dense import Dense, PerOrder, SpeciesDense, SpeciesRows, constant, weights_of
from compactmlip.deploy.lower.domain import Domain, domain, owned, with_ghosts
from compactmlip.deploy.lower.splines import Grid, RadialFunction
from compactmlip.kernels.gate import gate
from compactmlip.models.contraction import SymmetricContraction
from compactmlip.models.linear import add_features, normalised_silu
from compactmlip.models.mace import MACE, Interaction, MACEBlock, Readout
from compactmlip.models.mace_architecture import MACELayer

Features = list[Tensor | None]


class _Radial:
    """Radial functions of one layer for pairs of species."""

    def __init__(self, model: MACE, interaction: Interaction) -> None:
        self.model, self.interaction = model, interaction

    def _inputs(self, i: int, j: int, r: Tensor) -> tuple[Tensor, Tensor | None]:
        centers, neighbors = (torch.full(r.shape, k, dtype=torch.long) for k in (i, j))
        basis, envelope = self.model.radial(r, centers, neighbors)
        if self.interaction.shape.pair_embedding is not None:
            ends = self.interaction.source()[neighbors], self.interaction.target()[centers]
            basis = torch.cat([basis, *ends], dim=-1)
        return basis, envelope

    def weights(self, i: int, j: int) -> RadialFunction:
        """Weights of all paths, with the convolution's factor."""
        convolution = self.interaction.convolution

        def function(r: Tensor) -> Tensor:
            basis, envelope = self._inputs(i, j, r)
            value: Tensor = convolution.radial(basis) * convolution.normalisation
            return value if envelope is None else value * envelope

        return function

    def density(self, i: int, j: int) -> RadialFunction:
        """What a neighbour adds to the density."""
        inner = self.interaction
        network = inner.density if inner.shape.interaction == "density" else inner.density_network

        def function(r: Tensor) -> Tensor:
            basis, envelope = self._inputs(i, j, r)
            value = torch.tanh(network(basis) ** 2)
            return value if envelope is None else value * envelope

        return function

    def types(self, *, sent: bool) -> PairTypes:
        """Pair types; ``sent``: the neighbour's features are part of the functions."""
        num_species = len(self.model.spec.species)
        if self.model.radial.transform is not None or self.interaction.shape.pair_embedding is not None:
            return PairTypes.by_pair(num_species)
        return PairTypes.by_neighbor(num_species) if sent else PairTypes.one()


class LoweredInteraction(nn.Module):
    """From the features that enter a layer to the atomic basis."""

    shape: MACELayer
    alpha: Tensor
    beta: Tensor

    def __init__(self, model: MACE, t: int, grid: Grid) -> None:
        super().__init__()
        block = model.layers[t]
        assert isinstance(block, MACEBlock)
        inner = block.interaction
        self.shape, self.first = inner.shape, t == 0
        radial = _Radial(model, inner)
        down, up = weights_of(inner.down), weights_of(inner.up)
        paths, lmax = sorted(self.shape.paths), model.arch.lmax_edge
        types = radial.types(sent=self.first)
        if self.first:
            sent = model.embedding().detach() @ up[0]
            made = [folded(radial.weights(i, j), paths, sent[j], down) for i, j in types.members]
            functions = [f for f, _, _ in made]
            _, paths, sizes = made[0]
            self.sent = SpeciesRows(sent)
        else:
            functions = [radial.weights(i, j) for i, j in types.members]
            sizes = [self.shape.up[p[0]] for p in paths]
            self.up = PerOrder({l: Dense(pad_columns(w)) for l, w in up.items()})
            self.down = PerOrder({l: Dense(padded_rows(w, l, paths, self.shape.up)) for l, w in down.items()})
        self.outputs = [w.shape[1] for _, w in sorted(down.items())]
        self.convolution = SplineConvolution(paths, sizes, functions, types, grid, lmax=lmax, unit=self.first)
        self.density: SplineConvolution | None = None
        if self.shape.interaction != "plain":
            pairs = radial.types(sent=False)
            self.density = sum_of_neighbors([radial.density(i, j) for i, j in pairs.members], pairs, grid)
        if self.shape.interaction == "nonlinear":
            self.register_buffer("alpha", inner.alpha.detach().clone())
            self.register_buffer("beta", inner.beta.detach().clone())
            residual = weights_of(inner.residual)
            if not self.first:
                residual = {
                    l: torch.nn.functional.pad(w, (0, 0, 0, pad_columns(up[l]).shape[1] - w.shape[0]))
                    for l, w in residual.items()
                }
            self.residual = PerOrder({l: Dense(w) for l, w in residual.items()})
            self.mix = constant(inner.mix)
        elif self.shape.species_map:
            self.species_map = constant(inner.species_map)

    def forward(self, x: Features, graph: Domain) -> Features:
        """Atomic basis per order, (n_owned, 2l+1, channels)."""
        species = graph.owned_species
        up: Features = [] if self.first else self.up(x, species)
        messages = owned(self.convolution(graph, with_ghosts(up)))
        if self.density is not None:
            total = first_scalar(owned(self.density(graph, [])))
            divisor = 1 + total if self.shape.interaction == "density" else self.alpha + self.beta * total
            messages = [None if m is None else m / divisor for m in messages]
        messages = self._unpadded(messages) if self.first else self.down(messages, species)
        if self.shape.interaction == "nonlinear":
            sent: Features = [self.sent(species)] if self.first else up
            total_features = add_features(messages, self.residual(sent, species), len(messages))
            mixed: Features = self.mix(gate(total_features, self.shape.inner, sigmoid=True), species)
            return mixed
        mapped: Features = self.species_map(messages, species) if self.shape.species_map else messages
        return mapped

    def _unpadded(self, messages: Features) -> Features:
        sizes = dict(zip((l for l, m in enumerate(messages) if m is not None), self.outputs, strict=False))
        return [None if m is None else m[:, :, : sizes[l]] for l, m in enumerate(messages)]


def in_all_channels(weight: Tensor, contraction: SymmetricContraction, L: int) -> Tensor:
    """Map (channels of order L, out) with zero rows for the contraction's channels that order L lacks."""
    index = getattr(contraction, f"output_{L}")
    if index is None:
        return weight
    return weight.new_zeros(contraction.width, weight.shape[1]).index_copy(0, index, weight)


class LoweredReadout(nn.Module):
    """Energy of each atom from scalars, or from what its first matrix makes of them."""

    def __init__(self, readout: Readout, *, without_first: bool) -> None:
        super().__init__()
        weights = [m().detach() for m in readout.maps]
        biases: list[Tensor | None] = [None] * len(weights)
        for k, bias in enumerate(readout.biases):
            biases[k + 1] = bias.detach()
        self.without_first = without_first
        self.maps = nn.ModuleList(Dense(w, b) for w, b in zip(weights, biases, strict=True))
        if without_first:
            self.maps[0] = nn.Identity()

    def forward(self, scalars: Tensor) -> Tensor:
        """Return (n_nodes,)."""
        x = scalars
        for k, layer in enumerate(self.maps):
            x = layer(x if k == 0 else normalised_silu(x))
        return x.flatten()


class LoweredLayer(nn.Module):
    """One layer: interaction, contraction, output, readout."""

    invariant_channels: Tensor | None

    def __init__(self, model: MACE, t: int, grid: Grid) -> None:
        super().__init__()
        block = model.layers[t]
        assert isinstance(block, MACEBlock)
        last = t + 1 == len(model.layers)
        self.num_orders = 1 if last else len(block.shape.out)
        self.interaction = LoweredInteraction(model, t, grid)
        self.contraction = FoldedContraction(block.contraction)
        self.outputs = block.contraction.outputs
        index = getattr(block.contraction, "output_0", None) if last else None
        self.register_buffer("invariant_channels", index)
        linear = weights_of(block.linear)
        skip = {} if block.skip is None else weights_of(block.skip)
        self.readout: LoweredReadout | None = None
        if block.readout is not None:
            self.readout = LoweredReadout(block.readout, without_first=last)
        if last:
            assert block.readout is not None
            first = block.readout.maps[0]().detach()
            linear, skip = ({0: w[0] @ first} if 0 in w else {} for w in (linear, skip))
        linear = {l: in_all_channels(w, block.contraction, l) for l, w in linear.items()}
        self.linear = PerOrder({l: Dense(w) for l, w in linear.items()})
        self.skip_rows: SpeciesRows | None = None
        self.skip: PerOrder | None = None
        if t == 0 and 0 in skip:
            self.skip_rows = SpeciesRows(_rows(model.embedding().detach(), skip[0]))
        elif t > 0 and skip:
            kind = SpeciesDense if next(iter(skip.values())).dim() == 3 else Dense
            self.skip = PerOrder({l: kind(w) for l, w in skip.items()})

    def forward(self, x: Features, graph: Domain) -> tuple[Features, Tensor | None]:
        """Features after this layer, and its part of the energy (n_owned,)."""
        species = graph.owned_species
        atomic = self.interaction(x, graph)
        new: Features = self.linear(self._products(atomic, species), species)
        if self.skip_rows is not None:
            new = add_features(new, [self.skip_rows(species)], self.num_orders)
        elif self.skip is not None:
            new = add_features(new, self.skip(x, species), self.num_orders)
        energy: Tensor | None = None
        if self.readout is not None:
            assert new[0] is not None
            energy = self.readout(new[0])
        return new, energy

    def invariants(self, x: Features, graph: Domain) -> Tensor:
        """Scalars of the product basis, (n_owned, channels that the native model has)."""
        products = self._products(self.interaction(x, graph), graph.owned_species)[0]
        assert products is not None
        scalars = products.squeeze(1)
        return scalars if self.invariant_channels is None else scalars[:, self.invariant_channels]

    def _products(self, atomic: Features, species: Tensor) -> Features:
        """Product basis per order, (n_owned, 2L+1, channels of the contraction)."""
        product: Features = [None] * (1 + max(self.outputs))
        parts = self.contraction(atomic, species).split([2 * L + 1 for L in self.outputs], dim=1)
        for L, part in zip(self.outputs, parts, strict=True):
            product[L] = part
        return product


def _rows(embedding: Tensor, weight: Tensor) -> Tensor:
    """What each species' embedding becomes: (species, out)."""
    if weight.dim() == 2:
        return embedding @ weight
    return torch.einsum("sc,scd->sd", embedding, weight)


class LoweredMACE(LoweredModel):
    """Energy of each atom; what :class:`compactmlip.models.mace.MACE` computes."""

    def __init__(self, model: MACE, grid: Grid) -> None:
        super().__init__(model.energy_scale, model.energy_shift)
        count = 1 + max(t for t, layer in enumerate(model.layers) if layer.readout is not None)
        self.layers = nn.ModuleList(LoweredLayer(model, t, grid) for t in range(count))
        self.repulsion = copy.deepcopy(model.repulsion)

    def forward(self, species: Tensor, centers: Tensor, neighbors: Tensor, vectors: Tensor) -> Tensor:
        """Return (n_owned,), float64, eV."""
        graph = domain(species, centers, neighbors, vectors)
        energy = vectors.new_zeros(graph.owned_species.shape[0], dtype=torch.float64)
        if self.repulsion is not None:
            lengths = torch.linalg.vector_norm(vectors, dim=-1)
            (pairs,) = owned([self.repulsion(lengths, species, centers, neighbors)])
            assert pairs is not None
            energy = energy + pairs.to(torch.float64)
        x: Features = []
        for layer in self.layers:
            x, part = layer(x, graph)
            if part is not None:
                energy = energy + part.to(torch.float64)
        return self.in_ev(energy, graph.owned_species)

    def descriptors(self, species: Tensor, centers: Tensor, neighbors: Tensor, vectors: Tensor) -> Tensor:
        """Return those of the native model, (n_owned, channels)."""
        graph = domain(species, centers, neighbors, vectors)
        x: Features = []
        for layer in self.layers[:-1]:
            x, _ = layer(x, graph)
        last = self.layers[-1]
        assert isinstance(last, LoweredLayer)
        return last.invariants(x, graph)
