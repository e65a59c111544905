"""Certificates on disk, and the whole validation of a small model."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from types import SimpleNamespace

import ase.io
import numpy as np
import pytest
import torch
from ase.build import bulk
from markupsafe import escape
from pydantic import ValidationError

from compactmlip import checkpoint
from compactmlip.data.sample import SampleOptions
from compactmlip.errors import CheckpointError, InputError, SpeciesError
from compactmlip.validate import (
    Certificate,
    Stage,
    Thresholds,
    ValidateOptions,
    run,
    stages as validate_stages,
    validate,
)
from compactmlip.validate.checks import Check, overall
from compactmlip.validate.heldout import calmest, heldout_structures, typical
from compactmlip.validate.left_out import MOTION, LeftOut
from compactmlip.validate.parity import Labels, labels_of
from compactmlip.validate.resume import FOLDER

FAST = ValidateOptions(
    n_heldout=3,
    sample=SampleOptions(max_atoms=8, md_fraction=0.0),
    nve_seconds=1.0,
    nve_ps=0.3,
    teacher_nve_seconds=0.5,
    speed_seconds=0.3,
    sizes=(8,),
    repeats=2,
    nvt_seconds=0.5,
    ladder_seconds=0,
    npt_seconds=0,
    defect_seconds=0,
)


def test_round_trip_through_json(tmp_path, evidence):
    certificate, _ = evidence()
    path = certificate.save(tmp_path / "certificate.json")
    assert Certificate.load(path) == certificate
    assert json.loads(path.read_text())["schema_version"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["certificate.json"]


def test_not_a_number_survives_json(tmp_path, evidence):
    certificate, _ = evidence()
    broken = certificate.model_copy(
        update={"parity": certificate.parity.model_copy(update={"mean_force": float("nan")})}
    )
    text = broken.save(tmp_path / "c.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert np.isnan(Certificate.load(tmp_path / "c.json").parity.mean_force)


def test_what_is_not_a_certificate_is_refused(tmp_path, evidence):
    path = evidence()[0].save(tmp_path / "c.json")
    data = json.loads(path.read_text())
    for change in ({"schema_version": 1}, {"extra": 1}, {"nve": {**data["nve"], "extra": 1}}):
        path.write_text(json.dumps({**data, **change}))
        with pytest.raises(CheckpointError, match="not a compactmlip certificate"):
            Certificate.load(path)
    path.write_text("{")
    with pytest.raises(CheckpointError):
        Certificate.load(path)
    with pytest.raises(CheckpointError):
        Certificate.load(tmp_path / "missing.json")


def test_the_worst_check_decides():
    def check(verdict):
        return Check(name="x", verdict=verdict, value=1.0, unit="", reason="")

    assert overall([check("pass"), check("pass")]) == "pass"
    assert overall([check("pass"), check("warn")]) == "warn"
    assert overall([check("warn"), check("fail"), check("pass")]) == "fail"
    assert overall([]) == "fail"


def test_options_refuse_unknown_and_senseless_values():
    for bad in ({"n_holdout": 3}, {"timestep_fs": 0}, {"temperature_K": -1}, {"n_heldout": 0}):
        with pytest.raises(ValidationError):
            ValidateOptions(**bad)
    with pytest.raises(ValidationError):
        FAST.seed = 1  # type: ignore[misc]


@pytest.fixture(scope="module")
def files(tmp_path_factory, make_spec, make_model):
    """A weak, smooth teacher and a student whose parameters are slightly off."""
    folder = tmp_path_factory.mktemp("models")
    spec = make_spec(species=("Mg", "O"), channels=(4, 3), lmax_edge=1, num_layers=2)
    for name, change in (("teacher", 0.0), ("student", 0.002)):
        model = make_model(spec, dtype=torch.float32)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            model.get_buffer("energy_scale").mul_(0.2)
            for parameter in model.parameters():
                parameter.mul_(1 + change * torch.randn(parameter.shape, generator=generator))
        checkpoint.save(model, folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def validated(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "new"
    stages = [Stage(name="pruned", parameters=10, energy_mae=1.5)]
    crystal = bulk("MgO", "rocksalt", a=4.21, cubic=True)
    certificate = validate(
        files / "student.safetensors",
        files / "teacher.safetensors",
        [crystal],
        FAST,
        out,
        stages,
        progress=False,
    )
    return certificate, out


def test_validation_from_structures_alone(validated, files):
    certificate, out = validated
    assert {p.name for p in out.iterdir()} == {
        "certificate.json",
        "report.html",
        "heldout.extxyz",
        "validation.npz",
    }
    assert Certificate.load(out / "certificate.json") == certificate
    content = (files / "student.safetensors").read_bytes()
    assert certificate.model.sha256 == hashlib.sha256(content).hexdigest()
    assert certificate.model.bytes == len(content)
    assert certificate.model.parameters == certificate.teacher.parameters > 100
    assert (certificate.teacher.licence, certificate.model.species) == ("MIT", ("Mg", "O"))
    assert certificate.heldout.origin == "sampled" and certificate.heldout.reference == "teacher"
    assert certificate.parity.frames == 3 and certificate.teacher_parity is None
    assert 0 < certificate.parity.forces.mae < 0.1 * certificate.parity.mean_force
    assert certificate.speed[0].atoms_per_second.keys() == {"teacher", "model"}
    assert certificate.nve.stable and certificate.nve.steps >= 1
    assert certificate.verdict == overall(certificate.checks)
    verdicts = {c.name: c.verdict for c in certificate.checks}
    assert verdicts["forces are the gradient of the energy"] == "pass"
    assert verdicts["symmetry: rotation, permutation, translation"] == "pass"
    assert certificate.stages[0].energy_mae == 1.5
    reasons = {part.name: part.reason for part in certificate.left_out}
    assert reasons["density (NPT)"] == "Switched off (npt_seconds is 0)."
    assert reasons["engines agree"] == "The model is a checkpoint, not a deployed file."
    report = (out / "report.html").read_text(encoding="utf-8")
    listed = ", ".join(reasons)
    assert f"Not checked, for reasons listed below the verdicts: {listed}." in report
    for name, reason in reasons.items():
        assert f"<li>{name}: {escape(reason)}</li>" in report and not any(name in check for check in verdicts)


def test_numbers_can_be_recomputed_from_the_files(validated):
    certificate, out = validated
    arrays = np.load(out / "validation.npz")
    error = 1000 * (arrays["model_forces_eV_per_A"] - arrays["reference_forces_eV_per_A"])
    assert np.abs(error).mean() == pytest.approx(certificate.parity.forces.mae)
    frames = ase.io.read(out / "heldout.extxyz", ":")
    labels = labels_of(frames)
    np.testing.assert_array_equal(labels.energies, arrays["reference_energies_eV"])
    np.testing.assert_array_equal(np.concatenate(labels.forces), arrays["reference_forces_eV_per_A"])
    np.testing.assert_array_equal(labels.stresses, arrays["reference_stresses_eV_per_A3"])
    assert len(arrays["nve_model_total_eV"]) == certificate.nve.steps + 1


def test_given_labels_are_the_reference(validated, files, tmp_path):
    _, out = validated
    frames = ase.io.read(out / "heldout.extxyz", ":")
    for atoms in frames:
        atoms.info["REF_energy"] += 0.1 * len(atoms)
    only = FAST.model_copy(update={"teacher_nve_seconds": 0.0, "nve_seconds": 0.1})
    certificate = validate(
        files / "student.safetensors", files / "teacher.safetensors", frames, only, tmp_path, progress=False
    )
    assert certificate.heldout.reference == "labels" and certificate.heldout.seed is None
    assert certificate.parity.energy.bias == pytest.approx(-100, abs=10)
    assert certificate.teacher_parity is not None
    assert certificate.teacher_parity.energy.mae == pytest.approx(100, abs=0.1)
    assert certificate.teacher_parity.forces.mae == pytest.approx(0, abs=0.1)
    assert certificate.verdict == "fail" and certificate.teacher_nve is None
    assert LeftOut(name=MOTION, reason="Switched off (teacher_nve_seconds is 0).") in certificate.left_out
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "the teacher against the same reference" in report


def test_a_stopped_validation_continues(validated, files, tmp_path, monkeypatch):
    """What was measured is not measured again, and the numbers are those of an undisturbed run."""
    whole, _ = validated
    crystal = bulk("MgO", "rocksalt", a=4.21, cubic=True)
    arguments = (files / "student.safetensors", files / "teacher.safetensors", [crystal], FAST, tmp_path)

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run, "check_consistency", stop)
        with pytest.raises(KeyboardInterrupt):
            validate(*arguments, progress=False)
    assert {p.name for p in tmp_path.iterdir()} == {FOLDER}
    with monkeypatch.context() as patched:
        for name in ("heldout_structures", "compare_speed", "dynamics"):
            patched.setattr(run, name, stop)
        for name in ("short_range", "at_rest", "vibrations", "ladder"):
            patched.setattr(validate_stages, name, stop)
        certificate = validate(*arguments, progress=False)
    assert not (tmp_path / FOLDER).exists()
    for name in ("heldout", "parity", "consistency", "short_range", "crystal"):
        assert getattr(certificate, name) == getattr(whole, name), name


def test_dynamics_do_not_start_from_a_sampled_defect():
    """Unless there is nothing else, however small the forces in it are."""
    frames = [bulk("Cu", cubic=True) for _ in range(3)]
    forces = tuple(np.full((4, 3), size) for size in (0.1, 0.3, 0.2))
    labels = Labels(np.zeros(3), forces, np.zeros((3, 6)))
    assert calmest(frames, labels) is frames[0]
    frames[0].info["config_type"] = "vacancy"
    assert calmest(frames, labels) is frames[2]
    for atoms in frames:
        atoms.info["config_type"] = "surface"
    assert calmest(frames, labels) is frames[0]


def test_unusable_input_stops_before_any_work(files, tmp_path):
    student, teacher = files / "student.safetensors", files / "teacher.safetensors"
    with pytest.raises(InputError, match="no structure"):
        validate(student, teacher, [], FAST, tmp_path / "a", progress=False)
    with pytest.raises(SpeciesError, match="structure 0"):
        validate(student, teacher, [bulk("NaCl", "rocksalt", a=5.6)], FAST, tmp_path / "a", progress=False)
    with pytest.raises(CheckpointError):
        validate(tmp_path / "no.pt", teacher, [bulk("MgO", "rocksalt", a=4.2)], FAST, progress=False)
    assert not (tmp_path / "a").exists()


def test_sampling_needs_a_native_teacher(files, tmp_path):
    frames = [bulk("MgO", "rocksalt", a=4.2)]
    calculator = SimpleNamespace(spec=checkpoint.read_spec(files / "teacher.safetensors"))
    with pytest.raises(InputError, match="only be sampled with the teacher's checkpoint"):
        heldout_structures(
            frames, {"model": calculator, "teacher": calculator}, tmp_path / "t.pt", FAST, False
        )


def test_consistency_is_checked_where_forces_can_show_it():
    ideal, strained = bulk("MgO", "rocksalt", a=4.2, cubic=True), bulk("Mg")
    frames = [ideal, ideal, strained]
    zero, some = np.zeros((8, 3)), np.full((8, 3), 0.3)
    labels = Labels(np.zeros(3), (zero, some, np.full((1, 3), 9.0)), np.zeros((3, 6)))
    assert typical(frames, labels, 0) == ideal
    displaced = typical(frames[:1], labels, 0)
    assert 0.02 < np.abs(displaced.positions - ideal.positions).mean() < 0.08


def test_thresholds_can_be_changed_and_each_has_a_reason():
    limits = Thresholds.model_validate({"energy_mae": {"good": 0.1, "bad": 0.2}})
    assert limits.energy_mae.judge(0.15) == "warn" and limits.stress_mae == Thresholds().stress_mae
    assert all(getattr(Thresholds(), name).reason for name in Thresholds.model_fields)


def test_importing_does_not_load_the_plotting_library():
    code = "import sys, compactmlip.validate; print('matplotlib' in sys.modules, 'jinja2' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "matplotlib" not in result.stdout and result.stdout.startswith("False")
