"""The ridge solver against scikit-like closed forms and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compactmlip.compress.ridge import NormalEquations, RidgePath, choose_ridge


def _problem(rows: int, seed: int, noise: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    design = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    design[:, 5] *= 1e-2
    truth = torch.arange(12, dtype=torch.float64).reshape(6, 2) - 5
    goal = design @ truth + noise * torch.randn(rows, 2, generator=generator, dtype=torch.float64)
    return design, goal, truth


def _folds(rows: int, noise: float, count: int = 5) -> tuple[list[NormalEquations], torch.Tensor]:
    folds, truth = [], torch.empty(0)
    for seed in range(count):
        design, goal, truth = _problem(rows, seed, noise)
        fold = NormalEquations(design, goal)
        fold.add(design[: rows // 2], goal[: rows // 2], goal[: rows // 2])
        fold.add(design[rows // 2 :], goal[rows // 2 :], goal[rows // 2 :])
        folds.append(fold)
    return folds, truth


def test_error_is_the_sum_of_squares() -> None:
    design, goal, _ = _problem(20, 0, 0.5)
    sums = NormalEquations(design, goal)
    sums.add(design, goal, goal)
    change = torch.ones(6, 2, dtype=torch.float64)
    assert sums.error(change) == pytest.approx(float((goal - design @ change).square().sum()), rel=1e-12)


def test_solution_minimises_the_penalised_error() -> None:
    """Gradient of |b - A w|^2 + ridge * unit * sum (s w)^2 is zero; s is the fourth root of diag(A^T A)."""
    design, goal, _ = _problem(20, 0, 0.5)
    gram, moment = design.T @ design, design.T @ goal
    path = RidgePath(gram, moment)
    weights = path.solve(0.1)
    scale = gram.diagonal().pow(0.25).unsqueeze(1)
    gradient = gram @ weights - moment + 0.1 * path.unit * scale**2 * weights
    assert float(gradient.abs().max()) < 1e-10


def test_exact_data_are_recovered() -> None:
    folds, truth = _folds(20, 0.0)
    choice = choose_ridge(folds)
    assert choice.change is not None
    torch.testing.assert_close(choice.change, truth, rtol=0, atol=1e-3)
    assert choice.after < 1e-3 * choice.before


def test_chosen_penalty_grows_with_noise() -> None:
    ridges = [choose_ridge(_folds(4, noise)[0]).ridge or np.inf for noise in (0.0, 1.0, 30.0)]
    assert ridges[0] < ridges[1] < ridges[2]


def test_pure_noise_is_left_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    folds = []
    for _ in range(5):
        design = torch.randn(3, 30, generator=generator, dtype=torch.float64)
        goal = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        fold = NormalEquations(design, goal)
        fold.add(design, goal, goal)
        folds.append(fold)
    choice = choose_ridge(folds)
    assert choice.after <= choice.before
    assert choice.change is None or float(choice.change.abs().max()) < 0.1


def test_inputs_that_are_zero_change_nothing() -> None:
    design, goal = torch.zeros(5, 3, dtype=torch.float64), torch.ones(5, 2, dtype=torch.float64)
    folds = []
    for _ in range(3):
        fold = NormalEquations(design, goal)
        fold.add(design, goal, goal)
        folds.append(fold)
    assert choose_ridge(folds).change is None
