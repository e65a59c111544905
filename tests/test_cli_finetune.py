"""compactmlip finetune from files: what it writes and says, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from browser import CHROMIUM, check
from cli_runs import crystals, model_and_truth, run_cli
from torch import nn

from compactmlip.checkpoint import load, save
from compactmlip.data.read import read_labelled, write_labelled
from compactmlip.train.forgetting import labelled_by

QUICK = "--set forgetting_structures=2 --set batch_atoms=16 --dtype float64"


@pytest.fixture
def folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_spec: Callable[..., Any],
    make_model: Callable[..., nn.Module],
) -> Path:
    """A parent of five species, and frames whose labels come from a model that differs a little."""
    parent, truth = model_and_truth(make_spec, make_model)
    save(parent, tmp_path / "parent.safetensors")
    with torch.no_grad():
        truth.energy_shift.sub_(5.0)
    frames = crystals(14, "config_type", "cold", "warm")
    write_labelled(tmp_path / "train.xyz", labelled_by(truth, frames[:12]))
    write_labelled(tmp_path / "test.xyz", labelled_by(truth, frames[12:]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[int, str, str]]:
    return lambda line: run_cli(monkeypatch, capsys, f"finetune {line}")


Run = Callable[[str], tuple[int, str, str]]


class Outside(HTMLParser):
    """Collects references to anything outside the page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        names = ("src", "href", "xlink:href")
        self.found += [v for k, v in attrs if k in names and v and not v.startswith(("#", "data:"))]


def test_from_files_to_a_model_and_a_report(folder: Path, run: Run) -> None:
    line = f"parent.safetensors --train train.xyz --test test.xyz -o out --epochs 4 --lr 0.01 {QUICK}"
    code, out, err = run(line)
    assert code == 0, err
    for text in (
        "energy from 'REF_energy'",
        "validation: 1 of 12 frames",
        "weights of 3 others removed without loss",
        "step 0 is the parent",
        "E0 (least-squares)",
        "test: energy",
        "against the parent",
        "wrote out/model.safetensors",
    ):
        assert text in out, text
    names = {"model.safetensors", "report.html", "summary.json", "history.csv", "config.yaml", "valid.xyz"}
    assert names <= {p.name for p in (folder / "out").iterdir()}
    summary = json.loads((folder / "out" / "summary.json").read_text())
    for name in ("valid", "test"):
        errors = summary["sets"][name]
        assert errors["after"]["forces"]["mae"] < errors["before"]["forces"]["mae"]
    assert summary["e0"]["shifts"].keys() == {"O", "Mg"} and summary["removed_species"] == ["H", "C", "Si"]
    assert len(read_labelled("out/valid.xyz")) == 1
    report = (folder / "out" / "report.html").read_text()
    if CHROMIUM:
        check(folder / "out" / "report.html")
    parser = Outside()
    parser.feed(report)
    assert parser.found == []
    for text in (
        "Learning curves",
        "warm",
        "cold",
        "forces on Mg",
        "What was forgotten",
        "<svg",
        "least-squares",
    ):
        assert text in report, text
    assert "None" not in report.partition('<h2 id="provenance"')[0]

    again = run(f"{line} --json")
    assert again[0] == 0
    values = json.loads(again[1])
    assert values["test"]["forces_mae_after"] == summary["sets"]["test"]["after"]["forces"]["mae"]
    code, _, err = run(line.replace("0.01", "0.02"))
    assert code == 1 and "holds a" in err


def test_options_from_a_file_and_energies_of_atoms(folder: Path, run: Run) -> None:
    (folder / "run.yaml").write_text(
        "max_epochs: 1\nloss: universal\nschedule: linear\nconfig_weights: {warm: 2.0}\n"
        "freeze: ['layers.0']\nlabels: {energy_unit: eV}\nforgetting_structures: 0\ndtype: float64\n"
    )
    line = "parent.safetensors --train train.xyz -o out --config run.yaml --e0 Mg=-3.5,O=-9.25"
    code, out, err = run(line)
    assert code == 0, err
    assert "E0 (given)" in out and "against the parent" not in out
    step = load("out/model.safetensors").spec.provenance.steps[-1]
    assert step.options["loss"] == "universal" and step.options["config_weights"] == {"warm": 2.0}
    code, _, err = run(f"{line} --set los=huber -o other")
    assert code == 1 and "Did you mean 'loss'" in err
    code, _, err = run("parent.safetensors --train train.xyz --e0 Mg=much")
    assert code == 1 and "--e0 Mg=much" in err


def nan(frames: list[Atoms]) -> None:
    frames[3].info["REF_energy"] = np.nan


def some_forces(frames: list[Atoms]) -> None:
    del frames[3].arrays["REF_forces"]


def hartree(frames: list[Atoms]) -> None:
    for atoms in frames:
        atoms.info["REF_energy"] /= 27.211386


def bohr(frames: list[Atoms]) -> None:
    for atoms in frames:
        atoms.arrays["REF_forces"] /= 51.422067


def lost_pbc(frames: list[Atoms]) -> None:
    frames[3].pbc = False


def twice(frames: list[Atoms]) -> None:
    frames.append(frames[3].copy())


def in_test(frames: list[Atoms]) -> None:
    frames.append(read_labelled("test.xyz")[0])


def absurd(frames: list[Atoms]) -> None:
    frames[3].arrays["REF_forces"][0] = 1e4


def strange(frames: list[Atoms]) -> None:
    frames[3].symbols[0] = "Pu"


def renamed(frames: list[Atoms]) -> None:
    for atoms in frames:
        atoms.info["E_total"] = atoms.info.pop("REF_energy")


@pytest.mark.parametrize(
    ("spoil", "message", "cure"),
    [
        (nan, "1 frames have REF_energy that is NaN or infinite (train frame 3)", "--drop nan-labels"),
        (some_forces, "1 of 14 frames have no forces (train frame 3)", "--accept missing-forces"),
        (hartree, "--energy-unit Hartree", "--energy-unit Hartree"),
        (bohr, "--forces-unit Hartree/Bohr", "--forces-unit Hartree/Bohr"),
        (lost_pbc, "is their pbc lost?", "--drop mixed-pbc"),
        (twice, "repeat an earlier structure", "--drop duplicates"),
        (in_test, "1 in test and train", "--drop leaks"),
        (absurd, "above max_force", "--drop absurd-forces"),
        (strange, "Pu (first in train frame 3)", ""),
        (renamed, "--energy-key E_total", "--energy-key E_total"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_bad_data(
    folder: Path, run: Run, spoil: Callable[[list[Atoms]], None], message: str, cure: str
) -> None:
    frames = read_labelled("train.xyz")
    spoil(frames)
    write_labelled("bad.xyz", frames)
    line = f"parent.safetensors --train bad.xyz --test test.xyz -o out --epochs 1 {QUICK}"
    code, _, err = run(line)
    assert code == 1 and err.startswith("error: ") and "Traceback" not in err
    assert message in err
    assert not (folder / "out" / "model.safetensors").exists()
    if cure:
        line = line.replace("--test test.xyz", "") if spoil is renamed else line
        code, _, err = run(f"{line} {cure}")
        assert code == 0, err


def test_truncated_file(folder: Path, run: Run) -> None:
    text = (folder / "train.xyz").read_text()
    (folder / "cut.xyz").write_text(text[: len(text) - 40])
    code, _, err = run("parent.safetensors --train cut.xyz")
    assert code == 1 and "cut.xyz" in err and "cut off" in err


def test_an_ase_database_is_read(folder: Path, run: Run) -> None:
    import ase.db
    from ase.calculators.singlepoint import SinglePointCalculator

    with ase.db.connect("train.db") as database:
        for atoms in read_labelled("train.xyz"):
            plain = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True)
            plain.calc = SinglePointCalculator(
                plain, energy=atoms.info["REF_energy"], forces=atoms.arrays["REF_forces"]
            )
            database.write(plain)
    code, out, err = run(f"parent.safetensors --train train.db -o out --epochs 1 {QUICK}")
    assert code == 0, err
    assert "energy from 'energy', forces from 'forces'" in out
    assert read_labelled("out/valid.xyz")[0].info["REF_energy"] < 0
