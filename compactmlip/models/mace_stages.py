"""The MACE forward pass as a sequence of stages; see :mod:`compactmlip.models.stages`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from compactmlip.data.graph import GraphBatch
from compactmlip.models.contraction import SymmetricContraction, weight_key
from compactmlip.models.convolution import Edges
from compactmlip.models.linear import ScaledWeight
from compactmlip.models.mace import MACE, MACEBlock, Readout
from compactmlip.models.stages import Features, Fit, Stage, add_to_weight, linear_fits


@dataclass(frozen=True)
class State:
    """What one batch carries from stage to stage.

    Attributes
    ----------
    batch, edges
        The same at all stages.
    x
        Node features that entered the layer; after its last stage those that leave it.
    up, messages, inner, atomic, product
        Features inside the layer, once they are known.
    """

    batch: GraphBatch
    edges: Edges
    x: Features
    up: Features = field(default_factory=list)
    messages: Features = field(default_factory=list)
    inner: Features = field(default_factory=list)
    atomic: Features = field(default_factory=list)
    product: Features = field(default_factory=list)


def start(model: nn.Module, batch: GraphBatch) -> State:
    """State before the first stage."""
    assert isinstance(model, MACE)
    edges = model.edge_features(batch.species, batch.centers, batch.neighbors, batch.vectors)
    return State(batch, edges, model.embed(batch.species))


def linear_stages(model: nn.Module) -> Iterator[Stage[State]]:
    """All stages, in the order of the forward pass.

    Skip connections with weights per species, and contractions whose weights all species share, are left
    as they are.
    """
    assert isinstance(model, MACE)
    for t, block in enumerate(model.layers):
        assert isinstance(block, MACEBlock)
        yield _up_stage(model, block, t)
        yield _down_stage(model, block, t)
        if block.shape.has_inner:
            yield _inner_stage(model, block, t)
        yield _contraction_stage(block, t)
        yield _update_stage(model, block, t)
        if block.readout is not None:
            yield _readout_stage(block.readout, t)


def _up_stage(model: MACE, block: MACEBlock, t: int) -> Stage[State]:
    interaction = block.interaction

    def advance(state: State, up: Features) -> State:
        edges = interaction.edges_with_species(state.edges, state.batch.species)
        messages = interaction.convolution(up, edges)
        divisor = interaction.divisor(edges, state.batch.species.shape[0])
        return replace(state, up=up, messages=interaction.normalised(messages, divisor))

    return Stage(
        name=f"layer {t} up",
        fits=linear_fits(model, [(f"layers.{t}.interaction.up", lambda state: state.x)]),
        evaluate=lambda state: interaction.up(state.x),
        advance=advance,
    )


def _down_stage(model: MACE, block: MACEBlock, t: int) -> Stage[State]:
    interaction = block.interaction
    maps = [(f"layers.{t}.interaction.down", lambda state: state.messages)]
    if block.shape.interaction == "nonlinear":
        maps.append((f"layers.{t}.interaction.residual", lambda state: state.up))

    def advance(state: State, total: Features) -> State:
        features = interaction.activate(total)
        if block.shape.has_inner:
            return replace(state, messages=[], inner=features)
        return replace(state, messages=[], atomic=features)

    return Stage(
        name=f"layer {t} down",
        fits=linear_fits(model, maps),
        evaluate=lambda state: interaction.after_convolution(state.messages, state.up),
        advance=advance,
    )


def _inner_stage(model: MACE, block: MACEBlock, t: int) -> Stage[State]:
    """Species map, or the linear map after the gate."""
    name = "mix" if block.shape.interaction == "nonlinear" else "species_map"
    return Stage(
        name=f"layer {t} {name}",
        fits=linear_fits(model, [(f"layers.{t}.interaction.{name}", lambda state: state.inner)]),
        evaluate=lambda state: block.interaction.map_inner(state.inner, state.batch.species),
        advance=lambda state, total: replace(state, inner=[], atomic=total),
    )


def _contraction_stage(block: MACEBlock, t: int) -> Stage[State]:
    """The contraction is linear in its weights: least squares per species and channel."""
    contraction = block.contraction
    outputs = contraction.outputs if contraction.per_species else ()
    return Stage(
        name=f"layer {t} contraction",
        fits=tuple(_contraction_fit(contraction, t, L) for L in outputs),
        evaluate=lambda state: contraction(state.atomic, state.batch.species),
        advance=lambda state, total: replace(state, atomic=[], product=total),
    )


def _contraction_fit(contraction: SymmetricContraction, t: int, L: int) -> Fit[State]:
    degrees = [nu for nu in range(1, contraction.degree + 1) if (L, nu) in contraction.tables]

    def design(state: State) -> Tensor:
        features = contraction.product_features(state.atomic)
        return torch.cat([features[L, nu] for nu in degrees], dim=2)

    def apply(change: Tensor) -> None:
        counts = [len(contraction.tables[L, nu].multisets) for nu in degrees]
        for nu, part in zip(degrees, change.split(counts, dim=1), strict=True):
            contraction.add_to_combined(L, nu, part)

    parameter = f"layers.{t}.contraction.weights.{weight_key(L, degrees[-1])}"
    return Fit(L, "channel", parameter, design, apply)


def _update_stage(model: MACE, block: MACEBlock, t: int) -> Stage[State]:
    maps = [(f"layers.{t}.linear", lambda state: state.product)]
    if block.skip is not None and not block.skip.per_species:
        maps.append((f"layers.{t}.skip", lambda state: state.x))
    return Stage(
        name=f"layer {t} linear",
        fits=linear_fits(model, maps),
        evaluate=lambda state: block.update(state.x, state.product, state.batch.species),
        advance=lambda state, total: State(state.batch, state.edges, total),
    )


def _readout_stage(readout: Readout, t: int) -> Stage[State]:
    first = readout.maps[0]
    assert isinstance(first, ScaledWeight)

    def evaluate(state: State) -> Features:
        assert state.x[0] is not None
        return [state.x[0] @ first()]

    def design(state: State) -> Tensor:
        assert state.x[0] is not None
        return state.x[0]

    parameter = f"layers.{t}.readout.maps.0.weight"

    def apply(change: Tensor) -> None:
        add_to_weight(first, change)

    fit: Fit[State] = Fit(0, "shared", parameter, design, apply, (parameter,))
    return Stage(f"layer {t} readout", (fit,), evaluate, lambda state, total: state)
