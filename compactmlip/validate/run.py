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
from compactmlip.validate import certificate as cert
from compactmlip.validate.checks import (
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
from compactmlip.validate.consistency import check_consistency
from compactmlip.validate.crystal import EVALUATIONS, CrystalComparison, compare_crystals
from compactmlip.validate.cutoff import cutoff_step
from compactmlip.validate.engines import EngineParity, compare_engines
from compactmlip.validate.heldout import calmest, heldout_structures, typical
from compactmlip.validate.options import ValidateOptions
from compactmlip.validate.output import ValidationData, write_all
from compactmlip.validate.paired import compare_speed, dynamics, seconds_per_step
from compactmlip.validate.parity import Labels, ParityReport, evaluate_frames, parity
from compactmlip.validate.phonons import (
    Phonons,
    Spectra,
    available as phonons_available,
    compare_phonons,
    displacements,
)
from compactmlip.validate.short_range import Approach, Curve, approach
from compactmlip.validate.speed import Speed, describe_machine
from compactmlip.validate.structure import compare_structure
from compactmlip.validate.supercells import near_size

SHORT_RANGE_ATOMS = 32
"""About how many atoms are around two that come together."""


def validate(
    model: str | Path,
    teacher: str | Path,
    frames: Sequence[Atoms],
    options: ValidateOptions | None = None,
    out_dir: str | Path = ".",
    stages: Sequence[cert.Stage] = (),
    *,
    progress: bool = True,
) -> cert.Certificate:
    """Validate a compressed model against its teacher and write the evidence.

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
    stages
        Rows about how the model was made, for the report.

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
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)

    heldout, reference, origin = heldout_structures(usable, calculators, paths["teacher"], options, progress)
    predicted = evaluate_frames(
        calculators["model"], heldout, progress=progress, description="Model on held-out"
    )
    start = usable[0] if origin.origin == "sampled" else calmest(heldout, reference)
    with _same_engine(paths, calculators) as alike:
        speed = compare_speed(alike, start, options, progress)
        run, teacher_run, cell = dynamics(alike, start, speed, options, progress)
        apart, curves = _short_range(alike, start, options, progress)
        at_rest, modes, spectra = _crystal(alike, start, speed, options)
    structure = compare_structure(cell, run.positions, teacher_run.positions) if teacher_run else None
    data = ValidationData(
        tuple(heldout),
        reference,
        predicted,
        run.trace,
        teacher_run.trace if teacher_run else None,
        tuple(curves),
        spectra,
        structure[1] if structure else None,
    )
    found = parity(heldout, reference, predicted)
    dtype = calculators["model"].spec.dtype
    consistency = check_consistency(
        calculators["model"],
        typical(heldout, reference, options.seed),
        dtype=dtype,
        seed=options.seed,
        teacher=calculators["teacher"],
    )
    present = {symbol for atoms in heldout for symbol in atoms.get_chemical_symbols()}
    ends = cutoff_step(calculators["model"], sorted(present), calculators["model"].spec.cutoff)
    engines = _engines(paths["model"], calculators["model"], start)
    checks = (
        *parity_checks(found, options.thresholds),
        *consistency_checks(consistency, dtype),
        *engine_checks(engines, dtype),
        *cutoff_checks(ends, options.thresholds),
        *nve_checks(run.summary, options.thresholds),
        *structure_checks(structure[0] if structure else (), options.thresholds),
        *crystal_checks(at_rest, options.thresholds),
        *phonon_checks(modes, options.thresholds),
        *short_range_checks(apart, options.temperature_K, options.thresholds),
    )
    certificate = cert.Certificate(
        created_utc=datetime.now(timezone.utc).replace(microsecond=0),
        verdict=overall(checks),
        checks=checks,
        model=cert.describe_model(paths["model"], calculators["model"].spec),
        teacher=cert.describe_model(paths["teacher"], calculators["teacher"].spec),
        heldout=origin,
        parity=found,
        teacher_parity=_teacher_parity(calculators["teacher"], heldout, reference, origin, options, progress),
        consistency=consistency,
        engines=engines,
        cutoff=ends,
        nve=run.summary,
        teacher_nve=teacher_run.summary if teacher_run else None,
        structure=structure[0] if structure else (),
        crystal=at_rest,
        phonons=modes,
        short_range=tuple(apart),
        speed=tuple(speed),
        stages=tuple(stages),
        machine=machine,
        software=cert.software_versions(),
        options=options.model_dump(mode="json", exclude={"thresholds"}, exclude_none=True),
    )
    return write_all(out, certificate, data, build_report(certificate, data))


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


def _engines(model: Path, calculator: Any, start: Atoms) -> tuple[EngineParity, ...]:
    """Compare LAMMPS with ASE, for files that LAMMPS can run on several processes."""
    from compactmlip.deploy.archive import inspect

    if model.suffix != ".pt" or inspect(model)[1].backend != "kernels":
        return ()
    return compare_engines(model, calculator, near_size(start, SHORT_RANGE_ATOMS))


def _short_range(
    calculators: dict[str, Any], start: Atoms, options: ValidateOptions, progress: bool
) -> tuple[list[Approach], list[Curve]]:
    if not options.approach_points:
        return [], []
    cell, cutoff = near_size(start, SHORT_RANGE_ATOMS), calculators["model"].spec.cutoff
    return approach(calculators, cell, cutoff, options.approach_points, progress=progress)


def _crystal(
    calculators: dict[str, Any], start: Atoms, speed: Sequence[Speed], options: ValidateOptions
) -> tuple[CrystalComparison | None, Phonons | None, Spectra | None]:
    """Elastic constants and phonons at rest, of periodic structures for which the time is enough."""
    if not start.pbc.all():
        return None, None, None

    def seconds(atoms: Atoms) -> float:
        return sum(seconds_per_step(name, calculators, atoms, speed) for name in ("model", "teacher"))

    if EVALUATIONS * seconds(start) > options.crystal_seconds:
        return None, None, None
    model, teacher = calculators["model"], calculators["teacher"]
    found, relaxed = compare_crystals(model, teacher, start)
    if not (phonons_available() and found.model.relaxed and found.teacher.relaxed):
        return found, None, None
    count, atoms = displacements(relaxed[1])
    if count * seconds(near_size(start, atoms)) > options.crystal_seconds:
        return found, None, None
    return found, *compare_phonons(model, teacher, relaxed, options.temperature_K)
