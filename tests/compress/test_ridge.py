"""The ridge solver against explicit solutions, block by block."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from compactmlip.compress.ridge import (
    RIDGES,
    NormalEquations,
    RidgeChoice,
    RidgePath,
    Spectrum,
    choose_ridge,
)

P, Q = 6, 2


def _problem(rows: int, seed: int, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    design = torch.randn(rows, P, generator=generator, dtype=torch.float64)
    design[:, 5] *= 1e-2
    truth = torch.arange(P * Q, dtype=torch.float64).reshape(P, Q) - 5
    goal = design @ truth + noise * torch.randn(rows, Q, generator=generator, dtype=torch.float64)
    return design, goal, truth


def _sums(samples: Sequence[tuple[Tensor, Tensor]]) -> NormalEquations:
    """One block for each pair of inputs and goals."""
    sums = NormalEquations(len(samples), samples[0][0].shape[1], samples[0][1].shape[1])
    for k, (design, goal) in enumerate(samples):
        half = len(design) // 2
        for part in (slice(0, half), slice(half, None)):
            sums.add(design[None, part], goal[None, part], goal[None, part], first=k)
    return sums


def _choose(folds: Sequence[NormalEquations], damping: float = 1.0) -> RidgeChoice:
    return choose_ridge([lambda: folds], damping)


def _folds(rows: int, noise: float, count: int = 5) -> tuple[list[NormalEquations], Tensor]:
    problems = [_problem(rows, seed, noise) for seed in range(count)]
    return [_sums([(design, goal)]) for design, goal, _ in problems], problems[0][2]


def test_error_is_the_sum_of_squares() -> None:
    samples = [_problem(20, seed, 0.5)[:2] for seed in range(3)]
    change = torch.randn(3, P, Q, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    wanted = sum(float((b - a @ w).square().sum()) for (a, b), w in zip(samples, change, strict=True))
    assert _sums(samples).error(change) == pytest.approx(wanted, rel=1e-12)


def test_solution_minimises_the_penalised_error() -> None:
    """Gradient of |b - A w|^2 + ridge * unit * sum (s w)^2 is zero; s is the fourth root of diag(A^T A)."""
    sums = _sums([_problem(20, seed, 0.5)[:2] for seed in range(2)])
    weights = RidgePath(sums.gram, sums.moment, unit=3.0).solve(0.1)
    scale = torch.diagonal(sums.gram, dim1=1, dim2=2).pow(0.25).unsqueeze(-1)
    gradient = sums.gram @ weights - sums.moment + 0.1 * 3.0 * scale**2 * weights
    assert float(gradient.abs().max()) < 1e-10


def test_unit_is_the_mean_eigenvalue_of_blocks_with_samples() -> None:
    sums = _sums([_problem(20, seed, 0.5)[:2] for seed in range(3)])
    sums.gram[1] = 0.0
    eigenvalues = []
    for k in (0, 2):
        gram = sums.gram[k].numpy()
        scale = np.diag(gram) ** 0.25
        eigenvalues.append(np.linalg.eigvalsh(gram / np.outer(scale, scale)))
    spectrum = Spectrum()
    spectrum.add(sums.gram[:2])
    spectrum.add(sums.gram[2:])
    assert spectrum.mean == pytest.approx(float(np.mean(eigenvalues)), rel=1e-12)


def _explicit(samples: dict[int, dict[int, tuple[np.ndarray, np.ndarray]]], num_blocks: int) -> RidgeChoice:
    """The whole of ``choose_ridge`` by loops, from samples[fold][block]."""

    def pooled(folds: list[int], block: int) -> tuple[np.ndarray, np.ndarray]:
        parts = [samples[f][block] for f in folds if block in samples[f]]
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True)) if parts else ()  # type: ignore[return-value]

    def solve(folds: list[int], ridge: float) -> list[np.ndarray]:
        data = [pooled(folds, k) for k in range(num_blocks)]
        scales = [np.sum(d[0] ** 2, axis=0) ** 0.25 if d else None for d in data]
        traces = [np.sum(s**2) for s in scales if s is not None]
        unit = np.sum(traces) / (len(traces) * P)
        return [
            np.linalg.solve(d[0].T @ d[0] + ridge * unit * np.diag(s**2), d[0].T @ d[1])
            if d
            else np.zeros((P, Q))
            for d, s in zip(data, scales, strict=True)
        ]

    folds = list(samples)
    errors = np.zeros(len(RIDGES))
    square = sum(float((b**2).sum()) for fold in samples.values() for _, b in fold.values())
    for fold in folds:
        for j, ridge in enumerate(RIDGES):
            weights = solve([f for f in folds if f != fold], ridge)
            errors[j] += sum(float(((b - a @ weights[k]) ** 2).sum()) for k, (a, b) in samples[fold].items())
    best = int(np.argmin(errors))
    change = torch.tensor(np.stack(solve(folds, 10 * RIDGES[best])))
    return RidgeChoice(10 * RIDGES[best], change, 1.0, float(np.sqrt(errors[best] / square)))


def _uneven() -> dict[int, dict[int, tuple[np.ndarray, np.ndarray]]]:
    """Samples[fold][block]: block 1 in two folds only, block 2 in none, block 3 in one."""
    rng = np.random.default_rng(5)
    samples: dict[int, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
    for fold in range(4):
        samples[fold] = {}
        for block, present in ((0, True), (1, fold < 2), (3, fold == 3), (4, True)):
            if present:
                design = rng.normal(size=(9, P)) * np.linspace(0.1, 2.0, P)
                goal = design @ np.full((P, Q), 1.0 + block) + rng.normal(size=(9, Q))
                samples[fold][block] = (design, goal)
    return samples


def _equations(
    samples: dict[int, dict[int, tuple[np.ndarray, np.ndarray]]], blocks: range
) -> list[NormalEquations]:
    folds = []
    for by_block in samples.values():
        sums = NormalEquations(len(blocks), P, Q)
        for block, (design, goal) in by_block.items():
            if block in blocks:
                a, b = torch.tensor(design)[None], torch.tensor(goal)[None]
                sums.add(a, b, b, first=block - blocks.start)
        folds.append(sums)
    return folds


@pytest.mark.parametrize("step", [5, 2, 1])
def test_blocks_share_one_penalty(step: int) -> None:
    """Also when the blocks come in chunks."""
    samples = _uneven()
    starts = range(0, 5, step)
    chunks = [lambda k=k: _equations(samples, range(k, min(k + step, 5))) for k in starts]
    found, wanted = choose_ridge(chunks, damping=10.0), _explicit(samples, 5)
    assert found.ridge == pytest.approx(wanted.ridge)
    assert found.before == pytest.approx(1.0, rel=1e-12)
    assert found.after == pytest.approx(wanted.after, rel=1e-10)
    assert found.change is not None and wanted.change is not None
    torch.testing.assert_close(found.change, wanted.change, rtol=1e-9, atol=1e-10)
    assert torch.equal(found.change[2], torch.zeros(P, Q, dtype=torch.float64))


def test_blocks_with_few_samples_change_less() -> None:
    truth = torch.ones(3, 1, dtype=torch.float64)
    samples = []
    for rows, seed in ((3, 0), (300, 1)):
        generator = torch.Generator().manual_seed(seed)
        design = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
        samples.append((design, design @ truth))
    sums = _sums(samples)
    spectrum = Spectrum()
    spectrum.add(sums.gram)
    few, many = (float(w.norm()) for w in RidgePath(sums.gram, sums.moment, spectrum.mean).solve(0.1))
    assert few < 0.8 * many < 0.8 * float(truth.norm())


def test_exact_data_are_recovered() -> None:
    folds, truth = _folds(20, 0.0)
    choice = _choose(folds)
    assert choice.change is not None
    torch.testing.assert_close(choice.change[0], truth, rtol=0, atol=1e-3)
    assert choice.after < 1e-3 * choice.before


def test_chosen_penalty_grows_with_noise() -> None:
    ridges = [_choose(_folds(4, noise)[0]).ridge or np.inf for noise in (0.0, 1.0, 30.0)]
    assert ridges[0] < ridges[1] < ridges[2]


def test_pure_noise_is_left_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    folds = []
    for _ in range(5):
        design = torch.randn(3, 30, generator=generator, dtype=torch.float64)
        goal = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        folds.append(_sums([(design, goal)]))
    choice = _choose(folds)
    assert choice.after <= choice.before
    assert choice.change is None or float(choice.change.abs().max()) < 0.1


def test_inputs_that_are_zero_change_nothing() -> None:
    design, goal = torch.zeros(5, 3, dtype=torch.float64), torch.ones(5, 2, dtype=torch.float64)
    folds = [_sums([(design, goal)]) for _ in range(3)]
    assert _choose(folds).change is None
