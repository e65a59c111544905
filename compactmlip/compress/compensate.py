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
from compactmlip.data.graph import MAX_EDGES, GraphBatch, batches_by_edges, collate, energy_and_derivatives
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

RIDGES = tuple(10.0**k for k in range(-8, 3))
"""Penalties tried, relative to the mean square of the inputs."""

DAMPINGS = (1.0, 10.0, 100.0, 1000.0)
"""Factors on the chosen penalties tried when the refit does not lower the held-out error."""


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
class Compensation:
    """Outcome of :func:`compensate`.

    Attributes
    ----------
    model
        The refitted model, or the sliced one if nothing helped.
    damping
        Factor on all penalties; None means that the sliced model was kept.
    plain_error, error
        Held-out force RMSE against the original before and after, eV/Angstrom.
    fits
        One entry per stage and order.
    """

    model: nn.Module
    damping: float | None
    plain_error: float
    error: float
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
        Folds of the cross-validation.  The first is kept out of a trial refit to confirm on forces
        that it helps; the final refit uses all structures.
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
    batches, owners = _fold_batches(graphs, folds, max_edges, pruned)
    check = [batch for batch, fold in zip(batches, owners, strict=True) if fold == 0]
    fit = [(batch, fold) for batch, fold in zip(batches, owners, strict=True) if fold != 0]
    reference = [energy_and_derivatives(original, batch).forces for batch in check]
    plain = _force_rmse(pruned, check, reference)
    best: float | None = None
    error = plain
    for damping in DAMPINGS:
        candidate = copy.deepcopy(pruned)
        _refit_all(candidate, original, columns, fit, damping, "compensation, trial", progress)
        found = _force_rmse(candidate, check, reference)
        if found < error:
            best, error = damping, found
        elif best is not None:
            break
    if best is None:
        return Compensation(pruned, None, plain, plain, ())
    model = copy.deepcopy(pruned)
    everything = list(zip(batches, owners, strict=True))
    fits = _refit_all(model, original, columns, everything, best, "compensation", progress)
    return Compensation(model, best, plain, error, tuple(fits))


def _fold_batches(
    graphs: Sequence[GraphBatch], folds: NDArray[np.int64], max_edges: int, model: nn.Module
) -> tuple[list[GraphBatch], list[int]]:
    """Batches that hold structures of one fold each, where and how the model computes."""
    device, dtype = model_device(model), model_dtype(model)
    batches, owners = [], []
    for fold in np.unique(folds):
        part = [g for g, f in zip(graphs, folds, strict=True) if f == fold]
        for indices in batches_by_edges(part, max_edges):
            batches.append(collate([part[k] for k in indices]).to(device, dtype))
            owners.append(int(fold))
    return batches, owners


def _kept_columns(original: NequIP, masks: Mapping[str, Mask]) -> dict[str, Tensor]:
    """Output columns of the original's weights that the pruned model still has, by parameter name."""
    graph = channel_graph(original.spec)
    kept = graph.kept_indices(graph.complete(masks))
    return {name: torch.as_tensor(axes[-1]) for name, axes in kept.items() if name.endswith(".weight")}


def _force_rmse(model: nn.Module, batches: Sequence[GraphBatch], reference: Sequence[Tensor]) -> float:
    square, count = 0.0, 0
    for batch, forces in zip(batches, reference, strict=True):
        difference = energy_and_derivatives(model, batch).forces - forces
        square += float(difference.double().square().sum())
        count += difference.numel()
    return float(np.sqrt(square / count))


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
    sums: list[dict[int, _Sums]] = [{} for _ in range(num_orders)]
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
                sums[l][fold] = _Sums(design, goal)
            sums[l][fold].add(design, goal - now.flatten(0, 1).double(), goal)
    fits = []
    for l, by_fold in enumerate(sums):
        if len(by_fold) < 2:
            continue
        ridge, change, before, after = _choose_ridge(list(by_fold.values()), damping)
        fits.append(StageFit(stage.name, l, ridge, before, after))
        if change is not None:
            _apply(maps, l, change)
    return fits


def _target_columns(
    stage: LinearStage, maps: Sequence[nn.Module], columns: Mapping[str, Tensor], l: int
) -> Tensor:
    for name, module in zip(stage.maps, maps, strict=True):
        if str(l) in module.orders:  # type: ignore[operator]
            return columns[f"{name}.orders.{l}.weight"]
    raise AssertionError(f"{stage.name}: order {l} has no map")


class _Sums:
    """Normal equations of one least-squares problem, summed over batches in float64."""

    def __init__(self, design: Tensor, goal: Tensor) -> None:
        self.gram = design.new_zeros(design.shape[1], design.shape[1])
        self.moment = design.new_zeros(design.shape[1], goal.shape[1])
        self.square = self.scale = 0.0

    def add(self, design: Tensor, residual: Tensor, goal: Tensor) -> None:
        self.gram += design.mT @ design
        self.moment += design.mT @ residual
        self.square += float(residual.square().sum())
        self.scale += float(goal.square().sum())

    def error(self, change: Tensor) -> float:
        """Sum of squared residuals after ``change`` of the weights."""
        return self.square + float((change * (self.gram @ change - 2 * self.moment)).sum())


class _Ridge:
    """All penalised solutions of one problem from one eigendecomposition.

    Inputs are scaled to equal mean square first, so that the penalty treats all channels alike.
    """

    def __init__(self, gram: Tensor, moment: Tensor) -> None:
        scale = gram.diagonal().clamp(min=0).sqrt()
        self.inverse = torch.where(scale > 0, 1 / scale, 0.0).unsqueeze(1)
        values, self.vectors = torch.linalg.eigh(gram * self.inverse * self.inverse.mT)
        self.values = values.clamp(min=0)
        self.unit = float(self.values.mean())
        self.moment = self.vectors.mT @ (moment * self.inverse)

    def solve(self, ridge: float) -> Tensor:
        """Change of the weights under penalty ``ridge`` (relative to the mean eigenvalue)."""
        damped = self.moment / (self.values + ridge * self.unit).unsqueeze(1)
        change: Tensor = self.inverse * (self.vectors @ damped)
        return change


def _choose_ridge(folds: Sequence[_Sums], damping: float) -> tuple[float | None, Tensor | None, float, float]:
    """Pick the penalty with the least cross-validated error; then fit it to all folds."""
    gram = torch.stack([f.gram for f in folds]).sum(dim=0)
    moment = torch.stack([f.moment for f in folds]).sum(dim=0)
    before, scale = sum(f.square for f in folds), max(sum(f.scale for f in folds), 1e-300)
    errors = np.zeros(len(RIDGES))
    if not float(gram.diagonal().sum()) > 0:
        return None, None, (before / scale) ** 0.5, (before / scale) ** 0.5
    for fold in folds:
        rest = _Ridge(gram - fold.gram, moment - fold.moment)
        if rest.unit <= 0:
            return None, None, (before / scale) ** 0.5, (before / scale) ** 0.5
        errors += [fold.error(rest.solve(ridge * damping)) for ridge in RIDGES]
    best = int(np.argmin(errors))
    if not errors[best] < before:
        return None, None, (before / scale) ** 0.5, (before / scale) ** 0.5
    ridge = RIDGES[best] * damping
    return (
        ridge,
        _Ridge(gram, moment).solve(ridge),
        (before / scale) ** 0.5,
        (max(errors[best], 0.0) / scale) ** 0.5,
    )


def _apply(maps: Sequence[nn.Module], l: int, change: Tensor) -> None:
    """Distribute the solution over the maps whose inputs were put side by side."""
    row = 0
    for module in maps:
        block = block_weight(module, l)  # type: ignore[arg-type]
        if block is not None:
            rows = block.weight.shape[-2]
            add_to_weight(block, change[row : row + rows])
            row += rows
