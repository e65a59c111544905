"""Training on Hessian products: the loss and its gradient, what it does, resuming, and missing labels."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from cli_runs import run_cli
from mace_models import make_model as make_mace, make_spec as make_mace_spec
from torch import nn

from compactmlip import checkpoint
from compactmlip.data.hessian import DIRECTIONS, PRODUCTS
from compactmlip.data.label import label
from compactmlip.data.read import write_labelled
from compactmlip.errors import InputError
from compactmlip.train import loop
from compactmlip.train.dataset import Dataset
from compactmlip.train.distil import DistilOptions, DistilResult, distil
from compactmlip.train.loss import loss_terms, residuals
from compactmlip.train.metrics import dataset_residuals, evaluate
from compactmlip.train.options import TrainOptions

EVERYTHING = 100


def disturbed(model: nn.Module, size: float) -> nn.Module:
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, p in changed.named_parameters():
            if name != "basis.wave_numbers":
                p += size * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return changed


@pytest.fixture(params=["nequip", "mace"])
def pair(request: pytest.FixtureRequest, teacher: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Teacher and student."""
    own = teacher if request.param == "nequip" else make_mace(make_mace_spec(hidden=(4, 3), lmax_edge=2))
    return own, disturbed(own, 0.1)


@pytest.fixture
def labelled(teacher: nn.Module, frames: list[Atoms], tmp_path: Path) -> list[Atoms]:
    """The frames with three Hessian products each."""
    return label(frames, teacher, tmp_path / "labelled.xyz", hessian=3, progress=False)


def run(student: nn.Module, frames: list[Atoms], folder: Path, **changes: Any) -> DistilResult:
    settings = {"max_epochs": 4, "batch_atoms": 8, "lr": 0.01, "dtype": "float64", "hessian_weight": 1.0}
    options = DistilOptions.parse(**{**settings, **changes})
    return distil(student, frames[:4], frames[4:], options, folder, progress=False)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_loss_is_that_of_the_products(
    pair: tuple[nn.Module, nn.Module], frames: list[Atoms], tmp_path: Path
) -> None:
    """Errors are differences of labels; the teacher has none; the gradient is that of finite differences."""
    teacher, student = pair
    two = [
        label(frames[:2], model, tmp_path / f"{name}.xyz", hessian=2, progress=False)
        for name, model in (("teacher", teacher), ("student", student))
    ]
    data = Dataset.from_frames(two[0], teacher.spec, torch.float64, hessian=EVERYTHING)
    options = TrainOptions(hessian_weight=3.0, energy_weight=0, forces_weight=0, stress_weight=0)
    assert float(loss_terms(residuals(teacher, data.batch([0, 1])), options).total) < 1e-18

    differences = [s.arrays[PRODUCTS] - t.arrays[PRODUCTS] for t, s in zip(*two, strict=True)]
    units = np.abs(np.concatenate(differences)) / options.hessian_delta
    expected = 3.0 * np.where(units < 1, units**2 / 2, units - 0.5).mean()
    found = residuals(student, data.batch([0, 1]))
    assert found.hessians is not None and not found.hessians.requires_grad
    np.testing.assert_allclose(found.hessians.numpy(), np.concatenate(differences), atol=1e-9)
    assert float(loss_terms(found, options).total) == pytest.approx(expected, rel=1e-9)
    assert expected > 0.01

    def loss() -> torch.Tensor:
        return loss_terms(residuals(student, data.batch([0, 1]), create_graph=True), options).total

    total = loss()
    total.backward(inputs=[p for p in student.parameters() if p.requires_grad])
    step = 1e-5
    for name, parameter in student.named_parameters():
        entry = parameter.detach().view(-1)
        k = int(parameter.grad.abs().argmax()) if parameter.grad is not None else 0
        values = []
        for shift in (step, -2 * step, step):
            entry[k] += shift
            values.append(float(loss().detach()))
        slope = (values[0] - values[1]) / (2 * step)
        got = 0.0 if parameter.grad is None else float(parameter.grad.view(-1)[k])
        assert got == pytest.approx(slope, rel=1e-4, abs=1e-7), name


def test_residuals_of_batches_join(student: nn.Module, labelled: list[Atoms]) -> None:
    data = Dataset.from_frames(labelled, student.spec, torch.float64, hessian=2)
    found = dataset_residuals(student, data, max_atoms=8)
    alone = [residuals(student, s).hessians for s in data.structures]
    assert found.hessians is not None and found.hessians.shape == (data.num_atoms, 6)
    torch.testing.assert_close(found.hessians, torch.cat(alone), rtol=0, atol=1e-10)
    errors = evaluate(student, data)
    assert errors.hessian is not None
    assert errors.hessian.mae == pytest.approx(float(found.hessians.abs().mean()))
    assert "H " in str(errors)


def test_structure_weights_count(student: nn.Module, labelled: list[Atoms]) -> None:
    """A structure's weight of the forces is that of its Hessian."""
    options = TrainOptions(hessian_weight=1.0)
    shares = np.array([[1.0, 1.0, 1.0], [1.0, 0.25, 1.0]])
    data = Dataset.from_frames(labelled[:2], student.spec, torch.float64, weights=shares, hessian=1)
    both = residuals(student, data.batch([0, 1]))
    assert both.hessians is not None
    units = (both.hessians.abs() / options.hessian_delta).numpy()
    each = np.where(units < 1, units**2 / 2, units - 0.5)
    assert len(labelled[0]) == 4
    expected = (each[:4].sum() + 0.25 * each[4:].sum()) / each.size
    assert float(loss_terms(both, options).hessian) == pytest.approx(expected)


def test_training_on_it_lowers_its_error(student: nn.Module, labelled: list[Atoms], tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_epochs": 25, "batch_atoms": 16, "optimizer": "adamw"}
    with_it = run(student, labelled, tmp_path / "with", hessian_weight=2.0, **options)
    without = run(student, labelled, tmp_path / "without", hessian_weight=0.0, **options)
    assert without.errors.hessian is None
    data = Dataset.from_frames(labelled[4:], student.spec, torch.float64, hessian=3)
    before, plain, better = (evaluate(m, data).hessian for m in (student, without.model, with_it.model))
    assert before is not None and plain is not None and better is not None
    assert better.mae < 0.8 * plain.mae and better.mae < 0.5 * before.mae
    assert with_it.history[-1]["hessian_mae_eV_per_A2"] < with_it.history[0]["hessian_mae_eV_per_A2"]
    assert "valid_hessian" in with_it.history[0] and "valid_hessian" not in without.history[0]
    assert checkpoint.load(tmp_path / "with" / "best.safetensors").spec.provenance.steps[-1].options[
        "hessian_weight"
    ] == pytest.approx(2.0)


def test_directions_follow_each_other(
    student: nn.Module, labelled: list[Atoms], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each epoch uses the next labelled directions, every second step has none."""
    seen: list[tuple[int, np.ndarray | None]] = []
    original = loop.residuals

    def watched(model: nn.Module, batch: Any, **kwargs: Any) -> Any:
        moved = None if batch.hessian is None else batch.hessian.directions.numpy()
        seen.append((batch.num_atoms, moved))
        return original(model, batch, **kwargs)

    monkeypatch.setattr(loop, "residuals", watched)
    run(student, labelled, tmp_path, max_epochs=2, batch_atoms=24, hessian_directions=2)
    shuffled = [np.random.default_rng((0, epoch)).permutation(4) for epoch in range(2)]
    for epoch, columns in enumerate(([0, 1], [2, 0])):
        atoms = [labelled[k].arrays[DIRECTIONS].reshape(-1, 3, 3)[:, columns] for k in shuffled[epoch]]
        found = seen[epoch][1]
        assert found is not None and np.array_equal(found, np.concatenate(atoms))
    seen.clear()
    run(student, labelled, tmp_path / "other", max_epochs=1, batch_atoms=4, hessian_every=2)
    assert [moved is None for _, moved in seen] == [False, True, False, True]


def test_interrupted_run_resumes_to_the_same_weights(
    student: nn.Module, labelled: list[Atoms], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(student, labelled, tmp_path / "whole", hessian_every=3, hessian_directions=2)
    original, calls = loop.residuals, 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "residuals", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(student, labelled, tmp_path / "parts", hessian_every=3, hessian_directions=2)
    resumed = run(student, labelled, tmp_path / "parts", hessian_every=3, hessian_directions=2)
    assert torch.equal(weights(resumed.model), weights(whole.model))


def _without(frames: list[Atoms]) -> str:
    del frames[2].arrays[PRODUCTS]
    return r"frame 2 of the training set .* has no REF_hessian_products.*label --hessian"


def _nan(frames: list[Atoms]) -> str:
    frames[5].arrays[PRODUCTS][0, 1] = math.nan
    return r"frame 1 of the validation set .*REF_hessian_products holds values that are not finite"


def _odd(frames: list[Atoms]) -> str:
    values = frames[1].arrays.pop(PRODUCTS)
    frames[1].new_array(PRODUCTS, values[:, :6])
    return r"frame 1 of the training set .*REF_hessian_products has shape \(8, 6\), expected \(8, 9\)"


def _fewer(frames: list[Atoms]) -> str:
    for key in (DIRECTIONS, PRODUCTS):
        values = frames[1].arrays.pop(key)
        frames[1].new_array(key, values[:, :6])
    return "different numbers of Hessian products"


def _not_three(frames: list[Atoms]) -> str:
    for key in (DIRECTIONS, PRODUCTS):
        values = frames[0].arrays.pop(key)
        frames[0].new_array(key, values[:, :4])
    return r"REF_hessian_directions has shape \(4, 4\), expected \(4, 3 K\)"


@pytest.mark.parametrize("spoil", [_without, _nan, _odd, _fewer, _not_three])
def test_bad_labels_are_refused(
    student: nn.Module, labelled: list[Atoms], tmp_path: Path, spoil: Callable[[list[Atoms]], str]
) -> None:
    message = spoil(labelled)
    with pytest.raises(InputError, match=message):
        run(student, labelled, tmp_path / "run")
    run(student, labelled, tmp_path / "plain", hessian_weight=0.0, max_epochs=1)


def test_command_line(
    teacher: nn.Module,
    student: nn.Module,
    frames: list[Atoms],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint.save(teacher, tmp_path / "teacher.safetensors")
    checkpoint.save(student, tmp_path / "student.safetensors")
    write_labelled(tmp_path / "plain.xyz", frames[:2])
    distilled = (
        "distil student.safetensors --valid {0} --train {0} -o done.safetensors --epochs 1 --hessian 0.5"
    )
    code, _, err = run_cli(monkeypatch, capsys, distilled.format("plain.xyz"))
    assert code == 1 and "label --hessian" in err
    more = "label plain.xyz --teacher teacher.safetensors --hessian 2 --keep-labels -o more.xyz"
    for line in (more, distilled.format("more.xyz")):
        code, out, err = run_cli(monkeypatch, capsys, line)
        assert code == 0, f"{line}\n{out}\n{err}"
    assert "eV/A^2" in out
    assert checkpoint.read_spec(tmp_path / "done.safetensors").provenance.steps[-1].options[
        "hessian_weight"
    ] == pytest.approx(0.5)
