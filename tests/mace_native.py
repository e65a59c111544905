"""Small random MACE models of the shape that upstream builds, or changed from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from compactmlip.channels import Channels
from compactmlip.compress.apply import prune
from compactmlip.compress.plan import choose, parse_target, target_sizes
from compactmlip.models import build, channel_graph
from compactmlip.models.mace_architecture import MACEArchitecture, MACEReadout, upstream_layer
from compactmlip.spec import ModelSpec, Provenance

SPECIES = ("H", "C", "O", "Mg")
NUM_NEIGHBORS = 11.3
"""Divisor of the first layer's messages; the second layer has another one."""


def native_spec(
    hidden: Channels = (6, 6), layers: list[dict[str, Any]] | None = None, **architecture: Any
) -> ModelSpec:
    """Two layers, as upstream would build them, changed as told."""
    made = [
        upstream_layer(
            hidden[:1], width=hidden[0], out=hidden, lmax_edge=2, correlation=2, radial_hidden=(7, 9)
        ),
        upstream_layer(
            hidden, width=hidden[0], out=hidden[:1], lmax_edge=2, correlation=2, radial_hidden=(7, 9)
        ),
    ]
    readouts = [MACEReadout(kind="linear"), MACEReadout(kind="nonlinear", hidden=(5,))]
    shapes = [
        layer.model_copy(update={"readout": readout, **own})
        for layer, readout, own in zip(made, readouts, layers or [{}, {}], strict=True)
    ]
    options = {
        "embedding": hidden[0],
        "num_basis": 5,
        "envelope": {"kind": "polynomial", "p": 5},
        "lmax_edge": 2,
        "layers": [shape.model_dump() for shape in shapes],
    }
    shape = MACEArchitecture.model_validate({**options, **architecture})
    return ModelSpec(
        family="mace",
        species=SPECIES,
        cutoff=4.0,
        dtype="float64",
        num_message_passing_layers=len(shape.layers),
        architecture=shape.model_dump(mode="json"),
        provenance=Provenance(name="random", source="tests", licence="MIT"),
    )


def native_model(spec: ModelSpec, seed: int = 3) -> nn.Module:
    """Random weights; energies and normalisation as those of a trained model."""
    generator = torch.Generator().manual_seed(seed)
    model = build(spec)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        for t, block in enumerate(model.layers):
            block.interaction.convolution.normalisation.fill_(1 / (NUM_NEIGHBORS - 2 * t))
            for weight in block.contraction.weights.values():
                weight /= weight.shape[1]
        model.energy_scale.fill_(0.7)
        model.energy_shift.copy_(torch.tensor([-13.6, -1030.0, -2040.0, -5.5])[: len(spec.species)])
    return model


def random_scores(spec: ModelSpec) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(5)
    return {name: generator.normal(size=group.size) for name, group in channel_graph(spec).groups.items()}


def cut_to(model: nn.Module, target: str, **options: Any) -> nn.Module:
    """Prune to a target as the command does, with random scores."""
    spec = model.spec
    sizes = target_sizes(spec, parse_target(target, len(model.layers)), **options)
    return prune(model, choose(channel_graph(spec), sizes, random_scores(spec)))
