"""The deployed file: an archive with compiled code that says what it is.

A TorchScript file (``*.pt``) maps ``(species, centers, neighbors, vectors)`` to the energy of each atom:
species indices (N,) and edge ends (E,) as int64, edge vectors (E, 3) in Angstrom in the file's dtype,
energies (N,) in eV as float64.  If calibration structures were given there is a second method, which scores
atoms by the trust region (:mod:`compactmlip.deploy.trust`).  A file with machine code (``*.pt2``, backend
"aoti", see :mod:`compactmlip.deploy.package`) returns the gradient of the summed energy with respect to the
vectors as well.  The entry ``compactmlip.json`` is the model's spec (species, cutoff, units, dtype,
provenance) with one more key, ``deployed``: :class:`Deployment`.
"""

from __future__ import annotations

import json
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from compactmlip.deploy.trust import METHOD, TrustRegion, TrustScores
from compactmlip.errors import CheckpointError, InputError, KernelError
from compactmlip.spec import DTypeName, ModelSpec

ENTRY = "compactmlip.json"
"""Name of the JSON text inside the archive."""

DEPLOYED_VERSION = 4
"""Version of the layout.  1 had torch files only; 2 added kernels; 3 precision, accuracy and aoti; 4 cueq,
trust regions, and operators that let a structure be split among processes."""

Backend = Literal["torch", "kernels", "cueq", "aoti"]
"""What a file is and needs: TorchScript that needs torch only; TorchScript that calls the operators of
:mod:`compactmlip.kernels`, compiled for the CPU; TorchScript that calls the operator of
:mod:`compactmlip.kernels.polynomial_operator`, on NVIDIA GPUs with cuequivariance; machine code for one
processor and one version of torch."""

SUFFIXES: dict[Backend, str] = {"torch": ".pt", "kernels": ".pt", "cueq": ".pt", "aoti": ".pt2"}

Precision = Literal["float32", "float64", "mixed", "bf16"]
"""How a file computes; :mod:`compactmlip.deploy.precision` says what the last two mean."""

INPUTS: dict[Precision, DTypeName] = {
    "float32": "float32",
    "float64": "float64",
    "mixed": "float32",
    "bf16": "float32",
}
"""Dtype of the edge vectors, by precision."""

DTYPES = {"float32": torch.float32, "float64": torch.float64}

NodeEnergy = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SelfCheck(_Frozen):
    """Largest deviations of the file from the float64 model, and what was allowed.

    Each is relative to the largest value met (and to no less than 1 eV, 1 eV/Angstrom and
    0.1 eV/Angstrom^3).
    """

    num_structures: int
    energy_error: float
    force_error: float
    stress_error: float
    energy_tolerance: float
    force_tolerance: float
    stress_tolerance: float


class Accuracy(_Frozen):
    """Errors against the float64 model: mean absolute and largest.

    Energies in eV/atom, forces (components) in eV/Angstrom, stress (components) in eV/Angstrom^3; stress
    is None where no structure is periodic.  ``structures`` says on what: "built-in", random ones made from
    the model's species, or "calibration", those that the user gave.  ``force_largest`` is the largest force
    component there (None in files of earlier versions): on random structures it may be absurdly large, and
    rounding with it.
    """

    structures: Literal["built-in", "calibration"]
    num_structures: int
    num_atoms: int
    energy_mae: float
    energy_max: float
    force_mae: float
    force_max: float
    force_largest: float | None = None
    stress_mae: float | None
    stress_max: float | None


class Tables(_Frozen):
    """Tables of radial functions in a lowered model: size, largest errors that they cause, and the bounds.

    Errors are those of a float64 model with the tables against the one without: of an atom's energy (eV) and
    of a force component (eV/Angstrom), where either is above 10 as if it were scaled to 10.  Knots lie
    evenly from 0 to the cutoff; ``values_per_knot`` is 2 for cubic interpolation (value and slope) and 3 for
    quintic (second derivative as well).
    """

    knots: int
    values_per_knot: int
    energy_error: float
    force_error: float
    energy_bound: float
    force_bound: float


class Binary(_Frozen):
    """What machine code is bound to, apart from torch's version."""

    machine: str
    instruction_sets: tuple[str, ...]


class Deployment(_Frozen):
    """What is known about a deployed file beyond the spec of its model.

    ``precision`` and ``accuracy`` are None or empty in files of older releases.  ``tf32`` allows matrix
    products on NVIDIA GPUs to round their operands to 10 bits.  ``tables`` is None where radial networks are
    evaluated as they are, ``trust`` where no calibration structures were given.
    """

    format_version: int = DEPLOYED_VERSION
    compactmlip_version: str
    torch_version: str
    backend: Backend = "torch"
    precision: Precision | None = None
    tf32: bool = False
    source_sha256: str | None = None
    self_check: SelfCheck
    accuracy: tuple[Accuracy, ...] = ()
    tables: Tables | None = None
    binary: Binary | None = None
    trust: TrustRegion | None = None


def to_json(spec: ModelSpec, deployment: Deployment) -> str:
    """Return the text of the entry that a deployed file carries."""
    return json.dumps({**spec.model_dump(mode="json"), "deployed": deployment.model_dump(mode="json")})


def inspect(path: str | Path) -> tuple[ModelSpec, Deployment]:
    """Read what a deployed file says about itself; nothing of its code is run.

    Raises
    ------
    CheckpointError
        If the file is missing, truncated, of another type, not made by compactmlip or of a newer version.
    """
    path = Path(path)
    _check_type(path)
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if n.endswith(f"/extra/{ENTRY}")]
            text = archive.read(names[0]).decode() if names else None
            kind = _kind(archive.namelist())
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path}: truncated or damaged ({error}). Copy it again, or compile the model again."
        ) from error
    if text is None:
        raise CheckpointError(
            f"{path}: {kind}, but not made by 'compactmlip compile'. "
            "Upstream checkpoints are imported with 'compactmlip convert' and then compiled."
        )
    return _parse(text, path)


def load_deployed(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[torch.jit.ScriptModule, ModelSpec]:
    """Load a deployed TorchScript file.

    Returns
    -------
    module, spec
        The TorchScript module in evaluation mode (call it through :func:`without_profiling`) and the
        spec of the model.

    Raises
    ------
    CheckpointError
        As :func:`inspect`, and if this torch cannot read the module.
    KernelError
        If the file needs compiled operators or cuequivariance and they cannot be used here.
    InputError
        If the device does not exist, or the file cannot run on it.
    """
    path = Path(path)
    spec, deployment = inspect(path)
    if deployment.backend == "aoti":
        raise CheckpointError(
            f"{path}: compiled with --backend aoti, so there is no TorchScript module in it. Use "
            "CompactMLIPCalculator, or compile the model with --backend torch."
        )
    check_content(path)
    if deployment.backend == "kernels":
        _load_kernels(path, usable_device(device))
    elif deployment.backend == "cueq":
        _load_polynomials(path, usable_device(device))
    return load_module(path, device, f"written with torch {deployment.torch_version}"), spec


def load_module(
    path: Path, device: torch.device | str = "cpu", origin: str = "of unknown origin"
) -> torch.jit.ScriptModule:
    """Load the TorchScript module of a file, whatever it says about itself.

    Raises
    ------
    CheckpointError
        If this torch cannot read it.
    InputError
        If the device does not exist.
    """
    target = usable_device(device)
    try:
        with quiet_torchscript():
            module = torch.jit.load(str(path), map_location=target)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{path}: {origin}; torch {torch.__version__} cannot read it: {reason}. "
            "Compile the model again with this torch."
        ) from error
    return module.eval()


def without_profiling(module: torch.jit.ScriptModule) -> NodeEnergy:
    """Return a function that runs the module without TorchScript's profiling executor.

    That executor specialises the code to the shapes it meets and compiles again when they change.
    The number of edges changes at almost every step of a simulation, so it costs seconds and gains
    nothing; without it the result is also the same, bit for bit, at every call.
    """

    def node_energy(species: Tensor, centers: Tensor, neighbors: Tensor, vectors: Tensor) -> Tensor:
        with torch.jit.optimized_execution(False):
            energy: Tensor = module(species, centers, neighbors, vectors)
        return energy

    return node_energy


def trust_scores(module: torch.jit.ScriptModule) -> TrustScores:
    """Return the function of a module that scores atoms by their trust region, which it must have."""
    method = getattr(module, METHOD)

    def scores(species: Tensor, centers: Tensor, neighbors: Tensor, vectors: Tensor) -> Tensor:
        with torch.jit.optimized_execution(False), torch.no_grad():
            found: Tensor = method(species, centers, neighbors, vectors)
        return found

    return scores


def usable_device(device: torch.device | str) -> torch.device:
    """Return the torch device of a name.

    Raises
    ------
    InputError
        If the name means nothing or this machine has no such device.
    """
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"device '{device}' cannot be used here: {reason}. Use 'cpu' or 'cuda'.") from error
    return target


@contextmanager
def quiet_torchscript() -> Iterator[None]:
    """Keep torch from warning its user that TorchScript, which a deployed file is, is deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
        yield


def _load_kernels(path: Path, device: torch.device) -> None:
    from compactmlip.kernels.build import require

    if device.type != "cpu":
        raise InputError(
            f"{path}: compiled with --backend kernels, which run on the CPU only, not on '{device}'. "
            "Compile the model again with --backend cueq (needs cuequivariance) or --backend torch."
        )
    try:
        require()
    except KernelError as error:
        raise KernelError(
            f"{path}: compiled with --backend kernels, which cannot be used here: {error}. "
            "Install a C++ compiler, or compile the model again with --backend torch."
        ) from error


def _load_polynomials(path: Path, device: torch.device) -> None:
    """Register the operator that the file calls; the CPU needs no more than that."""
    from compactmlip.kernels.polynomial_operator import require

    if device.type == "cpu":
        return
    try:
        require(device)
    except KernelError as error:
        raise KernelError(
            f"{path}: compiled with --backend cueq, which cannot be used here: {error}, or compile the model "
            "again with --backend torch."
        ) from error


def _kind(names: Sequence[str]) -> str:
    """What an archive with these entries is, for messages."""
    if any(n.endswith("/constants.pkl") for n in names):
        return "a TorchScript file"
    return "an AOTInductor package" if any("/data/aotinductor/" in n for n in names) else "an archive"


def _check_type(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file.")
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from error
    if head.startswith(b"PK"):
        return
    # A safetensors file starts with the length of its JSON header in 8 bytes.
    if path.suffix == ".safetensors" or head[8:] == b"{":
        raise CheckpointError(
            f"{path}: a checkpoint, not a deployed file; compile it first: "
            f"compactmlip compile {path} -o {path.with_suffix('.pt').name}"
        )
    raise CheckpointError(
        f"{path}: not a deployed file. A deployed file is made by 'compactmlip compile'; "
        "upstream checkpoints are imported with 'compactmlip convert' first."
    )


def check_content(path: Path) -> None:
    """Compare every entry with its checksum, which torch does not.

    Raises
    ------
    CheckpointError
        If one differs.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        damaged = str(error)
    if damaged is not None:
        raise CheckpointError(f"{path}: damaged at {damaged}. Copy it again, or compile the model again.")


def _parse(text: str, path: Path) -> tuple[ModelSpec, Deployment]:
    try:
        data = json.loads(text)
        deployed = data.pop("deployed")
        version = deployed["format_version"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: its description is damaged ({error!r}).") from error
    if not isinstance(version, int) or version > DEPLOYED_VERSION:
        raise CheckpointError(
            f"{path}: deployed format version {version}, but this compactmlip reads up to "
            f"{DEPLOYED_VERSION}. Upgrade compactmlip."
        )
    spec = ModelSpec.from_json(json.dumps(data), str(path))
    try:
        return spec, Deployment.model_validate(deployed)
    except ValidationError as error:
        raise CheckpointError(f"{path}: its description is damaged: {error}") from error
