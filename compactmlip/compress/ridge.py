"""Ridge regression from normal equations that are summed over batches, with cross-validated penalty.

Many problems of one shape (blocks: one per species, or per species and channel) are solved side by side
and share the penalty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

RIDGES = tuple(10.0**k for k in range(-8, 3))
"""Penalties tried, relative to the mean eigenvalue of the (scaled) normal equations."""


class NormalEquations:
    """Sums over samples of A^T A, A^T b and b^2 for inputs A and residuals b, in float64.

    Parameters
    ----------
    num_blocks, num_inputs, num_outputs
        B, p, q.

    Attributes
    ----------
    gram, moment
        (B, p, p) and (B, p, q).
    square, scale
        Squares of residuals and of goals, summed over everything.
    """

    def __init__(
        self, num_blocks: int, num_inputs: int, num_outputs: int, device: torch.device | str = "cpu"
    ) -> None:
        like = torch.empty(0, dtype=torch.float64, device=device)
        self.gram = like.new_zeros(num_blocks, num_inputs, num_inputs)
        self.moment = like.new_zeros(num_blocks, num_inputs, num_outputs)
        self.square = self.scale = 0.0

    def add(self, design: Tensor, residual: Tensor, goal: Tensor, first: int = 0) -> None:
        """Add n samples to each of b blocks.

        Parameters
        ----------
        design, residual, goal
            Inputs (b, n, p), what is missing to the goal (b, n, q), and the goal (b, n, q).
        first
            The blocks are ``first ... first + b - 1``.
        """
        blocks = slice(first, first + len(design))
        self.gram[blocks] += design.mT @ design
        self.moment[blocks] += design.mT @ residual
        self.square += float(residual.square().sum())
        self.scale += float(goal.square().sum())

    def error(self, change: Tensor) -> float:
        """Sum of squared residuals when ``change`` (B, p, q) is added to the weights."""
        return self.square + float((change * (self.gram @ change - 2 * self.moment)).sum())


class RidgePath:
    """Solutions of B problems for all penalties, from one eigendecomposition each.

    Inputs are divided by the square root of their RMS first.  Between no scaling, which hardly lets weak
    channels change, and scaling to equal RMS, which lets their noise in, this measured best.

    Parameters
    ----------
    gram, moment
        (B, p, p) and (B, p, q).
    unit
        What penalties are relative to, :meth:`Spectrum.mean`.  One unit for all blocks holds those that
        were rarely seen closer to where they are; blocks without samples do not change.
    """

    def __init__(self, gram: Tensor, moment: Tensor, unit: float) -> None:
        scale = _second_moments(gram).pow(0.25)
        self.inverse = torch.where(scale > 0, 1 / scale, 0.0).unsqueeze(-1)
        values, self.vectors = torch.linalg.eigh(gram * self.inverse * self.inverse.mT)
        self.values = values.clamp(min=0)
        self.unit = unit
        self.moment = self.vectors.mT @ (moment * self.inverse)

    def solve(self, ridge: float) -> Tensor:
        """Change of the weights (B, p, q) under penalty ``ridge``."""
        damped = self.moment / (self.values + ridge * self.unit).unsqueeze(-1)
        change: Tensor = self.inverse * (self.vectors @ damped)
        return change


@dataclass
class Spectrum:
    """Sum and number of the eigenvalues of scaled normal equations, over blocks that have samples."""

    total: float = 0.0
    count: int = 0

    def add(self, gram: Tensor) -> None:
        """Add blocks (B, p, p); the trace needs no decomposition."""
        moments = _second_moments(gram)
        seen = moments.sum(dim=-1) > 0
        self.total += float(moments.sqrt().sum())
        self.count += int(seen.sum()) * moments.shape[-1]

    @property
    def mean(self) -> float:
        """Mean eigenvalue, 0 without samples."""
        return self.total / max(self.count, 1)


def _second_moments(gram: Tensor) -> Tensor:
    """Sum of squares of each input, (B, p)."""
    return gram.diagonal(dim1=-2, dim2=-1).clamp(min=0)


@dataclass(frozen=True)
class RidgeChoice:
    """Outcome of :func:`choose_ridge`.

    Attributes
    ----------
    ridge, change
        Penalty and change of the weights (B, p, q); None if no penalty beats leaving the weights alone.
    before, after
        Cross-validated RMS residual relative to the RMS of the goal.
    """

    ridge: float | None
    change: Tensor | None
    before: float
    after: float


Chunk = Callable[[], Sequence[NormalEquations]]
"""Makes the normal equations of some of the blocks, one per fold, folds always in the same order."""


def choose_ridge(chunks: Sequence[Chunk], damping: float = 1.0) -> RidgeChoice:
    """Pick the penalty with the least cross-validated error, multiply it by ``damping``, use all folds.

    The residual of one stage is not the error of the model: a stage that is fitted closely to the few
    materials at hand may mislead the stages behind it.  ``damping`` makes the fit more cautious.

    All blocks together choose.  Each chunk is made three times (scale, errors, solution), so that no more
    than one has to be in memory.

    Parameters
    ----------
    chunks
        In the order of the blocks.
    damping
        Factor on the chosen penalty.
    """
    whole, rests, square, scale = _scales(chunks)
    before = (square / scale) ** 0.5
    unchanged = RidgeChoice(None, None, before, before)
    if not all(rest.mean > 0 for rest in rests):
        return unchanged
    errors = np.zeros(len(RIDGES))
    for chunk in chunks:
        folds = chunk()
        gram, moment = _sums(folds)
        for fold, rest in zip(folds, rests, strict=True):
            path = RidgePath(gram - fold.gram, moment - fold.moment, rest.mean)
            errors += [fold.error(path.solve(ridge)) for ridge in RIDGES]
    best = int(np.argmin(errors))
    if not errors[best] < square:
        return unchanged
    ridge = RIDGES[best] * damping
    change = torch.cat([RidgePath(*_sums(chunk()), whole.mean).solve(ridge) for chunk in chunks])
    after = (max(float(errors[best]), 0.0) / scale) ** 0.5
    return RidgeChoice(ridge, change, before, after)


def _scales(chunks: Sequence[Chunk]) -> tuple[Spectrum, list[Spectrum], float, float]:
    """Spectra of all folds and of all but each one; squares of residuals and goals."""
    whole = Spectrum()
    rests: list[Spectrum] = []
    square = scale = 0.0
    for chunk in chunks:
        folds = chunk()
        gram, _ = _sums(folds)
        rests = rests or [Spectrum() for _ in folds]
        whole.add(gram)
        for fold, rest in zip(folds, rests, strict=True):
            rest.add(gram - fold.gram)
            square += fold.square
            scale += fold.scale
    return whole, rests, square, max(scale, 1e-300)


def _sums(folds: Sequence[NormalEquations]) -> tuple[Tensor, Tensor]:
    """Normal equations of all folds together."""
    gram = torch.stack([f.gram for f in folds]).sum(dim=0)
    return gram, torch.stack([f.moment for f in folds]).sum(dim=0)
