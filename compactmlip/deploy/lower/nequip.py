"""Lowering of the NequIP family.

What is folded: the first layer's features, which depend on the species only, into its radial tables and its
self-connection, together with the linear map behind its convolution; radial networks into tables; maps that
read the same features into one; the two linear maps of the readout into one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compactmlip.deploy.lower.base import LoweredModel
from compactmlip.deploy.lower.convolution import (
    PairTypes,
    SplineConvolution,
    folded,
    pad_columns,
    padded_rows,
)
from compactmlip.deploy.lower.dense import Dense, PerOrder, SpeciesDense, SpeciesRows, weights_of
from compactmlip.deploy.lower.domain import Domain, domain, owned, with_ghosts
from compactmlip.deploy.lower.splines import Grid, RadialFunction
from compactmlip.kernels.gate import gate
from compactmlip.models.convolution import LAYER_ENVELOPE
from compactmlip.models.linear import add_features
from compactmlip.models.nequip import NequIP, NequIPBlock

Features = list[Tensor | None]


def _radial(model: NequIP, t: int) -> RadialFunction:
    block = model.layers[t]
    assert isinstance(block, NequIPBlock)
    convolution = block.convolution

    cutoff = block.shape.cutoff

    def function(r: Tensor) -> Tensor:
        value: Tensor = convolution.radial(model.basis(r)) * convolution.normalisation
        return value if cutoff is None else value * LAYER_ENVELOPE.evaluate(r, cutoff).unsqueeze(-1)

    return function


class FirstLayer(nn.Module):
    """Layer 0: neighbours send scalars that depend on their species only."""

    def __init__(self, model: NequIP, grid: Grid) -> None:
        super().__init__()
        block = model.layers[0]
        assert isinstance(block, NequIPBlock)
        self.out = block.shape.out
        embedding = model.embedding().detach()
        sent = embedding @ weights_of(block.up)[0]
        if block.up.bias is not None:
            sent = sent + block.up.bias.detach()
        types = PairTypes.by_neighbor(len(model.spec.species))
        raw, down = _radial(model, 0), weights_of(block.down)
        made = [folded(raw, block.shape.paths, sent[j], down) for _, j in types.members]
        _, paths, self.sizes = made[0]
        self.orders = [p[2] for p in paths]
        self.convolution = SplineConvolution(
            paths,
            self.sizes,
            [f for f, _, _ in made],
            types,
            grid,
            lmax=model.arch.lmax_edge,
            solid=model.arch.solid_harmonics,
            unit=True,
        )
        rows = embedding.new_zeros(len(embedding), self.sizes[0])
        if block.skip is not None:
            weight = weights_of(block.skip)[0]
            rows = embedding @ weight if weight.dim() == 2 else torch.einsum("sc,scd->sd", embedding, weight)
        if block.down.bias is not None:
            rows = rows + block.down.bias.detach()
        self.rows = SpeciesRows(rows)

    def forward(self, x: Features, graph: Domain) -> Features:
        """Features after this layer."""
        messages = owned(self.convolution(graph, []))
        for l, size in zip(self.orders, self.sizes, strict=True):
            message = messages[l]
            assert message is not None
            messages[l] = message[:, :, :size]
        gates = add_features(messages, [self.rows(graph.owned_species)], len(self.out))
        return gate(gates, self.out)


class Layer(nn.Module):
    """A layer behind the first: what neighbours get and what the node keeps come from one product."""

    def __init__(self, model: NequIP, t: int, grid: Grid) -> None:
        super().__init__()
        block = model.layers[t]
        assert isinstance(block, NequIPBlock)
        self.out = block.shape.out
        paths = sorted(block.shape.paths)
        up = {l: pad_columns(w) for l, w in weights_of(block.up).items()}
        skip = {} if block.skip is None else weights_of(block.skip)
        per_species = block.skip is not None and block.skip.per_species
        self.skip = PerOrder({l: SpeciesDense(w) for l, w in skip.items()}) if per_species else None
        self.split: dict[int, tuple[int, int]] = {}
        maps: dict[int, nn.Module] = {}
        for l in sorted(set(up) | (set() if per_species else set(skip))):
            parts = [m[l] for m in (up, skip) if l in m and not (per_species and m is skip)]
            sent = up[l].shape[1] if l in up else 0
            self.split[l] = sent, sum(p.shape[1] for p in parts) - sent
            bias = None
            if l == 0 and block.up.bias is not None:
                bias = torch.nn.functional.pad(
                    block.up.bias.detach(), (0, sum(p.shape[1] for p in parts) - len(block.up.bias))
                )
            maps[l] = Dense(torch.cat(parts, dim=1), bias)
        self.maps = PerOrder(maps)
        sizes = [block.shape.up[p[0]] for p in paths]
        self.convolution = SplineConvolution(
            paths,
            sizes,
            [_radial(model, t)],
            PairTypes.one(),
            grid,
            lmax=model.arch.lmax_edge,
            solid=model.arch.solid_harmonics,
        )
        self.down = PerOrder(
            {
                l: Dense(
                    padded_rows(w, l, paths, block.shape.up),
                    block.down.bias.detach() if l == 0 and block.down.bias is not None else None,
                )
                for l, w in weights_of(block.down).items()
            }
        )

    def forward(self, x: Features, graph: Domain) -> Features:
        """Features after this layer."""
        species = graph.owned_species
        up: Features = []
        own: Features = []
        for l, made in enumerate(self.maps(x, species)):
            sent, kept = self.split.get(l, (0, 0))
            if made is None or not (sent and kept):
                up.append(made if sent else None)
                own.append(made if kept else None)
                continue
            first, second = made.split([sent, kept], dim=-1)
            up.append(first)
            own.append(second)
        if self.skip is not None:
            own = self.skip(x, species)
        update = self.down(owned(self.convolution(graph, with_ghosts(up))), species)
        return gate(add_features(update, own, len(self.out)), self.out)


class LoweredNequIP(LoweredModel):
    """Energy of each atom; what :class:`compactmlip.models.nequip.NequIP` computes.

    With ``static_shapes`` layers with a shorter cutoff are given all edges; their tables end there.
    """

    static_shapes = False

    def __init__(self, model: NequIP, grid: Grid) -> None:
        super().__init__(model.energy_scale, model.energy_shift)
        self.cutoffs = [layer.cutoff for layer in model.arch.layers]
        grids = [grid if cutoff is None else grid.up_to(cutoff) for cutoff in self.cutoffs]
        layers = [Layer(model, t, grids[t]) if t else FirstLayer(model, grids[t]) for t in range(len(grids))]
        self.layers = nn.ModuleList(layers)
        self.embedding = SpeciesRows(model.embedding().detach())
        hidden, last = model.readout_hidden, model.readout().detach()
        bias = None if hidden.bias is None else hidden.bias.detach() @ last
        self.readout = Dense(weights_of(hidden)[0] @ last, bias)

    def forward(self, species: Tensor, centers: Tensor, neighbors: Tensor, vectors: Tensor) -> Tensor:
        """Return (n_owned,), float64, eV."""
        graph = domain(species, centers, neighbors, vectors)
        energy = self.readout(self._scalars(graph)).flatten().to(torch.float64)
        return self.in_ev(energy, graph.owned_species)

    def descriptors(self, species: Tensor, centers: Tensor, neighbors: Tensor, vectors: Tensor) -> Tensor:
        """Return those of the native model, (n_owned, channels)."""
        return self._scalars(domain(species, centers, neighbors, vectors)).squeeze(1)

    def _scalars(self, graph: Domain) -> Tensor:
        """Scalars after the last layer, (n_owned, 1, channels)."""
        x: Features = [] if len(self.layers) else [self.embedding(graph.owned_species)]
        shorter = [] if self.static_shapes else self.cutoffs
        graphs: dict[float | None, Domain] = {c: graph.within(c) for c in shorter if c is not None}
        for layer, cutoff in zip(self.layers, self.cutoffs, strict=True):
            x = layer(x, graphs.get(cutoff, graph))
        assert x[0] is not None
        return x[0]
