"""Fine-tuning: starts exactly at its parent, learns, resumes, and says what it changed."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from torch import nn

from compactmlip import checkpoint
from compactmlip.compress.apply import keep_species
from compactmlip.data.graph import build_graph
from compactmlip.errors import InputError, SelfCheckError
from compactmlip.train import finetune as module, loop
from compactmlip.train.finetune import MODEL_FILE, NOTHING_BETTER, FinetuneData, FinetuneResult, finetune
from compactmlip.train.finetune_options import FinetuneOptions
from compactmlip.train.forgetting import labelled_by
from compactmlip.train.reference import fit_reference, isolated_energies

SHIFTS = {"O": -13.0, "Mg": 7.5}
NO_STEP = 1e-300


@pytest.fixture
def parent(make_spec: Callable[..., Any], make_model: Callable[..., nn.Module]) -> nn.Module:
    """A model of five species."""
    return make_model(make_spec(channels=(4, 3), num_layers=2, lmax_edge=1, cutoff=3.2), seed=3)


@pytest.fixture
def truth(parent: nn.Module) -> nn.Module:
    """The parent with weights off by a twentieth and other energies of free atoms."""
    model = copy.deepcopy(parent)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "basis.wave_numbers":
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += 0.05 * noise
        for symbol, shift in SHIFTS.items():
            model.energy_shift[model.spec.species.index(symbol)] += shift
    return model


def structures(count: int) -> list[Atoms]:
    made = []
    for k in range(count):
        atoms = bulk("MgO", "rocksalt", a=4.21, cubic=True)
        atoms.rattle(0.1, seed=k)
        if k % 3 == 2:
            del atoms[k % 8]
        atoms.info["config_type"] = "vacancy" if k % 3 == 2 else "bulk"
        made.append(atoms)
    return made


@pytest.fixture
def data(truth: nn.Module) -> FinetuneData:
    frames = labelled_by(truth, structures(12))
    return FinetuneData(frames[:8], frames[8:10], frames[10:])


def options(**changes: Any) -> FinetuneOptions:
    defaults = {
        "max_epochs": 3,
        "batch_atoms": 16,
        "lr": 0.01,
        "dtype": "float64",
        "forgetting_structures": 2,
    }
    return FinetuneOptions.parse(**{**defaults, **changes})


@pytest.fixture
def run(parent: nn.Module, data: FinetuneData, tmp_path: Path) -> Callable[..., FinetuneResult]:
    def tuned(folder: str = "run", frames: FinetuneData = data, **changes: Any) -> FinetuneResult:
        return finetune(parent, frames, options(**changes), tmp_path / folder, progress=False)

    return tuned


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_step_zero_is_the_parent_up_to_the_shift(
    run: Callable[..., FinetuneResult], parent: nn.Module, data: FinetuneData
) -> None:
    result = run(lr=NO_STEP, max_epochs=1)
    assert result.removed_species == ("H", "C", "Si") and result.model.spec.species == ("O", "Mg")
    assert result.best_epoch == 0 and NOTHING_BETTER in result.notes
    assert result.start.energy < 1e-11 and result.start.forces < 1e-10
    assert torch.equal(weights(result.model), weights(keep_species(parent, ("O", "Mg"))))
    # Row 0 of the history has the parent's own force error, and energies after a shift by the least squares.
    found = labelled_by(parent, data.valid)
    error = [f.arrays["REF_forces"] - a.arrays["REF_forces"] for f, a in zip(found, data.valid, strict=True)]
    expected = 1e3 * np.abs(np.concatenate(error)).mean()
    assert result.history[0]["forces_mae_meV_per_A"] == pytest.approx(expected, rel=1e-9)
    shift = result.reference.shifts
    moved = [
        (f.info["REF_energy"] + sum(shift[s] for s in f.get_chemical_symbols()) - a.info["REF_energy"])
        / len(a)
        for f, a in zip(found, data.valid, strict=True)
    ]
    expected = 1e3 * np.abs(moved).mean()
    assert result.history[0]["energy_mae_meV_per_atom"] == pytest.approx(expected, rel=1e-6)
    assert result.reference.mae["least-squares"] < 0.05 < 1.0 < result.reference.mae["parent"]


def test_learns_and_reports_before_and_after(
    run: Callable[..., FinetuneResult], data: FinetuneData, tmp_path: Path
) -> None:
    result = run(max_epochs=30, lr=0.02)
    for errors in result.sets.values():
        assert errors.after.forces.mae < 0.5 * errors.before.forces.mae
        assert errors.after.energy.mae < errors.before.energy.mae
    test = result.sets["test"]
    assert {row.name: row.frames for row in test.rows_after} == {"bulk": 1, "vacancy": 1}
    parts = sum(row.forces.mae * row.atoms for row in test.rows_after) / test.atoms
    assert parts == pytest.approx(test.after.forces.mae)
    saved = checkpoint.load(tmp_path / "run" / MODEL_FILE)
    assert torch.equal(weights(saved), weights(result.model))
    (keep, step) = saved.spec.provenance.steps[-2:]
    assert keep.action == "keep species" and step.action == "finetune"
    assert step.options["e0_shifts"] == result.reference.shifts and step.options["train_frames"] == 8


def test_a_wrong_start_is_noticed(
    run: Callable[..., FinetuneResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = module.shifted

    def wrong(model: nn.Module, shifts: dict[str, float]) -> nn.Module:
        made = original(model, shifts)
        with torch.no_grad():
            made.readout.weight.mul_(1.001)
        return made

    monkeypatch.setattr(module, "shifted", wrong)
    with pytest.raises(SelfCheckError, match="more than rounding"):
        run()


def test_interrupted_run_resumes_bit_for_bit(
    run: Callable[..., FinetuneResult], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = run("whole", replay_structures=2)
    original, left = loop.residuals, [5]

    def stop(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "residuals", stop)
        with pytest.raises(KeyboardInterrupt):
            run("parts", replay_structures=2)
    assert torch.equal(weights(run("parts", replay_structures=2).model), weights(whole.model))
    with pytest.raises(InputError, match="other frames or other options"):
        run("parts", replay_structures=2, lr=0.02)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
import torch
torch.set_num_threads(1)
from compactmlip import checkpoint
from compactmlip.data.read import read_labelled
from compactmlip.train import loop
from compactmlip.train.finetune import FinetuneData, finetune
from compactmlip.train.finetune_options import FinetuneOptions
original, left = loop.residuals, [int(sys.argv[3])]
def kill(*args, **kwargs):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
loop.residuals = kill
frames = read_labelled("frames.xyz")
options = FinetuneOptions.model_validate_json(sys.argv[2])
finetune(checkpoint.load("parent.safetensors"), FinetuneData(frames[:8], frames[8:10], frames[10:]), options,
         Path(sys.argv[1]), progress=False)
"""


def test_killed_process_resumes_to_the_same_model(
    parent: nn.Module, data: FinetuneData, tmp_path: Path
) -> None:
    from compactmlip.data.read import write_labelled

    frames = [*data.train, *data.valid, *data.test]
    write_labelled(tmp_path / "frames.xyz", frames)
    checkpoint.save(parent, tmp_path / "parent.safetensors")
    settings = options(checkpoint_minutes=0, forgetting_structures=0)
    whole = finetune(parent, data, settings, tmp_path / "whole", progress=False)
    root = str(Path(__file__).resolve().parents[2])
    words = [sys.executable, "-c", KILLED, "parts", settings.model_dump_json(), "6", root]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (tmp_path / "parts" / MODEL_FILE).exists()
    resumed = finetune(parent, data, settings, tmp_path / "parts", progress=False)
    assert torch.equal(weights(resumed.model), weights(whole.model))


def test_finished_folder_is_not_overwritten_by_other_data(
    run: Callable[..., FinetuneResult], data: FinetuneData
) -> None:
    run(max_epochs=1)
    other = FinetuneData(data.train[:7], data.valid, data.test)
    with pytest.raises(InputError, match="holds a"):
        run(frames=other, max_epochs=1)


def test_frozen_parameters_stay(run: Callable[..., FinetuneResult], parent: nn.Module) -> None:
    result = run(freeze=("layers.0", "basis", "embedding*", "!layers.0.up"))
    before = dict(keep_species(parent, ("O", "Mg")).named_parameters())
    moved = {n for n, p in result.model.named_parameters() if not torch.equal(p, before[n])}
    frozen = {n for n in before if n.startswith(("layers.0", "basis", "embedding"))}
    frozen -= {n for n in frozen if n.startswith("layers.0.up")}
    assert frozen and moved and moved == set(before) - frozen
    assert result.trained_parameters == sum(before[n].numel() for n in moved)


@pytest.mark.parametrize(
    ("patterns", "message"), [(("layer.0",), "no parameter is called so"), (("*",), "nothing to train")]
)
def test_freezing_nothing_or_all_is_refused(
    run: Callable[..., FinetuneResult], patterns: tuple[str, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(freeze=patterns)


def test_low_rank_updates_are_merged(run: Callable[..., FinetuneResult], parent: nn.Module) -> None:
    result = run(lora_rank=1, max_epochs=5)
    before = dict(keep_species(parent, ("O", "Mg")).named_parameters())
    after = dict(result.model.named_parameters())
    assert after.keys() == before.keys()
    assert result.trained_parameters < result.parameters
    changes = {n: (after[n] - before[n]).detach() for n in before}
    ranks = {n: int(torch.linalg.matrix_rank(c, atol=1e-10).max()) for n, c in changes.items() if c.ndim >= 2}
    thin = {n for n, c in changes.items() if c.ndim >= 2 and c.shape[-1] * c.shape[-2] <= sum(c.shape[-2:])}
    wide = {n: rank for n, rank in ranks.items() if n not in thin}
    assert wide and set(wide.values()) <= {0, 1} and 1 in wide.values()
    with pytest.raises(InputError, match="rank 50"):
        run("other", lora_rank=50)
    with pytest.raises(InputError, match="not both"):
        options(lora_rank=1, freeze=("layers.0",))


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ((1 / 27.2114, 1.0), "look like Hartree"),
        ((1.0, 1 / 51.4221), "look like Hartree/Bohr"),
        ((23.0605, 23.0605), "(?s)look like kcal/mol,.*look like kcal/mol/Angstrom"),
        ((1.0, -1.0), "sign looks reversed"),
    ],
)
def test_other_units_are_suspected(
    run: Callable[..., FinetuneResult], data: FinetuneData, factors: tuple[float, float], message: str
) -> None:
    for atoms in data.train:
        atoms.info["REF_energy"] *= factors[0]
        atoms.arrays["REF_forces"] *= factors[1]
    with pytest.raises(InputError, match=message):
        run()
    assert run(accept=("units",), max_epochs=1).notes[0].startswith("units: ")


def test_frames_without_weight_and_without_forces(
    run: Callable[..., FinetuneResult], data: FinetuneData
) -> None:
    for atoms in data.train[::3]:
        atoms.info["config_type"] = "energies only"
        del atoms.arrays["REF_forces"]
    with pytest.raises(InputError, match="has no REF_forces"):
        run()
    first = run("a", accept=("missing-forces",), e0="parent", config_weights={"energies only": 0.0})
    for atoms in data.train[::3]:
        atoms.info["REF_energy"] += 0.3  # which only matters where the energy counts
    second = run("b", accept=("missing-forces",), e0="parent", config_weights={"energies only": 0.0})
    third = run("c", accept=("missing-forces",), e0="parent")
    assert torch.equal(weights(first.model), weights(second.model))
    assert not torch.equal(weights(second.model), weights(third.model))


def test_forgetting_is_measured_against_the_parent(run: Callable[..., FinetuneResult]) -> None:
    still = run("still", lr=NO_STEP, max_epochs=1, keep_species=("all",))
    assert [f.name for f in still.forgetting] == [
        "perturbed training structures",
        "the same with other species",
    ]
    assert still.removed_species == ()
    for found in still.forgetting:
        assert found.errors.forces.max < 1e-6 and found.mean_force > 10
    moved = run("moved", keep_species=("all",), max_epochs=10, lr=0.005)
    assert moved.best_epoch > 0 and all(f.errors.forces.mae > 0.1 for f in moved.forgetting)


def test_replayed_structures_have_the_shifted_labels_of_the_parent(
    run: Callable[..., FinetuneResult], parent: nn.Module, data: FinetuneData
) -> None:
    """With the parent's own labels, energies counted from another zero, there is nothing to learn."""

    def own(frames: Sequence[Atoms]) -> list[Atoms]:
        made = labelled_by(parent, frames)
        for atoms in made:
            atoms.info["REF_energy"] += sum(SHIFTS[s] for s in atoms.get_chemical_symbols())
        return made

    frames = FinetuneData(own(data.train), own(data.valid))
    changes = {"frames": frames, "max_epochs": 1, "keep_species": ("all",), "lr": NO_STEP}
    plain = run("plain", **changes)
    replayed = run("replayed", **changes, replay_structures=6)
    assert replayed.reference.shifts["Mg"] == pytest.approx(SHIFTS["Mg"], abs=1e-6)
    assert replayed.history[-1]["loss"] < 1e-12
    assert replayed.history[-1]["steps"] > plain.history[-1]["steps"]
    assert run("other", max_epochs=1, lr=NO_STEP, replay_structures=6).history[-1]["loss"] > 1e-3


def test_isolated_atoms_give_the_energies_of_free_atoms(
    parent: nn.Module, truth: nn.Module, data: FinetuneData, run: Callable[..., FinetuneResult]
) -> None:
    free = isolated_energies(truth)
    alone = truth(*_inputs(truth, Atoms("Mg")))
    assert free["Mg"] == pytest.approx(float(alone.detach()), abs=1e-12)
    frames = FinetuneData(data.train, data.valid, data.test, {s: free[s] for s in SHIFTS})
    result = run("isolated", frames=frames, e0="isolated", lr=NO_STEP, max_epochs=1)
    assert result.reference.source == "isolated"
    found = isolated_energies(result.model)
    assert {s: found[s] for s in SHIFTS} == pytest.approx({s: free[s] for s in SHIFTS}, abs=1e-9)
    with pytest.raises(InputError, match="do not name Mg"):
        run("lacking", frames=FinetuneData(data.train, data.valid, (), {"O": 1.0}), e0="isolated")
    with pytest.raises(InputError, match="do not name O"):
        run("given", e0={"Mg": -1.0})


def _inputs(model: nn.Module, atoms: Atoms) -> tuple[torch.Tensor, ...]:
    graph = build_graph(atoms, model.spec)
    return graph.species, graph.centers, graph.neighbors, graph.vectors


def test_choice_of_reference_energies() -> None:
    counts = np.array([[2.0, 1.0], [1.0, 1.0], [3.0, 1.0], [2.0, 2.0]])
    missing = counts @ [0.5, -2.0] + [1e-3, -1e-3, 1e-3, -1e-3]
    zero = {"O": 0.0, "Mg": 0.0}
    fitted = fit_reference("auto", ("O", "Mg"), counts, missing, {}, zero)
    assert fitted.source == "least-squares"
    assert fitted.shifts == pytest.approx({"O": 0.5, "Mg": -2.0}, abs=0.01)
    good = fit_reference("auto", ("O", "Mg"), counts, missing, {"O": 0.5, "Mg": -2.0}, zero)
    assert good.source == "isolated" and not good.note
    bad = fit_reference("auto", ("O", "Mg"), counts, missing, {"O": 1.5, "Mg": -2.0}, zero)
    assert bad.source == "least-squares" and "--e0 isolated" in bad.note
    given = fit_reference({"O": 1.0, "Mg": 2.0}, ("O", "Mg"), counts, missing, {}, {"O": 0.25, "Mg": 0.5})
    assert given.source == "given" and given.shifts == {"O": 0.75, "Mg": 1.5}
    more = fit_reference("auto", ("O", "Mg", "Si"), np.c_[counts, np.zeros(4)], missing, {}, zero)
    assert more.shifts["Si"] == pytest.approx(0, abs=1e-12) and more.note.startswith("Si are not in the data")
    # Water alone: only H2O's energy is known, and it is shared by the smallest shifts.
    water = np.array([[2.0, 1.0], [4.0, 2.0], [8.0, 4.0]])
    fitted = fit_reference("auto", ("H", "O"), water, water @ [1.0, 3.0], {}, {"H": 0.0, "O": 0.0})
    assert fitted.shifts == pytest.approx({"H": 2.0, "O": 1.0}) and "1 combinations" in fitted.note
