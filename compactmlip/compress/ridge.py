"""Ridge regression from normal equations that are summed over batches, with cross-validated penalty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

RIDGES = tuple(10.0**k for k in range(-8, 3))
"""Penalties tried, relative to the mean eigenvalue of the (scaled) normal equations."""


class NormalEquations:
    """Sums over samples of A^T A, A^T b and b^2 for inputs A and residuals b, in float64."""

    def __init__(self, design: Tensor, residual: Tensor) -> None:
        self.gram = design.new_zeros(design.shape[1], design.shape[1])
        self.moment = design.new_zeros(design.shape[1], residual.shape[1])
        self.square = self.scale = 0.0

    def add(self, design: Tensor, residual: Tensor, goal: Tensor) -> None:
        """Add samples: inputs (n, p), what is missing to the goal (n, q), and the goal (n, q)."""
        self.gram += design.mT @ design
        self.moment += design.mT @ residual
        self.square += float(residual.square().sum())
        self.scale += float(goal.square().sum())

    def error(self, change: Tensor) -> float:
        """Sum of squared residuals when ``change`` (p, q) is added to the weights."""
        return self.square + float((change * (self.gram @ change - 2 * self.moment)).sum())


class RidgePath:
    """Solutions of one problem for all penalties, from one eigendecomposition.

    Inputs are divided by the square root of their RMS first.  Between no scaling, which hardly lets weak
    channels change, and scaling to equal RMS, which lets their noise in, this measured best.
    """

    def __init__(self, gram: Tensor, moment: Tensor) -> None:
        scale = gram.diagonal().clamp(min=0).pow(0.25)
        self.inverse = torch.where(scale > 0, 1 / scale, 0.0).unsqueeze(1)
        values, self.vectors = torch.linalg.eigh(gram * self.inverse * self.inverse.mT)
        self.values = values.clamp(min=0)
        self.unit = float(self.values.mean())
        self.moment = self.vectors.mT @ (moment * self.inverse)

    def solve(self, ridge: float) -> Tensor:
        """Change of the weights (p, q) under penalty ``ridge``."""
        damped = self.moment / (self.values + ridge * self.unit).unsqueeze(1)
        change: Tensor = self.inverse * (self.vectors @ damped)
        return change


@dataclass(frozen=True)
class RidgeChoice:
    """Outcome of :func:`choose_ridge`.

    Attributes
    ----------
    ridge, change
        Penalty and change of the weights; None if no penalty beats leaving the weights alone.
    before, after
        Cross-validated RMS residual relative to the RMS of the goal.
    """

    ridge: float | None
    change: Tensor | None
    before: float
    after: float


def choose_ridge(folds: Sequence[NormalEquations], damping: float = 1.0) -> RidgeChoice:
    """Pick the penalty with the least cross-validated error, multiply it by ``damping``, use all folds.

    The residual of one stage is not the error of the model: a stage that is fitted closely to the few
    materials at hand may mislead the stages behind it.  ``damping`` makes the fit more cautious.
    """
    gram = torch.stack([f.gram for f in folds]).sum(dim=0)
    moment = torch.stack([f.moment for f in folds]).sum(dim=0)
    square, scale = sum(f.square for f in folds), max(sum(f.scale for f in folds), 1e-300)
    before = (square / scale) ** 0.5
    unchanged = RidgeChoice(None, None, before, before)
    errors = np.zeros(len(RIDGES))
    for fold in folds:
        rest = RidgePath(gram - fold.gram, moment - fold.moment)
        if not rest.unit > 0:
            return unchanged
        errors += [fold.error(rest.solve(ridge)) for ridge in RIDGES]
    best = int(np.argmin(errors))
    if not errors[best] < square:
        return unchanged
    ridge = RIDGES[best] * damping
    after = (max(float(errors[best]), 0.0) / scale) ** 0.5
    return RidgeChoice(ridge, RidgePath(gram, moment).solve(ridge), before, after)
