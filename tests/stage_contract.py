"""What the stages of every native model family must satisfy (compactmlip/models/stages.py)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compactmlip.data.graph import GraphBatch
from compactmlip.models import linear_stages, start_state
from compactmlip.models.stages import Features, Fit


def check_fits(model: nn.Module, batch: GraphBatch) -> int:
    """Each fit's design and ``apply`` say how the stage's sum depends on weights; returns their number."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    count = 0
    with torch.no_grad():
        state = start_state(model, batch)
        for stage in linear_stages(model):
            before = stage.evaluate(state)
            for fit in stage.fits:
                design = fit.design(state)
                columns = model.get_parameter(fit.parameter).shape[-1]
                change = _random_change(fit, design, columns, len(model.spec.species), generator)
                fit.apply(change)
                assert torch.equal(fit.design(state), design), stage.name
                _assert_changed(fit, before, stage.evaluate(state), _effect(fit, design, change, batch))
                fit.apply(-change)
                count += 1
            total = stage.evaluate(state)
            for a, b in zip(before, total, strict=True):
                if a is not None:
                    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
            state = stage.advance(state, total)
    return count


def check_stages_exist_in_both(model: nn.Module, pruned: nn.Module) -> None:
    """A pruned model has the same stages, and no fit that the original has not."""
    ours, theirs = list(linear_stages(model)), list(linear_stages(pruned))
    assert [stage.name for stage in ours] == [stage.name for stage in theirs]
    for one, two in zip(ours, theirs, strict=True):
        fits = {fit.order: fit for fit in one.fits}
        for fit in two.fits:
            assert fits[fit.order].kind == fit.kind
            assert fit.parameter in dict(model.named_parameters())


def _random_change(
    fit: Fit, design: Tensor, columns: int, num_species: int, generator: torch.Generator
) -> Tensor:
    species = () if fit.kind == "shared" else (num_species,)
    return torch.randn(*species, design.shape[2], columns, generator=generator, dtype=torch.float64)


def _effect(fit: Fit, design: Tensor, change: Tensor, batch: GraphBatch) -> Tensor:
    if fit.kind == "shared":
        return torch.einsum("nmp,pq->nmq", design, change)
    per_node = change[batch.species]
    return torch.einsum("nmpq,npq->nmq" if fit.kind == "channel" else "nmp,npq->nmq", design, per_node)


def _assert_changed(fit: Fit, before: Features, after: Features, effect: Tensor) -> None:
    for l, (a, b) in enumerate(zip(before, after, strict=True)):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            wanted = a + effect if l == fit.order else a
            torch.testing.assert_close(b, wanted, rtol=1e-10, atol=1e-10)


def tapped(model: nn.Module, batch: GraphBatch) -> dict[tuple[str, int], Tensor]:
    """All features that the forward pass shows, by space and order."""
    seen: dict[tuple[str, int], Tensor] = {}

    def tap(space: str, order: int, x: Tensor) -> Tensor:
        seen[space, order] = x.detach()
        return x

    model(batch.species, batch.centers, batch.neighbors, batch.vectors, tap=tap)
    return seen


def assert_features(
    features: Sequence[Tensor | None], seen: dict[tuple[str, int], Tensor], space: str
) -> None:
    """Compare features of a stage with those of the forward pass."""
    found = {l: f for l, f in enumerate(features) if f is not None}
    assert found.keys() == {l for where, l in seen if where == space}
    for l, feature in found.items():
        torch.testing.assert_close(feature, seen[space, l], rtol=1e-12, atol=1e-12)
