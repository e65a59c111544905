"""Native model families: plain PyTorch, twice differentiable, free of upstream packages.

A model is a module with a ``spec`` and ``forward(species, centers, neighbors, vectors, tap=None)``, which
returns the energy of each atom; see :class:`compactmlip.models.nequip.NequIP`.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import TYPE_CHECKING, Any, cast as typing_cast

import torch
from torch import nn

from compactmlip.errors import CheckpointError, InputError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from compactmlip.channels import ChannelGraph, Channels, Mask
    from compactmlip.data.graph import GraphBatch
    from compactmlip.models.stages import Stage
    from compactmlip.models.targets import TargetOptions, Targets
    from compactmlip.models.workload import Work
    from compactmlip.spec import ModelSpec

FAMILIES = {"mace": "compactmlip.models.mace:MACE", "nequip": "compactmlip.models.nequip:NequIP"}
"""Family name -> "module:class"; imported when first used."""

STRUCTURES = {"mace": "compactmlip.models.mace_channels", "nequip": "compactmlip.models.nequip_channels"}
"""Family name -> module with ``channel_graph(spec)`` and ``pruned_spec(spec, masks)``."""

PLANS = {"mace": "compactmlip.models.mace_plan", "nequip": "compactmlip.models.nequip_plan"}
"""Family name -> module with ``target_sizes(spec, target, options)`` and ``channel_rows(spec)``."""

STAGES = {"mace": "compactmlip.models.mace_stages", "nequip": "compactmlip.models.nequip_stages"}
"""Family name -> module with ``start(model, batch)`` and ``linear_stages(model)``."""

WORK = {"mace": "compactmlip.models.mace_work", "nequip": "compactmlip.models.nequip_work"}
"""Family name -> module with ``work(spec, within)``."""

LAYER_CUTOFFS = {"nequip": "compactmlip.models.nequip_cutoffs"}
"""Family name -> module with ``with_layer_cutoffs(spec, cutoffs)``, where layers can have their own."""

FLOAT64_BUFFERS = frozenset({"energy_scale", "energy_shift"})
"""Buffers that stay in float64 whatever the compute dtype: energies are summed in float64."""


def build(spec: ModelSpec) -> nn.Module:
    """Build the model of a spec with random parameters, in float64.

    Raises
    ------
    CheckpointError
        If the family is unknown.
    """
    if spec.family not in FAMILIES:
        hint = did_you_mean(spec.family, FAMILIES)
        raise CheckpointError(f"unknown model family '{spec.family}'; known: {', '.join(FAMILIES)}.{hint}")
    module, _, name = FAMILIES[spec.family].partition(":")
    return typing_cast(nn.Module, getattr(importlib.import_module(module), name)(spec))


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast parameters and buffers in place to the compute dtype and return the model."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
            assert name not in FLOAT64_BUFFERS
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in FLOAT64_BUFFERS:
                setattr(module, name, buffer.to(dtype))
    return model


def exact_copy(model: nn.Module) -> nn.Module:
    """Copy of a native model in float64 whose constants (couplings, steps of the harmonics) are exact.

    Casting a float32 model to float64 would keep constants that were rounded to float32.
    """
    spec = model_spec(model)
    made = build(spec)
    made.load_state_dict(model.state_dict())
    return made.eval().requires_grad_(False)


def model_dtype(model: nn.Module) -> torch.dtype:
    """Compute dtype of a model."""
    return next(model.parameters()).dtype


def num_parameters(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters())


def model_device(model: nn.Module) -> torch.device:
    """Device that a model's parameters are on."""
    return next(model.parameters()).device


def model_spec(model: nn.Module) -> ModelSpec:
    """Spec of a native model.

    Raises
    ------
    TypeError
        If the module is not one of compactmlip's models.
    """
    from compactmlip.spec import ModelSpec

    spec = getattr(model, "spec", None)
    if not isinstance(spec, ModelSpec):
        raise TypeError(f"expected a compactmlip model, got {type(model).__name__}")
    return spec


def record_step(model: nn.Module, action: str, **options: Any) -> None:
    """Append a step to the provenance in the model's spec."""
    spec = model_spec(model)
    provenance = spec.provenance.then(action, **options)
    setattr(model, "spec", spec.model_copy(update={"provenance": provenance}))  # noqa: B010


def channel_graph(spec: ModelSpec) -> ChannelGraph:
    """Return the channel groups of a spec's family."""
    return typing_cast("ChannelGraph", _module(STRUCTURES, spec).channel_graph(spec))


def pruned_spec(
    spec: ModelSpec, masks: Mapping[str, Mask], cutoffs: Sequence[float | None] | None = None
) -> ModelSpec:
    """Return the spec that is left when only the masked-in channels of each group stay.

    With ``cutoffs`` layers get their own, as in :func:`with_layer_cutoffs`.
    """
    left = typing_cast("ModelSpec", _module(STRUCTURES, spec).pruned_spec(spec, masks))
    return left if cutoffs is None else with_layer_cutoffs(left, cutoffs)


def target_sizes(spec: ModelSpec, target: Sequence[Channels], options: TargetOptions) -> Targets:
    """Return what a target, channels per order for each layer, means for the channel groups."""
    return typing_cast("Targets", _module(PLANS, spec).target_sizes(spec, target, options))


def channel_rows(spec: ModelSpec) -> list[tuple[str, str]]:
    """Return rows (what, channels) that show a spec's channels to people."""
    return typing_cast("list[tuple[str, str]]", _module(PLANS, spec).channel_rows(spec))


def work(spec: ModelSpec, within: Callable[[float], float] | None = None) -> Work:
    """Return what a deployed model of a spec has to compute and to keep.

    ``within`` says which share of the neighbours is nearer than a distance (Angstrom); by default they are
    spread evenly.
    """
    return typing_cast("Work", _module(WORK, spec).work(spec, within or partial(evenly, spec.cutoff)))


def evenly(cutoff: float, distance: float) -> float:
    """Share of neighbours up to a cutoff that are nearer than a distance, if they are spread evenly."""
    return min(1.0, (distance / cutoff) ** 3)


def with_layer_cutoffs(spec: ModelSpec, cutoffs: Sequence[float | None]) -> ModelSpec:
    """Return the spec with another cutoff in each layer (Angstrom; None for the model's).

    A layer whose cutoff is shorter already keeps it.

    Raises
    ------
    InputError
        If there is not one for each layer, one is not between zero and the model's, or the family's layers
        have none.
    """
    if spec.family not in LAYER_CUTOFFS:
        raise InputError(f"layers of models of family '{spec.family}' cannot have cutoffs of their own.")
    if len(cutoffs) != spec.num_message_passing_layers:
        raise InputError(
            f"{len(cutoffs)} cutoffs of layers are given, but the model has "
            f"{spec.num_message_passing_layers} layers."
        )
    for t, cutoff in enumerate(cutoffs):
        if cutoff is not None and not 0 < cutoff <= spec.cutoff:
            raise InputError(
                f"layer {t}: the cutoff must be above 0 and at most the model's {spec.cutoff:g} Angstrom, "
                f"not {cutoff:g}."
            )
    made = _module(LAYER_CUTOFFS, spec).with_layer_cutoffs(spec, cutoffs)
    return typing_cast("ModelSpec", made)


def start_state(model: nn.Module, batch: GraphBatch) -> Any:
    """Return the state of a batch before the first of :func:`linear_stages`."""
    return _module(STAGES, model_spec(model)).start(model, batch)


def linear_stages(model: nn.Module) -> Iterator[Stage[Any]]:
    """Return the stages of a model's forward pass; see :mod:`compactmlip.models.stages`."""
    return typing_cast("Iterator[Stage[Any]]", _module(STAGES, model_spec(model)).linear_stages(model))


def _module(registry: Mapping[str, str], spec: ModelSpec) -> Any:
    return importlib.import_module(registry[spec.family])
