"""Compensated pruning: after cutting, refit the linear maps in closed form.

Stage by stage through the network, each sum of linear maps of the pruned model is fitted by ridge
least squares to what the original computes there (before the activation), from the inputs that the
pruned model really sees.  Errors of earlier stages are thereby corrected as far as later weights can.
The penalty pulls towards the sliced weights and its strength is chosen per stage and order on
held-out structures; "no change" is always among the choices.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compactmlip.channels import Mask
from compactmlip.compress.ridge import NormalEquations, choose_ridge
from compactmlip.data.graph import (
    MAX_EDGES,
    Derivatives,
    GraphBatch,
    batches_by_edges,
    collate,
    energy_and_derivatives,
)
from compactmlip.errors import InputError
from compactmlip.models import channel_graph, model_device, model_dtype
from compactmlip.models.nequip import Features, NequIP
from compactmlip.models.nequip_stages import (
    LinearStage,
    State,
    add_to_weight,
    block_weight,
    linear_map,
    linear_stages,
    start,
)
from compactmlip.progress import Track

DAMPINGS = (1.0, 10.0, 100.0, 1000.0)
"""Factors on the chosen penalties, tried in turn until the held-out errors stop falling."""

CHECK_ATOMS = 500
"""Energies and forces are checked on held-out folds of at least so many atoms: all folds of a small set."""


@dataclass(frozen=True)
class StageFit:
    """What the refit of one stage and order did.

    Attributes
    ----------
    stage, order
        Where.
    ridge
        Penalty chosen on held-out structures; None means that the weights were left alone.
    before, after
        RMS deviation from the original on held-out structures, relative to the RMS of the target.
    """

    stage: str
    order: int
    ridge: float | None
    before: float
    after: float


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
    max_edges: int = MAX_EDGES,
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
        If there are fewer than two structures or groups.
    """
    assert isinstance(pruned, NequIP) and isinstance(original, NequIP)
    folds = split_folds(len(graphs), groups, num_folds, seed)
    columns = _kept_columns(original, masks)
    data = _fold_batches(graphs, folds, max_edges, pruned)
    held_out = _folds_to_check(data)
    check = [(batch, fold) for batch, fold in data if fold in held_out]
    wanted = [energy_and_derivatives(original, batch) for batch, _ in check]
    before = after = _errors([pruned] * len(check), check, wanted)
    best: float | None = None
    for damping in DAMPINGS:
        models = {fold: copy.deepcopy(pruned) for fold in held_out}
        for fold, model in models.items():
            rest = [(batch, f) for batch, f in data if f != fold]
            _refit_all(model, original, columns, rest, damping, "compensation, trial", progress)
        found = _errors([models[fold] for _, fold in check], check, wanted)
        if _is_better(found, after):
            best, after = damping, found
        elif best is not None:
            break
    if best is None:
        return Compensation(pruned, None, before, before, ())
    model = copy.deepcopy(pruned)
    fits = _refit_all(model, original, columns, data, best, "compensation", progress)
    return Compensation(model, best, before, after, tuple(fits))


def _folds_to_check(data: Sequence[tuple[GraphBatch, int]]) -> list[int]:
    """First folds that hold enough atoms together."""
    chosen: list[int] = []
    atoms = 0
    for fold in sorted({fold for _, fold in data}):
        if atoms >= CHECK_ATOMS:
            break
        chosen.append(fold)
        atoms += sum(len(batch.species) for batch, f in data if f == fold)
    return chosen


def _is_better(new: HeldOutError, old: HeldOutError) -> bool:
    """Whether neither error rises and their product falls."""
    risen = new.energy > old.energy or new.forces > old.forces
    return not risen and new.energy * new.forces < old.energy * old.forces


def _fold_batches(
    graphs: Sequence[GraphBatch], folds: NDArray[np.int64], max_edges: int, model: nn.Module
) -> list[tuple[GraphBatch, int]]:
    """Batches that hold structures of one fold each, where and how the model computes."""
    device, dtype = model_device(model), model_dtype(model)
    data = []
    for fold in np.unique(folds):
        part = [g for g, f in zip(graphs, folds, strict=True) if f == fold]
        for indices in batches_by_edges(part, max_edges):
            data.append((collate([part[k] for k in indices]).to(device, dtype), int(fold)))
    return data


def _kept_columns(original: NequIP, masks: Mapping[str, Mask]) -> dict[str, Tensor]:
    """Output columns of the original's weights that the pruned model still has, by parameter name."""
    graph = channel_graph(original.spec)
    kept = graph.kept_indices(graph.complete(masks))
    return {name: torch.as_tensor(axes[-1]) for name, axes in kept.items() if name.endswith(".weight")}


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


@torch.no_grad()
def _refit_all(
    student: NequIP,
    teacher: NequIP,
    columns: Mapping[str, Tensor],
    data: Sequence[tuple[GraphBatch, int]],
    damping: float,
    title: str,
    progress: bool,
) -> list[StageFit]:
    """Walk both models stage by stage; change the student in place."""
    batches, folds = [batch for batch, _ in data], [fold for _, fold in data]
    students = [start(student, batch) for batch in batches]
    teachers = [start(teacher, batch) for batch in batches]
    fits: list[StageFit] = []
    stages = list(zip(linear_stages(student), linear_stages(teacher), strict=True))
    with Track(title, len(stages), "stages", enabled=progress) as track:
        for stage, source in stages:
            targets = [source.evaluate(state, source.inputs(state)) for state in teachers]
            fits += _refit_stage(student, stage, students, targets, columns, folds, damping)
            teachers = [source.advance(s, y) for s, y in zip(teachers, targets, strict=True)]
            students = [stage.advance(s, stage.evaluate(s, stage.inputs(s))) for s in students]
            track.advance(1)
    return fits


def _refit_stage(
    student: NequIP,
    stage: LinearStage,
    states: Sequence[State],
    targets: Sequence[Features],
    columns: Mapping[str, Tensor],
    folds: Sequence[int],
    damping: float,
) -> list[StageFit]:
    maps = [linear_map(student, name) for name in stage.maps]
    num_orders = max(len(t) for t in targets)
    sums: list[dict[int, NormalEquations]] = [{} for _ in range(num_orders)]
    for state, target, fold in zip(states, targets, folds, strict=True):
        inputs = stage.inputs(state)
        current = stage.evaluate(state, inputs)
        for l, wanted in enumerate(target):
            now = current[l] if l < len(current) else None
            if wanted is None or now is None:
                continue
            blocks = [x[l] for x, m in zip(inputs, maps, strict=True) if block_weight(m, l) is not None]
            kept = _target_columns(stage, maps, columns, l)
            design = torch.cat([b.flatten(0, 1) for b in blocks if b is not None], dim=1).double()
            goal = wanted.index_select(-1, kept.to(wanted.device)).flatten(0, 1).double()
            if fold not in sums[l]:
                sums[l][fold] = NormalEquations(design, goal)
            sums[l][fold].add(design, goal - now.flatten(0, 1).double(), goal)
    fits = []
    for l, by_fold in enumerate(sums):
        if len(by_fold) < 2:
            continue
        choice = choose_ridge(list(by_fold.values()), damping)
        fits.append(StageFit(stage.name, l, choice.ridge, choice.before, choice.after))
        if choice.change is not None:
            _apply(maps, l, choice.change)
    return fits


def _target_columns(
    stage: LinearStage, maps: Sequence[nn.Module], columns: Mapping[str, Tensor], l: int
) -> Tensor:
    for name, module in zip(stage.maps, maps, strict=True):
        if str(l) in module.orders:  # type: ignore[operator]
            return columns[f"{name}.orders.{l}.weight"]
    raise AssertionError(f"{stage.name}: order {l} has no map")


def _apply(maps: Sequence[nn.Module], l: int, change: Tensor) -> None:
    """Distribute the solution over the maps whose inputs were put side by side."""
    row = 0
    for module in maps:
        block = block_weight(module, l)  # type: ignore[arg-type]
        if block is not None:
            rows = block.weight.shape[-2]
            add_to_weight(block, change[row : row + rows])
            row += rows
