"""Second-order importance: how much squared errors of energies and forces grow when a channel is cut.

A gate g multiplies each channel; cutting it is g = 0.  The squared error against the uncut model is zero
at g = 1, so its Hessian there is exactly J^T J, with J the derivatives of energies or forces with respect to
the gates, and its diagonal says what cutting one channel costs to second order (Optimal Brain Damage, LeCun
et al. 1990).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compactmlip.compress.tapped import Scores, structure_of, sums, taylor_products
from compactmlip.data.graph import GraphBatch

PROBES = 2
"""Random vectors per structure; their noise falls with the number of structures as well."""


def energy_curvature(model: nn.Module, batch: GraphBatch) -> Scores:
    """Sum over structures of (dE/dg)^2, eV^2, for each channel."""
    scores = {}
    for name, product in taylor_products(model, batch).items():
        slopes = sums(product, structure_of(name, batch), len(batch.num_atoms))
        scores[name] = slopes.square().sum(dim=0).cpu().numpy()
    return scores


def force_curvature(signs: torch.Generator, model: nn.Module, batch: GraphBatch) -> Scores:
    """Sum over structures of the mean over force components of (dF/dg)^2, (eV/Angstrom)^2.

    Rows of J are not formed: for a vector v of random signs, the mean of (d(v.F)/dg)^2 is the sum over
    components of (dF/dg)^2 (Hutchinson's estimate), and d(v.F)/dg is a product of v with second derivatives
    of the energy.
    """
    gates: dict[str, Tensor] = {}

    def gated(space: str, order: int, x: Tensor) -> Tensor:
        name = f"{space}/{order}"
        gates[name] = x.new_ones(len(batch.num_atoms), x.shape[-1]).requires_grad_()
        gate = gates[name].index_select(0, structure_of(name, batch))
        return x * (gate.unsqueeze(1) if x.dim() == 3 else gate)

    with torch.enable_grad():
        vectors = batch.vectors.detach().requires_grad_()
        energies = model(batch.species, batch.centers, batch.neighbors, vectors, tap=gated)
        (pulls,) = torch.autograd.grad(energies.sum(), vectors, create_graph=True)
        totals = {name: torch.zeros_like(gate, dtype=torch.float64) for name, gate in gates.items()}
        for probe in range(PROBES):
            v = torch.randint(0, 2, (len(batch.species), 3), generator=signs).to(vectors) * 2 - 1
            # The force on an atom is the sum of the pulls of its edges, minus that of edges that end on it.
            along = ((v[batch.centers] - v[batch.neighbors]) * pulls).sum()
            found = torch.autograd.grad(
                along, list(gates.values()), retain_graph=probe + 1 < PROBES, allow_unused=True
            )
            for name, slope in zip(gates, found, strict=True):
                if slope is not None:
                    totals[name] += slope.double().square() / PROBES
    components = 3 * batch.num_atoms.unsqueeze(1)
    return {name: (total / components).sum(dim=0).cpu().numpy() for name, total in totals.items()}
