"""Turn a native model into one TorchScript file that runs without compactmlip's model code."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from ase import Atoms
from torch import Tensor, nn

from compactmlip import __version__
from compactmlip.checkpoint import atomic_write, load, sha256
from compactmlip.data.graph import GraphBatch
from compactmlip.deploy.archive import (
    DTYPES,
    ENTRY,
    VERSIONS,
    Backend,
    Deployment,
    SelfCheck,
    inspect,
    load_module,
    quiet_torchscript,
    to_json,
    without_profiling,
)
from compactmlip.deploy.selfcheck import TOLERANCES, SelfChecker
from compactmlip.errors import CheckpointError, InputError, KernelError, did_you_mean
from compactmlip.kernels.build import VARIABLE, load as load_kernels, mode, without_kernels
from compactmlip.models import cast, model_spec
from compactmlip.models.linear import ScaledWeight
from compactmlip.spec import DTypeName, ModelSpec


@dataclass(frozen=True)
class CompileReport:
    """What was written.

    Attributes
    ----------
    path
        The deployed file.
    spec
        Of the deployed model; its dtype is that of the file.
    self_check
        Deviations from the float64 model.
    num_bytes, sha256
        Size and digest of the file.
    """

    path: Path
    spec: ModelSpec
    self_check: SelfCheck
    num_bytes: int
    sha256: str


def compile_model(
    model: nn.Module | str | Path,
    output: str | Path,
    *,
    dtype: DTypeName = "float32",
    backend: Backend = "torch",
    check_structures: Sequence[Atoms] | None = None,
) -> CompileReport:
    """Compile a model to TorchScript and check the file against the model.

    The file is written, loaded again and compared with the model in float64 on structures of different
    size and periodicity: energies, forces and stresses.  It appears only if they agree.

    Parameters
    ----------
    model
        A native model, which is not changed, or the path of a ``*.safetensors`` checkpoint.
    output
        File to write, ``*.pt``; an existing file is replaced.
    dtype
        Precision of the file.  Energies are summed in float64 in any case.
    backend
        "torch" for a file that needs torch only; "kernels" for one that calls the compiled operators,
        which is several times faster and runs on the CPU, where there is a C++ compiler.
    check_structures
        Structures to check on; made from the model's species if None.

    Raises
    ------
    SelfCheckError
        If the compiled model does not reproduce the model.  Nothing is written.
    KernelError
        If the compiled operators are wanted and cannot be used here.
    CheckpointError
        If the checkpoint cannot be read or the output cannot be written.
    InputError, SpeciesError
        If an option or a structure cannot be used.
    """
    output = Path(output)
    if output.suffix != ".pt":
        raise CheckpointError(f"{output}: a compiled model is saved as *.pt; choose such a name.")
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype '{dtype}'; known: {', '.join(DTYPES)}.{did_you_mean(dtype, DTYPES)}")
    if backend not in VERSIONS:
        hint = did_you_mean(backend, VERSIONS)
        raise InputError(f"unknown backend '{backend}'; known: {', '.join(VERSIONS)}.{hint}")
    source = None
    if not isinstance(model, nn.Module):
        source, model = Path(model), load(model)
    original = cast(copy.deepcopy(model).cpu().eval().requires_grad_(False), torch.float64)
    spec = _deployed_spec(original, dtype)
    checker = SelfChecker(original, spec, check_structures)
    with _operators(backend):
        example = checker.largest_graph().to(dtype=DTYPES[dtype])
        traced = trace(with_constants(original, DTYPES[dtype]), example)

    def check(path: Path) -> SelfCheck:
        compiled = without_profiling(load_module(path))
        return checker.compare(compiled, DTYPES[dtype], TOLERANCES[dtype])

    def write(path: Path) -> None:
        _save(traced, path)
        deployment = Deployment(
            format_version=VERSIONS[backend],
            backend=backend,
            compactmlip_version=__version__,
            torch_version=str(torch.__version__),
            source_sha256=sha256(source) if source else None,
            self_check=check(path),
        )
        # The result is part of the file, so the file is written again, and checked again.
        _save(traced, path, {ENTRY: to_json(spec, deployment)})
        check(path)

    atomic_write(output, write)
    deployed_spec, deployment = inspect(output)
    return CompileReport(output, deployed_spec, deployment.self_check, output.stat().st_size, sha256(output))


class _Constant(nn.Module):
    """A weight that is its product with its frozen factor."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self) -> Tensor:
        return self.value


class _NodeEnergy(nn.Module):
    """The part of a model's interface that is deployed: no taps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, species: Tensor, centers: Tensor, neighbors: Tensor, vectors: Tensor) -> Tensor:
        energy: Tensor = self.model(species, centers, neighbors, vectors)
        return energy


def with_constants(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy in which weights include their factors and nothing is a parameter.

    Products are formed in float64 and rounded to ``dtype`` once.  As buffers the weights cannot be
    asked for a gradient, and follow the module to another device.
    """
    constant = cast(copy.deepcopy(model), torch.float64)
    for parent in list(constant.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ScaledWeight):
                parent.register_module(name, _Constant(child().detach()))
    for module in constant.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach())
    return cast(constant, dtype).eval()


def trace(model: nn.Module, example: GraphBatch) -> torch.jit.ScriptModule:
    """Record the operations of a model; numbers of atoms and edges stay free."""
    inputs = (example.species, example.centers, example.neighbors, example.vectors)
    with quiet_torchscript(), torch.no_grad():
        # torch's own check of the trace runs the same shapes again; the self-check runs others.
        traced = torch.jit.trace(_NodeEnergy(model).eval(), inputs, check_trace=False)
    assert isinstance(traced, torch.jit.ScriptModule)
    return traced


def _operators(backend: Backend) -> AbstractContextManager[None]:
    """Where a model's operations are those of the backend."""
    if backend == "torch":
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


def _deployed_spec(model: nn.Module, dtype: DTypeName) -> ModelSpec:
    spec = model_spec(model)
    provenance = spec.provenance.then("compile", dtype=dtype)
    return spec.model_copy(update={"dtype": dtype, "provenance": provenance})
