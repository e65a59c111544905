"""What a target means for the channel groups of MACE, and which channels are then kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mace_models
import numpy as np
import pytest
import torch
from ase.build import bulk
from mace_native import native_model, native_spec, random_scores
from torch import nn

from compactmlip.channels import Mask
from compactmlip.compress.apply import prune
from compactmlip.compress.importance import importance
from compactmlip.compress.plan import parse_target, target_sizes, top_channels
from compactmlip.data.graph import build_graph
from compactmlip.errors import InputError
from compactmlip.families.mace_uniform import constructor_arguments
from compactmlip.models import channel_graph, pruned_spec
from compactmlip.models.contraction import weight_key
from compactmlip.models.mace_architecture import MACEArchitecture
from compactmlip.models.mace_plan import channel_rows
from compactmlip.spec import ModelSpec

LAYER = {"species_map": True, "inner": (8, 8, 8), "skip": "none"}


def _masks(spec: ModelSpec, target: str, **options: Any) -> dict[str, Mask]:
    sizes = target_sizes(spec, parse_target(target, spec.num_message_passing_layers), **options)
    return top_channels(spec, sizes, random_scores(spec))


def _shape(spec: ModelSpec, masks: Mapping[str, Mask]) -> MACEArchitecture:
    smaller = pruned_spec(spec, channel_graph(spec).complete(masks))
    return MACEArchitecture.model_validate(smaller.architecture)


@pytest.mark.parametrize("target", ["8x0+8x1", "8x0", "4x0+4x1+4x2", "4x0+4x1", "4x0", "1x0+1x1"])
@pytest.mark.parametrize("species_map", [False, True])
def test_uniform_targets_give_shapes_that_upstream_can_build(target: str, species_map: bool) -> None:
    """All spaces of a layer keep one set of the contraction's channels."""
    spec = native_spec((8, 8, 8), layers=[LAYER if species_map else {}, {}])
    masks = _masks(spec, target)
    arch = _shape(spec, masks)
    count = int(target.partition("x")[0])
    for t, layer in enumerate(arch.layers):
        shared = [masks[f"layers.{t}.atomic/{l}"] for l in range(3)]
        shared += [masks[f"layers.{t}.product/{l}"] for l, size in enumerate(layer.product) if size]
        assert all(np.array_equal(mask, shared[0]) for mask in shared)
        assert layer.width == count and not layer.atomic_positions and not layer.product_positions
        assert layer.atomic == (count,) * 3 and layer.radial_hidden == (7, 9)
    assert arch.embedding == count and arch.lmax_edge == 2
    smaller = pruned_spec(spec, channel_graph(spec).complete(masks))
    assert constructor_arguments(smaller, 10.0)["hidden_irreps"].replace("o", "").replace("e", "") == target


def test_nonlinear_blocks_keep_one_size_everywhere() -> None:
    spec = mace_models.make_spec(
        **mace_models.VARIANTS["nonlinear"] | {"hidden": (6, 6, 6)}, width=6, num_layers=3
    )
    arch = _shape(spec, _masks(spec, "4x0+4x1", readout_hidden=3))
    assert [layer.out for layer in arch.layers] == [(4, 4), (4, 4), (4,)]
    for layer in arch.layers:
        assert layer.pair_embedding == (4, 4) and layer.width == 4
        assert layer.inner == layer.atomic == (4,) * 4
        assert layer.radial_hidden == (7, 9) and set(layer.up) == {4}
    assert arch.layers[2].readout is not None and arch.layers[2].readout.hidden == (3, 3)


def test_target_per_layer_and_order() -> None:
    """Layers and orders may differ; the second layer reads what the first one puts out."""
    spec = native_spec((14, 14))
    masks = _masks(spec, "12x0+6x1,8x0", radial_hidden=5, readout_hidden=3)
    arch = _shape(spec, masks)
    one, two = arch.layers
    assert (arch.embedding, arch.channels_in(1)) == (12, (12, 6))
    assert (one.up, one.out, one.width, one.atomic) == ((12,), (12, 6), 12, (12, 12, 12))
    assert (two.up, two.out, two.width, two.atomic) == ((12, 6), (8,), 8, (8, 8, 8))
    assert one.product == (12, 12) and two.product == (8,)
    assert one.radial_hidden == two.radial_hidden == (5, 5)
    assert two.readout is not None and two.readout.hidden == (3,)


def test_options_for_hidden_units_never_ask_for_more_than_there_is() -> None:
    spec = native_spec()
    arch = _shape(spec, _masks(spec, "4x0", radial_hidden=8, readout_hidden=99))
    assert [layer.radial_hidden for layer in arch.layers] == [(7, 8), (7, 8)]
    assert arch.layers[1].readout is not None and arch.layers[1].readout.hidden == (5,)


def test_a_target_larger_than_the_model_keeps_all() -> None:
    spec = native_spec()
    masks = _masks(spec, "99x0+99x1+99x2+99x3")
    assert all(mask.all() for mask in masks.values())
    assert _shape(spec, masks) == MACEArchitecture.model_validate(spec.architecture)
    # Larger in one order only: the other one is cut.
    assert _shape(spec, _masks(spec, "99x0+2x1")).layers[0].out == (6, 2)


def test_an_order_that_is_not_named_is_cut_with_its_contraction() -> None:
    spec = native_spec((6, 6, 6))
    arch = _shape(spec, _masks(spec, "6x0+6x2"))
    assert arch.layers[0].out == arch.layers[0].product == (6, 0, 6)
    assert arch.layers[1].up == (6, 0, 6)
    # Atomic features keep all orders: the many-body part's angular resolution is not the stream's.
    assert arch.layers[0].atomic == (6, 6, 6) and arch.lmax_edge == 2


def test_targets_without_scalars_or_with_other_depth_are_refused() -> None:
    spec = native_spec()
    with pytest.raises(InputError, match="needs scalar channels in every layer"):
        _masks(spec, "4x0,4x1")
    with pytest.raises(InputError, match="lists 3 layers, but the model has 2"):
        _masks(spec, "4x0,4x0,4x0")


@pytest.mark.parametrize("variant", ["residual", "agnostic first", "nonlinear", "three layers, four factors"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_was_cut_at_random_can_be_cut_again(variant: str, seed: int) -> None:
    """Orders that use different channels of the contraction have no common set: each keeps its best."""
    spec = mace_models.make_spec(**mace_models.VARIANTS[variant])
    rng = np.random.default_rng(seed)
    masks = {}
    for name, group in channel_graph(spec).groups.items():
        if group.space is not None:
            masks[name] = rng.random(group.size) < 0.75
            masks[name][rng.integers(group.size)] = True
    model = prune(mace_models.make_model(spec), masks)
    before = model.arch
    assert any(layer.atomic_positions or layer.product_positions for layer in before.layers)
    smaller = prune(model, _masks(model.spec, "2x0+1x1"))
    for old, new in zip(before.layers, smaller.arch.layers, strict=True):
        assert new.out[0] == min(old.out[0], 2) and max(new.out[1:], default=0) <= 1
        assert max(new.atomic) <= 2 and max(new.product) <= 2
        assert new.width <= old.width
    batch = build_graph(bulk("MgO", "rocksalt", a=4.21), smaller.spec)
    energies = smaller(batch.species, batch.centers, batch.neighbors, batch.vectors)
    assert torch.isfinite(energies).all() and energies.std() > 0
    assert channel_rows(smaller.spec)[-1][0].endswith("contraction")


def _stretched(model: nn.Module, factors: torch.Tensor) -> nn.Module:
    """The same function with larger atomic features: the contraction's weights make up for it."""
    block = model.layers[0]
    with torch.no_grad():
        for down in block.interaction.down.orders.values():
            down.weight *= factors
        for L, nu in block.contraction.tables:
            block.contraction.weights[weight_key(L, nu)] /= factors**nu
    return model


def test_the_contraction_is_scored_where_its_products_leave() -> None:
    """Sizes of atomic features say nothing: two models of one function keep the same channels."""
    spec = native_spec()
    plain, stretched = native_model(spec), native_model(spec)
    _stretched(stretched, torch.tensor([1.0, 30.0, 1.0, 30.0, 1.0, 30.0], dtype=torch.float64))
    atoms = bulk("MgO", "rocksalt", a=4.21, cubic=True)
    atoms.rattle(0.1, seed=0)
    graph = build_graph(atoms, spec)
    inputs = (graph.species, graph.centers, graph.neighbors, graph.vectors)
    torch.testing.assert_close(plain(*inputs), stretched(*inputs), rtol=1e-12, atol=1e-10)
    targets = target_sizes(spec, parse_target("3x0+3x1", 2))
    kept, scores = [], []
    for model in (plain, stretched):
        scores.append(importance(model, [graph], "activation"))
        kept.append(top_channels(spec, targets, scores[-1])["layers.0.atomic/1"])
    assert np.array_equal(kept[0], kept[1])
    total = scores[1]["layers.0.product/0"] + scores[1]["layers.0.product/1"]
    assert set(np.flatnonzero(kept[1])) == set(np.argsort(total)[-3:])
    by_size = sum(scores[1][f"layers.0.atomic/{l}"] for l in range(3))
    assert set(np.argsort(by_size)[-3:]) == {1, 3, 5} != set(np.flatnonzero(kept[1]))


def test_products_of_an_order_that_is_cut_do_not_vote() -> None:
    spec = native_spec()
    scores = random_scores(spec) | {
        "layers.0.product/0": np.array([6.0, 5.0, 4.0, 3.0, 2.0, 1.0]),
        "layers.0.product/1": np.array([0.0, 0.0, 0.0, 0.0, 99.0, 99.0]),
    }
    for target, wanted in (("2x0", [0, 1]), ("2x0+2x1", [4, 5])):
        masks = top_channels(spec, target_sizes(spec, parse_target(target, 2)), scores)
        assert np.flatnonzero(masks["layers.0.atomic/2"]).tolist() == wanted
        assert np.flatnonzero(masks["layers.0.product/0"]).tolist() == wanted


def test_rows_for_people() -> None:
    assert channel_rows(native_spec()) == [
        ("embedding", "6x0"),
        ("layer 0", "6x0+6x1, 3 paths"),
        ("layer 0 contraction", "6 channels, 2 factors"),
        ("layer 1", "6x0, 7 paths"),
        ("layer 1 contraction", "6 channels, 2 factors"),
    ]
