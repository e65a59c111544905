"""The loss against hand formulas and finite differences, data sets and their labels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ase import Atoms
from torch import nn

from compactmlip.data.graph import build_graph, energy_and_derivatives
from compactmlip.errors import InputError, SpeciesError
from compactmlip.spec import ModelSpec
from compactmlip.train.dataset import Dataset
from compactmlip.train.ema import WeightAverage
from compactmlip.train.loss import Residuals, loss_terms, residuals
from compactmlip.train.metrics import Error, evaluate
from compactmlip.train.options import TrainOptions


def huber(x: float) -> float:
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


def dataset(frames: list[Atoms], spec: ModelSpec) -> Dataset:
    return Dataset.from_frames(frames, spec, torch.float64)


def test_loss_is_the_weighted_huber_function_of_each_error() -> None:
    energies, forces, stresses = [0.004, -0.03], [[0.01, -0.3, 0.0]], [[0.0, 2e-4, -3e-3, 0.0, 1e-5, 0.0]]
    errors = Residuals(torch.tensor(energies).double(), torch.tensor(forces), torch.tensor(stresses))
    options = TrainOptions(
        energy_weight=2.0, forces_weight=0.5, stress_weight=3.0,
        energy_delta=0.01, forces_delta=0.1, stress_delta=1e-3,
    )  # fmt: skip
    terms = loss_terms(errors, options)
    assert float(terms.energy) == pytest.approx(2.0 * (huber(0.4) + huber(3.0)) / 2)
    assert float(terms.forces) == pytest.approx(0.5 * (huber(0.1) + huber(3.0)) / 3)
    assert float(terms.stress) == pytest.approx(3.0 * (huber(0.2) + huber(3.0) + huber(0.01)) / 6)
    assert float(terms.total) == pytest.approx(float(terms.energy + terms.forces + terms.stress))


def test_residuals_are_model_minus_label(student: nn.Module, frames: list[Atoms]) -> None:
    data = dataset(frames, student.spec)
    found = residuals(student, data.batch(range(6)))
    for k, atoms in enumerate(frames):
        alone = energy_and_derivatives(student, build_graph(atoms, student.spec))
        expected = (float(alone.energies.detach()) - atoms.info["REF_energy"]) / len(atoms)
        assert float(found.energies[k]) == pytest.approx(expected, abs=1e-12)
        stress = alone.stresses[0].numpy()[(0, 1, 2, 1, 0, 0), (0, 1, 2, 2, 2, 1)]
        np.testing.assert_allclose(found.stresses[k], stress - atoms.info["REF_stress"], atol=1e-13)
    expected = torch.cat(
        [energy_and_derivatives(student, build_graph(a, student.spec)).forces for a in frames]
    )
    labels = torch.as_tensor(np.concatenate([a.arrays["REF_forces"] for a in frames]))
    torch.testing.assert_close(found.forces, expected - labels, rtol=0, atol=1e-12)


def test_teacher_has_no_loss(teacher: nn.Module, frames: list[Atoms]) -> None:
    data = dataset(frames, teacher.spec)
    terms = loss_terms(residuals(teacher, data.batch(range(6))), TrainOptions())
    assert float(terms.total) < 1e-18


def test_gradient_agrees_with_finite_differences(student: nn.Module, frames: list[Atoms]) -> None:
    batch = dataset(frames[:2], student.spec).batch([0, 1])

    def loss() -> torch.Tensor:
        return loss_terms(residuals(student, batch, create_graph=True), TrainOptions()).total

    loss().backward()
    step = 1e-5
    for name, parameter in student.named_parameters():
        entry = parameter.detach().view(-1)
        values = []
        for shift in (step, -2 * step, step):
            entry[0] += shift
            values.append(float(loss().detach()))
        slope = (values[0] - values[1]) / (2 * step)
        assert float(parameter.grad.view(-1)[0]) == pytest.approx(slope, rel=1e-5, abs=1e-6), name


def test_gradient_reaches_every_parameter(student: nn.Module, frames: list[Atoms]) -> None:
    data = dataset(frames, student.spec)
    loss_terms(residuals(student, data.batch(range(6)), create_graph=True), TrainOptions()).total.backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0, name


def test_stress_of_molecules_is_ignored(
    student: nn.Module, frames: list[Atoms], molecule_frame: Atoms
) -> None:
    molecule_frame.info["REF_stress"] = np.full(6, np.nan)
    mixed = dataset([molecule_frame, *frames[:2]], student.spec).batch([0, 1, 2])
    crystals = dataset(frames[:2], student.spec).batch([0, 1])
    terms = loss_terms(residuals(student, mixed, create_graph=True), TrainOptions())
    alone = loss_terms(residuals(student, crystals), TrainOptions())
    assert float(terms.stress.detach()) == pytest.approx(float(alone.stress), rel=1e-12)
    terms.total.backward()
    assert all(p.grad.isfinite().all() for p in student.parameters())


def test_frames_without_stress_label_train_on_the_rest(student: nn.Module, frames: list[Atoms]) -> None:
    for atoms in frames:
        del atoms.info["REF_stress"]
    data = dataset(frames, student.spec)
    terms = loss_terms(residuals(student, data.batch([0, 1]), create_graph=True), TrainOptions())
    assert float(terms.stress.detach()) == 0.0
    terms.total.backward()
    assert all(p.grad.isfinite().all() for p in student.parameters())
    assert math.isnan(evaluate(student, data).stress.mae)


def test_full_stress_matrix_means_the_same(student: nn.Module, frames: list[Atoms]) -> None:
    voigt = dataset(frames, student.spec)
    for atoms in frames:
        xx, yy, zz, yz, xz, xy = atoms.info["REF_stress"]
        atoms.info["REF_stress"] = np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
    full = dataset(frames, student.spec)
    for a, b in zip(voigt.structures, full.structures, strict=True):
        assert torch.equal(a.stresses, b.stresses)


@pytest.mark.parametrize("key", ["REF_energy", "REF_forces"])
def test_missing_labels_are_named(tiny_spec: ModelSpec, frames: list[Atoms], key: str) -> None:
    holder = frames[3].info if key in frames[3].info else frames[3].arrays
    del holder[key]
    with pytest.raises(InputError, match=rf"frame 3 of the training set .* no {key}"):
        Dataset.from_frames(frames, tiny_spec)


def test_bad_labels_and_species_are_refused(tiny_spec: ModelSpec, frames: list[Atoms]) -> None:
    frames[1].arrays["REF_forces"][2, 0] = np.nan
    with pytest.raises(InputError, match=r"frame 1 .*REF_forces holds values that are not finite"):
        Dataset.from_frames(frames, tiny_spec)
    frames[1].arrays["REF_forces"][2, 0] = 0.0
    frames[1].info["REF_stress"] = np.zeros(9)
    with pytest.raises(InputError, match=r"REF_stress has shape \(9,\)"):
        Dataset.from_frames(frames, tiny_spec)
    frames[1].symbols[0] = "Ca"
    with pytest.raises(SpeciesError, match=r"frame 1 .*Ca"):
        Dataset.from_frames(frames, tiny_spec)
    with pytest.raises(InputError, match="no frames"):
        Dataset.from_frames([], tiny_spec)


def test_batches_hold_every_structure_once_within_bounds(tiny_spec: ModelSpec, frames: list[Atoms]) -> None:
    data = dataset(frames, tiny_spec)
    edges = [len(s.graph.centers) for s in data.structures]
    for max_atoms, max_edges in ((12, 10**9), (10**9, max(edges) + 1), (1, 1)):
        batches = data.batches(max_atoms, max_edges, seed=(0, 4))
        assert sorted(np.concatenate(batches).tolist()) == list(range(6))
        for batch in batches:
            inside = (
                sum(len(frames[k]) for k in batch) <= max_atoms and sum(edges[k] for k in batch) <= max_edges
            )
            assert inside or len(batch) == 1
    same, other = data.batches(1, 1, seed=(0, 4)), data.batches(1, 1, seed=(0, 5))
    assert np.array_equal(same, batches) and not np.array_equal(same, other)


def test_errors_are_plain_statistics(student: nn.Module, frames: list[Atoms]) -> None:
    data = dataset(frames, student.spec)
    found = evaluate(student, data)
    difference = [
        energy_and_derivatives(student, build_graph(a, student.spec)).forces.numpy() - a.arrays["REF_forces"]
        for a in frames
    ]
    together = np.concatenate(difference)
    assert found.forces.mae == pytest.approx(1e3 * np.abs(together).mean())
    assert found.forces.rmse == pytest.approx(1e3 * np.sqrt((together**2).mean()))
    assert found.forces.max == pytest.approx(1e3 * np.abs(together).max())
    oxygen = np.concatenate([d[a.numbers == 8] for d, a in zip(difference, frames, strict=True)])
    assert found.forces_by_species["O"].mae == pytest.approx(1e3 * np.abs(oxygen).mean())
    assert Error.of(torch.tensor([3e-3, -4e-3])) == Error(
        pytest.approx(3.5), pytest.approx(math.sqrt(12.5)), pytest.approx(4.0)
    )


def test_average_follows_its_formula() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, decay=0.2)
    expected = float(model.weight.detach())
    for step, value in enumerate((1.0, -2.0, 5.0, 7.0), start=1):
        with torch.no_grad():
            model.weight.fill_(value)
        average.update(model)
        decay = min(0.2, step / (step + 10))
        expected = decay * expected + (1 - decay) * value
        assert float(average.model.weight) == pytest.approx(expected, rel=1e-6)


def test_universal_and_squared_losses() -> None:
    energies, stresses = torch.zeros(1, dtype=torch.float64), torch.zeros(0, 6)
    forces = torch.tensor([[0.03, 0.0, 0.0], [0.03, 0.0, 0.0], [0.0, -0.002, 0.0], [0.03, 0.0, 0.0]])
    sizes = torch.tensor([1.0, 150.0, 250.0, 1000.0])
    errors = Residuals(energies, forces, stresses, sizes=sizes)
    settings = {"forces_delta": 0.01, "forces_weight": 2.0}
    found = loss_terms(errors, TrainOptions(loss="universal", **settings)).forces

    def part(u: float, delta: float) -> float:
        return u * u / 2 if u < delta else delta * (u - delta / 2)

    parts = (part(3.0, 1.0), part(3.0, 0.7), part(0.2, 0.4), part(3.0, 0.1))
    assert float(found) == pytest.approx(2.0 * sum(parts) / 12)
    found = loss_terms(errors, TrainOptions(loss="mse", **settings)).forces
    assert float(found) == pytest.approx(2.0 * (3 * 4.5 + 0.02) / 12)


@pytest.mark.parametrize("kind", ["huber", "universal", "mse"])
def test_weights_of_structures_multiply_their_parts(
    student: nn.Module, frames: list[Atoms], kind: str
) -> None:
    options = TrainOptions(loss=kind)
    plain = dataset(frames[:3], student.spec)
    single = [loss_terms(residuals(student, plain.batch([k])), options) for k in range(3)]
    factors = np.array([[1.0, 2.0, 3.0], [0.0, 0.5, 1.0], [2.0, 1.0, 0.0]])
    weighted = Dataset.from_frames(frames[:3], student.spec, torch.float64, weights=factors)
    found = loss_terms(residuals(student, weighted.batch(range(3))), options)
    atoms = [len(a) for a in frames[:3]]
    for name, column, sizes in (("energy", 0, [1, 1, 1]), ("forces", 1, atoms), ("stress", 2, [1, 1, 1])):
        parts = [
            float(getattr(single[k], name).detach()) * factors[k, column] * n for k, n in enumerate(sizes)
        ]
        assert float(getattr(found, name).detach()) == pytest.approx(sum(parts) / sum(sizes), rel=1e-12)
    # One structure with weights among others without: these count once.
    mixed = Dataset((plain.structures[0], weighted.structures[1]), plain.species)
    assert mixed.batch([0, 1]).weights.tolist() == [[1.0, 1.0, 1.0], [0.0, 0.5, 1.0]]


def test_structures_without_forces_count_by_their_energies(student: nn.Module, frames: list[Atoms]) -> None:
    bare = frames[1].copy()
    del bare.arrays["REF_forces"]
    with pytest.raises(InputError, match="REF_forces"):
        dataset([bare], student.spec)
    mixed = Dataset.from_frames([frames[0], bare, frames[2]], student.spec, torch.float64, need_forces=False)
    whole = dataset([frames[0], frames[1], frames[2]], student.spec)
    found, expected = (residuals(student, d.batch(range(3))) for d in (mixed, whole))
    torch.testing.assert_close(found.energies, expected.energies)
    n, m = len(frames[0]), len(frames[1])
    torch.testing.assert_close(found.forces, torch.cat([expected.forces[:n], expected.forces[n + m :]]))
    errors = evaluate(student, mixed)
    assert errors.forces.mae == pytest.approx(1e3 * float(found.forces.abs().mean()))
    assert mixed.num_atoms == whole.num_atoms
