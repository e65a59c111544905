"""Active distillation: what the student meets in its own dynamics is labelled by the teacher and learned."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from torch import nn

from compactmlip.data.graph import build_graph, energy_and_derivatives
from compactmlip.data.read import read_labelled
from compactmlip.errors import InputError
from compactmlip.train import active
from compactmlip.train.active import ActiveOptions, distil_actively
from compactmlip.train.distil import DistilOptions, DistilResult


def options(**changes: Any) -> ActiveOptions:
    small = {"max_epochs": 4, "batch_atoms": 8, "lr": 0.01, "dtype": "float64", "rounds": 2, "add": 3}
    md = {"md_runs": 4, "md_steps": 20, "md_interval": 10}
    return ActiveOptions.parse(**{**small, **md, **changes})


@pytest.fixture
def run(student: nn.Module, teacher: nn.Module, frames: list[Atoms], tmp_path: Path) -> Callable[..., Any]:
    """``run(folder="run", student=..., **options)`` on four frames, validated on the other two."""

    def make(folder: str = "run", model: nn.Module = student, **changes: Any) -> DistilResult:
        arguments = (model, teacher, frames[:4], frames[4:], options(**changes), tmp_path / folder)
        return distil_actively(*arguments, progress=False)

    return make


def test_budget_is_shared() -> None:
    given = options(max_minutes=12.0, max_epochs=100, rounds=3, seed=7)
    parts = [given.training(k) for k in range(4)]
    assert [p.max_minutes for p in parts] == [2.0, 2.0, 2.0, 6.0]
    assert [p.max_epochs for p in parts] == [17, 17, 17, 50]
    assert {type(p) for p in parts} == {DistilOptions} and {p.seed for p in parts} == {7}


def test_rounds_add_what_the_teacher_labels(
    run: Any, teacher: nn.Module, frames: list[Atoms], tmp_path: Path
) -> None:
    result = run()
    rows = json.loads((tmp_path / "run" / active.ROUNDS).read_text())
    assert [row["round"] for row in rows] == [0, 1, 2] and [row["train"] for row in rows] == [4, 7, 10]
    assert rows[1]["added"] == 3 and min(rows[1]["errors_on_added"].values()) > 0
    assert result.errors.row() == rows[2]["valid_errors"]
    for number in (1, 2):
        added = read_labelled(tmp_path / "run" / f"training-{number}" / active.ADDED)
        assert len(added) == 3
        for atoms in added:
            found = energy_and_derivatives(teacher, build_graph(atoms, teacher.spec))
            assert atoms.info["REF_energy"] == pytest.approx(float(found.energies.detach()), abs=1e-8)
            assert atoms.info["config_type"] == "active"
            same = [known for known in frames[:4] if len(known) == len(atoms)]
            assert min(np.abs(atoms.positions - known.positions).max() for known in same) > 1e-3


def test_continues_and_repeats(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped while the teacher labels: the rest follows, without new dynamics, to the same weights."""
    expected = run("whole")
    label, calls = active.label, []

    def stop(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return label(*args, **kwargs)

    monkeypatch.setattr(active, "label", stop)
    with pytest.raises(KeyboardInterrupt):
        run("stopped")
    monkeypatch.setattr(active, "trajectory", None)
    again = run("stopped")
    for a, b in zip(expected.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    one, two = ((tmp_path / name / active.ROUNDS).read_text() for name in ("whole", "stopped"))
    assert one == two
    with pytest.raises(InputError, match="another folder"):
        run("whole", add=2)
    other = copy.deepcopy(again.model)
    with pytest.raises(InputError, match="another folder"):
        run("whole", model=other)


def test_the_farthest_are_chosen(student: nn.Module, frames: list[Atoms]) -> None:
    """A stretched and a squeezed cell among near copies of what is known, which is not chosen again."""
    nearly, other = [], []
    for k, scale in enumerate((1.0, 1.0, 1.0, 1.0, 1.06, 0.95)):
        atoms = frames[k % 4].copy()
        atoms.set_cell(scale * atoms.cell, scale_atoms=True)
        atoms.rattle(1e-3, seed=k)
        (nearly if scale == 1 else other).append(atoms)
    picked = active._novel(student, frames[:4], [*nearly, *other], 2)
    assert {id(atoms) for atoms in picked} == {id(atoms) for atoms in other}
    assert len(active._novel(student, frames[:4], nearly, 99)) == 4


def test_what_the_teacher_finds_unphysical_is_left_out(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(active, "FORCE_LIMIT", 0.0)
    run(rounds=1)
    rows = json.loads((tmp_path / "run" / active.ROUNDS).read_text())
    assert (rows[1]["added"], rows[1]["errors_on_added"], rows[1]["train"]) == (0, None, 4)


def test_student_that_breaks_at_once(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(active, "trajectory", lambda *args, **kwargs: [])
    with pytest.raises(InputError, match="broke at once"):
        run()


def test_last_validation_structures_are_the_farthest(run: Any, tmp_path: Path) -> None:
    """One of ten new ones: the budget of the early stopping sees what is new."""
    run(rounds=1, add=10, md_runs=6, max_epochs=2)
    rows = json.loads((tmp_path / "run" / active.ROUNDS).read_text())
    assert rows[1]["added"] == 10 and (rows[1]["train"], rows[1]["valid"]) == (13, 3)
