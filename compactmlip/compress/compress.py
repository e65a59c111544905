"""Pruning as one step: score, choose, slice, compensate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from compactmlip.compress.apply import prune
from compactmlip.compress.compensate import Compensation, compensate
from compactmlip.compress.cost import Setting, Shapes
from compactmlip.compress.importance import importance
from compactmlip.compress.path_importance import path_importance
from compactmlip.compress.plan import parse_cutoffs, parse_target, target_sizes, top_channels
from compactmlip.compress.plan_file import Plan
from compactmlip.compress.reshape import check_basis, cut_layers, resize_basis
from compactmlip.compress.tapped import Scores
from compactmlip.compress.thin import effort, thinned_by_share
from compactmlip.data.graph import GraphBatch
from compactmlip.data.select import random_up_to
from compactmlip.errors import InputError
from compactmlip.models import channel_graph, model_spec, record_step, with_layer_cutoffs
from compactmlip.models.reshape import BasisStart
from compactmlip.models.targets import Targets
from compactmlip.spec import ModelSpec

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
    target: str | Plan | None,
    *,
    layers: int | None = None,
    radial_hidden: int | None = None,
    readout_hidden: int | None = None,
    odd_paths: bool = False,
    edge_order: int | None = None,
    cut_paths: float = 0.0,
    cutoffs: str | None = None,
    num_basis: int | None = None,
    basis_start: BasisStart = "inherited",
    criterion: str = "taylor",
    scores: Scores | None = None,
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
        the channels, which makes sense with ``layers`` or ``num_basis`` only.  Or a plan, which replaces
        ``radial_hidden``, ``readout_hidden``, ``odd_paths``, ``edge_order``, ``cut_paths``, ``cutoffs`` and
        ``criterion`` and may name single paths to cut.
    layers
        Number of layers to keep; the others are cut first (:func:`compactmlip.compress.reshape.cut_layers`).
    radial_hidden, readout_hidden
        Units to keep in the radial networks and in the readout; all by default.
    odd_paths
        Keep tensor-product paths with odd l1 + l2 + l3.  Models that have them (SevenNet) break inversion
        symmetry; cutting them restores it exactly, and with compensation costs next to no accuracy.
        Families without such paths ignore it.
    edge_order
        Largest order of the spherical harmonics of edges to keep, the largest one of the target by default.
        One above it costs little and lets features of low order see more of the angles.
    cut_paths
        Share of the paths of the tensor products to cut as well, of those that ``target`` leaves: the ones
        that are worth least for the work that they take (:mod:`compactmlip.compress.thin`).
    cutoffs
        Of the layers, as :func:`compactmlip.compress.plan.parse_cutoffs` takes them.
    num_basis, basis_start
        Radial basis functions to have in the end, and how they start
        (:func:`compactmlip.compress.reshape.resize_basis`); the scores and the errors of the compensation
        are those before this change.
    criterion
        How channels are ranked, see :func:`compactmlip.compress.importance.importance`.
    scores
        Scores by that criterion, if they are known already.
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
    if target is None and (cut_paths or cutoffs):
        raise InputError("paths and cutoffs of layers need a target: give the channels that stay.")
    if target is None and layers is None and num_basis is None:
        raise InputError("nothing to cut: give a target such as 64x0+32x1, or a number of layers.")
    if num_basis is not None:
        check_basis(teacher, num_basis, basis_start)
    if layers is not None:
        teacher = cut_layers(teacher, layers, graphs=graphs)
    result = Compressed(teacher, None, {})
    if target is not None:
        reach = parse_cutoffs(cutoffs, model_spec(teacher))
        options: dict[str, Any] = {"radial_hidden": radial_hidden, "readout_hidden": readout_hidden}
        options |= {"odd_paths": odd_paths, "edge_order": edge_order}
        if isinstance(target, Plan):
            reach = target.cutoffs
            criterion, options, target = target.importance, target.options, target.target
        elif cut_paths:
            thin = thin_plan(teacher, graphs, target, cut_paths, seed=seed, progress=progress, **options)
            options, target = thin.options, thin.target
        targets = checked_targets(model_spec(teacher), target, **options, cutoffs=reach)
        if scores is None:
            scores = importance(
                teacher, some_structures(graphs, seed), criterion, seed=seed, progress=progress
            )
        masks = top_channels(model_spec(teacher), targets, scores)
        result = Compressed(prune(teacher, masks, reach), None, scores)
        done = {"target": target, "odd_paths": options["odd_paths"], "importance": criterion}
        done |= {"structures": len(graphs)}
        done |= {
            name: options[name]
            for name in ("edge_order", "without_paths")
            if options.get(name) not in (None, ())
        }
        done |= {"cutoffs": list(reach)} if reach else {}
        record_step(result.sliced, "prune", **done, **({"seed": seed} if criterion == "random" else {}))
        if with_compensation:
            refit = compensate(
                result.sliced, teacher, masks, graphs, groups=groups, seed=seed, progress=progress
            )
            if refit.damping is not None:
                how = {"structures": len(graphs), "damping": refit.damping, "seed": seed}
                record_step(refit.model, "compensate", **how)
            result = replace(result, compensation=refit)
    return result if num_basis is None else _resized(result, num_basis, basis_start, seed)


def thin_plan(
    teacher: nn.Module,
    graphs: Sequence[GraphBatch],
    target: str,
    share: float,
    *,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> Plan:
    """Plan of a target without a share of the paths that it leaves.

    Parameters
    ----------
    teacher, graphs
        Model and structures that say what each path is worth.
    target
        Channels per order.
    share
        Of the paths, between 0 and 1.
    seed, progress
        As of :func:`compress`.
    options
        Those of :func:`compactmlip.compress.plan.target_sizes`.
    """
    shapes = Shapes(teacher)
    plan = Plan.uniform(target, model_spec(teacher).num_message_passing_layers, **options)
    worth = path_importance(teacher, some_structures(graphs, seed), progress=progress)
    return thinned_by_share(shapes, plan, worth, effort(shapes, Setting.of(graphs)), share)


def checked_targets(
    spec: ModelSpec,
    target: str,
    *,
    radial_hidden: int | None = None,
    readout_hidden: int | None = None,
    odd_paths: bool = False,
    edge_order: int | None = None,
    without_paths: Sequence[str] = (),
    cutoffs: Sequence[float | None] | None = None,
    all_may_stay: bool = False,
) -> Targets:
    """Sizes that a target means for a model, after a check that it can be met and that it cuts something.

    Cutoffs of layers are enough for the latter; ``all_may_stay`` leaves it out, where paths will be cut.

    Raises
    ------
    InputError
        If it is malformed, contradicts itself or cuts nothing.
    """
    options = {"radial_hidden": radial_hidden, "readout_hidden": readout_hidden, "edge_order": edge_order}
    wanted = parse_target(target, spec.num_message_passing_layers)
    targets = target_sizes(spec, wanted, **options, odd_paths=odd_paths, without_paths=without_paths)
    if cutoffs is not None:
        with_layer_cutoffs(spec, cutoffs)
    groups = channel_graph(spec).groups
    # How many channels stay does not depend on their scores.
    masks = top_channels(spec, targets, {name: np.zeros(group.size) for name, group in groups.items()})
    if not all_may_stay and cutoffs is None and all(mask.all() for mask in masks.values()):
        raise InputError(f"the target '{target}' cuts nothing from this model; ask for fewer channels.")
    return targets


def _resized(result: Compressed, num_basis: int, start: BasisStart, seed: int) -> Compressed:
    """The same with another radial basis in the models."""
    sliced = resize_basis(result.sliced, num_basis, start=start, seed=seed)
    if result.compensation is None:
        return replace(result, sliced=sliced)
    model = resize_basis(result.compensation.model, num_basis, start=start, seed=seed)
    return replace(result, sliced=sliced, compensation=replace(result.compensation, model=model))


def some_structures(graphs: Sequence[GraphBatch], seed: int) -> list[GraphBatch]:
    """Random structures of about ``IMPORTANCE_ATOMS`` atoms in all."""
    return [graphs[k] for k in random_up_to([len(g.species) for g in graphs], IMPORTANCE_ATOMS, seed)]
