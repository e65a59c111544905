"""Commands that score, cut by a plan or a budget, and search."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ase.io
import pytest
import torch
from ase.build import bulk
from cli_runs import run_cli
from torch import nn

from compactmlip.checkpoint import load, save
from compactmlip.compress.plan_file import Plan
from compactmlip.models import model_spec, num_parameters

Run = Callable[[str], tuple[int, str, str]]


@pytest.fixture
def run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    make_spec: Callable[..., Any],
    make_model: Callable[..., nn.Module],
) -> Run:
    """Run a command line in a folder with a model and structures."""
    spec = make_spec(channels=(8, 4), num_layers=2, lmax_edge=1, cutoff=3.0, species=("Mg", "O"))
    save(make_model(spec, dtype=torch.float32), tmp_path / "teacher.safetensors")
    frames = []
    for seed in range(12):
        atoms = bulk("MgO", "rocksalt", a=4.21)
        atoms.rattle(0.1, seed=seed)
        frames.append(atoms)
    ase.io.write(tmp_path / "mgo.xyz", frames)
    monkeypatch.chdir(tmp_path)

    return partial(run_cli, monkeypatch, capsys)


def test_scores_budget_and_plan(run: Run) -> None:
    code, out, err = run(
        "importance teacher.safetensors --calibration mgo.xyz --criterion hessian --resamples 1 --json"
    )
    assert code == 0, err
    found = json.loads(out)
    assert 0 < found["overlap"] <= 1 and len(found["layer_relevance"]) == 2
    assert Path("scores.png").stat().st_size > 1000
    assert json.loads(Path("scores.stability.json").read_text())["criterion"] == "hessian"

    code, out, err = run(
        "prune teacher.safetensors --calibration mgo.xyz --importance scores.safetensors --round-to 2 "
        "--budget parameters=50% -o half.safetensors --json"
    )
    assert code == 0, err
    found = json.loads(out)
    assert found["parameters"] <= 0.5 * found["parameters_before"]
    plan = Plan.load("half.plan.json")
    assert plan.importance == "hessian" and plan.made_by["budget"] == "parameters=50%"

    code, out, err = run(
        "prune teacher.safetensors --calibration mgo.xyz --plan half.plan.json --importance "
        "scores.safetensors -o again.safetensors --json"
    )
    assert code == 0, err
    one, two = load("half.safetensors"), load("again.safetensors")
    assert model_spec(one).architecture == model_spec(two).architecture
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--to 4x0 --budget parameters=50%", "give only one of --to and --budget"),
        ("--budget sweets=50%", "cannot read the budget"),
        ("--cut-paths 0.5 --budget flops=50%", "give only one of --budget and --cut-paths"),
        ("--to 4x0 --cut-paths 1.5", "between 0 and 1"),
        ("--layers 1 --cut-paths 0.5", "need a target"),
        ("--plan plan.json --cutoffs -,2", "give only one of --plan and --cutoffs"),
        ("--to 4x0 --cutoffs -,far", "cannot read 'far' in the cutoffs"),
        ("--to 4x0 --cutoffs 12", "at most the model's"),
        ("--to 4x0 --first paths", "give --budget as well"),
        ("--plan none.json", "cannot read the plan none.json"),
        ("--importance none.safetensors", "no such file"),
        ("--to 4x0 --importance taylr", "unknown importance 'taylr'"),
        ("--budget parameters=3", "cannot be met"),
    ],
)
def test_what_cannot_be_is_refused(run: Run, options: str, message: str) -> None:
    code, _, err = run(f"prune teacher.safetensors --calibration mgo.xyz {options}")
    assert code == 1
    assert message in err
    assert not Path("pruned.safetensors").exists()


def test_paths_are_cut(run: Run) -> None:
    prune = "prune teacher.safetensors --calibration mgo.xyz --to 8x0+4x1 --json"
    code, out, err = run(f"{prune} --cut-paths 0.5")
    assert code == 0, err
    whole, cut = (model_spec(load(f"{name}.safetensors")) for name in ("teacher", "pruned"))
    paths = [[len(layer["paths"]) for layer in spec.architecture["layers"]] for spec in (whole, cut)]
    assert sum(paths[1]) < sum(paths[0]) and cut.architecture["layers"][0]["out"][0] == 8
    code, out, err = run(f"{prune} --budget flops=60% -o less.safetensors")
    assert code == 0, err
    plan = Plan.load("less.plan.json")
    assert json.loads(out)["without_paths"] == list(plan.without_paths)
    assert plan.made_by["cost"] <= 0.6 * plan.made_by["cost_uncut"]


def test_cutoffs_of_layers(run: Run) -> None:
    """By default, of a target, and of a budget that cuts half or more."""
    prune = "prune teacher.safetensors --calibration mgo.xyz --json"
    whole = model_spec(load("teacher.safetensors"))
    short = round(0.8 * whole.cutoff, 2)
    for options, wanted in (
        ("--to 8x0+4x1 --cutoffs -,2.5", [None, 2.5]),
        ("--to 4x0+2x1", [None, None]),
        ("", [None, short]),
        ("--cutoffs -", [None, None]),
        ("--budget flops=40%", [None, short]),
        ("--budget flops=40% --cutoffs -", [None, None]),
        ("--budget flops=80%", [None, None]),
    ):
        code, out, err = run(f"{prune} {options}")
        assert code == 0, err
        spec = model_spec(load("pruned.safetensors"))
        assert [layer.get("cutoff") for layer in spec.architecture["layers"]] == wanted, options
        if "budget" in options:
            assert json.loads(out)["cutoffs"] == (wanted if any(wanted) else None)


def test_search(run: Run) -> None:
    values = ("atoms=16", "round_to=2", "fit_atoms=14", "held_out_atoms=6", "repeats=1", "splits=1")
    settings = " ".join(f"--set {value}" for value in values)
    code, out, err = run(
        f"search teacher.safetensors --data mgo.xyz --memory 2GB --candidates 2 {settings} --json"
    )
    assert code == 0, err
    found = json.loads(out)
    assert found["candidates"] == 2 and found["meets_target"]
    assert num_parameters(load("search/pruned.safetensors")) == found["parameters"]
    code, _, err = run(f"search teacher.safetensors --data mgo.xyz --speedup fast {settings}")
    assert code == 1 and "speedup" in err


def test_harmonics_of_edges_may_reach_higher_than_features(
    run: Run, make_spec: Callable[..., Any], make_model: Callable[..., nn.Module]
) -> None:
    spec = make_spec(channels=(8, 4, 4), num_layers=3, lmax_edge=2, cutoff=3.0, species=("Mg", "O"))
    save(make_model(spec, dtype=torch.float32), "teacher.safetensors")
    sizes = {}
    for options in ("", "--edge-order 2"):
        line = f"prune teacher.safetensors --calibration mgo.xyz --to 4x0+2x1 {options} -o cut.safetensors"
        code, out, err = run(f"{line} --json")
        assert code == 0, err
        kept = model_spec(load("cut.safetensors"))
        sizes[kept.architecture["lmax_edge"]] = json.loads(out)["parameters"]
        assert kept.provenance.steps[0].options.get("edge_order") == (2 if options else None)
    assert sorted(sizes) == [1, 2] and sizes[1] < sizes[2], "paths that only l = 2 of edges allows"
