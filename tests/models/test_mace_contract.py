"""The MACE family satisfies the family contract, for every architecture option."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import contract
import mace_models
import numpy as np
import pytest
import torch
from ase import Atoms
from torch import nn

from compactmlip import checkpoint
from compactmlip.compress.apply import keep_species, prune
from compactmlip.data.graph import build_graph, collate, energy_and_derivatives
from compactmlip.deploy.archive import load_deployed, without_profiling
from compactmlip.deploy.compile import compile_model
from compactmlip.errors import InputError
from compactmlip.models import cast, channel_graph
from compactmlip.models.mace_architecture import MACEArchitecture

VARIANTS = tuple(mace_models.VARIANTS)


@cache
def _made(variant: str) -> nn.Module:
    return mace_models.make_model(mace_models.make_spec(**mace_models.VARIANTS[variant]), seed=1)


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    """A float64 model for each architecture option in turn; tests do not change it."""
    return _made(request.param)


def test_forces_are_of_real_size(model: nn.Module, structures: dict[str, Atoms]) -> None:
    for name in ("crystal", "smaller than the cutoff", "slab", "molecule"):
        assert 0.005 < float(contract.evaluate(model, structures[name]).forces.abs().max()) < 60


def test_rotation(model: nn.Module, structures: dict[str, Atoms], rng: np.random.Generator) -> None:
    for atoms in structures.values():
        contract.check_rotation(model, atoms, rng)


def test_inversion(model: nn.Module, structures: dict[str, Atoms]) -> None:
    for atoms in structures.values():
        one = contract.evaluate(model, atoms)
        two = contract.evaluate(model, contract.transformed(atoms, -np.eye(3)))
        two.forces.neg_()
        contract.assert_same(one, two, 1e-10)


def test_translation_and_permutation(
    model: nn.Module, structures: dict[str, Atoms], rng: np.random.Generator
) -> None:
    for atoms in structures.values():
        contract.check_translation_and_wrapping(model, atoms)
        contract.check_permutation(model, atoms, rng)


@pytest.mark.parametrize("name", ["smaller than the cutoff", "molecule"])
def test_extensivity(model: nn.Module, structures: dict[str, Atoms], name: str) -> None:
    contract.check_extensivity(model, structures[name])


def test_forces(model: nn.Module, structures: dict[str, Atoms], rng: np.random.Generator) -> None:
    contract.check_forces(model, structures["molecule"], rng)


@pytest.mark.parametrize("name", ["smaller than the cutoff", "slab"])
def test_stress(model: nn.Module, structures: dict[str, Atoms], name: str, rng: np.random.Generator) -> None:
    """Strain moves atoms too, so this also checks forces in periodic structures."""
    contract.check_stress(model, structures[name], rng)


def test_smooth_at_cutoff(model: nn.Module) -> None:
    contract.check_smooth_at_cutoff(model, "MgO")


def test_empty_plan_is_identity(model: nn.Module, structures: dict[str, Atoms]) -> None:
    contract.check_empty_plan(model, structures["molecule"])


@pytest.mark.parametrize("seed", range(3))
def test_masked_equals_pruned(model: nn.Module, structures: dict[str, Atoms], seed: int) -> None:
    chosen = [structures[name] for name in ("smaller than the cutoff", "molecule", "isolated atom")]
    contract.check_masked_equals_pruned(model, chosen, np.random.default_rng(seed))


def test_pruned_twice_equals_pruned_once(model: nn.Module, structures: dict[str, Atoms]) -> None:
    """Masks of a model that has already lost channels, and whose contraction has unequal orders."""
    rng = np.random.default_rng(11)
    for _ in range(2):
        contract.check_masked_equals_pruned(model, [structures["crystal"], structures["molecule"]], rng)
        graph = channel_graph(model.spec)
        masks = {}
        for name, group in graph.groups.items():
            if group.space is not None and group.size > 2:
                masks[name] = np.arange(group.size) != rng.integers(group.size)
        model = prune(model, masks)


def test_whole_orders_of_every_space_cut(model: nn.Module, structures: dict[str, Atoms]) -> None:
    """Also scalars, the neighbours' features, and what enters and leaves the contraction."""
    graph, atoms = channel_graph(model.spec), structures["smaller than the cutoff"]
    cut = set()
    for name, group in graph.groups.items():
        layer, _, space = name.partition("/")[0].rpartition(".")
        if space not in ("up", "inner", "atomic", "product", "out"):
            continue
        masks = {name: np.zeros(group.size, dtype=bool)}
        try:
            pruned = prune(model, masks)
        except InputError as error:
            assert group.order == 0 and "pruning would leave" in str(error), name
            continue
        left = pruned.spec.architecture["layers"][int(layer.rpartition(".")[2])][space]
        assert not any(left[group.order : group.order + 1]), name
        cut.add((space, group.order))
        masked = contract.evaluate(model, atoms, graph.complete(masks))
        contract.assert_same(masked, contract.evaluate(pruned, atoms), 1e-12)
    assert ("atomic", 1) in cut
    if len(model.spec.architecture["layers"]) > 1:
        assert ("atomic", 0) in cut


@pytest.mark.parametrize(
    "name", ["species", "embedding/0", "layers.0.radial.0/0", "layers.0.atomic/*", "layers.0.out/0"]
)
def test_nothing_left_is_refused(name: str) -> None:
    model = _made("residual")
    groups = channel_graph(model.spec).groups
    chosen = [n for n in groups if n == name or (name.endswith("*") and n.startswith(name[:-1]))]
    assert chosen
    with pytest.raises(InputError, match="pruning would leave"):
        prune(model, {n: np.zeros(groups[n].size, dtype=bool) for n in chosen})


def test_gates_without_scalars_are_refused() -> None:
    """In a nonlinear layer the gates are made from scalars: of paths, or of the neighbours' residual."""
    model = _made("nonlinear")
    groups = channel_graph(model.spec).groups
    chosen = [
        n for n in groups if n == "layers.1.up/0" or (n.startswith("layers.1.path/") and n.endswith("-0"))
    ]
    assert len(chosen) > 1
    with pytest.raises(InputError, match="the gates of layers.1 without scalars"):
        prune(model, {n: np.zeros(groups[n].size, dtype=bool) for n in chosen})


def test_species_removal_is_exact(model: nn.Module, structures: dict[str, Atoms]) -> None:
    for atoms in structures.values():
        contract.check_species_removal(model, atoms)


def test_species_removal_shrinks_what_depends_on_species(model: nn.Module) -> None:
    kept = keep_species(model, ["O", "Mg"])
    shared = not MACEArchitecture.model_validate(model.spec.architecture).contraction_per_species
    for name, tensor in kept.state_dict().items():
        if ".contraction.weights." in name:
            assert tensor.shape[0] == (1 if shared else 2), name
        if name in ("embedding.weight", "energy_scale", "energy_shift") or name.endswith("radii"):
            assert tensor.shape[0] == 2, name


def test_batches_do_not_mix(model: nn.Module, structures: dict[str, Atoms]) -> None:
    graphs = [build_graph(atoms, model.spec, torch.float64) for atoms in structures.values()]
    together = energy_and_derivatives(model, collate(graphs))
    alone = [energy_and_derivatives(model, graph) for graph in graphs]
    torch.testing.assert_close(
        together.energies, torch.cat([a.energies for a in alone]), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(together.forces, torch.cat([a.forces for a in alone]), rtol=0, atol=1e-11)


def test_save_and_load_are_bitwise(
    model: nn.Module, structures: dict[str, Atoms], tmp_path: Path, rng: np.random.Generator
) -> None:
    """Also of a model with unequal channels, whose contraction has positions."""
    masks = {}
    for name, group in channel_graph(model.spec).groups.items():
        if group.space is not None:
            masks[name] = np.arange(group.size) != rng.integers(group.size)
    for k, one in enumerate((model, prune(model, masks))):
        two = checkpoint.load(checkpoint.save(one, tmp_path / f"{k}.safetensors"))
        assert two.spec.architecture == one.spec.architecture
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, two.state_dict()[name]), name
        atoms = structures["molecule"]
        contract.assert_same(contract.evaluate(one, atoms), contract.evaluate(two, atoms), 0)


def test_single_precision_is_close(model: nn.Module, structures: dict[str, Atoms]) -> None:
    single = cast(copy.deepcopy(model), torch.float32)
    for atoms in structures.values():
        exact = contract.evaluate(model, atoms)
        found = energy_and_derivatives(single, build_graph(atoms, model.spec, torch.float32))
        assert found.energies.dtype == torch.float64
        scale = max(1.0, float(exact.forces.abs().max()))
        torch.testing.assert_close(found.node_energies, exact.node_energies, rtol=1e-5, atol=1e-5 * scale)
        torch.testing.assert_close(found.forces.double(), exact.forces, rtol=0, atol=3e-5 * scale)


def test_second_derivatives(model: nn.Module, structures: dict[str, Atoms]) -> None:
    """Training differentiates forces by weights; checked by finite differences, through the contraction."""
    model = copy.deepcopy(model)
    batch = build_graph(structures["molecule"], model.spec, torch.float64)
    names = [n for n, _ in model.named_parameters() if n.endswith((".up.orders.0.weight", "weights.0_1"))]
    weights = [model.get_parameter(name) for name in names]
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in weights]

    def loss() -> torch.Tensor:
        return energy_and_derivatives(model, batch, create_graph=True).forces.square().sum()

    gradients = torch.autograd.grad(loss(), weights)
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    step, values = 1e-5, []
    for factor in (1, -2):
        with torch.no_grad():
            for weight, direction in zip(weights, directions, strict=True):
                weight += factor * step * direction
        values.append(loss().detach())
    torch.testing.assert_close(slope, (values[0] - values[1]) / (2 * step), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("variant", ["density", "nonlinear"])
def test_compiled_file_equals_model(variant: str, structures: dict[str, Atoms], tmp_path: Path) -> None:
    model = _made(variant)
    path = compile_model(model, tmp_path / "m.pt", dtype="float64").path
    module, spec = load_deployed(path)
    assert (spec.family, spec.species) == ("mace", mace_models.SPECIES)
    for atoms in structures.values():
        graph = build_graph(atoms, spec, torch.float64)
        found = energy_and_derivatives(without_profiling(module), graph)
        contract.assert_same(contract.evaluate(model, atoms), found, 1e-11)
