"""compactmlip distil with rounds of exploration, from files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_runs import crystals, model_and_truth, run_cli
from torch import nn

from compactmlip.checkpoint import load, read_spec, save
from compactmlip.data.read import write_labelled
from compactmlip.train.forgetting import labelled_by

SETS = "--train train.xyz --valid valid.xyz"
QUICK = "--epochs 2 --set dtype=float64 --set add=2 --set md_runs=2 --set md_steps=20 --set temperature=[300]"


@pytest.fixture
def folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_spec: Callable[..., Any],
    make_model: Callable[..., nn.Module],
) -> Path:
    """Student, teacher, and frames with the teacher's labels."""
    student, teacher = model_and_truth(make_spec, make_model)
    save(student, tmp_path / "student.safetensors")
    save(teacher, tmp_path / "teacher.safetensors")
    frames = labelled_by(teacher, crystals(4, "mp_id", "mp-0"))
    write_labelled(tmp_path / "train.xyz", frames[:3])
    write_labelled(tmp_path / "valid.xyz", frames[3:])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_rounds(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"distil student.safetensors {SETS} -o small.safetensors --rounds 1 --teacher teacher.safetensors"
    code, out, err = run_cli(monkeypatch, capsys, f"{line} {QUICK}")
    assert code == 0, err
    assert "wrote small.safetensors" in out
    rows = json.loads((folder / "small.training" / "rounds.json").read_text())
    assert [row["train"] for row in rows] == [3, 5]
    assert [s.action for s in read_spec(folder / "small.safetensors").provenance.steps].count("distil") == 2
    again, _, _ = run_cli(monkeypatch, capsys, f"{line} {QUICK}")
    assert again == 0 and load(folder / "small.safetensors") is not None
    code, _, err = run_cli(monkeypatch, capsys, f"{line} {QUICK} --set add=1")
    assert code == 1 and "another folder" in err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--rounds 2", "--rounds and --teacher belong together"),
        ("--teacher teacher.safetensors", "--rounds and --teacher belong together"),
        ("--teacher none.safetensors --rounds 1", "none.safetensors"),
        ("--set add=3", "add"),
    ],
)
def test_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: str, message: str
) -> None:
    line = f"distil student.safetensors {SETS} -o small.safetensors --epochs 2 {more}"
    code, _, err = run_cli(monkeypatch, capsys, line)
    assert code == 1 and message in err, err
    assert not (folder / "small.safetensors").exists()
