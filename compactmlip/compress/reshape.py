"""Change a model's depth, or the size of its radial basis."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from compactmlip.compress.apply import prune
from compactmlip.data.graph import GraphBatch
from compactmlip.errors import InputError, UnsupportedFeatureError
from compactmlip.models import build, cast, channel_graph, model_device, model_dtype, model_spec, record_step
from compactmlip.models.reshape import BasisStart, LastReadout
from compactmlip.spec import ModelSpec

_FAMILIES = {"mace": "compactmlip.models.mace_reshape"}


def cut_layers(
    model: nn.Module,
    num_layers: int,
    *,
    graphs: Sequence[GraphBatch] = (),
    readout: LastReadout = "nonlinear",
    readout_hidden: int = 16,
    keep_unread: bool = False,
) -> nn.Module:
    """Return a model of the first ``num_layers`` layers.

    What the new last layer computes for the layers behind it (orders above 0) is cut too.  Each layer less
    shortens the receptive field by one cutoff; without retraining, expect large errors.  The readout of an
    inner layer of MACE is linear, which costs accuracy as the last one: by default it is replaced by a
    nonlinear one that starts as the same function (Structural Pruning, C.1).

    Parameters
    ----------
    graphs
        Calibration structures.  With some, the energy shift of each species makes up for the mean energy that
        the cut layers contributed.  (Fitting the readout's weights to the energies of atoms as well was
        measured to be worse, in energies and forces of unseen structures.)
    readout_hidden
        Hidden units of a new nonlinear readout, at least two.
    keep_unread
        Keep what nobody reads any more, as Structural Pruning does: it only costs time and memory.

    Raises
    ------
    InputError
        If there is no such layer, it has no readout, or there is no such kind of readout.
    UnsupportedFeatureError
        If the family cannot be made shallower.
    """
    spec = model_spec(model)
    if not 1 <= num_layers < spec.num_message_passing_layers:
        raise InputError(
            f"cannot keep {num_layers} layers of {spec.num_message_passing_layers}; keep at least one "
            "and cut at least one."
        )
    _check_choice("readout of the last layer", readout, get_args(LastReadout))
    if readout_hidden < 2:
        raise InputError("a nonlinear readout needs at least two hidden units.")
    family = _family(spec)
    shallow = _rebuilt(model, *family.shallower(model, num_layers))
    last = f"layers.{num_layers - 1}.out"
    groups = channel_graph(model_spec(shallow)).groups
    unread = {n: np.zeros(g.size, dtype=bool) for n, g in groups.items() if g.space == last and g.order}
    result = prune(shallow, unread) if unread and not keep_unread else shallow
    if readout == "nonlinear" and family.has_linear_readout(result):
        result = _rebuilt(result, *family.nonlinear_readout(result, model, readout_hidden))
    if graphs:
        _fit_shifts(result, model, graphs)
    done = {"layers": num_layers, "readout": readout, "structures": len(graphs)}
    record_step(result, "cut layers", **done, **({"keep_unread": True} if keep_unread else {}))
    return result


@torch.no_grad()
def _fit_shifts(model: nn.Module, original: nn.Module, graphs: Sequence[GraphBatch]) -> None:
    """Give atoms of each species the mean energy that the original gives them; in place."""
    num_species = len(model_spec(model).species)
    total = torch.zeros(num_species, dtype=torch.float64, device=model_device(model))
    count = torch.zeros_like(total)
    for graph in graphs:
        batch = graph.to(model_device(model), model_dtype(model))
        inputs = (batch.species, batch.centers, batch.neighbors, batch.vectors)
        missing = original(*inputs) - model(*inputs)
        total = total.index_add(0, batch.species, missing)
        count = count.index_add(0, batch.species, torch.ones_like(missing))
    model.get_buffer("energy_shift").add_(total / count.clamp(min=1))


def resize_basis(
    model: nn.Module, num_basis: int, *, start: BasisStart = "inherited", seed: int = 0
) -> nn.Module:
    """Return a model with another number of radial basis functions.

    "inherited" adds functions with weight zero, which changes nothing until training uses them; "random"
    draws the layers that read the basis anew ("large embedding" of Structural Pruning, D.3), after which the
    model has to be trained.

    Raises
    ------
    InputError
        As :func:`check_basis`.
    UnsupportedFeatureError
        If the family's basis cannot be resized.
    """
    check_basis(model, num_basis, start)
    result = _rebuilt(model, *_family(model_spec(model)).with_basis(model, num_basis, start, seed))
    record_step(result, "resize basis", num_basis=num_basis, start=start, seed=seed)
    return result


def check_basis(model: nn.Module, num_basis: int, start: BasisStart) -> None:
    """Refuse what :func:`resize_basis` cannot do, before any work is done.

    Raises
    ------
    InputError
        If there is no function, no such start, or nothing can be inherited.
    UnsupportedFeatureError
        If the family's basis cannot be resized.
    """
    _check_choice("start of a radial basis", start, get_args(BasisStart))
    if num_basis < 1:
        raise InputError("a radial basis needs at least one function.")
    _family(model_spec(model)).check_basis(model, num_basis, start)


def _check_choice(what: str, given: str, choices: tuple[str, ...]) -> None:
    if given not in choices:
        raise InputError(f"unknown {what} '{given}'; choose {' or '.join(choices)}.")


def _family(spec: ModelSpec) -> Any:
    if spec.family not in _FAMILIES:
        raise UnsupportedFeatureError(
            f"depth and radial basis of the family '{spec.family}' cannot be changed; supported: "
            f"{', '.join(_FAMILIES)}."
        )
    return importlib.import_module(_FAMILIES[spec.family])


def _rebuilt(model: nn.Module, spec: ModelSpec, state: Mapping[str, Tensor]) -> nn.Module:
    new = cast(build(spec), model_dtype(model))
    new.load_state_dict(state)
    return new.to(model_device(model)).train(model.training)
