"""Fewer layers and other radial bases: what stays exactly the same, what is refused, what is counted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import contract
import mace_models
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from mace_native import native_model, native_spec
from torch import nn

from compactmlip import checkpoint
from compactmlip.compress.apply import keep_species
from compactmlip.compress.reshape import cut_layers, resize_basis
from compactmlip.data.graph import GraphBatch, build_graph
from compactmlip.errors import InputError, UnsupportedFeatureError
from compactmlip.models import build, cast, model_dtype, num_parameters
from compactmlip.models.mace_architecture import MACEArchitecture, MACEReadout, upstream_layer
from compactmlip.models.radial import PolynomialEnvelope
from compactmlip.spec import ModelSpec

LINEAR = MACEReadout(kind="linear")
NONLINEAR = MACEReadout(kind="nonlinear", hidden=(16,))
LAYERS = ("residual", "agnostic first", "density", "nonlinear", "three layers, four factors", "scalars")
"""Variants with several layers, each with a readout."""


def _made(variant: str, **changes: Any) -> nn.Module:
    spec = mace_models.make_spec(**mace_models.VARIANTS[variant] | changes)
    return mace_models.make_model(spec, seed=1)


def _graphs(model: nn.Module, count: int = 4, seed: int = 0) -> list[GraphBatch]:
    rng = np.random.default_rng(seed)
    graphs = []
    for _ in range(count):
        atoms = bulk("MgO", "rocksalt", a=4.21, cubic=True)
        atoms.rattle(0.15, rng=rng)
        graphs.append(build_graph(atoms, model.spec, model_dtype(model)))
    return graphs


def _energies(model: nn.Module, graph: GraphBatch) -> torch.Tensor:
    with torch.no_grad():
        energies: torch.Tensor = model(graph.species, graph.centers, graph.neighbors, graph.vectors)
    return energies


def _first_layers(model: nn.Module, count: int, graph: GraphBatch) -> torch.Tensor:
    """Energies of all readouts up to a layer, by the model's own parts."""
    inputs = (graph.species, graph.centers, graph.neighbors, graph.vectors)
    with torch.no_grad():
        energy, x = model.pair_energy(*inputs), model.embed(graph.species)
        for layer in model.layers[:count]:
            x = layer(x, model.edge_features(*inputs), graph.species)
            energy = energy + layer.read(x)
        scaled: torch.Tensor = model.scaled(energy, graph.species)
    return scaled


def _assert_equal_states(one: nn.Module, two: nn.Module) -> None:
    first, second = one.state_dict(), two.state_dict()
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]) and tensor.dtype == second[name].dtype, name


def _round_trip(model: nn.Module, folder: Path) -> nn.Module:
    loaded = checkpoint.load(checkpoint.save(model, folder / "model.safetensors"))
    _assert_equal_states(loaded, model)
    # The file says in which precision it holds the parameters.
    name = str(model_dtype(model)).removeprefix("torch.")
    assert loaded.spec == model.spec.model_copy(update={"dtype": name})
    return loaded


@pytest.mark.parametrize("variant", LAYERS)
def test_what_is_left_is_the_sum_of_the_first_readouts(variant: str, tmp_path: Path) -> None:
    """With the linear readout and with the nonlinear one that replaces it, for every number of layers."""
    model = _made(variant)
    before = copy.deepcopy(model.state_dict())
    graph = _graphs(model, 1)[0]
    for count in range(1, len(model.layers)):
        wanted = _first_layers(model, count, graph)
        linear = cut_layers(model, count, readout="linear")
        replaced = cut_layers(model, count)
        for result in (linear, replaced):
            torch.testing.assert_close(_energies(result, graph), wanted, rtol=1e-10, atol=1e-10)
            assert len(result.layers) == result.spec.num_message_passing_layers == count
            assert len(result.arch.layers[-1].out) == 1
            assert result.arch.layers[-1].product == (result.arch.layers[-1].width,)
            _round_trip(result, tmp_path)
        assert linear.arch.layers[-1].readout == LINEAR
        assert replaced.arch.layers[-1].readout == NONLINEAR
        atoms = bulk("MgO", "rocksalt", a=4.21, cubic=True)
        atoms.rattle(0.1, seed=3)
        contract.assert_same(contract.evaluate(linear, atoms), contract.evaluate(replaced, atoms), 1e-10)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_new_readout_has_the_old_hidden_units_and_learns_from_all() -> None:
    """Units of the last readout are there where they fit; each unit's weight to the energy has a gradient."""
    model = _made("residual", hidden=(6, 6))
    small = cut_layers(model, 1, readout_hidden=4)
    one, two = (m.layers[-1].readout.maps[0] for m in (model, small))
    torch.testing.assert_close(two()[:, 2:4], one()[:, 2:4], rtol=1e-14, atol=0)
    graph = _graphs(small, 1)[0]
    small(graph.species, graph.centers, graph.neighbors, graph.vectors).sum().backward()
    gradients = small.layers[-1].readout.maps[1].weight.grad
    assert gradients is not None and bool((gradients.abs() > 0).all())


def test_units_that_do_not_fit_start_at_zero() -> None:
    """The last readout has six channels, the new last layer five."""
    spec = native_spec(
        layers=[{"out": (5, 5), "product": (6, 6)}, {"up": (5, 5)}],
    )
    small = cut_layers(native_model(spec), 1, readout_hidden=5)
    first = small.layers[0].readout.maps[0].weight.detach()
    assert first.shape == (5, 5) and bool((first[:, 2:] == 0).all())
    graph = _graphs(small, 1)[0]
    torch.testing.assert_close(
        _energies(small, graph), _energies(cut_layers(native_model(spec), 1, readout="linear"), graph)
    )


def test_mean_energy_of_each_species_is_kept(structures: dict[str, Atoms]) -> None:
    model = _made("three layers, four factors")
    graphs = [*_graphs(model), build_graph(structures["molecule"], model.spec)]
    plain, fitted = cut_layers(model, 1), cut_layers(model, 1, graphs=graphs)
    species = torch.cat([g.species for g in graphs])
    missing = torch.cat([_energies(model, g) - _energies(fitted, g) for g in graphs])
    before = torch.cat([_energies(model, g) - _energies(plain, g) for g in graphs])
    assert set(species.tolist()) == {0, 1, 2, 3}
    for z in range(4):
        assert abs(float(missing[species == z].mean())) < 1e-12 * max(1.0, float(before.abs().max()))
        assert abs(float(before[species == z].mean())) > 1e-3
    # Silicon is in no structure.
    assert float(fitted.energy_shift[4]) == float(model.energy_shift[4])
    # Forces do not depend on the shift.
    atoms = structures["crystal"]
    assert torch.equal(contract.evaluate(plain, atoms).forces, contract.evaluate(fitted, atoms).forces)


@pytest.mark.parametrize("count", [-1, 0, 2, 3])
def test_number_of_layers_that_cannot_be_kept(count: int) -> None:
    with pytest.raises(InputError, match=f"cannot keep {count} layers of 2; keep at least one and cut"):
        cut_layers(_made("residual"), count)


def test_refusals_of_cut_layers(small_model: nn.Module) -> None:
    model = _made("residual")
    with pytest.raises(InputError, match="at least two hidden units"):
        cut_layers(model, 1, readout_hidden=1)
    with pytest.raises(InputError, match="unknown readout of the last layer 'bent'; choose linear or nonlin"):
        cut_layers(model, 1, readout="bent")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="layer 0 of this model has no readout of its own"):
        cut_layers(_made("last readout, all orders"), 1)
    with pytest.raises(UnsupportedFeatureError, match="family 'nequip' cannot be changed; supported: mace"):
        cut_layers(small_model, 1)


def _paper_model(num_species: int) -> nn.Module:
    """MACE-MP with 128 channels of orders up to 2 and 10 Bessel functions, for fewer species."""
    hidden = (128, 128, 128)
    shared: dict[str, Any] = {"width": 128, "lmax_edge": 3, "correlation": 3}
    layers = (
        upstream_layer(hidden[:1], out=hidden, readout=LINEAR, **shared),
        upstream_layer(hidden, out=hidden[:1], readout=NONLINEAR, **shared),
    )
    shape = MACEArchitecture(
        embedding=128, num_basis=10, envelope=PolynomialEnvelope(p=5), lmax_edge=3, layers=layers
    )
    spec = ModelSpec(
        family="mace",
        species=("H", "O")[:num_species],
        cutoff=6.0,
        num_message_passing_layers=2,
        architecture=shape.model_dump(mode="json"),
    )
    with torch.random.fork_rng(devices=[]):
        return build(spec)


def test_parameter_counts_of_the_paper() -> None:
    """Structural Pruning, depth: MACE-MP cut to one layer, with the readout that it had and with a new one.

    The paper keeps the weights of orders 1 and 2, which reach no energy any more.  Counts are linear in the
    number of species: 89 are not needed to know them.
    """
    counts = []
    for num_species in (1, 2):
        model = _paper_model(num_species)
        linear = cut_layers(model, 1, readout="linear", keep_unread=True)
        nonlinear = cut_layers(model, 1, keep_unread=True)
        counts.append([num_parameters(m) for m in (model, linear, nonlinear, cut_layers(model, 1))])
    for_all = [one + 88 * (two - one) for one, two in zip(*counts, strict=True)]
    assert for_all[:3] == [5_725_072, 3_453_696, 3_455_632]
    # What nobody reads: the contractions to orders 1 and 2 and the maps behind them.
    weights = model.layers[0].contraction.weights
    products = sum(w.shape[1] for key, w in weights.items() if not key.startswith("0_"))
    assert for_all[2] - for_all[3] == 89 * products * 128 + 2 * 128**2


def test_what_nobody_reads_changes_nothing() -> None:
    model = _made("residual")
    kept, cut = cut_layers(model, 1, keep_unread=True), cut_layers(model, 1)
    assert kept.arch.layers[0].out == (6, 5, 4) and cut.arch.layers[0].out == (6,)
    assert num_parameters(kept) > num_parameters(cut)
    graph = _graphs(model, 1)[0]
    torch.testing.assert_close(_energies(kept, graph), _energies(cut, graph), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", ["residual", "density", "nonlinear", "one layer, one factor", "scalars"])
def test_inherited_basis_is_the_same_function(variant: str, tmp_path: Path) -> None:
    model = _made(variant)
    before = copy.deepcopy(model.state_dict())
    larger = resize_basis(model, 8)
    assert (larger.arch.num_basis, model.arch.num_basis) == (8, 5)
    added = sum(p.numel() for p in larger.parameters()) - sum(p.numel() for p in model.parameters())
    units = 0
    for layer in model.arch.layers:
        units += layer.radial_hidden[0] + (layer.interaction == "density")
        units += layer.density_hidden[0] if layer.interaction == "nonlinear" else 0
    assert added == 3 * units
    atoms = bulk("MgO", "rocksalt", a=4.21, cubic=True)
    atoms.rattle(0.1, seed=3)
    contract.assert_same(contract.evaluate(model, atoms), contract.evaluate(larger, atoms), 1e-12)
    _round_trip(larger, tmp_path)
    # The new functions take part in training.
    graph = _graphs(larger, 1)[0]
    larger(graph.species, graph.centers, graph.neighbors, graph.vectors).sum().backward()
    first = larger.layers[0].interaction.convolution.radial.layers[0].weight.grad
    rows = first.T if variant == "nonlinear" else first
    assert bool((rows[5:8].abs().sum(dim=1) > 0).all())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_inherited_basis_of_the_same_size_changes_nothing() -> None:
    model = _made("residual")
    _assert_equal_states(resize_basis(model, 5), model)


READERS = (".convolution.radial.layers.0.", ".density.layers.0.", ".density_network.layers.0.")


@pytest.mark.parametrize("num_basis", [3, 5, 9])
@pytest.mark.parametrize("variant", ["residual", "density", "nonlinear", "independent products"])
def test_random_basis_changes_the_readers_only(variant: str, num_basis: int, tmp_path: Path) -> None:
    """Smaller and larger, for Gaussians too; species embeddings of edges keep their rows."""
    model = _made(variant)
    one, again, other = (resize_basis(model, num_basis, start="random", seed=s) for s in (1, 1, 2))
    _assert_equal_states(one, again)
    before, after = model.state_dict(), one.state_dict()
    assert list(before) == list(after)
    changed = [name for name in before if any(part in name for part in READERS)]
    weights = [name for name in changed if name.endswith("weight")]
    kinds = {"residual": 1, "independent products": 1, "density": 2, "nonlinear": 2}
    assert len(weights) == kinds[variant] * len(model.layers)
    for name, tensor in before.items():
        if name in weights:
            assert not torch.equal(after[name], other.state_dict()[name])
        elif name not in changed and name != "radial.functions.points":
            assert torch.equal(tensor, after[name]), name
    assert after["radial.functions.points"].shape == (num_basis,)
    for name in weights:
        rows, old = (s[name].T if variant == "nonlinear" else s[name] for s in (after, before))
        assert rows.shape[0] - num_basis == old.shape[0] - 5
        assert torch.equal(rows[num_basis:], old[5:])
        if variant == "nonlinear":
            assert float(rows[:num_basis].std()) == pytest.approx(rows.shape[0] ** -0.5, rel=0.5)
        else:
            scale = float(after[name.replace("weight", "scale")])
            assert scale == pytest.approx(num_basis**-0.5)
            if rows.shape[1] > 1:
                assert float(rows.std()) == pytest.approx(1.0, rel=0.5)
    if variant == "independent products":
        points = torch.linspace(0, model.spec.cutoff, num_basis, dtype=torch.float64)
        torch.testing.assert_close(after["radial.functions.points"], points)
    loaded, graph = _round_trip(one, tmp_path), _graphs(one, 1)[0]
    assert torch.equal(_energies(loaded, graph), _energies(one, graph))


def test_wave_numbers_of_the_model_are_inherited() -> None:
    """Upstream models may have trained them; new functions continue with n pi / r_c."""
    model = _made("residual")
    points = model.get_buffer("radial.functions.points")
    points *= 1.01
    larger = resize_basis(model, 7).get_buffer("radial.functions.points")
    assert torch.equal(larger[:5], points)
    expected = torch.tensor([6.0, 7.0], dtype=torch.float64) * np.pi / model.spec.cutoff
    torch.testing.assert_close(larger[5:], expected)


def test_refusals_of_resize_basis(small_model: nn.Module) -> None:
    model = _made("residual")
    with pytest.raises(InputError, match="at least one function"):
        resize_basis(model, 0, start="random")
    with pytest.raises(InputError, match="has 5 radial functions; only a larger number inherits"):
        resize_basis(model, 4)
    with pytest.raises(InputError, match="unknown start of a radial basis 'zero'; choose inherited or ran"):
        resize_basis(model, 8, start="zero")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="Gaussians move .* start at random"):
        resize_basis(_made("independent products"), 8)
    with pytest.raises(UnsupportedFeatureError, match="nequip"):
        resize_basis(small_model, 12)


@pytest.mark.parametrize("start", ["inherited", "random"])
def test_single_precision_and_training_mode_are_kept(start: Any, tmp_path: Path) -> None:
    model = cast(_made("residual"), torch.float32).eval()
    graphs = _graphs(model)
    for result in (resize_basis(model, 8, start=start), cut_layers(model, 1, graphs=graphs)):
        assert not result.training
        assert all(p.dtype == torch.float32 for p in result.parameters())
        assert {n: b.dtype for n, b in result.named_buffers()}.items() >= {
            "energy_shift": torch.float64,
            "radial.functions.points": torch.float32,
        }.items()
        assert torch.isfinite(_energies(result, graphs[0])).all()
        _round_trip(result, tmp_path)
    inherited = _energies(resize_basis(model, 8), graphs[0])
    torch.testing.assert_close(inherited, _energies(model, graphs[0]), rtol=1e-5, atol=1e-5)


def test_steps_are_recorded_and_go_with_other_steps() -> None:
    """Species, depth and basis in turn; the file says what was done."""
    model = keep_species(_made("three layers, four factors"), ["Mg", "O"])
    small = resize_basis(cut_layers(model, 2, graphs=_graphs(model, 3)), 9, start="random", seed=4)
    steps = [(step.action, step.options) for step in small.spec.provenance.steps]
    assert steps == [
        ("cut layers", {"layers": 2, "readout": "nonlinear", "structures": 3}),
        ("resize basis", {"num_basis": 9, "start": "random", "seed": 4}),
    ]
    assert small.spec.species == ("O", "Mg") and small.arch.num_basis == 9
    assert model.spec.provenance.steps == ()
