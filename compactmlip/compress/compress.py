"""Pruning as one step: score, choose, slice, compensate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from compactmlip.compress.apply import prune
from compactmlip.compress.compensate import Compensation, compensate
from compactmlip.compress.importance import Scores, importance
from compactmlip.compress.plan import parse_target, target_sizes, top_channels
from compactmlip.compress.reshape import cut_layers
from compactmlip.data.graph import GraphBatch
from compactmlip.errors import InputError
from compactmlip.models import model_spec, record_step

IMPORTANCE_ATOMS = 800
"""Importance is averaged over structures of about this many atoms: more do not change the ranking."""


@dataclass(frozen=True)
class Compressed:
    """Outcome of :func:`compress`.

    Attributes
    ----------
    sliced
        The model after plain slicing.
    compensation
        The refit, or None if it was switched off.
    scores
        Importance of each channel.
    """

    sliced: nn.Module
    compensation: Compensation | None
    scores: Scores

    @property
    def model(self) -> nn.Module:
        """The compensated model, or the sliced one."""
        return self.sliced if self.compensation is None else self.compensation.model


def compress(
    teacher: nn.Module,
    graphs: Sequence[GraphBatch],
    target: str | None,
    *,
    layers: int | None = None,
    radial_hidden: int | None = None,
    readout_hidden: int | None = None,
    odd_paths: bool = False,
    criterion: str = "taylor",
    with_compensation: bool = True,
    groups: Sequence[object] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Compressed:
    """Cut a model to a target architecture.

    Parameters
    ----------
    teacher
        A native model; it is not changed.
    graphs
        Calibration structures as graphs of this model.
    target
        Channels per order: ``"64x0+32x1"`` for all layers, or one per layer separated by commas.  None keeps
        the channels, which makes sense with ``layers`` only.
    layers
        Number of layers to keep; the others are cut first (:func:`compactmlip.compress.reshape.cut_layers`).
    radial_hidden, readout_hidden
        Units to keep in the radial networks and in the readout; all by default.
    odd_paths
        Keep tensor-product paths with odd l1 + l2 + l3.  Models that have them (SevenNet) break inversion
        symmetry; cutting them restores it exactly, and with compensation costs next to no accuracy.
        Families without such paths ignore it.
    criterion
        How channels are ranked, see :func:`compactmlip.compress.importance.importance`.
    with_compensation
        Refit the remaining linear maps (:func:`compactmlip.compress.compensate.compensate`).
    groups
        Material or trajectory of each structure, see there.

    Raises
    ------
    InputError
        If the target is malformed, larger than the model, or there is no calibration structure, or the
        criterion is unknown.
    """
    if layers is not None:
        teacher = cut_layers(teacher, layers, graphs=graphs)
        if target is None:
            return Compressed(teacher, None, {})
    elif target is None:
        raise InputError("nothing to cut: give a target such as 64x0+32x1, or a number of layers.")
    spec = model_spec(teacher)
    wanted = parse_target(target, spec.num_message_passing_layers)
    targets = target_sizes(
        spec,
        wanted,
        radial_hidden=radial_hidden,
        readout_hidden=readout_hidden,
        odd_paths=odd_paths,
    )
    scores = importance(teacher, _some(graphs, seed), criterion, seed=seed, progress=progress)
    masks = top_channels(spec, targets, scores)
    if all(mask.all() for mask in masks.values()):
        raise InputError(f"the target '{target}' cuts nothing from this model; ask for fewer channels.")
    sliced = prune(teacher, masks)
    done = {"target": target, "odd_paths": odd_paths, "importance": criterion, "structures": len(graphs)}
    if criterion == "random":
        done["seed"] = seed
    record_step(sliced, "prune", **done)
    if not with_compensation:
        return Compressed(sliced, None, scores)
    refit = compensate(sliced, teacher, masks, graphs, groups=groups, seed=seed, progress=progress)
    if refit.damping is not None:
        record_step(refit.model, "compensate", structures=len(graphs), damping=refit.damping, seed=seed)
    return Compressed(sliced, refit, scores)


def _some(graphs: Sequence[GraphBatch], seed: int) -> list[GraphBatch]:
    """Random structures of about ``IMPORTANCE_ATOMS`` atoms in all."""
    chosen, atoms = [], 0
    for k in np.random.default_rng(seed).permutation(len(graphs)):
        if atoms >= IMPORTANCE_ATOMS:
            break
        chosen.append(graphs[k])
        atoms += len(graphs[k].species)
    return chosen
