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
    layers = [
        layer.model_copy(update={"cutoff": None if cutoff == spec.cutoff else cutoff})
        for layer, cutoff in zip(arch.layers, cutoffs, strict=True)
    ]
    made = arch.model_copy(update={"layers": tuple(layers)})
    return spec.model_copy(update={"architecture": made.model_dump(mode="json")})
