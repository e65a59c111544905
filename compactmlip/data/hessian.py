"""Products of the Hessian of the energy with displacements of the atoms: labels for distillation.

A direction moves every atom by one or minus one along each axis, at random (Rademacher).  The mean square of
a component of a product is then the sum of squares of the row of the Hessian, whatever the size of the
structure: an error of the products measures the error of all force constants (Hutchinson,
Commun. Stat. Simul. Comput. 19, 433 (1990)).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from ase import Atoms
from numpy.typing import NDArray
from torch import Tensor, nn

from compactmlip.data.graph import GraphBatch, build_graph, edge_gradient, on_atoms
from compactmlip.errors import InputError
from compactmlip.models import exact_copy, model_device, model_dtype, model_spec

DIRECTIONS, PRODUCTS = "REF_hessian_directions", "REF_hessian_products"
"""Arrays (N, 3 K) of a frame: K displacements of all atoms, and the Hessian times each in eV/Angstrom^2."""

STEP = 1e-4
"""Angstrom; central differences in float64 are then good to about 1e-7 of the force constants."""

AGREEMENT = 1e-2
"""Largest relative difference between the derivative of the forces and central differences of them at which
the former is trusted; rounding in float32 makes about 1e-4."""

NodeEnergy = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Products = Callable[[GraphBatch, Tensor], Tensor]


def random_directions(num_atoms: int, count: int, seed: Sequence[int]) -> NDArray[np.float64]:
    """Displacements (N, count, 3) of 1 or -1, determined by the seed."""
    signs = np.random.default_rng(seed).integers(0, 2, (num_atoms, count, 3))
    return np.where(signs == 0, -1.0, 1.0)


def products_from(
    batch: GraphBatch, vectors: Tensor, gradient: Tensor, directions: Tensor, *, create_graph: bool = False
) -> Tensor:
    """Hessian products from the derivative of the energy.

    Structures of a batch do not know of each other, so one displacement of all their atoms gives the product
    of each one's own Hessian.

    Parameters
    ----------
    batch
        The structures.
    vectors, gradient
        From :func:`compactmlip.data.graph.edge_gradient` with ``create_graph``.
    directions
        (N, K, 3) displacements.
    create_graph
        Keep the graph, so that the products can be differentiated (training).

    Returns
    -------
    (N, K, 3), the derivative of minus the forces along each direction, eV/Angstrom per unit of it.
    """
    out = []
    for k in range(directions.shape[1]):
        moved = directions[:, k].to(gradient.dtype)
        stretch = moved.index_select(0, batch.neighbors) - moved.index_select(0, batch.centers)
        (change,) = torch.autograd.grad(
            gradient, vectors, stretch, create_graph=create_graph, retain_graph=True, materialize_grads=True
        )
        out.append(-on_atoms(batch, change))
    return torch.stack(out, dim=1)


def by_derivative(model: NodeEnergy, batch: GraphBatch, directions: Tensor) -> Tensor:
    """Hessian products (N, K, 3) by differentiating the forces."""
    vectors, _, gradient = edge_gradient(model, batch, create_graph=True)
    return products_from(batch, vectors, gradient, directions).detach()


def by_differences(model: NodeEnergy, batch: GraphBatch, directions: Tensor, step: float = STEP) -> Tensor:
    """Hessian products (N, K, 3) by central differences of the forces, in float64.

    ``model`` must compute in float64.  Edges stay those of the batch: what enters the cutoff within ``step``
    has no energy yet.
    """
    batch = batch.to(dtype=torch.float64)
    out = []
    for k in range(directions.shape[1]):
        moved = step * directions[:, k].double()
        stretch = moved[batch.neighbors] - moved[batch.centers]
        ends = [replace(batch, vectors=batch.vectors + sign * stretch) for sign in (1, -1)]
        plus, minus = (on_atoms(b, edge_gradient(model, b)[2]) for b in ends)
        out.append((minus - plus) / (2 * step))
    return torch.stack(out, dim=1)


def best_method(model: nn.Module, atoms: Atoms) -> Products:
    """Choose how to compute a model's Hessian products, by comparing both ways on a structure.

    The derivative costs about three force evaluations per direction and has no step; central differences
    serve models whose forces have no derivative, or a wrong one.

    Raises
    ------
    InputError
        If neither gives finite numbers.
    """
    spec, dtype, device = model_spec(model), model_dtype(model), model_device(model)
    precise = model if dtype == torch.float64 else exact_copy(model).to(device)
    graph = build_graph(atoms, spec, dtype).to(device)
    directions = torch.as_tensor(random_directions(len(atoms), 1, [0]), device=device)
    expected = by_differences(precise, graph, directions)
    if not bool(expected.isfinite().all()):
        raise InputError("the model's forces are not finite near its structures: it has no Hessian to label.")
    try:
        found = by_derivative(model, graph, directions).double()
    except RuntimeError:  # an operator that can be differentiated only once
        return lambda batch, d: by_differences(precise, batch, d)
    if float((found - expected).norm()) <= AGREEMENT * max(float(expected.norm()), AGREEMENT):
        return lambda batch, d: by_derivative(model, batch, d)
    return lambda batch, d: by_differences(precise, batch, d)
