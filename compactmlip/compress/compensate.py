"""Compensated pruning: after cutting, refit the linear maps in closed form.

Stage by stage through the network, each sum of linear maps of the pruned model is fitted by ridge
least squares to what the original computes there (before the activation), from the inputs that the
pruned model really sees.  Errors of earlier stages are thereby corrected as far as later weights can.
Values and slopes are fitted together, on displaced copies (:mod:`compactmlip.compress.mirror`).
The penalty pulls towards the sliced weights and its strength is chosen per stage and order on
held-out structures; "no change" is always among the choices.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compactmlip.channels import Mask
from compactmlip.compress.mirror import REFIT_EDGES, Pairs
from compactmlip.compress.refit import StageFit, refit, stage_outputs
from compactmlip.data.graph import (
    Derivatives,
    GraphBatch,
    batches_by_edges,
    collate,
    energy_and_derivatives,
)
from compactmlip.errors import InputError
from compactmlip.models import channel_graph, model_device, model_dtype, model_spec
from compactmlip.models.stages import Features

DAMPINGS = (1.0, 10.0, 100.0, 1000.0)
"""Factors on the chosen penalties, tried in turn until the held-out errors stop falling."""

CHECK_ATOMS = 500
"""Energies and forces are checked on held-out folds of at least so many atoms: all folds of a small set."""

PAIR_ATOMS, MOST_DIRECTIONS = 2000, 4
"""So many pairs of displaced copies are made of each structure that they have about this many atoms, between
one pair and the largest number.  A small set gains from the second to the fourth: each shows other slopes."""

KEPT_BYTES = 1_000_000_000
"""What the original computes is kept for all trials if it needs no more memory, else computed for each."""


@dataclass(frozen=True)
class HeldOutError:
    """Mean absolute deviations from the original: eV/atom, and eV/Angstrom of a force component."""

    energy: float
    forces: float


@dataclass(frozen=True)
class Compensation:
    """Outcome of :func:`compensate`.

    Attributes
    ----------
    model
        The refitted model, or the sliced one if nothing helped.
    damping
        Factor on all penalties; None means that the sliced model was kept.
    before, after
        Errors on calibration structures that the trial refits had not seen.
    fits
        One entry per stage and order.
    """

    model: nn.Module
    damping: float | None
    before: HeldOutError
    after: HeldOutError
    fits: tuple[StageFit, ...] = field(repr=False)


def split_folds(num: int, groups: Sequence[object] | None, num_folds: int, seed: int) -> NDArray[np.int64]:
    """Assign structures to folds; members of one group stay together.

    Raises
    ------
    InputError
        If there are fewer than two structures or groups.
    """
    labels = list(range(num)) if groups is None else list(groups)
    unique = list(dict.fromkeys(labels))
    if len(unique) < 2:
        raise InputError("compensation needs at least two calibration structures (or groups of them).")
    order = np.random.default_rng(seed).permutation(len(unique))
    fold_of = {unique[k]: position % num_folds for position, k in enumerate(order)}
    return np.array([fold_of[label] for label in labels])


def compensate(
    pruned: nn.Module,
    original: nn.Module,
    masks: Mapping[str, Mask],
    graphs: Sequence[GraphBatch],
    *,
    groups: Sequence[object] | None = None,
    num_folds: int = 5,
    max_edges: int = REFIT_EDGES,
    seed: int = 0,
    progress: bool = False,
) -> Compensation:
    """Refit the linear maps of a pruned model against the original.

    Parameters
    ----------
    pruned, original, masks
        ``pruned = prune(original, masks)``.  Neither model is changed.
    graphs
        Calibration structures; no labels are needed.
    groups
        Label of the material or trajectory of each structure.  When given, the penalty is chosen on
        groups that the fit has not seen: use it when the model is meant for other materials.
    num_folds
        Folds of the cross-validation.  Trial refits without one fold each confirm that both energies and
        forces improve there, or the sliced model is returned; the final refit uses all structures.
    max_edges
        Largest batch, in edges.

    Raises
    ------
    InputError
        If there are fewer than two structures or groups, or the models differ in their species.
    """
    if model_spec(pruned).species != model_spec(original).species:
        raise InputError("compensation needs both models for the same species: cut species before channels.")
    folds = split_folds(len(graphs), groups, num_folds, seed)
    parts = {int(f): [g for g, k in zip(graphs, folds, strict=True) if k == f] for f in np.unique(folds)}
    where = model_device(pruned), model_dtype(pruned)
    check = [
        (collate([parts[fold][k] for k in indices]).to(*where), fold)
        for fold in _folds_to_check(parts)
        for indices in batches_by_edges(parts[fold], max_edges)
    ]
    wanted = [energy_and_derivatives(original, batch) for batch, _ in check]
    before = after = _errors([pruned] * len(check), check, wanted)
    refits = _Refits(original, masks, _displaced(parts, max_edges, seed, where))
    best: float | None = None
    for damping in DAMPINGS:
        models = {fold: copy.deepcopy(pruned) for fold in {fold for _, fold in check}}
        for fold, model in models.items():
            refits.run(model, damping, "compensation, trial", progress, without=fold)
        found = _errors([models[fold] for _, fold in check], check, wanted)
        if _is_better(found, after):
            best, after = damping, found
        elif best is not None:
            break
    if best is None:
        return Compensation(pruned, None, before, before, ())
    model = copy.deepcopy(pruned)
    fits = refits.run(model, best, "compensation", progress)
    return Compensation(model, best, before, after, tuple(fits))


def _displaced(
    parts: Mapping[int, Sequence[GraphBatch]],
    max_edges: int,
    seed: int,
    where: tuple[torch.device, torch.dtype],
) -> list[tuple[GraphBatch, int]]:
    """Batches of mirrored pairs with the folds that they belong to."""
    atoms = sum(len(graph.species) for part in parts.values() for graph in part)
    directions = min(max(round(PAIR_ATOMS / (2 * atoms)), 1), MOST_DIRECTIONS)
    seeds = np.random.SeedSequence(seed).generate_state(directions * len(parts)).tolist()
    return [
        (batch.to(*where), fold)
        for fold, part in parts.items()
        for _ in range(directions)
        for batch in Pairs().batches(part, max_edges, seeds.pop())
    ]


class _Refits:
    """Refits of copies of one pruned model on all batches, or without those of one fold."""

    def __init__(
        self, original: nn.Module, masks: Mapping[str, Mask], data: Sequence[tuple[GraphBatch, int]]
    ) -> None:
        self.original, self.data = original, data
        self.columns = kept_columns(original, masks)
        self.outputs = self._outputs()

    def _outputs(self) -> list[list[Features]] | None:
        """What the original computes at each stage for each batch, unless that takes too much memory."""
        kept: list[list[Features]] = []
        size = 0
        for stage in stage_outputs(self.original, [batch for batch, _ in self.data]):
            size += sum(x.nbytes for features in stage for x in features if x is not None)
            if size > KEPT_BYTES:
                return None
            kept.append(stage)
        return kept

    def run(
        self, model: nn.Module, damping: float, title: str, progress: bool, without: int | None = None
    ) -> list[StageFit]:
        """Refit a model in place."""
        chosen = [k for k, (_, fold) in enumerate(self.data) if fold != without]
        known = None if self.outputs is None else [[stage[k] for k in chosen] for stage in self.outputs]
        data = [self.data[k] for k in chosen]
        options: dict[str, Any] = {"pairs": Pairs(), "known": known, "title": title, "progress": progress}
        return refit(model, self.original, self.columns, data, damping, **options)


def _folds_to_check(parts: Mapping[int, Sequence[GraphBatch]]) -> list[int]:
    """First folds that hold enough atoms together."""
    chosen: list[int] = []
    atoms = 0
    for fold in sorted(parts):
        if atoms >= CHECK_ATOMS:
            break
        chosen.append(fold)
        atoms += sum(len(graph.species) for graph in parts[fold])
    return chosen


def _is_better(new: HeldOutError, old: HeldOutError) -> bool:
    """Whether neither error rises and their product falls."""
    risen = new.energy > old.energy or new.forces > old.forces
    return not risen and new.energy * new.forces < old.energy * old.forces


def kept_columns(original: nn.Module, masks: Mapping[str, Mask]) -> dict[str, Tensor]:
    """Output channels (last axis) of the original's weights that the pruned model has, by parameter name."""
    graph = channel_graph(model_spec(original))
    kept = graph.kept_indices(graph.complete(masks))
    return {name: torch.as_tensor(axes[-1]) for name, axes in kept.items() if axes}


def _errors(
    models: Sequence[nn.Module], check: Sequence[tuple[GraphBatch, int]], wanted: Sequence[Derivatives]
) -> HeldOutError:
    """Errors over all batches; each batch has its own model, which has not seen it."""
    energies, forces = [], []
    for model, (batch, _), reference in zip(models, check, wanted, strict=True):
        found = energy_and_derivatives(model, batch)
        energies.append((found.energies - reference.energies) / batch.num_atoms)
        forces.append((found.forces - reference.forces).flatten())
    return HeldOutError(float(torch.cat(energies).abs().mean()), float(torch.cat(forces).abs().mean()))
