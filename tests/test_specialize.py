"""The whole way on a small random teacher: results, continuation after an interruption, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
import yaml
from ase.build import bulk, molecule
from torch import nn

import compactmlip.specialize as module
from compactmlip import checkpoint
from compactmlip.compress.defaults import DEFAULTS, Cut
from compactmlip.compress.plan_file import Plan
from compactmlip.config import resolve
from compactmlip.deploy.ase import CompactMLIPCalculator
from compactmlip.errors import CompactMLIPError, InputError, SpeciesError
from compactmlip.models import build, model_spec, num_parameters
from compactmlip.spec import ModelSpec
from compactmlip.specialize import specialize
from compactmlip.specialize_folder import Folder
from compactmlip.specialize_options import SpecializeOptions, with_budgets

_MGO = [bulk("MgO", "rocksalt", a=4.21, cubic=True)]

FILES = {
    "config.yaml",
    "teacher.safetensors",
    "samples.xyz",
    "labelled.xyz",
    "train.xyz",
    "valid.xyz",
    "test.xyz",
    "pruned.safetensors",
    "compensated.safetensors",
    "distilled.safetensors",
    "model.pt",
    "certificate.json",
    "report.html",
}


@pytest.fixture(scope="module")
def teacher(
    make_spec: Callable[..., Any],
    make_model: Callable[..., nn.Module],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    spec = make_spec(channels=(8, 6, 4), num_layers=2, lmax_edge=2)
    model = make_model(spec, dtype=torch.float32)
    # A random network has no repulsion: keep it soft so that sampled structures stay sensible.
    for name, buffer in model.named_buffers():
        if name == "energy_scale":
            buffer.mul_(0.1)
    return checkpoint.save(model, tmp_path_factory.mktemp("teacher") / "teacher.safetensors")


def _options(teacher: Path, **more: Any) -> SpecializeOptions:
    settings = [
        "sample.n=20",
        "sample.max_atoms=8",
        "sample.md_fraction=0.1",
        "sample.md_steps=6",
        "distil.max_epochs=3",
        "validation.nve_seconds=1",
        "validation.teacher_nve_seconds=1",
        "validation.speed_seconds=0.5",
        "validation.sizes=[8]",
        "validation.repeats=1",
        "validation.nve_ps=0.05",
    ]
    given = {"teacher": str(teacher), "to": "5x0+4x1", "minutes": 1.0, **more}
    return resolve(SpecializeOptions, None, settings, **given)


@pytest.fixture(scope="module")
def finished(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "out"
    specialize([bulk("MgO", "rocksalt", a=4.21, cubic=True)], _options(teacher), folder, progress=False)
    return folder


def test_everything_is_there(finished: Path) -> None:
    assert {p.name for p in finished.iterdir()} >= FILES
    certificate = json.loads((finished / "certificate.json").read_text())
    names = [row["name"] for row in certificate["stages"]]
    assert names[1:] == ["teacher, species needed", "pruned", "pruned, compensated", "distilled"]
    parameters = [row["parameters"] for row in certificate["stages"]]
    assert parameters[0] > parameters[1] > parameters[2] == parameters[3] == parameters[4]
    assert certificate["stages"][2]["note"].startswith("5x0+4x1, ")
    assert certificate["stages"][2]["note"].endswith(" paths")
    splits = [len(ase.io.read(finished / f"{name}.xyz", ":")) for name in ("train", "valid", "test")]
    assert sum(splits) == 20 and min(splits) >= 1


def test_the_model_works_in_ase(finished: Path) -> None:
    atoms = bulk("MgO", "rocksalt", a=4.21, cubic=True)
    atoms.rattle(0.1, seed=3)
    atoms.calc = CompactMLIPCalculator(finished / "model.pt")
    assert np.isfinite(atoms.get_potential_energy()) and atoms.get_forces().shape == (8, 3)
    assert set(atoms.calc.spec.species) == {"Mg", "O"}
    actions = [step.action for step in atoms.calc.spec.provenance.steps]
    assert actions[0] == "prune" and actions[-1] in {"distil", "compile"}


def test_second_call_changes_nothing(finished: Path, teacher: Path) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in finished.iterdir() if p.suffix != ".yaml"}
    specialize([bulk("MgO", "rocksalt", a=4.21, cubic=True)], _options(teacher), finished, progress=False)
    assert before == {p.name: p.stat().st_mtime_ns for p in finished.iterdir() if p.suffix != ".yaml"}


def test_other_options_need_another_folder(finished: Path, teacher: Path) -> None:
    with pytest.raises(InputError, match="other options or structures"):
        specialize(
            [bulk("MgO", "rocksalt", a=4.21, cubic=True)], _options(teacher, seed=5), finished, progress=False
        )


@pytest.mark.parametrize("victim", ["sample", "label", "compress", "distil", "compile_model", "validate"])
def test_continues_after_an_interruption(
    teacher: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    """Stop before each step; the second call must not repeat what was done, and ends with the same model."""
    crystal = [bulk("MgO", "rocksalt", a=4.21, cubic=True)]

    def interrupt(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, victim, interrupt)
        with pytest.raises(KeyboardInterrupt):
            specialize(crystal, _options(teacher), tmp_path, progress=False)
    done = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir() if p.suffix in {".xyz", ".safetensors"}}
    specialize(crystal, _options(teacher), tmp_path, progress=False)
    for name, stamp in done.items():
        assert (tmp_path / name).stat().st_mtime_ns == stamp, name
    assert (tmp_path / "samples.xyz").read_bytes() == (finished / "samples.xyz").read_bytes()
    one, two = (checkpoint.load(f / "compensated.safetensors").state_dict() for f in (tmp_path, finished))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-5, atol=1e-6)


def test_species_outside_the_teacher(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(SpeciesError, match="Na"):
        specialize([bulk("NaCl", "rocksalt", a=5.6)], _options(teacher), tmp_path, progress=False)
    assert not list(tmp_path.glob("*.safetensors"))


def test_species_option_must_cover_the_structures(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="which are not among the species to keep"):
        specialize([molecule("H2O")], _options(teacher, species=("O",)), tmp_path, progress=False)


def test_no_structure(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no structure"):
        specialize([], None, tmp_path)


def test_paths_are_cut_where_no_channels_are_named(teacher: Path, tmp_path: Path) -> None:
    """The family's default keeps all channels but for those that no path makes any more."""
    options = _options(teacher).model_copy(update={"to": None, "minutes": 0.1})
    whole, cut = _pruned(options, tmp_path)
    paths = [sum(len(layer["paths"]) for layer in spec.architecture["layers"]) for spec in (whole, cut)]
    assert paths[1] < 0.5 * paths[0]
    assert cut.architecture["layers"][0]["out"][0] == whole.architecture["layers"][0]["out"][0]
    run = module._Run(Folder(tmp_path, options, _MGO), options, _MGO, False)
    assert run._cuts(checkpoint.load(teacher)) == list(DEFAULTS["nequip"])
    first, *others = DEFAULTS["nequip"]
    for given, wanted in (
        ({"to": "5x0"}, [Cut("5x0")]),
        ({"to": "5x0", "cut_paths": 0.25, "cutoffs": "-,2"}, [Cut("5x0", 0.25, "-,2")]),
        ({"cut_paths": 0.25}, [replace(first, cut_paths=0.25)]),
        ({"cutoffs": "-"}, [replace(cut, cutoffs="-") for cut in (first, *others)]),
    ):
        named = options.model_copy(update=given)
        assert module._Run(run.folder, named, _MGO, False)._cuts(checkpoint.load(teacher)) == wanted


def test_cutoffs_reach_the_model(teacher: Path, tmp_path: Path) -> None:
    _, cut = _pruned(_options(teacher, cutoffs="-,60%"), tmp_path / "a")
    layers = [layer.get("cutoff") for layer in cut.architecture["layers"]]
    assert layers[0] is None and layers[1] == pytest.approx(0.6 * cut.cutoff)
    budget = _options(teacher, to=None, budget="flops=60%", cutoffs="-,60%")
    _, cut = _pruned(budget, tmp_path / "b")
    assert [layer.get("cutoff") for layer in cut.architecture["layers"]] == layers


@pytest.mark.parametrize("better", [0, 1])
def test_the_candidate_that_learns_best_goes_on(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, better: int
) -> None:
    """Whichever it is; its weights of the short training are what the long one begins with."""
    monkeypatch.setitem(DEFAULTS, "nequip", (Cut("8x0+6x1+4x2", 0.5), Cut("4x0+3x1")))
    options = _options(teacher, to=None, minutes=12.0)
    run = _until_pruned(options, tmp_path)
    trainings: list[tuple[float, dict[str, Any]]] = []

    def trained(student: nn.Module, *args: Any, **given: Any) -> Any:
        result = module_distil(student, *args, **given)
        trainings.append((args[2].max_minutes, student.state_dict()))
        if len(trainings) == better + 1:
            result.history[-1]["valid_loss"] = 0.0
        return result

    module_distil = module.distil
    monkeypatch.setattr(module, "distil", trained)
    assert run.folder.step("choose", run.choose)["chosen"] == better
    kept = model_spec(checkpoint.load(tmp_path / "compensated.safetensors"))
    assert kept.architecture["layers"][0]["out"][0] == (8, 4)[better]
    weights = [
        checkpoint.load(tmp_path / name).state_dict()
        for name in ("started.safetensors", f"candidates/trial-{better}/best.safetensors")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    run.folder.step("distil", run.distil)
    assert all(torch.equal(trainings[2][1][name], weights[0][name]) for name in weights[0])
    wanted = [module.TRIAL_SHARE * trainings[2][0]] * 2
    assert [minutes for minutes, _ in trainings[:2]] == pytest.approx(wanted, rel=0.2)
    assert checkpoint.read_spec(tmp_path / "distilled.safetensors").architecture == kept.architecture
    assert "chosen among force errors of" in run._stage("distilled", "distilled").note
    assert "chosen" not in run._stage("pruned", "pruned").note


@pytest.mark.parametrize(("factor", "chosen"), [(0.95, 0), (0.85, 1), (1.2, 0)])
def test_the_first_candidate_stays_if_in_doubt(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float, chosen: int
) -> None:
    monkeypatch.setitem(DEFAULTS, "nequip", (Cut("8x0+6x1", 0.0), Cut("4x0+3x1")))
    options = _options(teacher, to=None, minutes=12.0)
    run = _until_pruned(options, tmp_path)
    losses = iter((1.0, factor))

    def trained(*args: Any, **given: Any) -> Any:
        result = module_distil(*args, **given)
        result.history[:] = [{**result.history[-1], "valid_loss": next(losses)}]
        return result

    module_distil = module.distil
    monkeypatch.setattr(module, "distil", trained)
    assert run.choose()["chosen"] == chosen


def test_no_trial_where_there_is_no_time_for_it(teacher: Path, tmp_path: Path) -> None:
    options = _options(teacher, to=None, minutes=0.1)
    _pruned(options, tmp_path)
    run = module._Run(Folder(tmp_path, options, _MGO), options, _MGO, False)
    assert run.choose() == {"chosen": 0, "forces_mae": [], "minutes": 0.0}
    assert not (tmp_path / "started.safetensors").exists()


def _until_pruned(options: SpecializeOptions, folder: Path) -> Any:
    """A run after its first steps."""
    run = module._Run(Folder(folder, options, _MGO), options, _MGO, False)
    for name in ("teacher", "sample", "label", "prune"):
        run.folder.step(name, getattr(run, name))
    return run


def _pruned(options: SpecializeOptions, folder: Path) -> tuple[ModelSpec, ModelSpec]:
    """Teacher and pruned model after the first steps."""
    _until_pruned(options, folder)
    names = ("teacher", "candidates/pruned-0")
    teacher, cut = (model_spec(checkpoint.load(folder / f"{name}.safetensors")) for name in names)
    return teacher, cut


def test_a_plan_says_what_is_kept(teacher: Path, tmp_path: Path) -> None:
    """A file is as good as the plan itself, also in config.yaml, which a second run may begin with."""
    plan = Plan(layers=("6x0+5x1", "4x0"), edge_order=1, without_paths=("layers.1.path/1-1-0",))
    file = plan.save(tmp_path / "plan.json")
    _, cut = _pruned(_options(teacher, to=None, plan=file), tmp_path / "a")
    layers = cut.architecture["layers"]
    assert [layer["out"] for layer in layers] == [[6, 5], [4]]
    assert layers[1]["paths"] == [[0, 0, 0]]
    settings = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert resolve(SpecializeOptions, tmp_path / "a" / "config.yaml", []).plan == plan
    assert settings["plan"]["layers"] == ["6x0+5x1", "4x0"]


def test_a_budget_is_kept_to(teacher: Path, tmp_path: Path) -> None:
    options = _options(teacher, to=None, budget="parameters=70%", minutes=0.1)
    whole, cut = _pruned(options, tmp_path)
    sizes = [num_parameters(build(spec)) for spec in (whole, cut)]
    assert 0.5 * sizes[0] < sizes[1] <= 0.7 * sizes[0]
    run = module._Run(Folder(tmp_path, options, _MGO), options, _MGO, False)
    run.folder.step("choose", run.choose)
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.made_by["budget"] == "parameters=70%"
    assert list(plan.channels[0]) == cut.architecture["layers"][0]["out"]


def test_a_budget_that_cuts_paths_begins_with_many_channels_and_with_fewer(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DEFAULTS, "nequip", (Cut("8x0+6x1+4x2", 0.5), Cut("4x0+3x1", 0.3)))
    _pruned(_options(teacher, to=None, budget="flops=40%"), tmp_path)
    plans = [Plan.load(tmp_path / "candidates" / f"plan-{k}.json") for k in (0, 1)]
    assert plans[0].channels[0][0] == 8 and plans[1].channels[0][0] == 4
    assert all(plan.made_by["cost"] <= 0.4 * plan.made_by["cost_uncut"] for plan in plans)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan": Plan(layers=("5x0",))}, "leave out to"),
        ({"plan": Plan(layers=("5x0",)), "to": None, "odd_paths": True}, "leave out odd_paths"),
        ({"plan": Plan(layers=("5x0",)), "to": None, "cutoffs": "-"}, "leave out cutoffs"),
        ({"plan": "absent.json", "to": None}, "cannot read the plan"),
        ({"budget": "latency=8x", "cut_paths": 0.5}, "leave out cut_paths"),
        ({"budget": "latency=8x", "plan": Plan(layers=("5x0",)), "to": None}, "leave out budget"),
        ({"budget": "speed=8x"}, "cannot read the budget"),
    ],
)
def test_contradictions(teacher: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _options(teacher, **options)


def test_validation_gets_its_share_of_the_time() -> None:
    short, long = (with_budgets(SpecializeOptions(minutes=m)).validation for m in (6.0, 12.0))
    assert long.nve_seconds == pytest.approx(2 * short.nve_seconds)
    given = resolve(SpecializeOptions, None, ["validation.nve_seconds=5"])
    assert with_budgets(given).validation.nve_seconds == 5


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "species": ({"species": ("O",)}, "not among the species to keep"),
    "target of another depth": ({"to": "5x0,5x0,5x0"}, "lists 3 layers"),
    "target without scalars": ({"to": "5x1"}, "needs scalar channels"),
    "target that cuts nothing": ({"to": "9x0+9x1+9x2", "odd_paths": True}, "cuts nothing"),
    "unreadable target": ({"to": "5y0"}, "cannot read channels"),
    "teacher": ({"teacher": "absent.safetensors"}, "no such file"),
    "plan of another depth": ({"to": None, "plan": Plan(layers=("5x0",) * 3)}, "3 layers"),
    "cutoff beyond the model's": (
        {"to": None, "plan": Plan(layers=("5x0",) * 2, cutoffs=(None, 99.0))},
        "layer 1: the cutoff must be above 0",
    ),
    "cutoffs that cannot be read": ({"cutoffs": "near"}, "cannot read 'near' in the cutoffs"),
    "cutoffs beyond the model's": ({"cutoffs": "-,99"}, "layer 1: the cutoff must be above 0"),
    "budget with cutoffs of more layers": (
        {"to": None, "budget": "flops=40%", "cutoffs": "3,2,2"},
        "lists cutoffs of 3 layers",
    ),
    "budget that ranks all channels": ({"budget": "parameters=40%"}, "only one of --to and --budget"),
    "licence": ({"teacher": "mace-omat-0-small"}, "accept"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_does_not_claim_the_folder(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    """The corrected command works in the same folder, with no time counted for the mistake."""
    crystal = [bulk("MgO", "rocksalt", a=4.21, cubic=True)]
    wrong = _options(teacher).model_copy(update=WRONG[mistake][0])
    with pytest.raises(CompactMLIPError, match=WRONG[mistake][1]):
        specialize(crystal, wrong, tmp_path, progress=False)
    failed = json.loads((tmp_path / "state.json").read_text())
    assert failed["results"] == {} and not list(tmp_path.glob("*.safetensors"))

    def stop(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "sample", stop)
        with pytest.raises(KeyboardInterrupt):
            specialize(crystal, _options(teacher), tmp_path, progress=False)
        state = json.loads((tmp_path / "state.json").read_text())
        assert state["identity"] != failed["identity"] and set(state["results"]) == {"teacher"}
        assert yaml.safe_load((tmp_path / "config.yaml").read_text())["to"] == "5x0+4x1"
        # From the first result on, the folder belongs to these options.
        with pytest.raises(InputError, match="other options or structures"):
            specialize(crystal, _options(teacher, seed=7), tmp_path, progress=False)
