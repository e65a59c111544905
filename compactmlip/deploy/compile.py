"""Turn a native model into one file that runs without compactmlip's model code."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from ase import Atoms
from torch import Tensor, nn

from compactmlip import __version__
from compactmlip.checkpoint import atomic_write, load, sha256
from compactmlip.data.graph import GraphBatch, build_graph
from compactmlip.deploy.archive import (
    DTYPES,
    ENTRY,
    INPUTS,
    SUFFIXES,
    Accuracy,
    Backend,
    Deployment,
    Precision,
    SelfCheck,
    Tables,
    inspect,
    load_module,
    quiet_torchscript,
    to_json,
    trust_scores,
)
from compactmlip.deploy.engine import load_code
from compactmlip.deploy.lower.lower import lower
from compactmlip.deploy.matmul import matmul_precision
from compactmlip.deploy.package import this_machine
from compactmlip.deploy.precision import in_precision, input_dtype
from compactmlip.deploy.selfcheck import TABLES, TOLERANCES, UNCHECKED, SelfChecker
from compactmlip.deploy.trust import METHOD, TrustRegion
from compactmlip.deploy.trust_fit import TOO_FEW, FittedTrust, fit
from compactmlip.errors import (
    CheckpointError,
    InputError,
    KernelError,
    LoweringError,
    UnsupportedFeatureError,
    did_you_mean,
)
from compactmlip.kernels.build import VARIABLE, load as load_kernels, mode, without_kernels
from compactmlip.models import cast, exact_copy, model_spec
from compactmlip.models.linear import ConstantWeight, ScaledWeight
from compactmlip.models.static_shapes import use_static_shapes
from compactmlip.spec import ModelSpec


@dataclass(frozen=True)
class CompileReport:
    """What was written.

    Attributes
    ----------
    path
        The deployed file.
    spec
        Of the deployed model; its dtype is that of the edge vectors.
    precision
        How the file computes.
    self_check
        Deviations from the float64 model, as the check sees them.
    accuracy
        Errors against the float64 model in units.
    tables
        Size and errors of the tables of a lowered model.
    trust
        The trust region, None if there is none.
    note
        Why a model for compiled operators was not lowered, or why there is no trust region though there are
        structures for one; empty otherwise.
    num_bytes, sha256
        Size and digest of the file.
    """

    path: Path
    spec: ModelSpec
    precision: Precision
    self_check: SelfCheck
    accuracy: tuple[Accuracy, ...]
    tables: Tables | None
    trust: TrustRegion | None
    note: str
    num_bytes: int
    sha256: str


def compile_model(
    model: nn.Module | str | Path,
    output: str | Path,
    *,
    dtype: Precision = "float32",
    backend: Backend = "torch",
    check_structures: Sequence[Atoms] | None = None,
    calibration: Sequence[Atoms] = (),
    trust_structures: Sequence[Atoms] | None = None,
    tf32: bool = False,
    static_shapes: bool = False,
) -> CompileReport:
    """Compile a model to a file that runs without compactmlip's model code, and check the file.

    The file is written, loaded again and compared with the model in float64 on structures of different
    size and periodicity: energies, forces and stresses.  It appears only if they agree.

    Parameters
    ----------
    model
        A native model, which is not changed, or the path of a ``*.safetensors`` checkpoint.
    output
        File to write, ``*.pt`` or, with backend "aoti", ``*.pt2``; an existing file is replaced.
    dtype
        Precision of the file, see :mod:`compactmlip.deploy.precision`.  Energies are summed in float64 in
        any case.
    backend
        "torch" for a file that needs torch only; "kernels" for a lowered model (see
        :mod:`compactmlip.deploy.lower`) that calls the compiled operators, which is an order of magnitude
        faster and runs on the CPU, where there is a C++ compiler; "cueq" for a lowered model that computes
        with cuequivariance on NVIDIA GPUs (not yet run on one) and without it, slowly, on the CPU; "aoti"
        for machine code that runs with this version of torch on processors like this one.
    check_structures
        Structures to check on; made from the model's species if None.
    calibration
        Structures (labels are not needed) on which the error against the float64 model is measured and
        stored in the file, besides those of the check.
    trust_structures
        Structures that span the file's trust region (see :mod:`compactmlip.deploy.trust`); those of
        ``calibration`` if None.  Without any there is no trust region; nor is there with backend "aoti".
    tf32
        Allow products in TF32 on NVIDIA GPUs.  The check runs on the CPU and does not see what it costs.
    static_shapes
        Let no shape depend on distances or species, for CUDA graphs (backends "torch" and "cueq").

    Raises
    ------
    SelfCheckError
        If the compiled model does not reproduce the model.  Nothing is written.
    KernelError
        If the compiled operators or cuequivariance are wanted and cannot be used here, or machine code
        cannot be made.
    UnsupportedFeatureError
        If the model cannot be exported to machine code or has no lowered form for cuequivariance, or has
        nothing that the precision applies to.
    CheckpointError
        If the checkpoint cannot be read or the output cannot be written.
    InputError, SpeciesError
        If an option or a structure cannot be used.
    """
    output = Path(output)
    _check_options(output, dtype, backend, tf32, static_shapes)
    source = None
    if not isinstance(model, nn.Module):
        source, model = Path(model), load(model)
    original = exact_copy(model)
    spec = _deployed_spec(original, dtype)
    checker = SelfChecker(original, spec, check_structures, calibration)
    with _operators(backend), matmul_precision():
        made = prepared(original, backend, dtype, checker)
        if static_shapes:
            use_static_shapes(made.module)
        trust, no_trust = _fit_trust(
            made.module, spec, backend, calibration if trust_structures is None else trust_structures
        )
        example = checker.largest_graph().to(dtype=input_dtype(dtype))
        code = _compiled(made.module, example, backend, trust)
    deployment = Deployment(
        compactmlip_version=__version__,
        torch_version=str(torch.__version__),
        backend=backend,
        precision=dtype,
        tf32=tf32,
        source_sha256=sha256(source) if source else None,
        self_check=UNCHECKED,
        tables=made.tables,
        binary=this_machine() if backend == "aoti" else None,
        trust=trust.region if trust else None,
    )

    tolerances = TOLERANCES[dtype] if made.tables is None else TOLERANCES[dtype].plus(TABLES)

    def write(path: Path) -> None:
        code(path, {})
        evaluate = load_code(path, spec, deployment)
        check = checker.compare(evaluate, dtype, tolerances)
        if trust is not None:
            trust.check(trust_scores(load_module(path)), made.module, checker.graphs, dtype)
        found = {"self_check": check, "accuracy": checker.measure(evaluate, dtype)}
        # The results are part of the file, so the file is written again, and checked again.
        code(path, {ENTRY: to_json(spec, deployment.model_copy(update=found))})
        checker.compare(load_code(path, spec, deployment), dtype, tolerances)

    atomic_write(output, write)
    deployed_spec, written = inspect(output)
    return CompileReport(
        output,
        deployed_spec,
        dtype,
        written.self_check,
        written.accuracy,
        written.tables,
        written.trust,
        "; ".join(filter(None, (made.note, no_trust))),
        output.stat().st_size,
        sha256(output),
    )


def default_backend(device: str = "cpu") -> Backend:
    """Return "kernels" where compiled operators can be used, else "torch".

    "cueq" is never the default: nobody has run it on a GPU yet.
    """
    return "kernels" if torch.device(device).type == "cpu" and load_kernels() else "torch"


@dataclass(frozen=True)
class Prepared:
    """A module that is ready to be compiled."""

    module: nn.Module
    tables: Tables | None = None
    note: str = ""


def prepared(original: nn.Module, backend: Backend, precision: Precision, checker: SelfChecker) -> Prepared:
    """Return the module that is compiled: same inputs and outputs as the original, nothing to train.

    ``original`` is a native model in float64 and is not changed.
    """
    if backend == "cueq":
        return _with_polynomials(original, precision, checker)
    if backend != "kernels":
        return Prepared(in_precision(with_constants(original), precision))
    try:
        lowered = lower(original, checker.graphs + checker.calibration)
    except LoweringError as error:
        return Prepared(in_precision(with_constants(original), precision), note=f"not lowered: {error}")
    return Prepared(in_precision(with_constants(lowered.module), precision), lowered.tables)


def _with_polynomials(original: nn.Module, precision: Precision, checker: SelfChecker) -> Prepared:
    from compactmlip.deploy.lower.polynomial import check_polynomials, with_polynomials

    # Tables are chosen with the compiled operators where there are some, because those are faster.
    runnable = None if load_kernels() else with_polynomials
    try:
        lowered = lower(original, checker.graphs + checker.calibration, runnable=runnable)
    except LoweringError as error:
        raise UnsupportedFeatureError(
            f"--backend cueq needs a lowered model, and {error}. Choose --backend torch."
        ) from error
    module = with_polynomials(in_precision(with_constants(lowered.module), precision))
    check_polynomials(module)
    return Prepared(module, lowered.tables)


def with_constants(model: nn.Module) -> nn.Module:
    """Return a copy in float64 in which weights include their factors and nothing is a parameter.

    As buffers the weights cannot be asked for a gradient, and follow the module to another device.
    """
    constant = cast(copy.deepcopy(model), torch.float64)
    for parent in list(constant.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ScaledWeight):
                parent.register_module(name, ConstantWeight(child().detach()))
    for module in constant.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach())
    return constant.eval()


class _NodeEnergy(nn.Module):
    """The part of a model's interface that is deployed: no taps."""

    def __init__(self, model: nn.Module, scores: nn.Module | None = None) -> None:
        super().__init__()
        self.model, self.scores = model, scores

    def forward(self, species: Tensor, centers: Tensor, neighbors: Tensor, vectors: Tensor) -> Tensor:
        energy: Tensor = self.model(species, centers, neighbors, vectors)
        return energy

    def trust(self, species: Tensor, centers: Tensor, neighbors: Tensor, vectors: Tensor) -> Tensor:
        """Scores of owned atoms in the trust region, (n_owned, 4)."""
        assert self.scores is not None
        features = self.model.descriptors(species, centers, neighbors, vectors)  # type: ignore[operator]
        scores: Tensor = self.scores(features, species, centers, neighbors, vectors)
        return scores


def trace(model: nn.Module, example: GraphBatch, scores: nn.Module | None = None) -> torch.jit.ScriptModule:
    """Record the operations of a model; numbers of atoms and edges stay free.

    With ``scores`` the module has a second method, which shares the model's weights.
    """
    inputs = (example.species, example.centers, example.neighbors, example.vectors)
    methods = ("forward",) if scores is None else ("forward", METHOD)
    with quiet_torchscript(), torch.no_grad():
        # torch's own check of the trace runs the same shapes again; the self-check runs others.
        traced = torch.jit.trace_module(
            _NodeEnergy(model, scores).eval(), dict.fromkeys(methods, inputs), check_trace=False
        )
    assert isinstance(traced, torch.jit.ScriptModule)
    return traced


def _fit_trust(
    module: nn.Module, spec: ModelSpec, backend: Backend, structures: Sequence[Atoms]
) -> tuple[FittedTrust | None, str]:
    """Trust region that structures span, or None and, if there are structures, why."""
    if not structures:
        return None, ""
    if backend == "aoti":
        return None, "no trust region: machine code has none, choose --backend kernels or torch"
    found = fit(module, spec, [build_graph(a, spec, DTYPES[spec.dtype]) for a in structures])
    return found, TOO_FEW if found is None else ""


Code = Callable[[Path, dict[str, str]], None]
"""Writes compiled code to a file, with further entries."""


def _compiled(module: nn.Module, example: GraphBatch, backend: Backend, trust: FittedTrust | None) -> Code:
    scores = trust.scores if trust else None
    if backend == "cueq":
        with without_kernels():
            return partial(_save, trace(module, example, scores))
    if backend != "aoti":
        return partial(_save, trace(module, example, scores))
    from compactmlip.deploy.aoti import compile_package, write_package

    return partial(write_package, compile_package(module, example))


def _check_options(
    output: Path, precision: Precision, backend: Backend, tf32: bool, static_shapes: bool
) -> None:
    if backend not in SUFFIXES:
        hint = did_you_mean(backend, SUFFIXES)
        raise InputError(f"unknown backend '{backend}'; known: {', '.join(SUFFIXES)}.{hint}")
    suffix = SUFFIXES[backend]
    if output.suffix != suffix:
        raise CheckpointError(
            f"{output}: a model compiled with --backend {backend} is saved as *{suffix}; choose such a name."
        )
    if precision not in INPUTS:
        hint = did_you_mean(precision, INPUTS)
        raise InputError(f"unknown dtype '{precision}'; known: {', '.join(INPUTS)}.{hint}")
    if tf32 and (backend not in ("torch", "cueq") or precision == "float64"):
        raise InputError(
            "--tf32 is for files that run in float32 on NVIDIA GPUs: use it with --backend torch or cueq and "
            "without --dtype float64."
        )
    if static_shapes and backend not in ("torch", "cueq"):
        raise InputError(
            "--static-shapes is for files that run as CUDA graphs: use it with --backend torch or cueq."
        )


def _operators(backend: Backend) -> AbstractContextManager[None]:
    """Where a model's operations are those of the backend."""
    if backend == "cueq":
        from compactmlip.kernels.polynomial_operator import require

        try:
            require()
        except KernelError as error:
            raise KernelError(f"--backend cueq: {error}. Or choose --backend torch.") from error
        return nullcontext()
    if backend != "kernels":
        return without_kernels()
    if not load_kernels():
        raise KernelError(
            f"--backend kernels needs the compiled operators; {VARIABLE} is '{mode()}', and "
            "'compactmlip build' says whether they can be built. Or choose --backend torch."
        )
    return nullcontext()


def _save(traced: torch.jit.ScriptModule, path: Path, entries: dict[str, str] | None = None) -> None:
    # Through a buffer, because torch makes the name of the file, here a temporary one, part of it.
    buffer = io.BytesIO()
    with quiet_torchscript():
        torch.jit.save(traced, buffer, _extra_files=entries or {})
    path.write_bytes(buffer.getvalue())


def _deployed_spec(model: nn.Module, precision: Precision) -> ModelSpec:
    spec = model_spec(model)
    provenance = spec.provenance.then("compile", dtype=precision)
    return spec.model_copy(update={"dtype": INPUTS[precision], "provenance": provenance})
