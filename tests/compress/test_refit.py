"""Fits of each kind on made-up stages, whose weights are tensors of the test."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import compactmlip.compress.refit as module
from compactmlip.compress.mirror import Pairs
from compactmlip.compress.refit import refit_stage
from compactmlip.data.graph import GraphBatch
from compactmlip.models.stages import Fit, Kind, Stage

P, COMPONENTS, TEACHER_CHANNELS = 4, 3, 5
KEPT = torch.tensor([0, 2, 3])
NUM_SPECIES, ABSENT = 4, 2
SHAPES: dict[Kind, tuple[int, ...]] = {
    "shared": (P, TEACHER_CHANNELS),
    "species": (NUM_SPECIES, P, TEACHER_CHANNELS),
    "channel": (NUM_SPECIES, P, TEACHER_CHANNELS),
}


@dataclass
class Problem:
    """A stage of order 1 beside a part that is not refitted; ``weight`` is what the fit may change."""

    kind: Kind
    weight: Tensor
    truth: Tensor
    states: list[tuple[Tensor, Tensor, Tensor]]
    targets: list[list[Tensor | None]]
    data: list[tuple[GraphBatch, int]]

    def design(self, state: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return state[0][..., KEPT] if self.kind == "channel" else state[0]

    def total(self, state: tuple[Tensor, Tensor, Tensor]) -> list[Tensor | None]:
        return [None, _map(self.kind, self.design(state), self.weight, state[2]) + state[1][..., KEPT]]

    def refit(self, damping: float = 1.0, pairs: Pairs | None = None) -> list[module.StageFit]:
        fit = Fit(1, self.kind, "made.up", self.design, self.weight.add_)
        stage = Stage("made up", (fit,), self.total, lambda state, total: state)
        columns = {"made.up": KEPT}
        return refit_stage(stage, self.states, self.targets, columns, self.data, damping, NUM_SPECIES, pairs)


def _map(kind: Kind, design: Tensor, weight: Tensor, species: Tensor) -> Tensor:
    if kind == "shared":
        return design @ weight
    return torch.einsum(
        "nmpq,npq->nmq" if kind == "channel" else "nmp,npq->nmq", design, weight[species].to(design.dtype)
    )


def _batch(species: Tensor) -> GraphBatch:
    none, edges = torch.empty(0, dtype=torch.long), torch.empty(0, 3)
    count, volume = torch.tensor([len(species)]), torch.tensor([float("nan")])
    return GraphBatch(species, none, none, edges, torch.zeros_like(species), count, volume)


def _problem(kind: Kind, *, noise: float = 0.0, num_batches: int = 4, num_nodes: int = 60) -> Problem:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    truth = normal(*SHAPES[kind])
    present = torch.tensor([z for z in range(NUM_SPECIES) if z != ABSENT])
    states, targets, data = [], [], []
    for k in range(num_batches):
        species = present[torch.randint(3, (num_nodes // 2,), generator=generator)].repeat(2)
        width = (TEACHER_CHANNELS,) if kind == "channel" else ()
        design, rest = (
            normal(num_nodes, COMPONENTS, P, *width),
            normal(num_nodes, COMPONENTS, TEACHER_CHANNELS),
        )
        goal = _map(kind, design, truth, species) + rest
        states.append((design, rest, species))
        targets.append([None, goal + noise * normal(*goal.shape)])
        data.append((_batch(species), k % 3))
    weight = truth[..., KEPT] + normal(*truth[..., KEPT].shape)
    return Problem(kind, weight, truth, states, targets, data)


@pytest.mark.parametrize("kind", list(SHAPES))
@pytest.mark.parametrize("pairs", [None, Pairs()])
def test_exact_weights_are_found(kind: Kind, pairs: Pairs | None) -> None:
    """Cut channels are left out, the part that is not refitted is allowed for, unseen species stay put."""
    problem = _problem(kind)
    start = problem.weight.clone()
    (fit,) = problem.refit(pairs=pairs)
    assert (fit.stage, fit.order) == ("made up", 1)
    assert fit.after < 1e-5 * fit.before
    wanted = problem.truth[..., KEPT].clone()
    if kind != "shared":
        wanted[ABSENT] = start[ABSENT]
        assert torch.equal(problem.weight[ABSENT], start[ABSENT])
    torch.testing.assert_close(problem.weight, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["species", "channel"])
@pytest.mark.parametrize("max_bytes", [1, 4000])
def test_chunks_give_the_same_weights(kind: Kind, max_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk of one block, and one that ends between the channels of a species."""
    whole, parts = (_problem(kind, noise=1.0) for _ in range(2))
    (one,) = whole.refit()
    sizes: list[int] = []
    make = module.NormalEquations

    def counted(blocks: int, *sizes_and_device: int, **options: object) -> module.NormalEquations:
        sizes.append(blocks)
        return make(blocks, *sizes_and_device, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "MAX_BYTES", max_bytes)
    monkeypatch.setattr(module, "NormalEquations", counted)
    (two,) = parts.refit()
    assert max(sizes) < (3 if kind == "species" else 9)
    assert one.ridge == two.ridge
    assert one.after == pytest.approx(two.after, rel=1e-12)
    torch.testing.assert_close(whole.weight, parts.weight, rtol=1e-10, atol=1e-12)


def test_a_species_fit_is_one_shared_fit_per_species() -> None:
    """Without a penalty to speak of, each species' weights are its own least-squares solution."""
    problem = _problem("species", noise=0.1, num_nodes=200)
    problem.refit(damping=1e-9)
    for z in (0, 1, 3):
        rows = [(s[2] == z) for s in problem.states]
        design = torch.cat([s[0][r] for s, r in zip(problem.states, rows, strict=True)]).flatten(0, 1)
        goals = [t[1] - s[1] for t, s in zip(problem.targets, problem.states, strict=True)]
        goal = torch.cat([g[r] for g, r in zip(goals, rows, strict=True)]).flatten(0, 1)
        solution = torch.linalg.lstsq(design, goal[:, KEPT]).solution
        torch.testing.assert_close(problem.weight[z], solution, rtol=0, atol=1e-9)


def test_a_channel_fit_is_one_fit_per_species_and_channel() -> None:
    problem = _problem("channel", noise=0.1, num_nodes=200)
    problem.refit(damping=1e-9)
    z, c = 3, 1
    rows = [(s[2] == z) for s in problem.states]
    inputs = [s[0][r][..., KEPT[c]] for s, r in zip(problem.states, rows, strict=True)]
    goals = [
        (t[1] - s[1])[r][..., KEPT[c]] for t, s, r in zip(problem.targets, problem.states, rows, strict=True)
    ]
    solution = torch.linalg.lstsq(torch.cat(inputs).flatten(0, 1), torch.cat(goals).reshape(-1, 1)).solution
    torch.testing.assert_close(problem.weight[z, :, c], solution[:, 0], rtol=0, atol=1e-9)


def test_pairs_weigh_slopes_as_they_say() -> None:
    """The weights are the least-squares solution of values and weighted slopes, made here by hand."""
    problem = _problem("species", noise=0.1, num_nodes=200)
    problem.refit(damping=1e-9, pairs=Pairs(displacement=0.05, slope_weight=0.3))
    z = 1
    designs, goals = [], []
    for (x, rest, species), target in zip(problem.states, problem.targets, strict=True):
        mine = species[:100] == z
        for whole, parts in ((x, designs), ((target[1] - rest)[..., KEPT], goals)):
            plus, minus = whole[:100][mine], whole[100:][mine]
            parts.append(torch.cat([(plus + minus) / 2, 0.3 * (plus - minus) / 0.1]))
    solution = torch.linalg.lstsq(torch.cat(designs).flatten(0, 1), torch.cat(goals).flatten(0, 1)).solution
    torch.testing.assert_close(problem.weight[z], solution, rtol=0, atol=1e-9)


def test_the_two_of_a_pair_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A species is fitted if its atoms give enough equations; a pair is one structure."""
    counts = [int((s[2] == 3).sum()) * COMPONENTS for s in _problem("species").states]
    monkeypatch.setattr(module, "ROWS_PER_INPUT", 0.6 * sum(counts) / P)
    for pairs, fitted in ((None, True), (Pairs(), False)):
        problem = _problem("species")
        start = problem.weight.clone()
        problem.refit(pairs=pairs)
        assert torch.equal(problem.weight[3], start[3]) is not fitted


def test_nothing_is_fitted_without_a_second_fold() -> None:
    problem = _problem("shared", num_batches=1)
    start = problem.weight.clone()
    assert problem.refit() == []
    assert torch.equal(problem.weight, start)


def test_a_stage_has_one_fit_per_order() -> None:
    problem = _problem("shared")
    fit = Fit(1, "shared", "made.up", problem.design, problem.weight.add_)
    with pytest.raises(ValueError, match="two fits of one order"):
        Stage("made up", (fit, fit), problem.total, lambda state, total: state)
