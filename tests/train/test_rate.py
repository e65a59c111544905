"""The learning rate follows the start, unless it is given."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from torch import nn

from compactmlip.data.read import FORCES
from compactmlip.models import model_spec
from compactmlip.train import loop
from compactmlip.train.dataset import Dataset
from compactmlip.train.distil import DistilOptions, distil
from compactmlip.train.options import TrainOptions
from compactmlip.train.rate import peak_rate


def _valid(model: nn.Module, frames: list[Atoms], forces: float) -> Dataset:
    """Frames whose forces have this mean size, eV/Angstrom."""
    scaled = []
    for atoms in copy.deepcopy(frames):
        labels = atoms.arrays[FORCES]
        atoms.arrays[FORCES] = labels * forces / np.abs(labels).mean()
        scaled.append(atoms)
    return Dataset.from_frames(scaled, model_spec(model), torch.float64)


@pytest.mark.parametrize(
    ("optimizer", "forces", "error", "expected"),
    [
        ("soap", 1.0, 0.12, 0.006),
        ("soap", 0.5, 0.05, 0.005),
        ("soap", 1.0, 0.5, 0.007),
        ("soap", 1.0, 0.9, 0.1),
        ("soap", 1.0, 3.0, 0.1),
        ("soap", 1.0, 0.001, 0.003),
        ("soap", 0.001, 0.01, 0.005),  # near a minimum an error is not compared with next to nothing
        ("adamw", 1.0, 0.2, 0.004),
        ("adamw", 1.0, 0.5, 0.005),
        ("adamw", 1.0, 2.0, 0.01),
        ("adamw", 1.0, 0.01, 0.001),
    ],
)
def test_rate_of_a_start(
    student: nn.Module, frames: list[Atoms], optimizer: str, forces: float, error: float, expected: float
) -> None:
    valid = _valid(student, frames, forces)
    options = TrainOptions.model_validate({"optimizer": optimizer})
    found = peak_rate(options, {"forces_mae_meV_per_A": 1e3 * error}, valid)
    assert found == pytest.approx(expected, rel=1e-6)
    assert peak_rate(TrainOptions(lr=0.7), {"forces_mae_meV_per_A": 1.0}, valid) == 0.7


def test_without_force_labels(student: nn.Module, frames: list[Atoms]) -> None:
    bare = copy.deepcopy(frames)
    for atoms in bare:
        del atoms.arrays[FORCES]
    valid = Dataset.from_frames(bare, model_spec(student), torch.float64, need_forces=False)
    assert peak_rate(TrainOptions(), {"forces_mae_meV_per_A": float("nan")}, valid) == pytest.approx(5e-3)


def test_a_run_uses_and_records_it_and_continues_with_it(
    student: nn.Module, frames: list[Atoms], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = DistilOptions.parse(max_epochs=3, batch_atoms=8, dtype="float64", schedule="constant")
    whole = distil(student, frames[:4], frames[4:], options, tmp_path / "whole", progress=False)
    mean = np.abs(np.concatenate([a.arrays[FORCES] for a in frames[4:]])).mean()
    relative = 1e-3 * whole.history[0]["forces_mae_meV_per_A"] / mean
    wanted = min(max(0.05 * relative, 3e-3), 7e-3) if relative < 0.7 else 0.1
    assert whole.history[-1]["lr"] == pytest.approx(wanted)

    calls, real = 0, loop.residuals

    def stops(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(loop, "residuals", stops)
        with pytest.raises(KeyboardInterrupt):
            distil(student, frames[:4], frames[4:], options, tmp_path / "parts", progress=False)
    parts = distil(student, frames[:4], frames[4:], options, tmp_path / "parts", progress=False)
    pairs = zip(whole.model.parameters(), parts.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert model_spec(parts.model).provenance.steps[-1].options["lr"] == pytest.approx(wanted)
