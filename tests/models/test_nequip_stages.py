"""The stages of NequIP are its forward pass, and its fits say how sums depend on weights."""

from __future__ import annotations

import stage_contract
import torch
from ase import Atoms
from torch import nn

from compactmlip.compress.apply import prune
from compactmlip.compress.importance import importance
from compactmlip.compress.plan import parse_target, target_sizes, top_channels
from compactmlip.data.graph import GraphBatch, build_graph, collate
from compactmlip.models import linear_stages, start_state


def _batch(model: nn.Module, structures: dict[str, Atoms]) -> GraphBatch:
    names = ("crystal", "smaller than the cutoff", "molecule")
    return collate([build_graph(structures[name], model.spec) for name in names])


def test_walking_the_stages_is_the_forward_pass(
    model_variant: nn.Module, structures: dict[str, Atoms]
) -> None:
    batch = _batch(model_variant, structures)
    seen = stage_contract.tapped(model_variant, batch)
    with torch.no_grad():
        state = start_state(model_variant, batch)
        stage_contract.assert_features(state.x, seen, "embedding")
        for stage in linear_stages(model_variant):
            total = stage.evaluate(state)
            state = stage.advance(state, total)
            layer = stage.name.split()[1] if " " in stage.name else ""
            if stage.name.endswith("up"):
                stage_contract.assert_features(total, seen, f"layers.{layer}.up")
            elif stage.name.endswith("down"):
                stage_contract.assert_features(state.x, seen, f"layers.{layer}.out")
        stage_contract.assert_features(state.x, seen, "readout.hidden")


def test_fits_describe_the_sums(model_variant: nn.Module, structures: dict[str, Atoms]) -> None:
    # Orders: 1, 4, 4 before the convolutions; 4, 4, 1 after; and the readout.
    assert stage_contract.check_fits(model_variant, _batch(model_variant, structures)) == 19


def test_pruned_models_have_the_same_stages(model_variant: nn.Module) -> None:
    spec = model_variant.spec
    targets = target_sizes(spec, parse_target("4x0+3x1", 3), odd_paths=False)
    masks = top_channels(spec, targets, importance(model_variant, [], "random"))
    stage_contract.check_stages_exist_in_both(model_variant, prune(model_variant, masks))
