"""Refit of a pruned model, stage by stage: from samples to normal equations to weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compactmlip.compress.mirror import Pairs
from compactmlip.compress.ridge import Chunk, NormalEquations, choose_ridge
from compactmlip.data.graph import GraphBatch
from compactmlip.models import linear_stages, model_spec, start_state
from compactmlip.models.stages import Features, Fit, Stage
from compactmlip.progress import Track

MAX_BYTES = 200_000_000
"""Normal equations that need more memory are made for some species and channels at a time."""


ROWS_PER_INPUT = 2
"""Weights of one species are fitted if its atoms give so many equations per unknown; else they stay.  With
fewer, the fit follows the few atoms at hand and can be worse for others than plain slicing."""


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
        RMS deviation from the original on held-out structures, relative to the RMS of the target; of
        values and weighted slopes together where pairs were fitted.
    """

    stage: str
    order: int
    ridge: float | None
    before: float
    after: float


@torch.no_grad()
def refit(
    student: nn.Module,
    teacher: nn.Module,
    columns: Mapping[str, Tensor],
    data: Sequence[tuple[GraphBatch, int]],
    damping: float,
    *,
    pairs: Pairs | None = None,
    known: Sequence[Sequence[Features]] | None = None,
    title: str = "refit",
    progress: bool = False,
) -> list[StageFit]:
    """Walk both models stage by stage and fit the student, in place, to what the teacher computes.

    Parameters
    ----------
    student, teacher
        A pruned model and its original.
    columns
        Output channels of the teacher's weights that the student still has, by parameter name.
    data
        Batches and the fold of the cross-validation that each belongs to.
    damping
        Factor on the penalties that are chosen.
    pairs
        Given if the batches are mirrored pairs (:mod:`compactmlip.compress.mirror`): values and slopes are
        fitted instead of values alone.
    known
        What the teacher computes (:func:`stage_outputs`), if several students are fitted to it.
    """
    batches = [batch for batch, _ in data]
    students = [start_state(student, batch) for batch in batches]
    num_species = len(model_spec(student).species)
    fits: list[StageFit] = []
    stages = list(linear_stages(student))
    outputs = stage_outputs(teacher, batches) if known is None else known
    with Track(title, len(stages), "stages", enabled=progress) as track:
        for stage, targets in zip(stages, outputs, strict=True):
            fits += refit_stage(stage, students, targets, columns, data, damping, num_species, pairs)
            students = [stage.advance(s, stage.evaluate(s)) for s in students]
            track.advance(1)
    return fits


@torch.no_grad()
def stage_outputs(model: nn.Module, batches: Sequence[GraphBatch]) -> Iterator[list[Features]]:
    """What a model computes at each stage, for each batch; one stage at a time."""
    states = [start_state(model, batch) for batch in batches]
    for stage in linear_stages(model):
        outputs = [stage.evaluate(state) for state in states]
        yield outputs
        states = [stage.advance(s, y) for s, y in zip(states, outputs, strict=True)]


def refit_stage(
    stage: Stage[Any],
    states: Sequence[Any],
    targets: Sequence[Features],
    columns: Mapping[str, Tensor],
    data: Sequence[tuple[GraphBatch, int]],
    damping: float,
    num_species: int,
    pairs: Pairs | None = None,
) -> list[StageFit]:
    """Fit one stage, in place, given its states and what the teacher computes, for each batch."""
    if len({fold for _, fold in data}) < 2:
        return []
    currents = [stage.evaluate(state) for state in states]
    done = []
    for fit in stage.fits:
        kept = columns[fit.parameter]
        samples = [
            _sample(fit, kept, state, target, current, batch, fold)
            for state, target, current, (batch, fold) in zip(states, targets, currents, data, strict=True)
        ]
        problem = _Problem(fit, samples, pairs)
        if not problem.species:
            continue
        choice = choose_ridge(problem.chunks(), damping)
        done.append(StageFit(stage.name, fit.order, choice.ridge, choice.before, choice.after))
        if choice.change is not None:
            fit.apply(problem.weights(choice.change, num_species))
    return done


@dataclass(frozen=True)
class _Sample:
    """What one batch says about one fit; ``nodes`` lists the batch's nodes by species, None for all."""

    state: Any
    goal: Tensor
    current: Tensor
    nodes: Mapping[int, Tensor | None]
    fold: int


def _sample(
    fit: Fit[Any],
    kept: Tensor,
    state: Any,
    target: Features,
    current: Features,
    batch: GraphBatch,
    fold: int,
) -> _Sample:
    wanted, now = target[fit.order], current[fit.order]
    assert wanted is not None and now is not None
    nodes: dict[int, Tensor | None] = {0: None}
    if fit.kind != "shared":
        present: list[int] = torch.unique(batch.species).tolist()
        nodes = {z: torch.nonzero(batch.species == z).squeeze(-1) for z in present}
    return _Sample(state, wanted.index_select(-1, kept.to(wanted.device)), now, nodes, fold)


class _Problem:
    """One fit as blocks of normal equations: species after species, in each channel after channel.

    Species that are rare in the samples are left out: their weights stay.
    """

    def __init__(self, fit: Fit[Any], samples: Sequence[_Sample], pairs: Pairs | None) -> None:
        self.fit, self.samples, self.pairs = fit, samples, pairs
        self.species = self._seen_often(samples)
        self.folds = list(dict.fromkeys(sample.fold for sample in samples))
        self.num_inputs = fit.design(samples[0].state).shape[2]
        num_outputs = samples[0].goal.shape[-1]
        self.per_channel = fit.kind == "channel"
        self.width, self.num_outputs = (num_outputs, 1) if self.per_channel else (1, num_outputs)

    def _seen_often(self, samples: Sequence[_Sample]) -> list[int]:
        """Species with enough samples; all of them count as one where they share their weights."""
        if self.fit.kind == "shared":
            return [0]
        rows: dict[int, int] = {}
        for sample in samples:
            for z, nodes in sample.nodes.items():
                assert nodes is not None
                rows[z] = rows.get(z, 0) + len(nodes) * sample.goal.shape[1]
        least = ROWS_PER_INPUT * self.fit.design(samples[0].state).shape[2]
        if self.pairs is not None:
            least *= 2  # the two of a pair are one structure
        return sorted(z for z, count in rows.items() if count >= least)

    def chunks(self) -> list[Chunk]:
        """Chunks that fit in memory; a single one is kept."""
        # All folds, and a sum, a difference, its scaled copy and its eigenvectors.
        floats = (len(self.folds) + 4) * self.num_inputs * (self.num_inputs + self.num_outputs)
        step = max(1, MAX_BYTES // (8 * max(floats, 1)))
        total = len(self.species) * self.width
        if step >= total:
            folds = self._equations(0, total)
            return [lambda: folds]
        return [partial(self._equations, k, min(k + step, total)) for k in range(0, total, step)]

    def _equations(self, first: int, stop: int) -> list[NormalEquations]:
        """Normal equations of blocks ``first ... stop - 1``, one for each fold."""
        device = self.samples[0].goal.device
        sizes = (stop - first, self.num_inputs, self.num_outputs)
        folds = {fold: NormalEquations(*sizes, device=device) for fold in self.folds}
        for sample in self.samples:
            parts = self._parts(sample, first, stop)
            if not parts:
                continue
            goal = sample.goal.double()
            design, missing, goal = (
                x if self.pairs is None else self.pairs.rows(x)
                for x in (self.fit.design(sample.state).double(), goal - sample.current.double(), goal)
            )
            # A channel's columns are its own: one column per block.
            columns = [x.unsqueeze(-2) if self.per_channel else x.unsqueeze(-1) for x in (missing, goal)]
            inputs = design if self.per_channel else design.unsqueeze(-1)
            for nodes, channels, position in parts:
                a, b, c = (_blocks(x, nodes, channels) for x in (inputs, *columns))
                folds[sample.fold].add(a, b, c, first=position)
        return list(folds.values())

    def _parts(self, sample: _Sample, first: int, stop: int) -> list[tuple[Tensor | None, slice, int]]:
        """Nodes, channels and place among blocks ``first ... stop - 1`` of what a batch contributes."""
        parts = []
        for k, z in enumerate(self.species):
            start = k * self.width
            low, high = max(first - start, 0), min(stop - start, self.width)
            if z in sample.nodes and low < high:
                parts.append((sample.nodes[z], slice(low, high), start + low - first))
        return parts

    def weights(self, change: Tensor, num_species: int) -> Tensor:
        """Turn blocks (B, p, q) into the shape that the fit applies; species without samples get 0."""
        if self.fit.kind == "shared":
            return change[0]
        if self.per_channel:
            change = change.reshape(len(self.species), self.width, self.num_inputs).mT
        full = change.new_zeros(num_species, *change.shape[1:])
        return full.index_copy(0, torch.tensor(self.species, device=change.device), change)


def _blocks(x: Tensor, nodes: Tensor | None, channels: slice) -> Tensor:
    """Turn (n_nodes, 2l+1, p, channels) into (channels, samples, p) of some nodes and channels."""
    x = x if nodes is None else x.index_select(0, nodes)
    return x[..., channels].permute(3, 0, 1, 2).flatten(1, 2)
