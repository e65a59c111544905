"""Retraining: published settings, parts of the data drawn per material, and what differs from fine-tuning."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from torch import nn
from torch.nn.functional import huber_loss, mse_loss

from compactmlip.data.hessian import DIRECTIONS
from compactmlip.data.label import label
from compactmlip.errors import InputError
from compactmlip.train import loop
from compactmlip.train.dataset import Dataset, Draw
from compactmlip.train.finetune import FinetuneData, FinetuneResult, finetune
from compactmlip.train.finetune_options import FinetuneOptions
from compactmlip.train.loss import Residuals, loss_terms
from compactmlip.train.retrain import PRESETS, RetrainOptions

KBAR_PER_EV_A3 = 1602.1766


@pytest.fixture
def materials(frames: list[Atoms]) -> list[Atoms]:
    """The six frames as three of one material, two of another and a single one."""
    for atoms, name in zip(frames, ["mp-1", "mp-2", "mp-1", "mp-2", "mp-1", "mp-3"], strict=True):
        atoms.info["mp_id"] = name
    return frames


def retrained(student: nn.Module, frames: list[Atoms], folder: Path, **changes: Any) -> FinetuneResult:
    settings = {"max_epochs": 4, "batch_atoms": 8, "lr": 0.01, "dtype": "float64"}
    options = RetrainOptions.parse(**{**settings, **changes})
    return finetune(student, FinetuneData(frames, frames[:2]), options, folder, progress=False)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", list(PRESETS))
def test_losses_of_presets_are_upstreams(name: str) -> None:
    """Weights, units and thresholds together give the functions that the models were trained with."""
    generator = torch.Generator().manual_seed(1)

    def errors(*shape: int, size: float) -> torch.Tensor:
        return size * torch.randn(*shape, generator=generator, dtype=torch.float64)

    energies, forces, stresses = errors(7, size=0.02), errors(9, 3, size=0.02), errors(7, 6, size=2e-3)
    sizes = torch.tensor([0.1] * 6 + [150.0, 250.0, 350.0], dtype=torch.float64)
    found = loss_terms(Residuals(energies, forces, stresses, sizes=sizes), RetrainOptions(preset=name))

    def huber(x: torch.Tensor, delta: float = 0.01) -> float:
        return float(huber_loss(x, torch.zeros_like(x), delta=delta, reduction="sum"))

    if name == "mace-mp":
        calm = huber(forces[:6])
        wild = [huber(f, 0.01 * share) for f, share in zip(forces[6:], (0.7, 0.4, 0.1), strict=True)]
        expected = [huber(energies) / 7, 10 * (calm + sum(wild)) / 27, 100 * huber(stresses) / 42]
    elif name == "mace-off":
        zero = torch.zeros_like
        expected = [40 * float(mse_loss(energies, zero(energies)))]
        expected += [1000 * float(mse_loss(forces, zero(forces))), 0.0]
    else:
        expected = [huber(energies) / 7, huber(forces) / 27]
        expected += [0.01 * huber(KBAR_PER_EV_A3 * stresses) / 42]
    assert found.stacked()[:3].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_have_the_optimiser_of_their_sources(name: str) -> None:
    assert RetrainOptions(preset=name).optimizer == "adamw" != RetrainOptions().optimizer


def test_preset_gives_way_to_other_options() -> None:
    options = RetrainOptions(preset="mace-mp", lr=0.02, patience=7)
    assert (options.lr, options.patience) == (0.02, 7)
    assert (options.ema_decay, options.max_epochs, options.schedule) == (0.995, 200, "plateau")
    assert RetrainOptions().ema_decay != 0.995
    with pytest.raises(InputError, match="'mace-mp', 'mace-off' or 'sevennet'"):
        RetrainOptions.parse(preset="mace")


def test_all_species_and_energies_stay(student: nn.Module, frames: list[Atoms], tmp_path: Path) -> None:
    only = [a for a in frames if set(a.get_chemical_symbols()) == {"Mg", "O"}]
    result = retrained(student, only, tmp_path)
    assert result.model.spec.species == student.spec.species and result.removed_species == ()
    assert set(result.reference.shifts.values()) == {0.0} and result.forgetting == []
    step = result.model.spec.provenance.steps[-1]
    assert step.action == "retrain" and step.options["lr"] == 0.01
    losses = [row["valid_loss"] for row in result.history]
    assert min(losses) < 0.9 * losses[0]


def test_epochs_draw_other_frames_of_each_material(
    student: nn.Module, materials: list[Atoms], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"group_key": "mp_id", "per_group": 1, "resample": True, "max_epochs": 8}
    seen: list[int] = []
    original = loop._Run.step

    def watched(self: Any, indices: Any, lr: float) -> None:
        seen.extend(indices.tolist())
        original(self, indices, lr)

    monkeypatch.setattr(loop._Run, "step", watched)
    whole = retrained(student, materials, tmp_path / "whole", **options)
    assert len(seen) == 8 * 3
    for epoch in range(8):
        drawn = seen[3 * epoch : 3 * epoch + 3]
        assert Counter(materials[k].info["mp_id"] for k in drawn) == {"mp-1": 1, "mp-2": 1, "mp-3": 1}
    assert set(seen) == set(range(6))

    monkeypatch.setattr(loop._Run, "step", original)
    calls = 0

    def interrupted(self: Any, indices: Any, lr: float) -> None:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        original(self, indices, lr)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            retrained(student, materials, tmp_path / "parts", **options)
    assert torch.equal(
        weights(retrained(student, materials, tmp_path / "parts", **options).model), weights(whole.model)
    )
    for atoms in materials:
        atoms.info["mp_id"] += "x"
    with pytest.raises(InputError, match="another model, other frames or other options"):
        retrained(student, materials, tmp_path / "whole", **options)


def test_batches_in_order_take_all_frames(student: nn.Module, materials: list[Atoms]) -> None:
    made = Dataset.from_frames(materials, student.spec, torch.float64)
    part = Dataset(made.structures, made.species, Draw(tuple("aabbcc"), 1, None))
    assert np.concatenate(part.batches(16, 10**6)).tolist() == list(range(6))
    assert len(np.concatenate(part.batches(16, 10**6, (0, 1)))) == 3


def test_teachers_hessian_joins_other_labels(
    teacher: nn.Module, student: nn.Module, frames: list[Atoms], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="label --hessian"):
        retrained(student, frames, tmp_path / "none", hessian_weight=1.0)
    more = label(frames, teacher, tmp_path / "more.xyz", hessian=2, keep_labels=True, progress=False)
    assert more[0].arrays[DIRECTIONS].shape == (4, 6)
    result = retrained(student, more, tmp_path / "run", hessian_weight=1.0)
    assert result.history[-1]["valid_hessian"] < result.history[0]["valid_hessian"]


def test_learning_rate_falls_on_a_plateau(student: nn.Module, frames: list[Atoms], tmp_path: Path) -> None:
    options = {"schedule": "plateau", "plateau_patience": 1, "plateau_factor": 0.5, "warmup": 0.0}
    result = retrained(student, frames, tmp_path, lr=1e-300, max_epochs=7, **options)
    rates = [row["lr"] / 1e-300 for row in result.history[1:]]
    assert rates == pytest.approx([1, 1, 0.5, 0.5, 0.25, 0.25, 0.125])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_group": 1}, "need group_key"),
        ({"per_group": 1, "group_share": 0.5, "group_key": "x"}, "per_group or group_share, not both"),
        ({"resample": True}, "resample draws a part anew"),
        ({"hessian_weight": 1.0, "replay_structures": 3}, "replayed structures have no Hessian"),
    ],
)
def test_options_that_contradict_each_other(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FinetuneOptions.parse(**changes)
