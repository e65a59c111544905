"""Layers of the NequIP family that see fewer neighbours than the model.

Messages of the first layer tell the nodes of all neighbours within the cutoff; later layers, which take most
of the time, can do with the nearer ones: with 4 instead of 5 Angstrom they have half as many.
"""

from __future__ import annotations

from collections.abc import Sequence

from compactmlip.models.nequip import NequIPArchitecture
from compactmlip.spec import ModelSpec


def with_layer_cutoffs(spec: ModelSpec, cutoffs: Sequence[float | None]) -> ModelSpec:
    """Spec with other cutoffs; see :func:`compactmlip.models.with_layer_cutoffs`."""
    arch = NequIPArchitecture.model_validate(spec.architecture)
    layers = []
    for layer, cutoff in zip(arch.layers, cutoffs, strict=True):
        # What a layer did not see before, its weights do not know of.
        shortest = min(c or spec.cutoff for c in (layer.cutoff, cutoff))
        layers.append(layer.model_copy(update={"cutoff": None if shortest == spec.cutoff else shortest}))
    made = arch.model_copy(update={"layers": tuple(layers)})
    return spec.model_copy(update={"architecture": made.model_dump(mode="json")})
