"""The NequIP forward pass as a sequence of linear stages, for closed-form refits.

A stage is one sum of linear maps, for instance ``down(messages) + skip(x)``.  Walking the stages of a
model and of its pruned copy side by side lets each stage of the copy be fitted to the original's
output, given the copy's own inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compactmlip.data.graph import GraphBatch
from compactmlip.models.convolution import Edges
from compactmlip.models.linear import EquivariantLinear, ScaledWeight
from compactmlip.models.nequip import Features, NequIP, NequIPBlock


@dataclass
class State:
    """What one batch carries from stage to stage."""

    batch: GraphBatch
    edges: Edges
    x: Features
    pending: Features


@dataclass(frozen=True)
class LinearStage:
    """One sum of linear maps.

    Attributes
    ----------
    name
        For messages.
    maps
        Names of the :class:`EquivariantLinear` modules whose outputs are added.
    inputs
        ``inputs(state)``: the features that each map reads.
    evaluate
        ``evaluate(state, inputs)``: the sum that the model computes now.
    advance
        ``advance(state, sum)``: continue to the next stage.
    """

    name: str
    maps: tuple[str, ...]
    inputs: Callable[[State], list[Features]]
    evaluate: Callable[[State, list[Features]], Features]
    advance: Callable[[State, Features], State]


def start(model: NequIP, batch: GraphBatch) -> State:
    """State before the first stage."""
    edges = model.edge_features(batch.centers, batch.neighbors, batch.vectors)
    return State(batch, edges, model.embed(batch.species), [])


def linear_stages(model: NequIP) -> Iterator[LinearStage]:
    """All stages that may be refitted, in the order of the forward pass.

    Self-connections with weights per species are left as they are.
    """
    for t in range(len(model.layers)):
        yield _up_stage(model, t)
        yield _gate_stage(model, t)
    yield _readout_stage(model)


def _block(model: NequIP, t: int) -> NequIPBlock:
    block = model.layers[t]
    assert isinstance(block, NequIPBlock)
    return block


def _up_stage(model: NequIP, t: int) -> LinearStage:
    block = _block(model, t)
    return LinearStage(
        name=f"layer {t} up",
        maps=(f"layers.{t}.up",),
        inputs=lambda state: [state.x],
        evaluate=lambda state, inputs: block.up(inputs[0]),
        advance=lambda state, total: State(
            state.batch, state.edges, state.x, block.convolution(total, state.edges)
        ),
    )


def _gate_stage(model: NequIP, t: int) -> LinearStage:
    block = _block(model, t)
    linear_skip = block.skip is not None and not block.skip.per_species
    maps = (f"layers.{t}.down", f"layers.{t}.skip") if linear_skip else (f"layers.{t}.down",)
    return LinearStage(
        name=f"layer {t} down",
        maps=maps,
        inputs=lambda state: [state.pending, state.x] if linear_skip else [state.pending],
        evaluate=lambda state, inputs: block.gate_input(state.x, state.pending, state.batch.species),
        advance=lambda state, total: State(state.batch, state.edges, block.activate(total), []),
    )


def _readout_stage(model: NequIP) -> LinearStage:
    return LinearStage(
        name="readout",
        maps=("readout_hidden",),
        inputs=lambda state: [state.x[:1]],
        evaluate=lambda state, inputs: model.readout_hidden(inputs[0]),
        advance=lambda state, total: State(state.batch, state.edges, total, []),
    )


def linear_map(model: NequIP, name: str) -> EquivariantLinear:
    """Find a map by the name that a stage gives."""
    module = model.get_submodule(name)
    assert isinstance(module, EquivariantLinear)
    return module


def block_weight(linear: EquivariantLinear, l: int) -> ScaledWeight | None:
    """Weight block of order l, or None."""
    key = str(l)
    if key not in linear.orders:
        return None
    block = linear.orders[key]
    assert isinstance(block, ScaledWeight)
    return block


@torch.no_grad()
def add_to_weight(block: ScaledWeight, change: Tensor) -> None:
    """Add a change of the effective weight (factor times parameter)."""
    block.weight.add_((change / block.scale.double()).to(block.weight.dtype))
