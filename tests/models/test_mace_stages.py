"""The stages of MACE are its forward pass, and refitting along them restores what was disturbed."""

from __future__ import annotations

import copy
from functools import cache

import mace_models
import numpy as np
import pytest
import stage_contract
import torch
from ase import Atoms
from ase.build import bulk
from mace_native import native_model, native_spec
from torch import nn

from compactmlip.compress.apply import prune
from compactmlip.compress.plan import parse_target, target_sizes, top_channels
from compactmlip.compress.refit import refit
from compactmlip.data.graph import GraphBatch, build_graph, collate, energy_and_derivatives
from compactmlip.models import channel_graph, linear_stages, start_state
from compactmlip.models.contraction import weight_key

VARIANTS = tuple(mace_models.VARIANTS)


@cache
def _made(variant: str) -> nn.Module:
    return mace_models.make_model(mace_models.make_spec(**mace_models.VARIANTS[variant]), seed=1)


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    """A float64 model for each architecture option in turn; tests do not change it."""
    return _made(request.param)


def _batch(model: nn.Module, structures: dict[str, Atoms]) -> GraphBatch:
    names = ("crystal", "smaller than the cutoff", "molecule")
    return collate([build_graph(structures[name], model.spec) for name in names])


def _data(model: nn.Module, count: int, atoms_of: str = "MgO", seed: int = 0) -> list[tuple[GraphBatch, int]]:
    """Batches of rattled cells and their folds."""
    rng = np.random.default_rng(seed)
    data = []
    for k in range(count):
        atoms = bulk(atoms_of, "rocksalt", a=4.21 * (1 + 0.02 * rng.normal()), cubic=True)
        atoms.rattle(0.15, rng=rng)
        data.append((build_graph(atoms, model.spec), k % 3))
    return data


def _everything(model: nn.Module) -> dict[str, torch.Tensor]:
    """Columns to fit where nothing was cut."""
    return {name: torch.arange(p.shape[-1]) for name, p in model.named_parameters() if p.dim()}


def test_walking_the_stages_is_the_forward_pass(model: nn.Module, structures: dict[str, Atoms]) -> None:
    """Features of every space agree, and the readouts of what the layers put out add up to the energies."""
    batch = _batch(model, structures)
    inputs = (batch.species, batch.centers, batch.neighbors, batch.vectors)
    seen = stage_contract.tapped(model, batch)
    checked = set()
    with torch.no_grad():
        energies = model.pair_energy(*inputs)
        state = start_state(model, batch)
        stage_contract.assert_features(state.x, seen, "embedding")
        for stage in linear_stages(model):
            _, layer, kind = stage.name.split()
            state = stage.advance(state, stage.evaluate(state))
            spaces = {
                "up": {"up": state.up},
                "down": {"inner": state.inner, "atomic": state.atomic},
                "species_map": {"atomic": state.atomic},
                "mix": {"atomic": state.atomic},
                "contraction": {"product": state.product},
                "linear": {"out": state.x},
                "readout": {},
            }[kind]
            for space, features in spaces.items():
                if features:
                    stage_contract.assert_features(features, seen, f"layers.{layer}.{space}")
                    checked.add(f"layers.{layer}.{space}")
            part = model.layers[int(layer)].read(state.x) if kind == "linear" else None
            energies = energies if part is None else energies + part
    owned = {
        space for space, _ in seen if space.split(".")[-1] in ("up", "inner", "atomic", "product", "out")
    }
    assert checked == owned
    torch.testing.assert_close(model.scaled(energies, batch.species), model(*inputs), rtol=1e-12, atol=1e-12)


def test_fits_describe_the_sums(model: nn.Module, structures: dict[str, Atoms]) -> None:
    """Every order of every map can be refitted, but contractions whose weights all species share."""
    expected = 0
    for t, layer in enumerate(model.arch.layers):
        into = model.arch.channels_in(t)
        expected += sum(1 for a, b in zip(into, layer.up, strict=False) if a and b)
        expected += sum(1 for c in layer.down if c) + (sum(1 for c in layer.inner if c))
        expected += sum(1 for c in layer.product if c) * (1 + model.arch.contraction_per_species)
        expected += layer.readout is not None
    assert stage_contract.check_fits(model, _batch(model, structures)) == expected


def test_pruned_models_have_the_same_stages(model: nn.Module, rng: np.random.Generator) -> None:
    scores = {name: rng.random(group.size) for name, group in channel_graph(model.spec).groups.items()}
    for target in ("4x0+3x1", "3x0"):
        targets = target_sizes(model.spec, parse_target(target, len(model.layers)))
        smaller = prune(model, top_channels(model.spec, targets, scores))
        stage_contract.check_stages_exist_in_both(model, smaller)


def test_fits_of_a_model_with_holes_in_its_contraction(
    model: nn.Module, structures: dict[str, Atoms], rng: np.random.Generator
) -> None:
    """After cutting at random, orders have different channels of the contraction."""
    masks = {}
    for name, group in channel_graph(model.spec).groups.items():
        if group.space is not None:
            masks[name] = np.zeros(group.size, dtype=bool)
            masks[name][rng.permutation(group.size)[: max(group.size - 2, 1)]] = True
    smaller = prune(model, masks)
    assert any(layer.product_positions or layer.atomic_positions for layer in smaller.arch.layers)
    stage_contract.check_stages_exist_in_both(model, smaller)
    assert stage_contract.check_fits(smaller, _batch(smaller, structures)) > 4


def test_a_copy_keeps_its_weights(model: nn.Module) -> None:
    student = copy.deepcopy(model)
    fits = refit(student, model, _everything(model), _data(model, 3), 1.0)
    assert fits and all(fit.ridge is None and fit.before == 0 for fit in fits)
    for (name, a), (_, b) in zip(student.state_dict().items(), model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@torch.no_grad()
def _disturbed(model: nn.Module, batch: GraphBatch, size: float = 0.3) -> nn.Module:
    """A copy with noise on all weights that may be refitted: ``size`` of each sum's RMS."""
    student = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(7)
    state = start_state(student, batch)
    for stage in linear_stages(student):
        before = stage.evaluate(state)
        for fit in stage.fits:
            species = () if fit.kind == "shared" else (len(student.spec.species),)
            shape = (*species, fit.design(state).shape[2], student.get_parameter(fit.parameter).shape[-1])
            change = torch.randn(shape, generator=generator, dtype=torch.float64)
            fit.apply(change)
            effect = stage.evaluate(state)[fit.order] - before[fit.order]
            factor = size * before[fit.order].square().mean().sqrt() / effect.square().mean().sqrt()
            fit.apply((factor - 1) * change)
        state = stage.advance(state, stage.evaluate(state))
    return student


def _errors(student: nn.Module, model: nn.Module, data: list[tuple[GraphBatch, int]]) -> tuple[float, float]:
    """RMS deviations of energies and forces."""
    energies, forces = [], []
    for batch, _ in data:
        one, two = energy_and_derivatives(student, batch), energy_and_derivatives(model, batch)
        energies.append(one.node_energies - two.node_energies)
        forces.append((one.forces - two.forces).flatten())
    return tuple(float(torch.cat(parts).square().mean().sqrt()) for parts in (energies, forces))


def test_a_disturbed_model_is_restored(model: nn.Module) -> None:
    """Held-out energies and forces of the teacher come back, as its weights can be found again."""
    data = _data(model, 24)
    student = _disturbed(model, data[0][0])
    unseen = _data(model, 2, seed=5)
    before = _errors(student, model, unseen)
    refit(student, model, _everything(model), data, 1.0)
    after = _errors(student, model, unseen)
    assert min(before) > 5e-3
    assert after[0] < 1e-3 * before[0] and after[1] < 5e-3 * before[1]


@pytest.mark.parametrize("contraction", ["paths", "independent"])
def test_combined_weights_change_as_asked(contraction: str) -> None:
    """With more weights than independent products, by the least change of the weights."""
    spec = native_spec(contraction=contraction, layers=[{"correlation": 3}, {"correlation": 3}])
    block = native_model(spec).layers[0].contraction
    generator = torch.Generator().manual_seed(0)
    redundant = 0
    for L, nu in block.tables:
        weight, before = block.weights[weight_key(L, nu)], block.combined_weights(L, nu).detach().clone()
        old = weight.detach().clone()
        change = torch.randn(before.shape, generator=generator, dtype=torch.float64)
        block.add_to_combined(L, nu, change)
        torch.testing.assert_close(block.combined_weights(L, nu), before + change, rtol=1e-11, atol=1e-11)
        if contraction == "paths":
            mixing = block.get_buffer(f"mixing_{L}_{nu}")
            redundant += weight.shape[1] > mixing.shape[0]
            # The least change lies in the row space of the mixing matrix.
            rows = torch.linalg.qr(mixing.T).Q
            moved = (weight - old).detach()
            torch.testing.assert_close(rows @ (rows.T @ moved), moved, rtol=1e-11, atol=1e-11)
        else:
            torch.testing.assert_close(weight - old, change, rtol=1e-11, atol=1e-11)
    assert redundant > 0 or contraction == "independent"


def test_rarely_seen_species_keep_their_weights() -> None:
    """Maps and contractions that have weights per species change for the species that are seen often."""
    model = _made("agnostic first")
    data = _data(model, 24)
    present = [model.spec.species.index(s) for s in ("Mg", "O")]
    others = [z for z in range(len(model.spec.species)) if z not in present]
    data[0][0].species[0] = others[0]  # one atom of another species: fewer equations than unknowns
    student = _disturbed(model, data[0][0])
    before = copy.deepcopy(student.state_dict())
    refit(student, model, _everything(model), data, 1.0)
    owned = [name for name in before if ".species_map." in name or ".contraction.weights." in name]
    owned = [name for name in owned if not name.endswith("scale")]
    assert len(owned) > 8
    for name in owned:
        now = student.state_dict()[name]
        assert torch.equal(now[others], before[name][others]), name
        assert all(not torch.equal(now[z], before[name][z]) for z in present), name
