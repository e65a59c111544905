"""Export of MACE models: upstream computes the same numbers.

Tests of files that mace-torch loads need mace-torch; the others do not.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from contract import evaluate
from mace_native import NUM_NEIGHBORS, SPECIES, cut_to, native_model, native_spec
from pickles import FOLDER
from torch import Tensor, nn

from compactmlip import checkpoint
from compactmlip.cli import export as export_command
from compactmlip.compress.apply import keep_species
from compactmlip.errors import InputError, SelfCheckError, UnsupportedFeatureError
from compactmlip.families import inert, mace_export, mace_upstream
from compactmlip.families.mace import import_model, load_checkpoint
from compactmlip.families.mace_config import from_arguments, from_model
from compactmlip.families.mace_contraction import read, upstream_weights
from compactmlip.families.mace_export import export_model
from compactmlip.families.mace_uniform import constructor_arguments
from compactmlip.models import cast
from compactmlip.models.contraction import SymmetricContraction
from compactmlip.models.mace_architecture import upstream_layer
from compactmlip.models.products import coupling_paths
from compactmlip.spec import Provenance

SAFE_LOADING = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_RESIDUAL = "RealAgnosticResidualInteractionBlock"
_DENSITY = "RealAgnosticDensityInteractionBlock"
_DENSITY_RESIDUAL = "RealAgnosticDensityResidualInteractionBlock"
_NONLINEAR = "RealAgnosticResidualNonLinearInteractionBlock"
BASE: dict[str, Any] = {
    "model": "ScaleShiftMACE",
    "r_max": 4.0,
    "num_bessel": 5,
    "num_polynomial_cutoff": 5,
    "max_ell": 2,
    "interaction_cls": _RESIDUAL,
    "interaction_cls_first": _RESIDUAL,
    "num_interactions": 2,
    "num_elements": len(SPECIES),
    "hidden_irreps": "4x0e+4x1o",
    "MLP_irreps": "6x0e",
    "edge_irreps": None,
    "correlation": 2,
    "gate": "silu",
    "radial_MLP": [7, 9],
    "avg_num_neighbors": NUM_NEIGHBORS,
    "atomic_numbers": [1, 6, 8, 12],
    "use_reduced_cg": False,
    "readout_cls": "NonLinearReadoutBlock",
}
KINDS: dict[str, dict[str, Any]] = {
    "scalars": {"hidden_irreps": "4x0e", "interaction_cls_first": "RealAgnosticInteractionBlock"},
    "three orders": {"hidden_irreps": "4x0e+4x1o+4x2e", "max_ell": 3, "correlation": 3},
    "density": {
        "interaction_cls": _DENSITY_RESIDUAL,
        "interaction_cls_first": _DENSITY,
        "heads": ["a", "Default"],
        "distance_transform": "Agnesi",
        "pair_repulsion": True,
    },
    "nonlinear": {
        "interaction_cls": _NONLINEAR,
        "interaction_cls_first": _NONLINEAR,
        "readout_cls": "NonLinearBiasReadoutBlock",
        "use_agnostic_product": True,
        "apply_cutoff": False,
        "edge_irreps": "3x0e+2x1o",
        "use_edge_irreps_first": True,
    },
    "one layer": {
        "model": "MACE",
        "num_interactions": 1,
        "distance_transform": "Soft",
        "radial_type": "gaussian",
    },
    "three layers": {"num_interactions": 3, "max_ell": 1, "correlation": 4},
    "last readout": {"correlation": [2, 1], "use_last_readout_only": True, "keep_last_layer_irreps": True},
    "reduced": {"use_reduced_cg": True, "correlation": 3},
}


@pytest.fixture(autouse=True)
def _torch_restored() -> Iterator[None]:
    """Upstream's calculator changes torch's default dtype."""
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


# Refusals of the whole model


def test_only_mace_models(small_model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match="only models of the MACE family .* not 'nequip'"):
        export_model(small_model, tmp_path / "x.model")
    assert not list(tmp_path.iterdir())


def test_energy_scale_per_species_is_refused(tmp_path: Path) -> None:
    model = native_model(native_spec())
    model.energy_scale[1] = 0.8
    with pytest.raises(UnsupportedFeatureError, match=r"energy scale differs between species \(0.7 to 0.8\)"):
        export_model(model, tmp_path / "x.model")
    assert not list(tmp_path.iterdir())


def test_missing_mace_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mace", "mace.modules"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnsupportedFeatureError, match=r"pip install 'compactmlip\[mace\]'"):
        export_model(native_model(native_spec()), tmp_path / "x.model")
    assert not list(tmp_path.iterdir())


def test_process_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SAFE_LOADING, raising=False)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with pytest.raises(KeyError), mace_upstream.upstream_state(torch.float64):
        assert torch.get_default_dtype() == torch.float64
        os.environ[SAFE_LOADING] = "1"
        torch.rand(100)
        raise KeyError
    assert torch.get_default_dtype() == torch.float32
    assert SAFE_LOADING not in os.environ
    assert torch.equal(torch.rand(3), expected)


def test_command_does_not_overwrite_its_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.model").write_bytes(b"kept")
    with pytest.raises(InputError, match="written over itself"):
        export_command("a.model")
    with pytest.raises(InputError, match="unknown dtype 'half'"):
        export_command("a.model", dtype="half")
    assert Path("a.model").read_bytes() == b"kept"


@pytest.mark.parametrize(("factor", "accepted"), [(1 + 3e-9, False), (1 + 3e-10, True)])
def test_self_check(factor: float, accepted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the native model with energies that are slightly off."""
    native = native_model(native_spec())

    def upstream(
        model: nn.Module, species: Tensor, centers: Tensor, neighbors: Tensor, positions: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        moving = positions.clone().requires_grad_(True)
        energies = native(species, centers, neighbors, moving[neighbors] - moving[centers])
        shift = native.energy_shift[species]
        forces = -torch.autograd.grad(energies.sum(), moving)[0]
        return shift + factor * (energies.detach() - shift), forces

    monkeypatch.setattr(mace_upstream, "evaluate", upstream)
    with contextlib.nullcontext() if accepted else pytest.raises(SelfCheckError, match="energies differ"):
        mace_export._self_check(native, nn.Identity())


# Numbers without mace-torch


def test_writing_inverts_reading() -> None:
    """A file of mace-torch, read and written: the same constructor arguments and tensors."""
    root = inert.load_inert(FOLDER / "e3nn.model")
    config, state = from_model(root, "e3nn.model"), inert.state_dict(root)
    native = import_model(config, state, Provenance())
    arguments = constructor_arguments(native.spec, 3.5)
    assert from_arguments(arguments, "arguments") == replace(
        config, layers=tuple(replace(layer, correlation=2) for layer in config.layers)
    )
    written = mace_export._Writer(native, state, 3.5).upstream_state()
    numbers = {name for name in state if name.endswith((".weight", ".weights_max", ".weights.0"))}
    assert {name for name in numbers if state[name].numel()} <= written.keys()
    for name, value in written.items():
        torch.testing.assert_close(value, state[name], rtol=1e-14, atol=0, check_dtype=False)


def couplings(
    orders: tuple[int, ...], outputs: tuple[int, ...], degree: int, t: int = 0
) -> dict[str, Tensor]:
    """Dense coupling tensors as upstream's modules hold them."""
    starts = {l: sum(2 * k + 1 for k in orders if k < l) for l in orders}
    dimension = sum(2 * l + 1 for l in orders)
    state = {}
    for k, L in enumerate(outputs):
        for nu in range(1, degree + 1):
            paths = coupling_paths(orders, L, nu)
            dense = np.zeros((2 * L + 1, *[dimension] * nu, len(paths)))
            for p, path in enumerate(paths):
                block = tuple(slice(starts[l], starts[l] + 2 * l + 1) for l in path.orders)
                dense[(slice(None), *block, p)] = path.tensor
            tensor = torch.tensor(dense)
            state[f"products.{t}.symmetric_contractions.contractions.{k}.U_matrix_{nu}"] = (
                tensor if L else tensor[0]
            )
    return state


@pytest.mark.parametrize("own", [{}, {"contraction": "independent"}, {"contraction_per_species": False}])
def test_reading_inverts_writing_after_a_cut(own: dict[str, Any]) -> None:
    """Factors of the uncut model, which upstream computes from its own sizes, end in the weights."""

    class Writer(mace_export._Writer):
        def _put(self, name: str, value: Tensor) -> None:
            self.state[name] = value.detach()

    model = keep_species(native_model(native_spec((8, 8), **own)), ["H", "C", "O"])
    cut = cut_to(model, "5x0+5x1", radial_hidden=6, readout_hidden=4)
    assert float(cut.get_buffer("layers.1.interaction.up.orders.1.scale")) == pytest.approx(8**-0.5)
    template = couplings((0, 1, 2), (0, 1), 2) | couplings((0, 1, 2), (0,), 2, t=1)
    others = {
        "atomic_numbers": torch.tensor([1, 6, 8]),
        "r_max": torch.tensor(4.0),
        "radial_embedding.cutoff_fn.p": torch.tensor(5),
        "atomic_energies_fn.atomic_energies": cut.energy_shift.unsqueeze(0),
        "scale_shift.scale": cut.energy_scale[:1],
        "scale_shift.shift": torch.zeros(1),
    }
    state = template | others | Writer(cut, template, NUM_NEIGHBORS).upstream_state()
    config = from_arguments(constructor_arguments(cut.spec, NUM_NEIGHBORS), "arguments")
    again = import_model(config, state, Provenance())
    assert float(again.get_buffer("layers.1.interaction.up.orders.1.scale")) == pytest.approx(5**-0.5)
    assert_close(native_results(again, ethanol()), native_results(cut, ethanol()), 1e-12)


def test_smallest_weights_give_the_same_products() -> None:
    layer = upstream_layer((3,), width=3, out=(3, 3), lmax_edge=2, correlation=3)
    state = couplings((0, 1, 2), (0, 1), 3)
    torch.manual_seed(0)
    everything = dict.fromkeys((0, 1, 2))
    contraction = SymmetricContraction(3, everything, dict.fromkeys((0, 1)), 3, 2, "independent")
    weights = upstream_weights(state, 0, layer, contraction, "test")
    kind, [found] = read(state | weights, [layer], "test")
    assert kind == "paths"
    other = SymmetricContraction(3, everything, dict.fromkeys((0, 1)), 3, 2)
    redundant = 0
    for key, weight in found.items():
        L, nu = map(int, key.split("_"))
        other.weights[key].data.copy_(weight)
        torch.testing.assert_close(
            other.combined_weights(L, nu), contraction.weights[key], rtol=0, atol=1e-12
        )
        mixing = getattr(other, f"mixing_{key}")
        # Smallest: no part of the weights is without effect.
        silent = torch.eye(mixing.shape[1], dtype=torch.float64) - torch.linalg.pinv(mixing) @ mixing
        assert float((silent @ weight).abs().max()) < 1e-12
        redundant += mixing.shape[1] - mixing.shape[0]
    assert redundant > 0


# With mace-torch


@pytest.fixture
def calculator() -> Iterator[Callable[..., Any]]:
    """``calculator(path_or_model, **options)``: upstream's, in float64."""
    with mace_upstream.upstream_state(torch.float64):
        calculators = pytest.importorskip("mace.calculators")

        def make(model: Path | nn.Module, **options: Any) -> Any:
            source = {"model_paths": str(model)} if isinstance(model, Path) else {"models": [model]}
            return calculators.MACECalculator(
                **source, device="cpu", **{"default_dtype": "float64", **options}
            )

        yield make


def upstream_model(kind: str) -> tuple[dict[str, Any], nn.Module]:
    """Constructor arguments, and upstream's model with random weights."""
    arguments = {**BASE, **KINDS[kind]}
    generator = np.random.default_rng(7)
    heads = len(arguments.get("heads", ["Default"]))
    energies = generator.normal(size=(heads, len(SPECIES))) * 3
    scaled = {"atomic_inter_scale": [0.8, 0.9][:heads], "atomic_inter_shift": [0.1, 0.2][:heads]}
    made = {
        **arguments,
        "atomic_energies": energies,
        **(scaled if arguments["model"] == "ScaleShiftMACE" else {}),
    }
    with mace_upstream.upstream_state(torch.float64):
        model = mace_upstream.build(made)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = torch.tensor(generator.normal(size=tuple(parameter.shape)))
            if name.endswith((".alpha", ".beta")):
                value = (12.0 if name.endswith("alpha") else 0.4) + 0.05 * value
            elif "contractions" in name:
                value = value / parameter.shape[1]
            parameter.copy_(value)
    return arguments, model


def crystal() -> Atoms:
    atoms = bulk("MgO", "rocksalt", a=4.0, cubic=True)
    atoms.rattle(0.1, seed=1)
    return atoms


def ethanol() -> Atoms:
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=4)
    return atoms


def results(calculator: Any, atoms: Atoms) -> dict[str, np.ndarray]:
    calculator.calculate(atoms)
    names = ("energies", "forces", "stress") if atoms.pbc.all() else ("energies", "forces")
    return {name: np.array(calculator.results[name]) for name in names}


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    for name, value in expected.items():
        scale = max(1e-6, float(np.abs(value).max()))
        assert float(np.abs(found[name] - value).max()) < tolerance * scale, name


def native_results(model: nn.Module, atoms: Atoms) -> dict[str, np.ndarray]:
    made = evaluate(model, atoms)
    found = {"energies": made.node_energies.numpy(), "forces": made.forces.numpy()}
    if atoms.pbc.all():
        found["stress"] = made.stresses[0].numpy()[(0, 1, 2, 1, 0, 0), (0, 1, 2, 2, 2, 1)]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind: str, calculator: Callable[..., Any], tmp_path: Path) -> None:
    """Upstream's model, imported, exported and loaded again, gives upstream's first numbers."""
    arguments, upstream = upstream_model(kind)
    native = import_model(from_arguments(arguments, kind), upstream.state_dict(), Provenance())
    export_model(native, tmp_path / "x.model")
    first, second = calculator(upstream), calculator(tmp_path / "x.model")
    assert second.models[0].heads == ["Default"]
    for atoms in (crystal(), ethanol()):
        expected = results(first, atoms)
        assert float(np.abs(expected["forces"]).max()) > 1e-3
        assert_close(results(second, atoms), expected, 1e-10)
    if kind == "three orders":  # not only the same energy, but the same weights
        again = second.models[0].state_dict()
        for name, parameter in upstream.named_parameters():
            torch.testing.assert_close(again[name], parameter.detach(), rtol=1e-13, atol=0)


def test_pruned_model(calculator: Callable[..., Any], tmp_path: Path) -> None:
    model = keep_species(native_model(native_spec((8, 8), contraction="independent")), ["H", "C", "O"])
    cut = cut_to(model, "5x0+5x1", radial_hidden=6, readout_hidden=4)
    export_model(cut, tmp_path / "x.model")
    expected = native_results(cut, ethanol())
    assert_close(results(calculator(tmp_path / "x.model"), ethanol()), expected, 1e-10)
    again = load_checkpoint(tmp_path / "x.model", Provenance())
    assert_close(native_results(again, ethanol()), expected, 1e-10)


def test_float32(calculator: Callable[..., Any], tmp_path: Path) -> None:
    model = native_model(native_spec())
    model.energy_shift.copy_(torch.tensor([-1.5, 2.25, -3.0, 4.0]))  # no digits are lost
    export_model(model, tmp_path / "a.model", dtype=torch.float32)
    single = cast(native_model(native_spec()), torch.float32)
    single.energy_shift.copy_(model.energy_shift)
    export_model(single, tmp_path / "b.model")
    export_model(single, tmp_path / "c.model", dtype=torch.float64)
    made = {name: calculator(tmp_path / f"{name}.model", default_dtype="") for name in "abc"}
    dtypes = [next(c.models[0].parameters()).dtype for c in made.values()]
    assert dtypes == [torch.float32, torch.float32, torch.float64]
    expected = native_results(model, crystal())
    for found in made.values():
        assert_close(results(found, crystal()), expected, 1e-4)
    # The native float32 model keeps weights in float32, so its float64 file has their rounding only.
    assert_close(results(made["c"], crystal()), expected, 2e-6)
    assert next(single.parameters()).dtype == torch.float32


def test_wrong_export_is_not_written(
    calculator: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mace_export, "upstream_columns", lambda weight, layer: weight)
    before = torch.get_default_dtype()
    with pytest.raises(SelfCheckError, match="nothing was written"):
        export_model(native_model(native_spec()), tmp_path / "x.model")
    assert not list(tmp_path.iterdir()) and torch.get_default_dtype() == before


def test_command_in_a_fresh_process(tmp_path: Path) -> None:
    """Nothing of upstream's warnings is printed, and torch still loads safely after mace was imported."""
    if importlib.util.find_spec("mace") is None:
        pytest.skip("needs mace-torch")
    checkpoint.save(native_model(native_spec()), tmp_path / "small.safetensors")
    script = (
        "import os; from compactmlip.cli import export; export('small.safetensors', dtype='float32');"
        f"import sys; assert 'mace' in sys.modules and '{SAFE_LOADING}' not in os.environ"
    )
    environment = {key: value for key, value in os.environ.items() if key != SAFE_LOADING}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "wrote small.model\n", "")
    assert load_checkpoint(tmp_path / "small.model", Provenance()).spec.species == SPECIES
