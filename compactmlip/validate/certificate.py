"""The certificate: every number of a validation, the limits it was held against, and the verdicts."""

from __future__ import annotations

import platform
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compactmlip.checkpoint import atomic_write_text, sha256
from compactmlip.errors import CheckpointError
from compactmlip.spec import ModelSpec
from compactmlip.validate.checks import Check, Verdict
from compactmlip.validate.consistency import Consistency
from compactmlip.validate.crystal import CrystalComparison
from compactmlip.validate.cutoff import CutoffStep
from compactmlip.validate.defects import Defect
from compactmlip.validate.density import DensityComparison
from compactmlip.validate.engines import EngineParity
from compactmlip.validate.ensemble import Sampling
from compactmlip.validate.environment import EnvironmentErrors
from compactmlip.validate.ladder import Ladder
from compactmlip.validate.left_out import LeftOut
from compactmlip.validate.motion import MotionComparison
from compactmlip.validate.nve import NVESummary
from compactmlip.validate.parity import ParityReport
from compactmlip.validate.phonons import Phonons
from compactmlip.validate.short_range import Approach
from compactmlip.validate.speed import Machine, Speed
from compactmlip.validate.structure import Distribution
from compactmlip.validate.thermostat import KineticEnergy
from compactmlip.validate.vibration import Vibration

SCHEMA_VERSION: Literal[2] = 2
"""Version of the JSON layout written by this release."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class ModelFile(_Frozen):
    """Identity of a model file."""

    file: str
    sha256: str
    bytes: int
    family: str
    species: tuple[str, ...]
    parameters: int
    dtype: str
    cutoff: float = Field(description="Angstrom")
    num_message_passing_layers: int
    name: str
    source: str
    licence: str
    citation: str


class Stage(_Frozen):
    """One step on the way from the teacher to the deployed file, as a row of the report.

    Errors are mean absolute errors in meV/atom, meV/Angstrom and meV/Angstrom^3; what is not known is
    None.
    """

    name: str
    parameters: int | None = None
    file_bytes: int | None = None
    energy_mae: float | None = None
    forces_mae: float | None = None
    stress_mae: float | None = None
    note: str = ""


class Heldout(_Frozen):
    """The structures that the errors were measured on, and where the reference comes from."""

    origin: Literal["given", "sampled"]
    reference: Literal["labels", "teacher"]
    seed: int | None = None
    species_not_seen: tuple[str, ...] = ()


class Certificate(_Frozen):
    """Everything that was measured, with the identity of both files and the verdicts."""

    schema_version: Literal[2] = SCHEMA_VERSION
    created_utc: datetime
    verdict: Verdict
    checks: tuple[Check, ...]
    left_out: tuple[LeftOut, ...] = ()
    model: ModelFile
    teacher: ModelFile
    heldout: Heldout
    files: dict[str, str] = Field({}, description="SHA-256 of what lies beside: structures and arrays")
    parity: ParityReport
    environments: tuple[EnvironmentErrors, ...] = ()
    teacher_parity: ParityReport | None = None
    consistency: Consistency
    engines: tuple[EngineParity, ...] = ()
    cutoff: CutoffStep | None = None
    nve: NVESummary
    teacher_nve: NVESummary | None = None
    crystal: CrystalComparison | None = None
    phonons: Phonons | None = None
    sampling: Sampling | None = None
    structure: tuple[Distribution, ...] = ()
    vibration: tuple[Vibration, ...] = ()
    motion: tuple[MotionComparison, ...] = ()
    thermostat: KineticEnergy | None = None
    ladder: Ladder | None = None
    density: DensityComparison | None = None
    defects: tuple[Defect, ...] = ()
    short_range: tuple[Approach, ...] = ()
    speed: tuple[Speed, ...] = ()
    stages: tuple[Stage, ...] = ()
    machine: Machine
    software: dict[str, str]
    options: dict[str, object]

    @property
    def not_checked(self) -> str:
        """Names of what was left out, as a list in words."""
        return ", ".join(dict.fromkeys(part.name for part in self.left_out))

    def save(self, path: str | Path) -> Path:
        """Write as JSON, completely or not at all."""
        atomic_write_text(Path(path), self.model_dump_json(indent=2) + "\n")
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Certificate:
        """Read a certificate.

        Raises
        ------
        CheckpointError
            If the file is missing or not a certificate of this version.
        """
        try:
            return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ValidationError) as error:
            raise CheckpointError(
                f"{path}: not a compactmlip certificate of version {SCHEMA_VERSION}: {error}"
            ) from error


def describe_model(path: Path, spec: ModelSpec) -> ModelFile:
    """Identity of a model file from its bytes and its spec."""
    return ModelFile(
        file=path.name,
        sha256=sha256(path),
        bytes=path.stat().st_size,
        family=spec.family,
        species=spec.species,
        parameters=count_parameters(spec),
        dtype=spec.dtype,
        cutoff=spec.cutoff,
        num_message_passing_layers=spec.num_message_passing_layers,
        name=spec.provenance.name,
        source=spec.provenance.source,
        licence=spec.provenance.licence,
        citation=spec.provenance.citation,
    )


def count_parameters(spec: ModelSpec) -> int:
    """Number of trainable parameters of the model that a spec describes."""
    import torch

    from compactmlip.models import build, num_parameters

    with torch.random.fork_rng(devices=[]):
        return num_parameters(build(spec))


def software_versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    import compactmlip

    versions = {"compactmlip": compactmlip.__version__, "python": platform.python_version()}
    for name in ("torch", "ase", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
