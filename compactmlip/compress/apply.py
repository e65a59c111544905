"""Cut channels out of a model: pure slicing, nothing is recomputed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from compactmlip.channels import Mask
from compactmlip.errors import InputError, unknown_species_error
from compactmlip.models import build, cast, channel_graph, model_device, model_dtype, model_spec, pruned_spec


def prune(
    model: nn.Module, masks: Mapping[str, Mask], cutoffs: Sequence[float | None] | None = None
) -> nn.Module:
    """Return a smaller model that keeps only the masked-in channels of each group.

    The result equals the model with the cut channels set to zero, to rounding, for any masks
    (Structural Pruning, alignment).  Groups that are not named stay whole; what cannot live without
    a cut group goes with it.

    Parameters
    ----------
    model
        A native model; it is not changed.
    masks
        Boolean mask (size,) by channel-group name.
    cutoffs
        Of the layers, as :func:`with_layer_cutoffs` takes them; by default they stay as they are.

    Raises
    ------
    InputError
        If a mask or the cutoffs do not fit, or nothing would be left of a part that is needed.
    """
    spec = model_spec(model)
    graph = channel_graph(spec)
    complete = graph.complete(masks)
    smaller = cast(build(pruned_spec(spec, complete, cutoffs)), model_dtype(model))
    old, new = model.state_dict(), smaller.state_dict()
    kept = graph.kept_indices(complete)
    smaller.load_state_dict({name: _take(old[name], kept[name]) for name in new})
    return smaller.to(model_device(model)).train(model.training)


def with_layer_cutoffs(model: nn.Module, cutoffs: Sequence[float | None]) -> nn.Module:
    """Return the model with layers that see neighbours up to cutoffs of their own, and nothing beyond.

    Parameters
    ----------
    model
        A native model; it is not changed.
    cutoffs
        One for each layer, in Angstrom; None for the model's.

    Raises
    ------
    InputError
        As :func:`compactmlip.models.with_layer_cutoffs`.
    """
    return prune(model, {}, cutoffs)


def keep_species(model: nn.Module, symbols: Iterable[str]) -> nn.Module:
    """Return the model for a subset of its species; energies of such structures are unchanged.

    Raises
    ------
    SpeciesError
        If a symbol is not covered by the model.
    """
    spec = model_spec(model)
    wanted = set(symbols)
    if not wanted:
        raise InputError("no species given; name at least one, for instance --species Mg,O.")
    if not wanted <= set(spec.species):
        raise unknown_species_error(wanted, spec.species, "the list of species to keep")
    mask = np.array([s in wanted for s in spec.species])
    smaller = prune(model, {"species": mask})
    return smaller


def _take(tensor: Tensor, indices: Iterable[np.ndarray[tuple[int], np.dtype[np.int64]]]) -> Tensor:
    for axis, index in enumerate(indices):
        if len(index) < tensor.shape[axis]:
            tensor = tensor.index_select(axis, torch.as_tensor(index, device=tensor.device))
    return tensor.clone()
