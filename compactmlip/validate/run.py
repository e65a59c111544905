"""The whole validation: held-out errors, consistency, NVE, short distances, speed; the certificate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ase import Atoms

from compactmlip.data.read import ISOLATED_ATOM
from compactmlip.errors import InputError, SelfCheckError
from compactmlip.spec import DTypeName
from compactmlip.validate import certificate as cert
from compactmlip.validate.checks import (
    Check,
    consistency_checks,
    crystal_checks,
    cutoff_checks,
    engine_checks,
    nve_checks,
    overall,
    parity_checks,
    phonon_checks,
    short_range_checks,
    structure_checks,
)
from compactmlip.validate.checks_dynamics import (
    defect_checks,
    density_checks,
    ladder_checks,
    motion_checks,
    sampling_checks,
    thermostat_checks,
    vibration_checks,
)
from compactmlip.validate.consistency import check_consistency
from compactmlip.validate.cutoff import cutoff_step
from compactmlip.validate.engines import compare_deployed
from compactmlip.validate.environment import errors_by_environment
from compactmlip.validate.heldout import calmest, heldout_structures, typical
from compactmlip.validate.left_out import MOTION, LeftOut, unjudged, unstable
from compactmlip.validate.making import read_making
from compactmlip.validate.motion import compare_motion
from compactmlip.validate.nve import SAMPLE_EVERY, NVEResult
from compactmlip.validate.options import ValidateOptions
from compactmlip.validate.output import ValidationData, write_all
from compactmlip.validate.paired import compare_speed, dynamics
from compactmlip.validate.parity import Labels, ParityReport, evaluate_frames, parity
from compactmlip.validate.resume import Parts, identity
from compactmlip.validate.speed import describe_machine
from compactmlip.validate.stages import SMALL_CELL, Setting, physics
from compactmlip.validate.supercells import near_size


def validate(
    model: str | Path,
    teacher: str | Path,
    frames: Sequence[Atoms],
    options: ValidateOptions | None = None,
    out_dir: str | Path = ".",
    stages: Sequence[cert.Stage] = (),
    *,
    source: str | Path | None = None,
    scores: str | Path | None = None,
    front: str | Path | None = None,
    progress: bool = True,
) -> cert.Certificate:
    """Validate a compressed model against its teacher and write the evidence.

    A run that was stopped continues where it was if it is started again with the same files, structures and
    options.

    Parameters
    ----------
    model, teacher
        A deployed file (``*.pt``) or a checkpoint (``*.safetensors``).
    frames
        Held-out structures with REF_energy and REF_forces, which are then the reference; or plain
        structures, from which held-out ones are sampled and labelled by the teacher.
    options
        Budgets, seed and limits.
    out_dir
        Made if needed; gets ``certificate.json``, ``report.html``, ``heldout.extxyz`` (with the reference
        labels) and ``validation.npz``.
    source
        The checkpoint that the model was compiled from: it is compared as well, in plain PyTorch.
    stages, scores, front
        How the model was made, for the report: rows of a table, importance of the teacher's channels
        (written by ``compactmlip importance``), and ``front.json`` of ``compactmlip search``.

    Raises
    ------
    CompactMLIPError
        If a file cannot be read, a structure cannot be used or a species is not covered.  A model
        that fails a check raises nothing: its certificate says so.
    """
    from compactmlip.validate.report import build_report

    options = options or ValidateOptions()
    machine = describe_machine()
    paths = {"model": Path(model), "teacher": Path(teacher)}
    calculators = {name: _calculator(path, options.device) for name, path in paths.items()}
    usable = _usable(frames, calculators)
    making = read_making(
        calculators["model"].spec,
        paths["teacher"],
        Path(scores) if scores else None,
        Path(front) if front else None,
    )
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    parts = Parts(out, identity([*paths.values(), *_given(source)], frames, options))

    heldout, reference, origin = parts.of(
        "heldout", lambda: heldout_structures(usable, calculators, paths["teacher"], options, progress)
    )
    predicted = parts.of(
        "predicted",
        lambda: evaluate_frames(
            calculators["model"], heldout, progress=progress, description="Model on held-out"
        ),
    )
    start = usable[0] if origin.origin == "sampled" else calmest(heldout, reference)
    with _same_engine(paths, calculators) as alike:
        speed = parts.of("speed", lambda: compare_speed(alike, start, options, progress))
        run, teacher_run, cell = parts.of(
            "dynamics", lambda: dynamics(alike, start, speed, options, progress)
        )
        setting = Setting(alike, start, speed, options, progress, parts)
        found = physics(setting, cell, stable=run.summary.stable)
    moves = None
    if teacher_run:
        interval = SAMPLE_EVERY * options.timestep_fs / 1000
        moves = compare_motion(cell, run.positions, teacher_run.positions, interval)
    left_out = [*found.left_out, *_no_motion(moves, run, teacher_run, options)]
    data = ValidationData(
        tuple(heldout),
        reference,
        predicted,
        run.trace,
        teacher_run.trace if teacher_run else None,
        found.curves,
        found.spectra,
        found.functions,
        moves[1] if moves else None,
        making,
    )
    errors = parity(heldout, reference, predicted)
    dtype = calculators["model"].spec.dtype
    consistency = parts.of(
        "consistency",
        lambda: check_consistency(
            calculators["model"],
            typical(heldout, reference, options.seed),
            dtype=dtype,
            seed=options.seed,
            teacher=calculators["teacher"],
        ),
    )
    present = {symbol for atoms in heldout for symbol in atoms.get_chemical_symbols()}
    ends = cutoff_step(calculators["model"], sorted(present), calculators["model"].spec.cutoffs)
    engines, alone = parts.of(
        "engines",
        lambda: compare_deployed(paths["model"], calculators["model"], near_size(start, SMALL_CELL), source),
    )
    measured: dict[str, Any] = {
        "parity": errors,
        "environments": errors_by_environment(heldout, reference, predicted),
        "consistency": consistency,
        "engines": engines,
        "cutoff": ends,
        "nve": run.summary,
        "sampling": found.ensembles.sampling if found.ensembles else None,
        "structure": found.structure,
        "vibration": found.vibration,
        "motion": moves[0] if moves else (),
        "thermostat": found.thermostat,
        "ladder": found.ladder,
        "density": found.density,
        "crystal": found.crystal,
        "phonons": found.phonons,
        "defects": found.defects,
        "short_range": found.short_range,
    }
    judged = _judged(measured, dtype, options)
    checks = tuple(check for group in judged.values() for check in group)
    left_out += [*unjudged(measured, judged), *alone]
    certificate = cert.Certificate(
        created_utc=datetime.now(timezone.utc).replace(microsecond=0),
        verdict=overall(checks),
        checks=checks,
        model=cert.describe_model(paths["model"], calculators["model"].spec),
        teacher=cert.describe_model(paths["teacher"], calculators["teacher"].spec),
        heldout=origin,
        teacher_parity=_teacher_parity(calculators["teacher"], heldout, reference, origin, options, progress),
        teacher_nve=teacher_run.summary if teacher_run else None,
        speed=tuple(speed),
        stages=tuple(stages),
        machine=machine,
        software=cert.software_versions(),
        options=options.model_dump(mode="json", exclude={"thresholds"}, exclude_none=True),
        left_out=tuple(left_out),
        **measured,
    )
    complete = write_all(out, certificate, data, build_report(certificate, data))
    parts.finish()
    return complete


def _judged(
    measured: dict[str, Any], dtype: DTypeName, options: ValidateOptions
) -> dict[str, Sequence[Check]]:
    """Verdicts on everything that was measured, in the order of the report."""
    limits = options.thresholds
    return {
        "parity": parity_checks(measured["parity"], limits),
        "consistency": consistency_checks(measured["consistency"], dtype),
        "engines": engine_checks(measured["engines"], dtype),
        "cutoff": cutoff_checks(measured["cutoff"], limits),
        "nve": nve_checks(measured["nve"], limits),
        "sampling": sampling_checks(measured["sampling"]),
        "structure": structure_checks(measured["structure"], limits),
        "vibration": vibration_checks(measured["vibration"], limits),
        "motion": motion_checks(measured["motion"], limits),
        "thermostat": thermostat_checks(measured["thermostat"], limits),
        "density": density_checks(measured["density"], limits),
        "crystal": crystal_checks(measured["crystal"], limits),
        "phonons": phonon_checks(measured["phonons"], limits),
        "defects": defect_checks(measured["defects"], limits),
        "short_range": short_range_checks(measured["short_range"], options.temperature_K, limits),
        "ladder": ladder_checks(measured["ladder"], options.temperature_K, limits),
    }


def _given(source: str | Path | None) -> list[Path]:
    return [Path(source)] if source else []


def _no_motion(
    moves: object, run: NVEResult, teacher_run: NVEResult | None, options: ValidateOptions
) -> list[LeftOut]:
    """Say why diffusion was not compared."""
    if moves is not None:
        return []
    if not run.summary.stable:
        return [unstable(MOTION)]
    if teacher_run is not None:
        reason = "A run is too short (nve_seconds, teacher_nve_seconds)."
    elif options.teacher_nve_seconds:
        reason = "There is no time for a run of the teacher (teacher_nve_seconds)."
    else:
        reason = "Switched off (teacher_nve_seconds is 0)."
    return [LeftOut(name=MOTION, reason=reason)]


def _usable(frames: Sequence[Atoms], calculators: dict[str, Any]) -> list[Atoms]:
    """Structures without isolated atoms, all covered by both models."""
    usable = [a for a in frames if a.info.get("config_type") != ISOLATED_ATOM and len(a) > 1]
    if not usable:
        raise InputError("no structure to validate on (single atoms do not count).")
    for name, calculator in calculators.items():
        for k, atoms in enumerate(usable):
            where = f"structure {k} (checked for the {name})"
            calculator.spec.species_index(atoms.get_chemical_symbols(), where)
    return usable


def _teacher_parity(
    teacher: Any,
    frames: Sequence[Atoms],
    reference: Labels,
    origin: cert.Heldout,
    options: ValidateOptions,
    progress: bool,
) -> ParityReport | None:
    """Compare the teacher with given labels on some structures: what the model can be expected to reach."""
    if origin.reference == "teacher" or not options.teacher_frames:
        return None
    few = list(frames[: options.teacher_frames])
    n = len(few)
    subset = Labels(reference.energies[:n], reference.forces[:n], reference.stresses[:n])
    own = evaluate_frames(teacher, few, progress=progress, description="Teacher on held-out")
    return parity(few, subset, own)


def _calculator(path: Path, device: str) -> Any:
    from compactmlip.deploy.ase import CompactMLIPCalculator

    return CompactMLIPCalculator(path, device=device)


@contextmanager
def _same_engine(paths: dict[str, Path], calculators: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Calculators in which a teacher from a checkpoint computes as the model does.

    A ratio of speeds would otherwise tell the engines apart, not the models.  Beside a model with compiled
    operators the teacher is compiled with them as well; beside one in plain PyTorch it does without.
    """
    from compactmlip.deploy.archive import inspect
    from compactmlip.deploy.compile import compile_model
    from compactmlip.kernels.build import without_kernels

    model, teacher = paths["model"], paths["teacher"]
    if model.suffix not in (".pt", ".pt2") or teacher.suffix != ".safetensors":
        yield calculators
        return
    spec, deployment = inspect(model)
    if deployment.backend != "kernels":
        with without_kernels():
            yield calculators
        return
    with TemporaryDirectory() as folder:
        compiled = Path(folder) / "teacher.pt"
        try:
            compile_model(teacher, compiled, dtype=deployment.precision or spec.dtype, backend="kernels")
        except SelfCheckError:  # a checkpoint of random or broken weights; its own numbers are as good
            yield calculators
            return
        yield {**calculators, "teacher": _calculator(compiled, "cpu")}
