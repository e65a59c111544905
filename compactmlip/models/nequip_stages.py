"""The NequIP forward pass as a sequence of stages; see :mod:`compactmlip.models.stages`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from compactmlip.data.graph import GraphBatch
from compactmlip.models.convolution import Edges
from compactmlip.models.nequip import NequIP, NequIPBlock
from compactmlip.models.stages import Features, Stage, linear_fits


@dataclass(frozen=True)
class State:
    """What one batch carries from stage to stage.

    Attributes
    ----------
    batch, edges
        The same at all stages.
    x
        Node features that entered the layer.
    messages
        Between the two stages of a layer: the aggregated messages.
    """

    batch: GraphBatch
    edges: Edges
    x: Features
    messages: Features


def start(model: nn.Module, batch: GraphBatch) -> State:
    """State before the first stage."""
    assert isinstance(model, NequIP)
    edges = model.edge_features(batch.centers, batch.neighbors, batch.vectors)
    return State(batch, edges, model.embed(batch.species), [])


def linear_stages(model: nn.Module) -> Iterator[Stage[State]]:
    """All stages, in the order of the forward pass.

    Self-connections with weights per species are left as they are.
    """
    assert isinstance(model, NequIP)
    for t in range(len(model.layers)):
        yield _up_stage(model, t)
        yield _gate_stage(model, t)
    yield _readout_stage(model)


def _block(model: NequIP, t: int) -> NequIPBlock:
    block = model.layers[t]
    assert isinstance(block, NequIPBlock)
    return block


def _up_stage(model: NequIP, t: int) -> Stage[State]:
    block = _block(model, t)
    return Stage(
        name=f"layer {t} up",
        fits=linear_fits(model, [(f"layers.{t}.up", lambda state: state.x)]),
        evaluate=lambda state: block.up(state.x),
        advance=lambda state, up: State(state.batch, state.edges, state.x, block.convolve(up, state.edges)),
    )


def _gate_stage(model: NequIP, t: int) -> Stage[State]:
    block = _block(model, t)
    maps = [(f"layers.{t}.down", lambda state: state.messages)]
    if block.skip is not None and not block.skip.per_species:
        maps.append((f"layers.{t}.skip", lambda state: state.x))
    return Stage(
        name=f"layer {t} down",
        fits=linear_fits(model, maps),
        evaluate=lambda state: block.gate_input(state.x, state.messages, state.batch.species),
        advance=lambda state, total: State(state.batch, state.edges, block.activate(total), []),
    )


def _readout_stage(model: NequIP) -> Stage[State]:
    return Stage(
        name="readout",
        fits=linear_fits(model, [("readout_hidden", lambda state: state.x[:1])]),
        evaluate=lambda state: model.readout_hidden(state.x[:1]),
        advance=lambda state, total: State(state.batch, state.edges, total, []),
    )
