"""Lowered models: the same function as the native model, up to the error of the tables."""

from __future__ import annotations

from typing import Any

import contract
import mace_models
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from torch import nn

from compactmlip.compress.apply import prune
from compactmlip.data.graph import build_graph, energy_and_derivatives
from compactmlip.deploy.archive import inspect
from compactmlip.deploy.ase import CompactMLIPCalculator
from compactmlip.deploy.compile import compile_model
from compactmlip.deploy.lower.convolution import MAX_TABLE_BYTES, padded, padded_rows
from compactmlip.deploy.lower.lower import ENERGY_BOUND, FORCE_BOUND, MEANINGLESS, lower, lower_on_grid
from compactmlip.deploy.lower.splines import Grid, SmoothLayerNorm, tabulate
from compactmlip.deploy.selfcheck import random_structures
from compactmlip.errors import LoweringError
from compactmlip.models import cast, exact_copy
from compactmlip.models.convolution import message_rows

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.fixture(params=["nequip", "mace"])
def model(request: pytest.FixtureRequest, make_model: Any, make_spec: Any) -> nn.Module:
    made: nn.Module
    made = (
        mace_models.make_model(mace_models.make_spec())
        if request.param == "mace"
        else make_model(make_spec())
    )
    return made


FINE = 1280
"""Intervals whose error is rounding, for the toy models' smooth networks."""


def graphs(model: Any) -> list[Any]:
    return [build_graph(atoms, model.spec) for atoms in random_structures(model.spec)]


def assert_same(model: nn.Module, tolerance: float = 1e-9) -> None:
    lowered = lower_on_grid(model, FINE)
    largest = 0.0
    for graph in graphs(model):
        found, expected = energy_and_derivatives(lowered, graph), energy_and_derivatives(model, graph)
        for name in ("node_energies", "forces"):
            a, b = getattr(found, name), getattr(expected, name)
            assert float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max())), name
        largest = max(largest, float(expected.forces.abs().max()))
    assert largest > 1e-2


@pytest.mark.parametrize("variant", mace_models.VARIANTS)
def test_mace(variant: str) -> None:
    model = mace_models.make_model(mace_models.make_spec(**mace_models.VARIANTS[variant]), seed=1)
    assert_same(model)


@pytest.mark.parametrize("seed", [0, 1])
def test_heterogeneous_channels(seed: int) -> None:
    """Orders and layers with channels of their own, as pruning leaves them."""
    model = mace_models.make_model(mace_models.make_spec(), seed=seed)
    assert_same(prune(model, contract.random_masks(model, np.random.default_rng(seed))))


def test_nequip(model_variant: nn.Module) -> None:
    assert_same(model_variant)


def test_a_kink_costs_few_knots(make_model: Any, make_spec: Any) -> None:
    """Two second derivatives at the onset of XPLOR smoothing: about as many knots as without smoothing."""
    knots = []
    for envelope in ({"kind": "polynomial", "p": 6}, {"kind": "xplor", "onset": 3.1}):
        spec = make_spec()
        spec = spec.model_copy(update={"architecture": {**spec.architecture, "envelope": envelope}})
        model = make_model(spec)
        lowered = lower(model, graphs(model))
        knots.append(lowered.tables.knots)
        assert lowered.tables.force_error * 2 < FORCE_BOUND
    assert knots[1] < 2 * knots[0]


def test_bounds_are_kept_and_recorded(model: Any) -> None:
    structures = graphs(model)
    lowered = lower(model, structures)
    tables = lowered.tables
    assert tables.energy_error <= tables.energy_bound == ENERGY_BOUND
    assert 0 < tables.force_error <= tables.force_bound == FORCE_BOUND
    finer = lower(model, structures, energy_bound=1e-9, force_bound=1e-8)
    assert finer.tables.knots > tables.knots


def test_impossible_bounds_are_refused(model: Any) -> None:
    with pytest.raises(LoweringError, match="still cause errors"):
        lower(model, graphs(model)[:2], energy_bound=0.0, force_bound=0.0)


def test_dimer_over_the_whole_range(model: Any) -> None:
    """Energy and force of every pair within the bounds at every distance, the last 0.1 Angstrom included."""
    lowered = lower(model, graphs(model)).module
    cutoff = model.spec.cutoff
    distances = np.concatenate(
        [np.linspace(0.5, cutoff - 0.1, 60), np.linspace(cutoff - 0.1, cutoff + 0.02, 60)]
    )
    counted = 0
    for r in distances:
        graph = build_graph(Atoms(model.spec.species[:2], [[0, 0, 0], [0.6 * r, 0, 0.8 * r]]), model.spec)
        found, expected = energy_and_derivatives(lowered, graph), energy_and_derivatives(model, graph)
        if float(expected.forces.abs().max()) > MEANINGLESS:
            continue
        counted += 1
        largest = max(1.0, float(expected.node_energies.abs().max()) / 10)
        assert float((found.node_energies - expected.node_energies).abs().max()) <= ENERGY_BOUND * largest
        largest = max(1.0, float(expected.forces.abs().max()) / 10)
        assert float((found.forces - expected.forces).abs().max()) <= FORCE_BOUND * largest
    assert counted > 100


def test_structures_without_meaning_do_not_count(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the limit below every force of the structures, only pairs at a distance are left."""
    structures = graphs(model)
    usual = lower(model, structures).tables
    monkeypatch.setattr("compactmlip.deploy.lower.lower.MEANINGLESS", 1e-3)
    assert lower(model, structures).tables.force_error < usual.force_error


def test_second_derivatives(model: Any) -> None:
    """Force constants by finite differences, which a coarse table would bend, agree to 1e-3 eV/Angstrom^2."""
    lowered = lower(model, graphs(model)).module
    atoms = random_structures(model.spec)[2]
    h, constants = 1e-3, []
    for evaluate in (lowered, model):
        forces = []
        for step in (h, -h):
            moved = atoms.copy()
            moved.positions[0, 1] += step
            forces.append(energy_and_derivatives(evaluate, build_graph(moved, model.spec)).forces)
        constants.append((forces[0] - forces[1]) / (2 * h))
    assert float(constants[1].abs().max()) > 1e-2
    assert float((constants[0] - constants[1]).abs().max()) < 1e-3 * max(1.0, float(constants[1].abs().max()))


@pytest.mark.parametrize("dtype", ["float32", "float64", "mixed", "bf16"])
def test_deployed_file(model: Any, dtype: Any, tmp_path: Any) -> None:
    path = tmp_path / "model.pt"
    report = compile_model(model, path, dtype=dtype, backend="kernels")
    assert report.tables is not None and report.note == ""
    assert inspect(path)[1].tables == report.tables
    atoms = random_structures(model.spec)[2]
    atoms.calc = CompactMLIPCalculator(path)
    expected = energy_and_derivatives(exact_copy(model), build_graph(atoms, model.spec))
    tolerance = {"float64": 2e-5, "float32": 1e-4, "mixed": 1e-4, "bf16": 0.1}[dtype]
    scale = max(1.0, float(expected.forces.abs().max()))
    assert np.abs(atoms.get_forces() - expected.forces.numpy()).max() <= tolerance * scale


def test_too_many_pairs_fall_back_to_networks(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compactmlip.deploy.lower.convolution.MAX_TABLE_BYTES", 1000)
    model = mace_models.make_model(mace_models.make_spec())
    with pytest.raises(LoweringError, match="--species"):
        lower_on_grid(model, 60)
    report = compile_model(model, tmp_path / "model.pt", backend="kernels")
    assert report.tables is None and report.note.startswith("not lowered: tables of")
    assert MAX_TABLE_BYTES > 1000


def test_unknown_family_is_refused(model: Any) -> None:
    other = exact_copy(model)
    other.spec = model.spec.model_copy(update={"family": "other"})
    with pytest.raises(LoweringError, match="'other'"):
        lower_on_grid(other, 60)


def test_the_model_is_not_changed(model: Any) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    lower_on_grid(model, 60)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_exact_copy_does_not_inherit_rounded_constants(model: Any) -> None:
    """Couplings of a float32 model are rounded; those of its exact copy are not."""
    single = cast(exact_copy(model), torch.float32)
    copied = exact_copy(single)
    harmonics = dict(copied.named_buffers())
    exact = dict(exact_copy(model).named_buffers())
    steps = [k for k in harmonics if "step_" in k or "coupling_" in k]
    assert steps and all(torch.equal(harmonics[k], exact[k]) for k in steps)


@pytest.mark.parametrize("values", [2, 3])
def test_table_converges(values: int) -> None:
    """The error of a Hermite table falls as the fourth or sixth power of the spacing."""
    from compactmlip.kernels.spline_convolution import interpolate

    def function(r: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.sin(3 * r) / r, torch.exp(-r)], dim=-1)

    r = torch.linspace(0.3, 3.9, 501, dtype=torch.float64)
    errors = []
    for knots in (21, 41):
        table = tabulate(function, (0.0, 4.0), knots, values)[None]
        found = interpolate(table, torch.zeros(501, dtype=torch.long), r, 4.0)
        errors.append(float((found - function(r)).abs().max()))
    order = np.log2(errors[0] / errors[1])
    assert abs(order - 2 * values) < 0.5


def test_second_derivative_of_layer_norm() -> None:
    """Against finite differences of the first; torch's own normalisation would be wrong."""
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm(6).double()
    inputs = torch.nn.Linear(1, 6).double()

    def function(r: torch.Tensor) -> torch.Tensor:
        return SmoothLayerNorm(norm)(inputs(r[:, None]) ** 2)

    r = torch.linspace(0.1, 4, 11, dtype=torch.float64)
    torch.testing.assert_close(function(r), norm(inputs(r[:, None]) ** 2))
    spacing, h = 0.4, 1e-5
    slopes = [tabulate(lambda r, s=s: function(r + s), (0.0, 4.0), 11, 2)[1:, 1] for s in (h, -h)]
    found = tabulate(function, (0.0, 4.0), 11, 3)[1:, 2]
    assert float(found.abs().max()) > 0.1
    assert float((found - (slopes[0] - slopes[1]) / (2 * h) * spacing).abs().max()) < 1e-6


def test_table_reaches_zero_distance() -> None:
    """sin(kr)/r cannot be evaluated at zero, where its limit is k."""
    table = tabulate(lambda r: (torch.sin(2 * r) / r)[:, None], (0.0, 4.0), 41, 3)
    assert torch.isfinite(table).all()
    assert abs(float(table[0, 0, 0]) - 2) < 1e-6


def test_tables_on_both_sides_of_a_kink() -> None:
    """Each side has its own second derivative where they meet, and its own limit at the cutoff."""
    grid = Grid.with_intervals(4.0, 20, 3, kink=3.0)
    assert (grid.knots, grid.knots_before_kink) == (15 + 1 + 10 + 1, 16)

    def function(r: torch.Tensor) -> torch.Tensor:
        bent = torch.where(r < 3, torch.zeros_like(r), (r - 3) ** 2)
        return torch.where(r < 4, bent, torch.full_like(r, 7.0))[:, None]

    table = grid.tabulate(function)
    assert torch.allclose(table[:16], torch.zeros(16, 3, 1, dtype=torch.float64), atol=1e-12)
    spacing = 1.0 / 10
    assert torch.allclose(table[16:, 2], torch.full((11, 1), 2 * spacing**2, dtype=torch.float64), atol=1e-12)
    assert abs(float(table[-1, 0, 0]) - 1) < 1e-12


def test_padding() -> None:
    assert [padded(n) for n in (0, 1, 8, 9, 128)] == [0, 8, 8, 16, 128]
    paths, channels = [(0, 1, 1), (1, 0, 1)], (3, 10)
    weight = torch.arange(13.0)[:, None]
    rows = message_rows(paths, channels)
    wide = padded_rows(weight, 1, paths, channels)
    assert wide.shape == (24, 1)
    assert torch.equal(wide[:3], weight[rows[0, 1, 1]]) and float(wide[3:8].abs().max()) == 0
    assert torch.equal(wide[8:18], weight[rows[1, 0, 1]]) and float(wide[18:].abs().max()) == 0


def test_lone_atom_and_no_neighbours(model: Any) -> None:
    lowered = lower_on_grid(model, 120)
    for atoms in (Atoms(model.spec.species[0]), bulk(model.spec.species[0], "sc", a=40.0)):
        graph = build_graph(atoms, model.spec)
        found, expected = energy_and_derivatives(lowered, graph), energy_and_derivatives(model, graph)
        assert float((found.node_energies - expected.node_energies).abs().max()) < 1e-10
