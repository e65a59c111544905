"""The ASE calculator: numbers against finite differences, ASE's protocol, refusals, copies and pickles."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from torch import nn

import compactmlip
from compactmlip import checkpoint
from compactmlip.data.graph import build_graph, energy_and_derivatives
from compactmlip.deploy.ase import CompactMLIPCalculator
from compactmlip.deploy.compile import compile_model
from compactmlip.errors import CheckpointError, CompactMLIPError, InputError, SpeciesError
from compactmlip.spec import ModelSpec

PROPERTIES = ("energy", "free_energy", "energies", "forces", "stress")


@pytest.fixture
def calc(deployed: Path) -> CompactMLIPCalculator:
    return CompactMLIPCalculator(deployed)


@pytest.fixture
def crystal(structures: dict[str, Atoms]) -> Atoms:
    return structures["crystal"]


def values(calc: CompactMLIPCalculator, atoms: Atoms) -> dict[str, np.ndarray]:
    """All results for a structure, which is not changed."""
    atoms = atoms.copy()
    atoms.calc = calc
    atoms.get_potential_energy()
    return {name: np.array(value) for name, value in calc.results.items()}


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray], tolerance: float = 1e-12) -> None:
    assert a.keys() == b.keys()
    for name in a:
        scale = max(1.0, float(np.abs(a[name]).max()))
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=tolerance * scale, err_msg=name)


# Numbers


def test_results_are_those_of_the_model(
    calc: CompactMLIPCalculator, small_model: nn.Module, small_spec: ModelSpec, structure: Atoms
) -> None:
    expected = energy_and_derivatives(small_model, build_graph(structure, small_spec))
    found = values(calc, structure)
    periodic = structure.pbc.any()
    assert found.keys() == set(PROPERTIES) - (set() if periodic else {"stress"})
    assert found["energy"] == found["free_energy"] == pytest.approx(float(expected.energies), abs=1e-10)
    assert found["energies"].sum() == pytest.approx(found["energy"], abs=1e-10)
    np.testing.assert_allclose(found["forces"], expected.forces.numpy(), atol=1e-10)
    if periodic:
        tensor = expected.stresses[0].numpy()
        voigt = [tensor[0, 0], tensor[1, 1], tensor[2, 2], tensor[1, 2], tensor[0, 2], tensor[0, 1]]
        np.testing.assert_allclose(found["stress"], voigt, atol=1e-12)
    assert all(np.asarray(v).dtype == np.float64 for v in calc.results.values())
    assert isinstance(calc.results["energy"], float)


def test_forces_are_minus_the_gradient(calc: CompactMLIPCalculator, structure: Atoms) -> None:
    structure.calc = calc
    forces, step = structure.get_forces(), 1e-4
    if len(structure) > 1:
        assert 0.05 < np.abs(forces).max() < 100  # neither zero nor beyond the reach of the step
    for atom in range(len(structure))[:3]:
        for axis in range(3):
            energies = []
            for sign in (1, -1):
                moved = structure.copy()
                moved.positions[atom, axis] += sign * step
                energies.append(values(calc, moved)["energy"])
            slope = (energies[0] - energies[1]) / (2 * step)
            assert forces[atom, axis] == pytest.approx(-slope, abs=2e-6)


@pytest.mark.parametrize("name", ["crystal", "smaller than the cutoff", "slab"])
def test_stress_is_the_strain_derivative(
    calc: CompactMLIPCalculator, structures: dict[str, Atoms], name: str
) -> None:
    atoms = structures[name]
    atoms.calc = calc
    stress, step, volume = atoms.get_stress(voigt=False), 1e-5, atoms.get_volume()
    assert np.abs(stress).max() > 1e-3
    for a in range(3):
        for b in range(3):
            energies = []
            for sign in (1, -1):
                strain = np.eye(3)
                strain[a, b] += sign * step / 2
                strain[b, a] += sign * step / 2
                strained = atoms.copy()
                strained.set_cell(atoms.cell.array @ strain, scale_atoms=True)
                if not atoms.pbc.all():
                    strained.positions = atoms.positions @ strain
                energies.append(values(calc, strained)["energy"])
            slope = (energies[0] - energies[1]) / (2 * step * volume)
            assert stress[a, b] == pytest.approx(slope, abs=1e-7)


def test_float32_is_close(small_model: nn.Module, crystal: Atoms, tmp_path: Path) -> None:
    single = CompactMLIPCalculator(compile_model(small_model, tmp_path / "m.pt").path)
    double = CompactMLIPCalculator(small_model)
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    a, b = values(single, crystal), values(double, crystal)
    assert_same(a, b, 2e-5)
    assert np.abs(a["forces"] - b["forces"]).max() > 1e-9
    assert all(v.dtype == np.float64 for v in a.values())


def test_checkpoint_and_memory_equal_the_compiled_file(
    calc: CompactMLIPCalculator, small_model: nn.Module, crystal: Atoms, tmp_path: Path
) -> None:
    path = checkpoint.save(small_model, tmp_path / "m.safetensors")
    expected = values(calc, crystal)
    for other in (path, str(path), small_model):
        assert_same(values(CompactMLIPCalculator(other), crystal), expected, 1e-11)
    single = CompactMLIPCalculator(path, dtype="float32")
    assert single.dtype == torch.float32
    assert 1e-9 < np.abs(values(single, crystal)["forces"] - expected["forces"]).max() < 1e-3


def test_model_in_memory_is_copied(small_model: nn.Module, crystal: Atoms) -> None:
    small_model.train()
    calc = CompactMLIPCalculator(small_model)
    before = values(calc, crystal)
    with torch.no_grad():
        for parameter in small_model.parameters():
            parameter.zero_()
    calc.reset()
    for same in (calc, pickle.loads(pickle.dumps(calc))):
        assert_same(values(same, crystal), before)
    assert small_model.training
    assert all(p.requires_grad for p in small_model.parameters())


# The neighbour list


@pytest.mark.parametrize("skin", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("pbc", [True, (True, False, True), False])
def test_results_do_not_depend_on_the_skin(
    deployed: Path, rng: np.random.Generator, skin: float, pbc: bool | tuple[bool, ...]
) -> None:
    """A trajectory with a breathing cell, wrapping, and atoms that come and go."""
    atoms = bulk("MgO", "rocksalt", a=4.21, cubic=True)
    atoms.pbc = pbc
    kept, fresh = CompactMLIPCalculator(deployed, skin=skin), CompactMLIPCalculator(deployed, skin=0.0)
    for step in range(25):
        atoms.positions += rng.normal(scale=0.03, size=atoms.positions.shape)
        atoms.set_cell(
            atoms.cell.array @ (np.eye(3) + rng.normal(scale=0.004, size=(3, 3))), scale_atoms=True
        )
        if step == 8:
            atoms.wrap(pbc=True)
        if step == 12:
            atoms.positions[0] += atoms.cell.array[0] * 3 if pbc else 0.0
        if step == 16:
            atoms.append("H")
            atoms.positions[-1] = atoms.positions[0] + [1.0, 0.2, 0.1]
        if step == 20:
            del atoms[2]
        assert_same(values(kept, atoms), values(fresh, atoms))
    assert fresh._neighbors.num_searches == 25
    assert kept._neighbors.num_searches == 25 if skin == 0 else kept._neighbors.num_searches < 25


def test_wrapping_changes_nothing(calc: CompactMLIPCalculator, crystal: Atoms) -> None:
    crystal.positions += 0.3
    expected = values(calc, crystal)
    shifted = crystal.copy()
    shifted.positions += np.arange(-4, 4)[:, None] * np.array([1, -1, 2]) @ crystal.cell.array
    assert_same(values(calc, shifted), expected, 1e-10)
    shifted.wrap()
    assert_same(values(calc, shifted), expected, 1e-10)


def test_alternating_structures(
    calc: CompactMLIPCalculator, structures: dict[str, Atoms], deployed: Path
) -> None:
    expected = {n: values(CompactMLIPCalculator(deployed), a) for n, a in structures.items()}
    for _ in range(2):
        for name, atoms in structures.items():
            assert_same(values(calc, atoms), expected[name])


# ASE's protocol


def test_calculates_once_per_structure(
    calc: CompactMLIPCalculator, crystal: Atoms, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = calc.calculate
    monkeypatch.setattr(calc, "calculate", lambda *a, **k: (calls.append(1), real(*a, **k)))
    crystal.calc = calc
    for _ in range(2):
        crystal.get_potential_energy()
        crystal.get_potential_energy(force_consistent=True)
        crystal.get_potential_energies()
        crystal.get_forces()
        crystal.get_stress()
    assert len(calls) == 1
    assert not calc.calculation_required(crystal, list(PROPERTIES))
    crystal.set_initial_charges(np.ones(len(crystal)))
    crystal.set_initial_magnetic_moments(np.ones(len(crystal)))
    assert not calc.calculation_required(crystal, list(PROPERTIES))
    crystal.positions[0, 0] += 1e-6
    assert calc.calculation_required(crystal, ["energy"])
    for change in (
        lambda: crystal.positions.__setitem__((0, 0), 0.2),
        lambda: crystal.set_cell(crystal.cell.array * 1.01),
        lambda: crystal.set_pbc((True, True, False)),
        lambda: crystal.numbers.__setitem__(0, 8),
    ):
        count = len(calls)
        change()
        crystal.get_forces()
        assert len(calls) == count + 1


def test_results_cannot_be_changed_from_outside(calc: CompactMLIPCalculator, crystal: Atoms) -> None:
    crystal.calc = calc
    crystal.get_forces()[:] = 0.0
    assert np.abs(crystal.get_forces()).max() > 0.05


def test_no_stress_without_periodicity(calc: CompactMLIPCalculator) -> None:
    atoms = molecule("H2O")
    atoms.calc = calc
    atoms.get_potential_energy()
    with pytest.raises(PropertyNotImplementedError, match="stress"):
        atoms.get_stress()
    atoms.set_cell([8.0, 8.0, 0.0])
    atoms.pbc = (True, True, False)
    with pytest.raises(PropertyNotImplementedError, match="stress"):
        atoms.get_stress()  # no volume to divide by
    atoms.set_cell([8.0, 8.0, 8.0])
    assert atoms.get_stress().shape == (6,)


def test_properties_that_a_potential_has_not(calc: CompactMLIPCalculator, crystal: Atoms) -> None:
    crystal.calc = calc
    for get in (crystal.get_dipole_moment, crystal.get_charges, crystal.get_magnetic_moments):
        with pytest.raises(PropertyNotImplementedError):
            get()


def test_names_for_databases(calc: CompactMLIPCalculator, deployed: Path) -> None:
    assert calc.name == "compactmlip"
    where = {"model": str(deployed), "device": "cpu", "dtype": "float64"}
    assert calc.todict() == where | {"skin": 0.5, "cuda_graph": False, "check": 0, "stop_outside": False}
    assert calc.spec.species == ("H", "C", "O", "Mg", "Si")


def test_is_a_public_name() -> None:
    assert compactmlip.CompactMLIPCalculator is CompactMLIPCalculator
    assert set(compactmlip.__all__) <= set(dir(compactmlip))
    with pytest.raises(AttributeError, match="no attribute 'CompactMLIPCalculater'"):
        _ = compactmlip.CompactMLIPCalculater


# Refusals


def test_unknown_species(calc: CompactMLIPCalculator) -> None:
    atoms = bulk("NaCl", "rocksalt", a=5.6)
    atoms.calc = calc
    with pytest.raises(SpeciesError, match=r"Cl, Na.*covers H C O Mg Si"):
        atoms.get_potential_energy()


def broken_structures() -> dict[str, tuple[Atoms, str]]:
    crystal = bulk("MgO", "rocksalt", a=4.21, cubic=True)
    not_finite, flat, overlap, image, cell = (crystal.copy() for _ in range(5))
    not_finite.positions[3, 1] = np.nan
    flat.cell[2] = 0.0
    overlap.positions[5] = overlap.positions[2]
    image.positions[5] = image.positions[2] + image.cell.array.sum(axis=0)
    cell.cell[0, 0] = np.inf
    return {
        "position": (not_finite, "position of atom 3 is not finite"),
        "volume": (flat, "no volume"),
        "overlap": (overlap, "atoms 2 and 5 lie on top"),
        "image": (image, "atoms 2 and 5 lie on top"),
        "cell": (cell, "the cell has entries that are not finite"),
        "empty": (Atoms(), "no atoms"),
    }


@pytest.mark.parametrize("kind", list(broken_structures()))
def test_structures_without_meaning(calc: CompactMLIPCalculator, crystal: Atoms, kind: str) -> None:
    expected = values(calc, crystal)
    atoms, message = broken_structures()[kind]
    atoms.calc = calc
    for _ in range(2):  # the second time, too: nothing of the failure is kept
        with pytest.raises(InputError, match=message):
            atoms.get_potential_energy()
    assert calc.results == {}
    assert_same(values(calc, crystal), expected)


def test_failed_calculation_leaves_no_results(calc: CompactMLIPCalculator, crystal: Atoms) -> None:
    """Called directly, as some codes do: results of another structure must not pass for those of this one."""
    assert values(calc, crystal)
    broken = crystal.copy()
    broken.positions[0] = np.nan
    with pytest.raises(InputError, match="atom 0"):
        calc.calculate(broken)
    assert calc.results == {}


def test_broken_model(small_model: nn.Module, crystal: Atoms) -> None:
    small_model.get_buffer("energy_scale")[small_model.spec.species.index("O")] = torch.inf  # type: ignore[union-attr]
    crystal.calc = CompactMLIPCalculator(small_model)
    first = crystal.get_chemical_symbols().index("O")
    with pytest.raises(InputError, match="not finite, first at atom 0" if first == 0 else "not finite"):
        crystal.get_forces()
    assert "forces" not in crystal.calc.results


def test_unusable_options(deployed: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        CompactMLIPCalculator(tmp_path / "missing.pt")
    with pytest.raises(CheckpointError, match="no such file"):
        CompactMLIPCalculator(tmp_path / "missing.safetensors")
    with pytest.raises(InputError, match=r"compiled in float64.*--dtype float32"):
        CompactMLIPCalculator(deployed, dtype="float32")
    with pytest.raises(InputError, match="Did you mean 'float64'"):
        CompactMLIPCalculator(deployed, dtype="flaot64")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="device 'cuda:77' cannot be used"):
        CompactMLIPCalculator(deployed, device="cuda:77")
    with pytest.raises(InputError, match="skin"):
        CompactMLIPCalculator(deployed, skin=-1.0)
    with pytest.raises(InputError, match="Linear is not a compactmlip model"):
        CompactMLIPCalculator(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="cutof"):
        CompactMLIPCalculator(deployed, cutof=3.0)  # type: ignore[call-arg]
    with pytest.raises(InputError, match="make a new calculator"):
        CompactMLIPCalculator(deployed).set(skin=1.0)
    assert CompactMLIPCalculator(deployed, dtype="float64").dtype == torch.float64


def test_nothing_to_calculate(calc: CompactMLIPCalculator) -> None:
    with pytest.raises(InputError, match=r"atoms\.calc"):
        calc.calculate()


# Torch's state


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("kind", ["compiled", "checkpoint"])
def test_any_gradient_mode(
    deployed: Path, small_model: nn.Module, crystal: Atoms, mode: Callable[[], object], kind: str
) -> None:
    source = deployed if kind == "compiled" else small_model
    expected = values(CompactMLIPCalculator(source), crystal)
    with mode():  # type: ignore[attr-defined]
        assert_same(values(CompactMLIPCalculator(source), crystal), expected)


def test_torch_is_left_alone(deployed: Path, crystal: Atoms) -> None:
    def state() -> tuple[object, ...]:
        optimise = torch._C._get_graph_executor_optimize()  # type: ignore[attr-defined]
        return torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), optimise

    before = state()
    expected = values(CompactMLIPCalculator(deployed), crystal)
    assert state() == before
    torch.set_default_dtype(torch.float16)
    try:
        assert_same(values(CompactMLIPCalculator(deployed), crystal), expected)
        assert torch.get_default_dtype() == torch.float16
    finally:
        torch.set_default_dtype(torch.float32)


# Copies and pickles


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_copies_are_independent(
    calc: CompactMLIPCalculator, crystal: Atoms, duplicate: Callable[[object], CompactMLIPCalculator]
) -> None:
    expected = values(calc, crystal)
    other = duplicate(calc)
    assert other._engine is calc._engine  # no second copy of the weights
    assert_same({n: np.array(v) for n, v in other.results.items()}, expected)
    moved = crystal.copy()
    moved.rattle(0.1, seed=5)
    changed = values(other, moved)
    assert np.abs(changed["forces"] - expected["forces"]).max() > 0.05
    assert_same({n: np.array(v) for n, v in calc.results.items()}, expected)
    assert calc._neighbors is not other._neighbors
    assert_same(values(calc, crystal), expected)


def test_pickle_holds_the_path(
    calc: CompactMLIPCalculator,
    crystal: Atoms,
    deployed: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    expected = values(calc, crystal)
    content = pickle.dumps(calc)
    assert len(content) < 20_000 < deployed.stat().st_size
    monkeypatch.chdir(tmp_path)
    other = pickle.loads(content)
    assert other._engine is None
    assert_same({n: np.array(v) for n, v in other.results.items()}, expected)
    other.reset()
    assert_same(values(other, crystal), expected)
    assert_same(values(pickle.loads(pickle.dumps(other)), crystal), expected)


def test_pickle_from_a_relative_path(
    deployed: Path, crystal: Atoms, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(deployed.parent)
    calc = CompactMLIPCalculator(deployed.name)
    content = pickle.dumps(calc)
    monkeypatch.chdir(tmp_path)
    assert_same(values(pickle.loads(content), crystal), values(calc, crystal))


def test_pickle_of_a_changed_file_is_refused(
    small_model: nn.Module,
    make_model: Callable[..., nn.Module],
    small_spec: ModelSpec,
    crystal: Atoms,
    tmp_path: Path,
) -> None:
    path = checkpoint.save(small_model, tmp_path / "m.safetensors")
    content = pickle.dumps(CompactMLIPCalculator(path))
    assert values(pickle.loads(content), crystal)
    checkpoint.save(make_model(small_spec, seed=7), path)
    with pytest.raises(CheckpointError, match="has changed"):
        values(pickle.loads(content), crystal)
    path.unlink()
    with pytest.raises(CompactMLIPError, match="no such file"):
        values(pickle.loads(content), crystal)


def test_pickle_of_a_model_in_memory(small_model: nn.Module, crystal: Atoms) -> None:
    calc = CompactMLIPCalculator(small_model)
    expected = values(calc, crystal)
    other = pickle.loads(pickle.dumps(calc))
    other.reset()
    assert_same(values(other, crystal), expected)
