"""Compile a model to machine code with AOTInductor: the second way to a deployed file.

TorchScript is deprecated upstream; this is what torch offers instead.  Automatic differentiation cannot be
exported, so the operations of the energy and of its gradient are recorded together first.
"""

from __future__ import annotations

import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compactmlip.data.graph import GraphBatch
from compactmlip.deploy.archive import SUFFIXES
from compactmlip.deploy.package import SMALLEST
from compactmlip.errors import KernelError, UnsupportedFeatureError
from compactmlip.kernels.compiler import find_compiler
from compactmlip.models.static_shapes import use_static_shapes

SETTINGS = {
    # Otherwise the number of threads at compile time is part of the code.
    "cpp.dynamic_threads": True,
    # All is in two source files; more processes than this one have nothing to do.
    "compile_threads": 1,
}
"""Of the compiler."""

OTHERWISE = "Choose --backend torch, which runs everywhere."


def compile_package(model: nn.Module, example: GraphBatch) -> bytes:
    """Return the content of a package with the code of a model.

    Parameters
    ----------
    model
        Maps species, centers, neighbors and vectors to energies, with plain operations of torch; its
        per-species maps are changed to a form that can be exported.
    example
        Inputs to record the operations with.  Numbers of atoms and edges stay free.

    Raises
    ------
    UnsupportedFeatureError
        If the model has operations that cannot be exported.
    KernelError
        If there is no C++ compiler, or it fails.
    """
    try:
        compiler = find_compiler()
    except KernelError as error:
        raise KernelError(f"--backend aoti: {error}. {OTHERWISE}") from error
    use_static_shapes(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of the deprecation of its own parts
        try:
            exported = _exported(model, _distinct(example))
        except Exception as error:  # whatever the many layers of torch.export raise
            raise UnsupportedFeatureError(
                f"this model cannot be exported for --backend aoti: {_first_line(error)}. {OTHERWISE}"
            ) from error
        with tempfile.TemporaryDirectory(prefix="compactmlip-") as folder:
            path = Path(folder) / f"model{SUFFIXES['aoti']}"
            try:
                torch._inductor.aoti_compile_and_package(
                    exported, package_path=str(path), inductor_configs=SETTINGS
                )
            except Exception as error:
                raise KernelError(
                    f"--backend aoti: the model cannot be compiled with {compiler}: {_first_line(error)}. "
                    f"{OTHERWISE}"
                ) from error
            return path.read_bytes()


def write_package(package: bytes, path: Path, entries: Mapping[str, str]) -> None:
    """Write a package with further entries, under ``extra/`` as in TorchScript files."""
    path.write_bytes(package)
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].split("/", 1)[0]
        for name, text in entries.items():
            archive.writestr(f"{root}/extra/{name}", text)


def _exported(model: nn.Module, example: GraphBatch) -> Any:
    from torch.fx.experimental.proxy_tensor import make_fx

    def energy_and_gradient(
        species: Tensor, centers: Tensor, neighbors: Tensor, vectors: Tensor
    ) -> tuple[Tensor, Tensor]:
        vectors = vectors.detach().requires_grad_()
        with torch.enable_grad():
            energies = model(species, centers, neighbors, vectors)
            (gradient,) = torch.autograd.grad(energies.sum(), vectors)
        return energies.detach(), gradient

    inputs = (example.species, example.centers, example.neighbors, example.vectors)
    recorded = make_fx(energy_and_gradient, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*inputs)
    atoms, edges = (torch.export.Dim(name, min=SMALLEST) for name in ("atoms", "edges"))
    shapes = ({0: atoms}, {0: edges}, {0: edges}, {0: edges})
    return torch.export.export(recorded, inputs, dynamic_shapes=shapes, strict=False)


def _distinct(example: GraphBatch) -> GraphBatch:
    """The example with different numbers of atoms and edges: equal sizes are taken for the same size."""
    num_atoms, num_edges = len(example.species), len(example.centers)
    kept = num_edges - 1 if num_edges == num_atoms else num_edges
    assert num_atoms > 3 and kept > 3, "an example must not have the size of a vector"
    return GraphBatch(
        example.species,
        example.centers[:kept],
        example.neighbors[:kept],
        example.vectors[:kept],
        example.structure,
        example.num_atoms,
        example.volumes,
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
