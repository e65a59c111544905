"""Energies, forces and stresses from a deployed file, whichever kind it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compactmlip.data.graph import Derivatives, GraphBatch, derivatives, energy_and_derivatives
from compactmlip.deploy.archive import (
    DTYPES,
    Deployment,
    NodeEnergy,
    check_content,
    inspect,
    load_deployed,
    load_module,
    trust_scores,
    usable_device,
    without_profiling,
)
from compactmlip.deploy.cuda_graph import Recorded, check_recordable
from compactmlip.deploy.matmul import matmul_precision
from compactmlip.deploy.package import PackagedModel, check_runs_here
from compactmlip.deploy.trust import TrustScores
from compactmlip.spec import ModelSpec

Evaluate = Callable[[GraphBatch], Derivatives]
"""From structures to energies, forces and stresses; edge vectors are in the engine's dtype."""


@dataclass(frozen=True)
class Engine:
    """A model that is ready to run.

    Attributes
    ----------
    spec
        Of the model.
    evaluate
        What computes.
    dtype, device
        Of the edge vectors that it takes, and where it wants its inputs.
    deployment
        What the file says about itself; None of a model in memory.
    trust
        Scores atoms by the file's trust region; None if it has none.
    """

    spec: ModelSpec
    evaluate: Evaluate
    dtype: torch.dtype
    device: torch.device
    deployment: Deployment | None = None
    trust: TrustScores | None = None


def load_engine(path: str | Path, device: torch.device | str = "cpu", *, cuda_graph: bool = False) -> Engine:
    """Load a deployed file.

    Parameters
    ----------
    path
        The file.
    device
        Where it is to run.
    cuda_graph
        Record the calculation as a CUDA graph, which saves time on small systems
        (:mod:`compactmlip.deploy.cuda_graph`).

    Raises
    ------
    CheckpointError
        As :func:`compactmlip.deploy.archive.inspect`, and if this torch or processor cannot run the file.
    KernelError
        If the file needs compiled operators or cuequivariance and they cannot be used here.
    InputError
        If the device does not exist, or the file cannot run on it or not be recorded.
    """
    path = Path(path)
    spec, deployment = inspect(path)
    target = usable_device(device)
    if cuda_graph and (target.type != "cuda" or deployment.backend == "aoti"):
        check_recordable(path, None, target)
    trust: TrustScores | None = None
    if deployment.backend == "aoti":
        check_runs_here(path, deployment, target)
        check_content(path)
        evaluate = from_package(PackagedModel(path, spec.cutoff))
    else:
        module, _ = load_deployed(path, target)
        tf32 = uses_tf32(deployment, target)
        if cuda_graph:
            check_recordable(path, module, target)
            evaluate = recorded(without_profiling(module), spec.cutoff, tf32=tf32)
        else:
            evaluate = from_energies(without_profiling(module), tf32=tf32)
        if deployment.trust is not None:
            trust = scores_by(trust_scores(module))
    return Engine(spec, evaluate, DTYPES[spec.dtype], target, deployment, trust)


def uses_tf32(deployment: Deployment, device: torch.device) -> bool:
    """Whether a file's products are computed in TF32: only where it says so, and only on NVIDIA GPUs."""
    return deployment.tf32 and device.type == "cuda"


def load_code(path: Path, spec: ModelSpec, deployment: Deployment) -> Evaluate:
    """Load the code of a file on the CPU, whatever the file itself says."""
    if deployment.backend == "aoti":
        return from_package(PackagedModel(path, spec.cutoff))
    if deployment.backend == "cueq":
        import compactmlip.kernels.polynomial_operator  # noqa: F401  registers the operator
    return from_energies(without_profiling(load_module(path)))


def from_energies(node_energy: NodeEnergy, *, tf32: bool = False) -> Evaluate:
    """Derivatives by automatic differentiation; products in TF32 only if ``tf32``."""

    def evaluate(batch: GraphBatch) -> Derivatives:
        with matmul_precision(tf32=tf32):
            return energy_and_derivatives(node_energy, batch)

    return evaluate


def recorded(node_energy: NodeEnergy, cutoff: float, *, tf32: bool = False) -> Evaluate:
    """Derivatives by automatic differentiation, recorded as a CUDA graph."""
    run = Recorded(node_energy, cutoff)

    def evaluate(batch: GraphBatch) -> Derivatives:
        with matmul_precision(tf32=tf32):
            return run(batch)

    return evaluate


def scores_by(trust: TrustScores) -> TrustScores:
    """Scores whose products are computed in the precision of the file."""

    def scores(species: Tensor, centers: Tensor, neighbors: Tensor, vectors: Tensor) -> Tensor:
        with matmul_precision():
            return trust(species, centers, neighbors, vectors)

    return scores


def from_package(model: PackagedModel) -> Evaluate:
    """Derivatives from the gradient that the code returns."""

    def evaluate(batch: GraphBatch) -> Derivatives:
        with matmul_precision():
            return derivatives(batch, *model(batch))

    return evaluate
