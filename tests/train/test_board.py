"""What a training leaves for TensorBoard: the numbers of its history, once each."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from torch import nn

from compactmlip.errors import InputError
from compactmlip.train import loop
from compactmlip.train.board import FOLDER, Board
from compactmlip.train.distil import DistilOptions, distil
from compactmlip.train.state import HISTORY_FILE


def _train(student: nn.Module, frames: list[Atoms], folder: Path, **options: Any) -> None:
    given = {"max_epochs": 4, "batch_atoms": 8, "dtype": "float64", "tensorboard": True, **options}
    distil(student, frames[:4], frames[4:], DistilOptions.parse(**given), folder, progress=False)


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder / FOLDER))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_history_is_drawn(student: nn.Module, frames: list[Atoms], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    _train(student, frames, tmp_path)
    with (tmp_path / HISTORY_FILE).open() as file:
        rows = list(csv.DictReader(file))
    found = _scalars(tmp_path)
    assert set(found) == set(rows[0]) - {"epoch", "steps", "minutes"}
    for name, points in found.items():
        expected = [(int(r["steps"]), float(r[name])) for r in rows if np.isfinite(float(r[name]))]
        assert len(points) >= 4  # the loss of the start is not known
        np.testing.assert_allclose(points, expected, rtol=1e-5)


def test_an_interrupted_run_draws_each_step_once(
    student: nn.Module, frames: list[Atoms], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    whole = loop.summarise
    calls = 0

    def stop_at_the_third(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(loop, "summarise", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        _train(student, frames, tmp_path)
    _train(student, frames, tmp_path)
    steps = [step for step, _ in _scalars(tmp_path)["valid_loss"]]
    assert steps == sorted(set(steps)) and len(steps) == 5


def test_what_is_written_again_replaces_what_was_there(tmp_path: Path) -> None:
    """As after a crash: the events are newer than the state from which the run goes on."""
    pytest.importorskip("tensorboard")
    for values in ({10: 1.0, 20: 2.0, 30: 3.0}, {20: 4.0, 30: 5.0}):
        with Board(tmp_path) as board:
            for step, value in values.items():
                board.add({"epoch": 1, "steps": step, "valid_loss": value})
    assert _scalars(tmp_path)["valid_loss"] == [(10, 1.0), (20, 4.0), (30, 5.0)]


def test_nothing_is_written_unasked(student: nn.Module, frames: list[Atoms], tmp_path: Path) -> None:
    _train(student, frames, tmp_path, tensorboard=False, max_epochs=1)
    assert not (tmp_path / FOLDER).exists()


def test_missing_package(
    student: nn.Module, frames: list[Atoms], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(InputError, match=r"needs the package tensorboard"):
        _train(student, frames, tmp_path)
