"""compactmlip retrain from files: what it writes, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_runs import crystals, model_and_truth, run_cli
from torch import nn

from compactmlip.checkpoint import read_spec, save
from compactmlip.data.read import write_labelled
from compactmlip.train.forgetting import labelled_by

QUICK = "--epochs 2 --dtype float64 --set batch_atoms=16"


@pytest.fixture
def folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_spec: Callable[..., Any],
    make_model: Callable[..., nn.Module],
) -> Path:
    """A model, and twelve frames of three materials whose labels differ from it a little."""
    pruned, truth = model_and_truth(make_spec, make_model)
    save(pruned, tmp_path / "pruned.safetensors")
    frames = crystals(12, "mp_id", "mp-0", "mp-1", "mp-2")
    write_labelled(tmp_path / "train.xyz", labelled_by(truth, frames))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_part_of_each_material_with_a_preset(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "run.yaml").write_text("preset: mace-mp\nema_decay: 0.9\nvalid_fraction: 0.34\n")
    line = f"retrain pruned.safetensors --train train.xyz -o out --config run.yaml {QUICK}"
    line += " --per-group 2 --group-key mp_id"
    code, out, err = run_cli(monkeypatch, capsys, line)
    assert code == 0, err
    assert "trained on 4 of 8 training frames, of 2 different 'mp_id'" in out
    assert "1 of 3 groups by 'mp_id'" in out
    assert "wrote out/model.safetensors" in out and "out/summary.json" in out
    names = {p.name for p in (folder / "out").iterdir()}
    assert {"model.safetensors", "summary.json", "history.csv", "config.yaml", "valid.xyz"} <= names
    assert "report.html" not in names
    spec = read_spec(folder / "out" / "model.safetensors")
    step = spec.provenance.steps[-1]
    assert len(spec.species) == 5 and step.action == "retrain"
    found = {
        key: step.options[key] for key in ("preset", "ema_decay", "loss", "clip", "per_group", "max_epochs")
    }
    assert found == {
        "preset": "mace-mp", "ema_decay": 0.9, "loss": "universal", "clip": 100.0, "per_group": 2,
        "max_epochs": 2,
    }  # fmt: skip
    assert step.options["train_frames"] == 4

    code, out, _ = run_cli(monkeypatch, capsys, f"{line} --json")
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert code == 0
    assert json.loads(out)["valid"]["forces_mae_after"] == summary["sets"]["valid"]["after"]["forces"]["mae"]
    # What was resolved can be given again.
    again = "retrain pruned.safetensors --train train.xyz -o out --config out/config.yaml"
    assert run_cli(monkeypatch, capsys, again)[0] == 0
    code, _, err = run_cli(monkeypatch, capsys, f"{line} --seed 3")
    assert code == 1 and "holds a" in err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--per-group 2 --group-key material", "frame 0 has no such info key"),
        ("--per-group 2", "group_key"),
        ("--preset mace", "mace-off"),
        ("--hessian 1", "label --hessian"),
        ("--train nothing.xyz", "nothing.xyz"),
    ],
)
def test_what_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: str, message: str
) -> None:
    line = f"retrain pruned.safetensors --train train.xyz -o out {QUICK} {more}"
    code, _, err = run_cli(monkeypatch, capsys, line)
    assert code == 1 and message in err
