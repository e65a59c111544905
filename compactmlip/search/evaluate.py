"""Error of a plan after compensation, in seconds: no training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from ase import Atoms
from torch import nn

from compactmlip.compress.apply import prune
from compactmlip.compress.compensate import kept_columns, split_folds
from compactmlip.compress.cost import Shapes
from compactmlip.compress.mirror import REFIT_EDGES, Pairs
from compactmlip.compress.plan_file import Plan
from compactmlip.compress.refit import refit, stage_outputs
from compactmlip.compress.tapped import Scores
from compactmlip.data.graph import (
    GraphBatch,
    batches_by_edges,
    build_graph,
    collate,
    energy_and_derivatives,
)
from compactmlip.data.select import random_up_to, split
from compactmlip.errors import InputError
from compactmlip.models import model_dtype, model_spec

FOLDS = 3
"""Folds that choose the penalties of a refit."""

TINY = 1e-9
"""Smallest error that is divided by."""


@dataclass(frozen=True)
class PlanError:
    """Mean absolute deviations from the uncut model: meV/atom, and meV/Angstrom of a force component."""

    energy: float
    forces: float

    @staticmethod
    def mean(errors: Sequence[PlanError]) -> PlanError:
        """Mean of the errors on several sets of structures."""
        return PlanError(fmean(e.energy for e in errors), fmean(e.forces for e in errors))

    def scaled(self, to: PlanError, of: PlanError) -> PlanError:
        """These errors times ``to`` over ``of``."""
        return PlanError(
            self.energy * to.energy / max(of.energy, TINY), self.forces * to.forces / max(of.forces, TINY)
        )


@dataclass(frozen=True)
class Frames:
    """Structures for refits and, other ones, for errors."""

    fit: list[Atoms]
    held_out: list[Atoms]


def split_frames(frames: Sequence[Atoms], fit_atoms: int, held_out_atoms: int, seed: int) -> Frames:
    """Divide structures into those for refits and held-out ones; trajectories stay together.

    Raises
    ------
    InputError
        If there are too few.
    """
    fit, _, held_out = split(frames, (0.65, 0.0, 0.35), seed=seed)
    few, check = (
        [part[k] for k in random_up_to([len(a) for a in part], atoms, seed)]
        for part, atoms in ((fit, fit_atoms), (held_out, held_out_atoms))
    )
    made = Frames(few, check)
    if len(made.fit) < FOLDS or not made.held_out:
        raise InputError(
            f"a search needs more structures: {len(frames)} leave {len(made.fit)} for refits (at least "
            f"{FOLDS}) and {len(made.held_out)} held out (at least 1). 'compactmlip sample' makes some."
        )
    return made


class Evaluator:
    """Cuts and refits one model by many plans; what the model itself computes is kept.

    Parameters
    ----------
    teacher
        The uncut model.
    frames
        Structures.
    scores
        Importance of its channels by each criterion that a plan may name.
    damping
        Factor on the penalties of the refits, see :func:`compactmlip.compress.refit.refit`.
    """

    def __init__(
        self,
        teacher: nn.Module,
        frames: Frames,
        shapes: Shapes,
        scores: Mapping[str, Scores],
        damping: float,
        seed: int = 0,
    ) -> None:
        self.teacher, self.shapes, self.scores, self.damping = teacher, shapes, scores, damping
        graphs = [build_graph(a, model_spec(teacher), model_dtype(teacher)) for a in frames.fit]
        self.graphs = graphs
        folds = split_folds(len(graphs), None, FOLDS, seed)
        self.pairs = Pairs()
        self.data: list[tuple[GraphBatch, int]] = []
        for fold in range(FOLDS):
            part = [g for g, f in zip(graphs, folds, strict=True) if f == fold]
            made = self.pairs.batches(part, REFIT_EDGES, seed=FOLDS * seed + fold)
            self.data += [(batch, fold) for batch in made]
        self.outputs = list(stage_outputs(teacher, [batch for batch, _ in self.data]))
        held = [build_graph(a, model_spec(teacher), model_dtype(teacher)) for a in frames.held_out]
        self.check = [collate([held[k] for k in i]) for i in batches_by_edges(held, REFIT_EDGES)]
        self.wanted = [energy_and_derivatives(teacher, batch) for batch in self.check]

    def student(self, plan: Plan) -> nn.Module:
        """Cut and refitted model."""
        masks = self.shapes.masks(plan, self.scores[plan.importance])
        student = prune(self.teacher, masks, plan.cutoffs)
        columns = kept_columns(self.teacher, masks)
        refit(student, self.teacher, columns, self.data, self.damping, pairs=self.pairs, known=self.outputs)
        return student

    def error(self, plan: Plan) -> PlanError:
        """Errors of the cut and refitted model on the held-out structures."""
        return self.error_of(self.student(plan))

    def error_of(self, model: nn.Module) -> PlanError:
        """Errors of a model on the held-out structures."""
        energies, forces = [], []
        for batch, wanted in zip(self.check, self.wanted, strict=True):
            found = energy_and_derivatives(model, batch)
            energies.append((found.energies - wanted.energies) / batch.num_atoms)
            forces.append((found.forces - wanted.forces).flatten())
        return PlanError(
            1e3 * float(torch.cat(energies).abs().mean()), 1e3 * float(torch.cat(forces).abs().mean())
        )
